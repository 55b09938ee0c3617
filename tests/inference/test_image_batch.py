"""Images that join and leave a running batch: each is what it is alone, and what fails changes nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from spar.common.errors import InputError
from spar.flow.sampler import FlowSampler
from spar.inference.flow_sampling import FlowSampling
from spar.inference.image_batch import ImageBatch
from spar.inference.pipeline import SparPipeline

CIRCLE = "a red circle"
LONG = "a large red circle to the left of a small blue star and a small green ring above a large white cross"
LAYOUT = "a large red circle on column two row three on a navy background"
INSTRUCTION = "change the background to navy"
SIDE = (64, 64)


@pytest.fixture(scope="module")
def pipe() -> SparPipeline:
    return SparPipeline.from_pretrained(dtype=torch.float32, device="cpu", progress=False)


def gap(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def join(pipe: SparPipeline, batch: ImageBatch, *prompts: str, seed: int = 3, steps: int = 4, **more) -> None:
    """By the model's own scale of guidance in a batch that has any, if `scales` says no other."""
    scales = more.pop("scales", None)
    seeds, own = list(range(seed, seed + len(prompts))), pipe.default_guidance if batch.guided else 1.0
    many = {"num_inference_steps": [steps] * len(prompts), "guidance_scale": scales or [own] * len(prompts)}
    pipe.join(batch, prompts, seed=seeds, **many, **more)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_prompts_layouts_and_edits_share_steps_and_each_is_its_own(pipe, guidance):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    batch, made = pipe.open_batch(SIDE, guidance != 1), {}
    join(pipe, batch, CIRCLE, layout=False)
    names = ["plain"]
    for step in range(12):
        pipe.step(batch)
        if step == 0:
            join(pipe, batch, INSTRUCTION, image=[picture], steps=3)
            names.append("edit")
        if step == 1:
            join(pipe, batch, LONG, layout=False, steps=2)
            join(pipe, batch, CIRCLE, layout=LAYOUT, seed=5, steps=6)
            names += ["long", "layout"]
        done = batch.finished
        if done:
            made |= dict(zip([names[row] for row in done], pipe.finish(batch, done).images, strict=True))
            names = [name for row, name in enumerate(names) if row not in done]
        if not len(batch):
            break
    settings = {"guidance_scale": guidance, "seed": 3}
    own = {
        "plain": pipe.generate(CIRCLE, layout=False, num_inference_steps=4, **settings),
        "edit": pipe.edit(picture, INSTRUCTION, num_inference_steps=3, **settings),
        "long": pipe.generate(LONG, layout=False, num_inference_steps=2, **settings),
        "layout": pipe.generate(CIRCLE, layout=LAYOUT, num_inference_steps=6, guidance_scale=guidance, seed=5),
    }
    assert step == 7 and made.keys() == own.keys()
    for name, out in own.items():
        assert gap(made[name], out.images[0]) <= 1, name


def test_images_of_different_guidance_share_steps_and_each_has_its_own(pipe):
    batch, scales = pipe.open_batch(SIDE, True), [2.0, 4.3, 0.0]
    join(pipe, batch, CIRCLE, layout=False, scales=scales[:1])
    pipe.step(batch)
    join(pipe, batch, CIRCLE, LONG, steps=3, scales=scales[1:], layout=False, seed=7)
    for _ in range(3):
        pipe.step(batch)
    out = pipe.finish(batch, [0, 1, 2])
    asked = [(CIRCLE, 4, 3), (CIRCLE, 3, 7), (LONG, 3, 8)]
    for number, (prompt, steps, seed) in enumerate(asked):
        shared = {"num_inference_steps": steps, "seed": seed, "layout": False}
        own = pipe.generate(prompt, guidance_scale=scales[number], **shared)
        assert gap(out.images[number], own.images[0]) <= 1 and out.metadata[number] == own.metadata[0]
        assert gap(out.images[number], pipe.generate(prompt, guidance_scale=9.0, **shared).images[0]) > 4
    for wrong, guided in ((1.0, True), (4.5, False)):
        with pytest.raises(ValueError, match=f"expected guidance .* 1, got {wrong}"):
            join(pipe, pipe.open_batch(SIDE, guided), CIRCLE, scales=[wrong])
    with pytest.raises(InputError, match="guidance_scale: expected"):
        join(pipe, batch, CIRCLE, scales=[-1.0])


def test_the_output_of_those_that_leave_is_that_of_a_call(pipe):
    batch = pipe.open_batch(SIDE, True)
    join(pipe, batch, CIRCLE, LONG, steps=2, negative_prompt=["a star", "a ring"], layout=False)
    pipe.step(batch)
    pipe.step(batch)
    out = pipe.finish(batch, [1, 0])
    own = pipe.generate(
        [CIRCLE, LONG], num_inference_steps=2, negative_prompt=["a star", "a ring"], layout=False, seed=3
    )
    assert out.metadata[::-1] == own.metadata and out.seeds == [4, 3] and own.metadata[0]["no_layout"]
    for one, other in zip(out.routing[::-1], own.routing, strict=True):
        assert one.tokens == other.tokens and one.kinds == other.kinds and np.array_equal(one.weights, other.weights)
    assert [gap(a, b) for a, b in zip(out.images[::-1], own.images, strict=True)] == [0, 0]


def test_a_condition_is_no_longer_than_that_of_its_longest_image(pipe):
    batch = pipe.open_batch(SIDE, True)
    join(pipe, batch, CIRCLE, layout=False)
    short = batch._condition
    join(pipe, batch, LONG, layout=False)
    assert batch._condition.mask.shape[1] > short.mask.shape[1]
    batch.leave([1])
    now = batch._condition
    assert torch.equal(now.mask, short.mask) and torch.equal(now.states, short.states)
    for one, other in zip(now.key_values, short.key_values, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    batch.leave([0])
    assert len(batch) == 0 and batch._condition is None


def test_an_interval_of_guidance_is_that_of_each_images_own_time(pipe):
    flow, sampler = FlowSampling(guidance_interval=(0.6, 1)), FlowSampler(shift=pipe.bundle.sampling.shift)
    batch, made = ImageBatch(SIDE, True, flow, sampler), []
    join(pipe, batch, CIRCLE, layout=False)
    pipe.step(batch)
    pipe.step(batch)
    join(pipe, batch, CIRCLE, layout=False, seed=4)
    while len(batch):
        pipe.step(batch)
        if done := batch.finished:
            made += pipe.finish(batch, done).images
    own = pipe.generate(
        CIRCLE, layout=False, num_inference_steps=4, guidance_interval=(0.6, 1), seed=3, num_images_per_prompt=2
    )
    assert [gap(a, b) <= 1 for a, b in zip(made, own.images, strict=True)] == [True, True]


def test_who_measures_joining_and_a_step_measures_all_of_the_devices_work(pipe, monkeypatch):
    batch, waited = pipe.open_batch(SIDE, True), list[tuple[int, list[int]]]()
    monkeypatch.setattr(type(pipe), "_wait", lambda _: waited.append((len(batch), [*batch.sampler.done])))
    join(pipe, batch, CIRCLE, layout=False)
    pipe.step(batch)
    assert waited == [(0, []), (1, [1])]  # prepared, not yet in the batch


def test_what_fails_leaves_the_batch_as_it_was(pipe, monkeypatch):
    batch, picture = pipe.open_batch(SIDE, True), Image.new("RGB", (128, 64))
    join(pipe, batch, CIRCLE, steps=1)
    for more, message in (
        ({"steps": 0}, "num_inference_steps: expected 1 to 1000, got 0"),
        ({"seed": -1}, "seed: expected"),
        ({"layout": "an elephant"}, "unknown words elephant"),
        ({"negative_prompt": ["an elephant"]}, "unknown words elephant"),
    ):
        with pytest.raises(InputError, match=message):
            join(pipe, batch, CIRCLE, **more)
    with pytest.raises(ValueError, match=r"expected images of \(64, 64\), got"):
        join(pipe, batch, INSTRUCTION, image=[picture])
    with pytest.raises(ValueError, match="expected images in the batch, got none|expected samples"):
        pipe.step(pipe.open_batch(SIDE, False))
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "_wait", lambda _: (_ for _ in ()).throw(RuntimeError("late")))
        with pytest.raises(RuntimeError, match="late"):  # as a device says it, after the call that was at fault
            join(pipe, batch, CIRCLE, seed=4)
    assert len(batch) == len(batch.sampler) == 1
    pipe.step(batch)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.model), "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            pipe.finish(batch, [0])
    assert len(batch) == 1 and batch.finished == [0]
    assert gap(pipe.finish(batch, [0]).images[0], pipe.generate(CIRCLE, num_inference_steps=1, seed=3).images[0]) == 0
