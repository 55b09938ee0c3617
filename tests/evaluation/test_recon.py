"""Reconstruction of image folders: measures against closed forms and other libraries, the command on a tiny model."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from scipy.ndimage import uniform_filter
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import ViTConfig, ViTModel

from spar.cli.main import main
from spar.common.errors import InputError
from spar.evaluation import recon as module
from spar.evaluation.compare import compare
from spar.evaluation.features import Described, EncoderFeatures, InceptionFeatures, load_features
from spar.evaluation.frechet import (
    ClassSums,
    FeatureSums,
    distance_of_sums,
    frechet_distance,
    inception_score,
    jackknife_score,
)
from spar.evaluation.inception import Inception, resize
from spar.evaluation.options import EvalOptions
from spar.evaluation.pixel_metrics import psnr, ssim_inside
from spar.evaluation.recon import check_pairs, images_below, recon
from spar.evaluation.results import read_result
from spar.processing.images import to_square

RNG = np.random.default_rng(0)


# ---- SSIM ------------------------------------------------------------------------------------------------------------


def noisy(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    a = np.stack([uniform_filter(RNG.uniform(0, 255, shape[1:]), (5, 5, 1)) for _ in range(shape[0])]).astype(np.uint8)
    return a, np.clip(a + RNG.normal(0, 12, shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_the_formula_over_windows_inside_with_the_sample_covariance(data_range):
    a, b = noisy((2, 20, 24, 3))
    x, y = (np.lib.stride_tricks.sliding_window_view(one / 255, (7, 7), (1, 2)) for one in (a, b))
    mx, my = x.mean((-1, -2)), y.mean((-1, -2))
    vx, vy = (one.reshape(*one.shape[:4], 49).var(-1, ddof=1) for one in (x, y))
    cov = ((x - mx[..., None, None]) * (y - my[..., None, None])).sum((-1, -2)) / 48
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim_inside(a, b, [data_range])[0] == pytest.approx(value.mean((1, 2, 3)))


def test_ssim_is_scikit_images():
    """The values are scikit-image's (0.26, `structural_similarity(..., channel_axis=-1)`) on these images in [0, 1]."""
    rng = np.random.default_rng(5)
    a = rng.integers(0, 256, (12, 17, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-30, 31, a.shape), 0, 255).astype(np.uint8)
    theirs = [0.9702426679622088, 0.9707639150533524]
    assert ssim_inside(a[None], b[None], [1.0, 2.0])[:, 0] == pytest.approx(theirs, rel=1e-12)


def test_the_doubled_range_flatters_and_a_small_image_is_refused():
    a, b = noisy((1, 32, 32, 3))
    assert ssim_inside(a, a).item() == pytest.approx(1.0)
    once, doubled = ssim_inside(a, b, (1.0, 2.0))[:, 0]
    assert 0 < once < doubled < 1
    with pytest.raises(ValueError, match="at least 7 x 7"):
        ssim_inside(a[:, :6], b[:, :6])


# ---- distances -------------------------------------------------------------------------------------------------------


def test_the_distance_of_sums_is_scipys_formula_however_the_images_are_split():
    a, b = RNG.normal(size=(60, 8)), RNG.normal(0.3, 1.4, size=(50, 8))
    means = a.mean(0) - b.mean(0)
    covs = [np.cov(x.T) for x in (a, b)]
    expected = means @ means + np.trace(covs[0] + covs[1] - 2 * sqrtm(covs[0] @ covs[1]).real)
    parts = FeatureSums.of(a[:7]) + FeatureSums.of(a[7:40]) + FeatureSums.of(a[40:])
    assert parts.count == 60
    assert distance_of_sums(parts, FeatureSums.of(b)) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


class Rows(torch.nn.Module):
    """An image's pixels are its features."""

    def forward(self, images):
        return images.flatten(1)


def test_the_distance_of_published_fids_is_torchmetrics():
    """With unbiased covariances; that of Shapes-Recon divides by N."""
    a, b = RNG.normal(size=(60, 3, 2, 2)), RNG.normal(0.3, 1.4, size=(50, 3, 2, 2))
    theirs = FrechetInceptionDistance(Rows(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(a), real=True)
    theirs.update(torch.from_numpy(b), real=False)
    sums = [FeatureSums.of(one.reshape(len(one), 12)) for one in (a, b)]
    assert distance_of_sums(*sums) == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_psnr_is_torchmetrics():
    a, b = noisy((3, 16, 20, 3))
    for one, other in zip(a, b, strict=True):
        theirs = peak_signal_noise_ratio(torch.from_numpy(one).double(), torch.from_numpy(other).double(), 255.0)
        assert psnr(one, other) == pytest.approx(float(theirs), rel=1e-6)


def test_the_inception_score_counts_evenly_used_classes():
    def score(classes):
        return inception_score(ClassSums.of(1000.0 * np.eye(8)[classes]))

    assert score([0, 1, 2, 3]) == pytest.approx(4.0)
    assert score([5, 5, 5]) == pytest.approx(1.0)
    assert inception_score(ClassSums.of(np.zeros((6, 8)))) == pytest.approx(1.0)  # it cannot tell them apart
    together = ClassSums.of(1000.0 * np.eye(8)[[0, 1]]) + ClassSums.of(1000.0 * np.eye(8)[[2, 3]])
    assert inception_score(together) == pytest.approx(4.0)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).normal(3.0, 1.0, 10)
    score = jackknife_score("mean", lambda one: one.mean(), [(Group([value]),) for value in values], 10)
    half = 2.262157 * values.std(ddof=1) / 10**0.5  # Student's, 9 degrees of freedom
    found = score.value, score.low, score.high
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))


class Group:
    """Values that know their mean, and are joined by +."""

    def __init__(self, values):
        self.values = values

    def __add__(self, other):
        return Group([*self.values, *other.values])

    def mean(self):
        return float(np.mean(self.values))


# ---- the network -----------------------------------------------------------------------------------------------------


@cache
def planted() -> dict[str, torch.Tensor]:
    """Weights that a seed gives, in the order of the network's own."""
    rng = np.random.default_rng(0)
    out = {}
    with torch.device("meta"):
        state = Inception().state_dict()
    for key, value in state.items():
        if "num_batches" in key:
            continue
        draw = rng.standard_normal(tuple(value.shape))
        if key.endswith("conv.weight"):
            draw *= (2 / np.prod(value.shape[1:])) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            draw = 1 + 0.1 * draw.clip(-3, 3)
        else:
            draw *= 0.1
        out[key] = torch.from_numpy(draw).float()
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(planted(), path, _use_new_zipfile_serialization=False)  # as the published file is written
    return path


def test_inception_gives_what_torch_fidelitys_gives_on_the_same_weights(weights):
    """The values are torch-fidelity's (0.4, float64), with these weights and images."""
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 40), dtype=np.uint8)
    features, logits = Inception.load(weights)(torch.from_numpy(images))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and features.dtype == torch.float64
    assert features[:, 2047].tolist() == pytest.approx([1.6361769, 1.6694403], rel=1e-5)
    assert features[:, 0].tolist() == pytest.approx([0.0056231022, 0.0039795209], rel=1e-4)
    assert features.mean().item() == pytest.approx(0.4705952, rel=1e-5)
    assert logits[:, [0, 1007]].flatten().tolist() == pytest.approx(
        [6.9513941, -1.5191971, 6.9752598, -1.6316700], rel=1e-5
    )


def test_images_are_resized_from_corner_to_corner_as_tensorflow_1_did():
    ramp = torch.arange(10, dtype=torch.float64).expand(1, 1, 10, 10)
    out = resize(ramp, 30)
    expected = torch.minimum(torch.arange(30, dtype=torch.float64) / 3, torch.tensor(9.0))
    assert torch.allclose(out[0, 0, 4], expected, atol=1e-6)
    assert torch.equal(resize(ramp, 10), ramp)


def test_the_file_of_weights_may_be_safetensors_and_another_network_is_refused(weights, tmp_path):
    save_file(planted(), tmp_path / "inception.safetensors")
    features = load_features(tmp_path / "inception.safetensors")
    images = RNG.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    own = features(images)
    assert np.array_equal(own.values, InceptionFeatures(weights)(images).values)
    assert own.logits is not None and "inception.safetensors, sha256" in features.name
    wrong = {**planted(), "fc.weight": torch.zeros(1000, 2048)}  # torchvision's
    save_file(wrong, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"Inception's fc.weight of shape \(1008, 2048\), got \(1000, 2048\)"):
        load_features(tmp_path / "other.safetensors")
    del wrong["Mixed_7c.branch1x1.conv.weight"]
    save_file({**wrong, "fc.weight": planted()["fc.weight"]}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"Mixed_7c.branch1x1.conv.weight of shape .*, got None"):
        load_features(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="found nothing at"):
        load_features(tmp_path / "missing.pth")


# ---- the benchmark ---------------------------------------------------------------------------------------------------


class Darker:
    """Gives every image back a level darker in all channels."""

    image_size, device = 32, "cpu"

    def __init__(self, step=1):
        self.step, self.calls = step, []

    def reconstruct(self, image):
        self.calls.append(len(image))
        self.images = [Image.fromarray(np.asarray(one) - np.uint8(self.step)) for one in image]
        return self


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for index in range(6):
            pixels = RNG.integers(100, 140, (40 + index, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    (root / ".cache").mkdir()
    return root


class Brightness:
    """One feature: the mean value of an image."""

    name = "brightness"

    def __call__(self, images):
        return Described(images.mean((1, 2, 3))[:, None])


def test_images_are_compared_as_they_were_cropped(folder, tmp_path):
    pipe = Darker(step=2)
    result = recon(pipe, folder, EvalOptions(batch=5), features=Brightness(), pairs=tmp_path / "pairs")
    assert result.settings["images"] == 12
    assert result.settings["distance_interval"] == "95 % jackknife, 10 groups of images"
    assert pipe.calls == [5, 5, 2]
    assert result.score("psnr").value == pytest.approx(20 * np.log10(255 / 2)) and result.score("psnr").n == 12
    assert 0.99 < result.score("ssim").value < result.score("ssim_range_2").value < 1
    assert result.score("frechet").value == pytest.approx(4.0)  # the mean is 2 lower, the variance the same
    assert result.score("frechet").low == pytest.approx(4.0) == result.score("frechet").high
    assert result.details["images"][6]["image"] == "dogs/0.png" and result.settings["features"] == "brightness"
    before, after = (np.asarray(Image.open(tmp_path / "pairs" / name / "00011.png")) for name in ("gt", "recon"))
    assert before.shape == (32, 32, 3) and (before - after == 2).all()
    again = recon(Darker(step=2), folder, EvalOptions(batch=12), features=Brightness())
    assert again.score("frechet").value == pytest.approx(result.score("frechet").value)
    assert recon(Darker(0), folder, EvalOptions(limit=4)).score("psnr").value == 100.0


class Classifier:
    """As `InceptionFeatures`, of three features and two classes."""

    name = "classifier"

    def __call__(self, images):
        values = images.mean((1, 2)).astype(np.float64)
        return Described(values, np.stack([values[:, 0], 240 - values[:, 0]], 1) / 2)


def test_a_classifier_gives_rfid_and_the_inception_score(folder):
    result = recon(Darker(), folder, features=Classifier())
    assert [score.name for score in result.scores] == ["psnr", "ssim", "ssim_range_2", "rfid", "inception_score"]
    assert result.score("rfid").value == pytest.approx(3.0)  # three means are 1 lower, the variances the same
    paths = images_below(folder)
    darker = np.stack([np.asarray(to_square(Image.open(path), 32)) - np.uint8(1) for path in paths])
    expected = inception_score(ClassSums.of(Classifier()(darker).logits))
    assert result.score("inception_score").value == pytest.approx(expected)


def test_an_encoder_describes_by_its_mean_patch_token(tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    network = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    network.save_pretrained(tmp_path / "vit")
    features = load_features(tmp_path / "vit")
    assert isinstance(features, EncoderFeatures) and features.name.startswith("ViTModel, weights ")
    images = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - features.encoder.mean) / features.encoder.std
    with torch.inference_mode():
        tokens = network.eval()(pixel_values=pixels).last_hidden_state[:, 1:]
    assert features(images).values == pytest.approx(tokens.mean(1).numpy(), abs=1e-5)
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="features: expected the folder of an image encoder"):
        load_features(tmp_path / "vit")


def test_images_are_taken_evenly_from_the_subfolders_that_have_some(folder):
    (folder / "annotations").mkdir()
    (folder / "annotations" / "list.txt").write_text("no image")
    assert [path.parent.name for path in images_below(folder)] == ["cats"] * 6 + ["dogs"] * 6
    chosen = [path.relative_to(folder).as_posix() for path in images_below(folder, 3)]
    assert chosen == ["cats/0.png", "cats/1.png", "dogs/0.png"]
    assert len(images_below(folder / "cats")) == 6 and len(images_below(folder / "cats", 2)) == 2
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    with pytest.raises(InputError, match=r"or in its subfolders, got both: stray.png"):
        images_below(folder)


def test_pairs_have_a_folder_of_their_own(folder, tmp_path):
    result = tmp_path / "scores.json"
    for place in (folder, folder / "pairs", tmp_path, tmp_path / "images" / ".." / "images"):
        with pytest.raises(InputError, match="pairs: expected a folder apart from the images"):
            check_pairs(place, folder, result)
    with pytest.raises(InputError, match="and from .*recon.json"):
        check_pairs(tmp_path / "other", folder, tmp_path / "other" / "recon.json")
    (tmp_path / "other").mkdir()
    check_pairs(tmp_path / "other", folder, result)
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(InputError, match="has other contents"):
        check_pairs(tmp_path / "other", folder, result, overwrite=True)


def test_features_of_many_images_are_added_up_in_parts(folder, monkeypatch):
    whole = recon(Darker(step=2), folder, EvalOptions(batch=2), features=Classifier())
    monkeypatch.setattr(module, "_FOLDED", 3)
    parts = recon(Darker(step=2), folder, EvalOptions(batch=2), features=Classifier())
    assert [score.value for score in parts.scores] == pytest.approx([score.value for score in whole.scores])
    assert [score.low for score in parts.scores] == pytest.approx([score.low for score in whole.scores])


def test_of_several_processes_one_measures(folder, tmp_path):
    pipe = Darker()
    assert recon(pipe, folder, EvalOptions(batch=5), pairs=tmp_path / "pairs", main=False) is None
    assert pipe.calls == [5, 5, 2] and not (tmp_path / "pairs").exists()


def test_two_results_are_compared_on_the_same_originals_alone(folder):
    first, second = (recon(Darker(step), folder, features=Brightness()) for step in (3, 1))
    decibels, similar = compare(first, second)
    assert (decibels.score, similar.score) == ("psnr", "ssim")
    assert decibels.value == pytest.approx(20 * np.log10(3), abs=1e-3) and similar.verdict == "higher"
    Image.new("RGB", (40, 40), "red").save(folder / "cats" / "0.png")
    with pytest.raises(InputError, match="two results of the same originals"):
        compare(first, recon(Darker(), folder, features=Brightness()))


def test_folders_without_two_images_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path / "empty", "found none"), (tmp_path / "nowhere", "expected a folder of images")):
        with pytest.raises(InputError, match=message):
            recon(Darker(), place)
    with pytest.raises(InputError, match="at least 2 images"):
        recon(Darker(), folder, EvalOptions(limit=1))
    (folder / "dogs" / "3.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"3\.png"):
        recon(Darker(), folder)


def test_the_command_scores_a_folder(tiny_run, folder, tmp_path, capsys):
    out, model = tmp_path / "scores.json", str(tiny_run.path / "model")
    asked = ["eval", "recon", "--model", model]
    assert main([*asked, "--images", str(folder), "--pairs", str(tmp_path / "pairs"), "-o", str(out)]) == 0
    assert "SSIM with range 2" in capsys.readouterr().out
    result = read_result(out)
    assert result.score("psnr").n == 12 and result.settings["size"] == 64
    assert result.settings["features"].startswith("random-convolutions-1")
    assert len(list((tmp_path / "pairs" / "recon").iterdir())) == 12
    assert json.loads((tmp_path / "pairs" / "images.json").read_text())[6] == "dogs/0.png"
    other = ["--images", str(folder), "-o", str(tmp_path / "other.json"), "--pairs", str(tmp_path / "pairs")]
    assert main([*asked, *other]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*asked, *other, "--overwrite", "--limit", "4"]) == 0
    assert len(list((tmp_path / "pairs" / "recon").iterdir())) == 4  # none of the earlier ones is left
    assert main(asked) == 2
    assert "recon: expected --images FOLDER" in capsys.readouterr().err
    assert main([*asked, "--images", str(folder), "--template", "a {}", "-o", str(tmp_path / "other.json")]) == 2
    assert "--template belongs to zero-shot, got recon" in capsys.readouterr().err
    assert main(["eval", "shapes-recon", "--model", model, "--features", str(folder)]) == 2
    assert "--features belongs to recon, got shapes-recon" in capsys.readouterr().err
