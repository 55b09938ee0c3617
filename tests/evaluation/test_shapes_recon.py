"""Shapes-Recon's measures against what they must be."""

from dataclasses import replace

import numpy as np
import pytest

from spar.evaluation.features import random_features
from spar.evaluation.frechet import frechet_distance
from spar.evaluation.options import EvalOptions
from spar.evaluation.pixel_metrics import band_psnr, psnr, ssim
from spar.evaluation.shapes_recon import recon_scenes, survivors
from spar.worlds.shapes.detector import degrade_image, detect
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Object, Scene

RNG = np.random.default_rng(0)


def test_psnr_of_a_known_error():
    a = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(a + np.uint8(5), a) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(a - np.uint8(5), a) == psnr(a + np.uint8(5), a)
    assert psnr(a, a) == 100.0


def test_the_errors_of_the_bands_add_up_and_each_wave_is_in_its_own():
    a, b = (RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    assert -10 * np.log10(sum(10 ** (-value / 10) for value in band_psnr(a, b))) == pytest.approx(psnr(a, b))
    flat = np.full((64, 64, 3), 128, np.uint8)
    for band, period in enumerate((32, 8, 2)):
        rows = np.rint(128 + 16 * np.cos(2 * np.pi * np.arange(64) / period))
        wave = np.broadcast_to(rows[:, None, None], flat.shape).astype(np.uint8)
        values = band_psnr(wave, flat)
        assert int(np.argmin(values)) == band and values[band] == pytest.approx(psnr(wave, flat), abs=0.1)
    assert band_psnr(a, a) == [100.0] * 3


def test_ssim_is_the_formula_over_uniform_windows():
    a = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    b = np.clip(a + RNG.normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    padded = [np.pad(x / 255, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect") for x in (a, b)]
    x, y = (np.lib.stride_tricks.sliding_window_view(one, (7, 7), (1, 2)) for one in padded)
    mx, my = x.mean((-1, -2)), y.mean((-1, -2))
    vx, vy = x.var((-1, -2)), y.var((-1, -2))
    cov = (x * y).mean((-1, -2)) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(value.mean((1, 2, 3)))
    assert ssim(a, a) == pytest.approx(1.0)


def test_frechet_distance_of_known_gaussians():
    x = RNG.normal(size=(4000, 5))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, ddof=0))).T  # mean 0, covariance 1
    shift, scale = np.array([1.0, -2.0, 0, 0, 0]), np.array([2.0, 1, 1, 0.5, 3])
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected)
    assert frechet_distance(x * scale + shift, x) == pytest.approx(expected)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(x[:3], x[:3]) == pytest.approx(0.0, abs=1e-6)


def test_the_distance_grows_with_damage_and_the_features_are_fixed():
    images = np.stack([render(scene) for scene in recon_scenes(EvalOptions(limit=40))])
    original = random_features(images)
    assert original.shape == (40, 96)
    distances = []
    for noise in (2.0, 8.0, 32.0):
        damaged = np.stack([degrade_image(image, RNG, blur=0.3, noise=noise) for image in images])
        distances.append(frechet_distance(original, random_features(damaged)))
    assert 0 < distances[0] < distances[1] < distances[2]
    assert np.array_equal(original, random_features(images))


def test_survivors_are_counted_by_look_and_place():
    ring, star = Object("ring", "red", "large", 18.0, 18.0), Object("star", "blue", "small", 46.0, 44.0)
    scene = Scene("gray", (ring, star), "two")

    def found(*objects, background="gray"):
        return survivors(detect(render(Scene(background, objects, "multi"))), scene)

    assert found(ring, star) == (2, True)
    assert found(ring, star, background="black") == (2, False)
    assert found(ring, star, Object("star", "blue", "small", 46.0, 12.0)) == (2, False)
    assert found(ring) == (1, False)
    assert found(ring, replace(star, x=48.9)) == (1, False)
    assert found(ring, replace(star, color="purple")) == (1, False)
    assert found(ring, replace(star, x=47.2)) == (2, True)


def test_one_thing_seen_survives_for_one_object_only():
    twins = (Object("ring", "red", "small", 18.0, 18.0), Object("ring", "red", "small", 46.0, 18.0))
    assert survivors(detect(render(Scene("gray", twins[:1], "single"))), Scene("gray", twins, "count")) == (1, False)


def test_the_scenes_are_five_hundred_and_always_the_same():
    scenes = recon_scenes(EvalOptions())
    assert len(set(scenes)) == 500
    assert recon_scenes(EvalOptions(limit=7, seed=4)) == scenes[:7]
