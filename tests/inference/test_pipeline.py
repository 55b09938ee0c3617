"""The pipeline: every argument has an effect, an image depends on its own seed alone, bad input gets a message."""

import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import spar
from spar.checkpoints.spar_format import ModelBundle, load_model
from spar.common.cpu import has_native_bfloat16
from spar.common.errors import Cancelled, InputError
from spar.common.limits import MAX_NEW_TOKENS
from spar.flow.sampler import FlowSampler
from spar.inference import layouts as layouts_module
from spar.inference import pipeline
from spar.inference.image_files import read_metadata
from spar.inference.pipeline import SparPipeline
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.processing.images import to_pil, to_square, to_tensor
from spar.processing.prompts import TokenBatch

CIRCLE, SQUARES = "a red circle", "two blue squares on a white background"
QUESTION = "what color is the background ?"
STEPS = 3
SPECIALS = 11  # the vocabulary's first tokens, template included: left small, so that answers are words


@pytest.fixture(scope="session")
def folder(tiny_run, tmp_path_factory) -> Path:
    """The tiny model, its denoiser and words made lively: nine steps leave both nearly deaf to what they are given.

    It writes no layouts unless it is told to.
    """
    loaded = load_model(tiny_run.path / "model")
    assert loaded.sampling.layout and loaded.sampling.edit_layout
    assert loaded.sampling.edit_guidance == 1.5
    own = replace(loaded.sampling, layout=False, edit_layout=False, edit_guidance=None)
    loaded = replace(loaded, sampling=own)
    generator = torch.Generator().manual_seed(0)
    network = loaded.model.denoiser.network
    for weight in (network.proj_out.weight, *(block.attn2.to_out[0].weight for block in network.transformer_blocks)):
        weight.data.normal_(std=0.4, generator=generator)
    words = loaded.text_tokenizer.vocab_size
    loaded.model.language.network.embed_tokens.weight.data[SPECIALS:words].normal_(generator=generator)
    for layer in loaded.model.language.network.layers:  # else the tied embedding repeats the last word
        layer.mlp.down_proj.weight.data.normal_(std=0.25, generator=generator)
    loaded.model.denoiser.reference_embed.weight.data.normal_(std=0.2, generator=generator)
    path = tmp_path_factory.mktemp("lively") / "model"
    SparPipeline(loaded).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pipe(folder) -> SparPipeline:
    return SparPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def generate(pipe, prompt=CIRCLE, **keywords):
    return pipe.generate(prompt, **{"num_inference_steps": STEPS, "seed": 3, **keywords})


def edit(pipe, image, instruction="remove the red circle", **keywords):
    return pipe.edit(image, instruction, **{"num_inference_steps": STEPS, "seed": 3, **keywords})


def gap(a: Image.Image, b: Image.Image) -> int:
    """The largest difference in grey levels."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# ---- every argument has an effect ------------------------------------------------------------------------------------

CHANGES = {
    "prompt": {"prompt": SQUARES},
    "negative_prompt": {"negative_prompt": SQUARES},
    "num_inference_steps": {"num_inference_steps": STEPS + 1},
    "guidance_scale": {"guidance_scale": 2.0},
    "seed": {"seed": 4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_argument_changes_the_image(pipe, name):
    (plain,), (again,) = generate(pipe).images, generate(pipe).images
    assert gap(plain, again) == 0
    assert gap(plain, generate(pipe, **CHANGES[name]).images[0]) > 4


@pytest.mark.parametrize("name", ["instruction", "negative_prompt", "num_inference_steps", "guidance_scale", "seed"])
def test_the_argument_changes_the_edited_image(pipe, pictures, name):
    change = {"instruction": "make the red circle blue"} if name == "instruction" else CHANGES[name]
    (plain,) = edit(pipe, pictures[0]).images
    assert gap(plain, edit(pipe, pictures[0]).images[0]) == 0
    assert gap(plain, edit(pipe, pictures[0], **change).images[0]) > 4


def test_the_image_changes_what_is_made_of_it(pipe, pictures):
    a, b = edit(pipe, pictures[:2], seed=[3, 3]).images
    assert gap(a, b) > 4
    a, b = pipe.reconstruct(pictures[:2]).images
    assert gap(a, b) > 4


@pytest.mark.parametrize(("height", "width"), [(32, None), (None, 32), (32, 128), (128, 64)])
def test_height_and_width_are_the_images(pipe, height, width):
    (image,) = generate(pipe, height=height, width=width).images
    assert image.size == (width or 64, height or 64)
    assert np.asarray(image).std() > 0


def test_num_images_per_prompt_makes_so_many_different_ones(pipe):
    out = generate(pipe, num_images_per_prompt=3)
    assert len(out.images) == len(out.seeds) == len(out.routing) == 3
    assert min(gap(out.images[i], out.images[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 4


def test_defaults_are_the_models_own(folder, pipe):
    loaded = load_model(folder)
    own = SparPipeline(
        ModelBundle(loaded.model, loaded.text_tokenizer, replace(loaded.sampling, steps=2, guidance=1.5))
    )
    (image,) = own.generate(CIRCLE, seed=3).images
    assert gap(image, generate(pipe, num_inference_steps=2, guidance_scale=1.5).images[0]) == 0


def test_the_sampler_of_a_call_is_as_the_models_own(folder, pipe, pictures):
    """And in the metadata, from which `spar info` writes the command; without it, what was there before."""
    loaded = load_model(folder)
    own = SparPipeline(
        ModelBundle(loaded.model, loaded.text_tokenizer, replace(loaded.sampling, method="euler"))
    )
    asked, default = generate(pipe, sampler="euler"), generate(own)
    assert gap(asked.images[0], default.images[0]) == 0 < gap(asked.images[0], generate(pipe).images[0])
    assert asked.metadata[0]["sampler"] == "euler" and "sampler" not in default.metadata[0]
    assert gap(edit(pipe, pictures[0], sampler="euler").images[0], edit(pipe, pictures[0]).images[0]) > 0


def counted(pipe, monkeypatch):
    """The rows of every call of the denoiser, and its calls of all blocks but the first."""
    rows, blocks = [], []
    real, last = pipe.model.denoiser.forward, pipe.model.denoiser.network.transformer_blocks[-1]
    monkeypatch.setattr(pipe.model.denoiser, "forward", lambda x, *rest: rows.append(len(x)) or real(x, *rest))
    own = type(last).forward
    monkeypatch.setattr(last, "forward", lambda x, *rest: blocks.append(len(x)) or own(last, x, *rest))
    return rows, blocks


def test_guidance_within_an_interval_computes_one_branch_outside(pipe, pictures, monkeypatch):
    exact = generate(pipe)
    rows, _ = counted(pipe, monkeypatch)
    whole = generate(pipe, guidance_interval=(0, 1))
    assert gap(whole.images[0], exact.images[0]) == 0 and set(rows) == {2}
    assert whole.metadata[0]["guidance_interval"] == "0.0:1.0" and "guidance_interval" not in exact.metadata[0]
    rows.clear()
    none = generate(pipe, guidance_interval=(0, 0))
    assert set(rows) == {1} and gap(none.images[0], generate(pipe, guidance_scale=1).images[0]) <= 1
    rows.clear()
    part = generate(pipe, guidance_interval=(0.95, 1))
    assert set(rows) == {1, 2} and sorted(rows, reverse=True) == rows  # it ends on the way
    assert gap(part.images[0], exact.images[0]) > 0
    assert gap(edit(pipe, pictures[0], guidance_interval=(0, 0)).images[0], edit(pipe, pictures[0]).images[0]) > 0


def test_step_caching_is_exact_at_nothing_and_saves_blocks_above(pipe, monkeypatch):
    exact = generate(pipe)
    rows, blocks = counted(pipe, monkeypatch)
    same = generate(pipe, step_cache=1e-9)
    assert gap(same.images[0], exact.images[0]) <= 1 and blocks == rows
    blocks.clear()
    rows.clear()
    saved = generate(pipe, step_cache=1.0)
    assert 0 < sum(blocks) < sum(rows) and saved.metadata[0]["step_cache"] == 1.0
    assert "step_cache" not in exact.metadata[0]


def test_step_caching_suits_batches_edits_and_bfloat16(folder, pictures):
    half = SparPipeline.from_pretrained(folder, dtype=torch.bfloat16, device="cpu", progress=False)
    for one in (half, SparPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu", progress=False)):
        several = generate(one, [CIRCLE, SQUARES], num_images_per_prompt=2, step_cache=1e-9, guidance_interval=(0.9, 1))
        plain = generate(one, [CIRCLE, SQUARES], num_images_per_prompt=2, guidance_interval=(0.9, 1))
        assert max(gap(a, b) for a, b in zip(several.images, plain.images, strict=True)) <= 21  # as of batches
        edited = edit(one, pictures[0], step_cache=0.5)
        assert edited.images[0].size == (64, 64) and edited.metadata[0]["step_cache"] == 0.5


@pytest.mark.parametrize("change", [{"shift": 1.0}, {"method": "euler"}])
def test_the_models_shift_and_method_count(folder, pipe, change):
    loaded = load_model(folder)
    other = SparPipeline(ModelBundle(loaded.model, loaded.text_tokenizer, replace(loaded.sampling, **change)))
    assert gap(generate(other).images[0], generate(pipe).images[0]) > 1


def test_max_new_tokens_bounds_the_answer(pipe, pictures):
    lengths = [len(pipe.understand(pictures[2], QUESTION, max_new_tokens=n).texts[0].split()) for n in (1, 2, 6)]
    assert lengths[0] <= 1 and lengths[1] <= 2 and lengths == sorted(lengths) and lengths[2] > lengths[0]
    long, short = (pipe.understand(pictures[2], QUESTION, max_new_tokens=n).texts[0] for n in (6, 2))
    assert long.startswith(short)


def test_the_answer_reads_image_and_question(folder, pictures, monkeypatch):
    pipe, seen = SparPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu"), []
    answer = pipe.model.language.generate
    monkeypatch.setattr(
        pipe.model.language, "generate", lambda embedded, *a, **k: seen.append(embedded) or answer(embedded, *a, **k)
    )
    for image, question in ((0, QUESTION), (1, QUESTION), (0, "what shape is the background ?")):
        pipe.understand(pictures[image], question, max_new_tokens=1)
    assert seen[0].shape == seen[1].shape == seen[2].shape
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_what_products_run_in(folder, pipe, pictures, dtype):
    half, seen = SparPipeline.from_pretrained(folder, dtype=dtype, device="cpu"), []
    half.model.connector.projection.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    a, b = generate(pipe, guidance_scale=1.0).images[0], generate(half, guidance_scale=1.0).images[0]
    assert seen == [dtype]
    assert 0 < gap(a, b) and np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() < 8
    assert half.reconstruct(pictures[0]).images[0].size == (64, 64)
    assert edit(half, pictures[0]).images[0].size == (64, 64)
    assert len(half.understand(pictures[0], QUESTION, max_new_tokens=2).texts) == 1


def test_a_dtype_may_be_its_name(folder, tmp_path):
    assert SparPipeline.from_pretrained(folder, dtype="bfloat16", device="cpu").dtype is torch.bfloat16
    SparPipeline.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half/denoiser/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_the_default_dtype_is_the_hardwares(folder, monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("spar.common.device.has_native_bfloat16", lambda fast=fast: fast)
        assert SparPipeline.from_pretrained(folder, device="cpu").dtype == dtype


def test_the_callback_sees_every_step(pipe):
    calls = []
    generate(pipe, num_images_per_prompt=2, callback=lambda *a: calls.append(a))
    assert [(done, steps) for done, steps, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    assert all(latent.shape == (2, 8, 8, 8) for *_, latent in calls)
    last, drawn = pipe.preview(calls[-1][2]), generate(pipe, num_images_per_prompt=2).images
    assert all(gap(a, b) == 0 for a, b in zip(last, drawn, strict=True))


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_a_callback_that_says_false_cancels(pipe, pictures, task):
    calls = []

    def stop(done, steps, latent):
        calls.append(done)
        return done < 2

    with pytest.raises(Cancelled, match="after 2 of 3 steps"):
        generate(pipe, callback=stop) if task == "generate" else edit(pipe, pictures[0], callback=stop)
    assert calls == [1, 2]


def test_a_cancelled_call_leaves_the_pipeline_as_it_was(pipe):
    (before,) = generate(pipe).images
    with pytest.raises(spar.Cancelled):
        generate(pipe, callback=lambda *_: False)
    assert gap(before, generate(pipe).images[0]) == 0


def test_what_cannot_be_called_is_no_callback(pipe, pictures):
    for task in (generate, lambda pipe, **keywords: edit(pipe, pictures[0], **keywords)):
        with pytest.raises(InputError, match=r"callback: expected a function of .*, got 3$"):
            task(pipe, callback=3)


def test_whatever_else_a_callback_says_goes_on(pipe):
    for answer in (None, True, 0, "stop"):
        assert len(generate(pipe, callback=lambda *_, answer=answer: answer).images) == 1


class Doubles(TorchDispatchMode):
    """Notes the operations that make a tensor in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, list | tuple) else (out,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64:
                self.found.append((function, tuple(one.shape)))
        return out


def test_nothing_is_computed_in_float64_which_some_devices_have_not(pipe, pictures):
    with Doubles() as doubles:
        generate(pipe)
        edit(pipe, pictures[0])
        pipe.understand(pictures[0], QUESTION, max_new_tokens=2)
        list(pipe.chat(conversation(pictures[0]), max_new_tokens=2))
        pipe.reconstruct(pictures[0])
    allowed = torch.ops.aten.lift_fresh.default, (STEPS,)  # the schedule, read from numpy on the CPU at its first use
    assert set(doubles.found) <= {allowed}


# ---- guidance --------------------------------------------------------------------------------------------------------


def by_hand(pipe, scale: float, rows: list[TokenBatch], f_v: torch.Tensor | None = None) -> Image.Image:
    """Both branches one by one, in the sampler, from the seed's own noise."""
    model = pipe.model
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = (model.condition(row.ids, row.mask, f_v) for row in rows)

        def velocity(x, t):
            v = model.velocity(x, t, ours).velocity
            if scale == 1:
                return v
            u = model.velocity(x, t, theirs).velocity
            return u + scale * (v - u)

        sampler = FlowSampler(shift=pipe.bundle.sampling.shift, method="dpmsolver++")
        sampler.join(noise, STEPS)
        sampler.run(velocity)
        return to_pil(model.decode(sampler.latents([0])))[0]


@pytest.mark.parametrize(
    ("scale", "negative"), [(0.0, None), (1.0, None), (3.0, None), (0.0, SQUARES), (3.0, SQUARES)]
)
def test_guidance_is_its_formula_and_one_is_the_conditional_branch(pipe, scale, negative):
    (image,) = generate(pipe, guidance_scale=scale, negative_prompt=negative).images
    assert gap(image, by_hand(pipe, scale, [pipe.prompts.generation([text]) for text in (CIRCLE, negative)])) <= 1


def test_the_branches_of_an_edit_have_each_their_own_reference(pipe, pictures):
    """The states at the reference's tokens tell the instruction, which the unconditional prompt lacks."""
    words = "remove the red circle"
    with torch.no_grad():
        f_v = pipe.model.tokenizer.encoder(to_tensor(pictures[:1]))
        rows = [pipe.prompts.edit([text]) for text in (words, None)]
        ours, theirs = (pipe.model.condition(row.ids, row.mask, f_v).reference for row in rows)
    assert (ours[:, 8:] - theirs[:, 8:]).abs().max() > 1e-3 and torch.equal(ours[:, :8], theirs[:, :8])
    (image,) = edit(pipe, pictures[0], words, guidance_scale=3.0).images
    assert gap(image, by_hand(pipe, 3.0, rows, f_v)) <= 1


def test_guidance_one_never_runs_the_unconditional_branch(pipe, monkeypatch):
    sizes, velocity = [], pipe.model.velocity
    monkeypatch.setattr(pipe.model, "velocity", lambda x, *a: sizes.append(len(x)) or velocity(x, *a))
    generate(pipe, guidance_scale=1.0)
    generate(pipe, guidance_scale=1.5)
    assert sizes == [1] * STEPS + [2] * STEPS


# ---- seeds, batches, order -------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(pipe):
    texts = [CIRCLE, SQUARES, "a large green star to the left of a small yellow ring"]  # all but one are padded
    together = generate(pipe, texts, num_images_per_prompt=2, seed=[5, 6, 7, 8, 9, 5])
    for i, (text, seed) in enumerate(zip([t for t in texts for _ in "12"], together.seeds, strict=True)):
        (alone,) = generate(pipe, text, seed=seed).images
        assert gap(together.images[i], alone) <= 1
    assert gap(together.images[0], together.images[1]) > 4 and gap(together.images[0], together.images[2]) > 4


def test_seeds_that_share_their_lower_32_bits_draw_other_images(pipe):
    one, other, same = generate(pipe, [CIRCLE] * 3, seed=[7, 2**32 + 7, 7]).images
    assert gap(one, same) == 0 and gap(one, other) > 1


def test_the_callers_default_type_changes_nothing(pipe, pictures):
    def everything() -> list:
        drawn = generate(pipe, [CIRCLE, SQUARES], layout=True, seed=[5, 6], num_inference_steps=1)
        answers = pipe.understand(pictures[0], QUESTION, max_new_tokens=6, temperature=5.0, seed=3)
        images = [*drawn.images, *edit(pipe, pictures[0]).images, *pipe.reconstruct(pictures[0]).images]
        return [drawn.metadata, answers.texts, *(image.tobytes() for image in images)]

    wanted = everything()
    torch.set_default_dtype(torch.float64)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == wanted


def test_outputs_are_equal_where_all_that_they_hold_is(pipe):
    one, same, other = (generate(pipe, CIRCLE, seed=seed, num_inference_steps=1) for seed in (5, 5, 6))
    assert one == same and one != other and one.routing == same.routing and one.routing[0] != 3
    assert one.routing[0] != replace(one.routing[0], weights=one.routing[0].weights + 1)


def test_an_edit_depends_on_its_own_seed_and_not_on_its_batch(pipe, pictures):
    instructions = ["remove the red circle", "add a large blue star above the small green square"]
    together = edit(pipe, pictures[:2], instructions, num_images_per_prompt=2, seed=[5, 6, 7, 8])
    for i in range(4):
        (alone,) = edit(pipe, pictures[i // 2], instructions[i // 2], seed=[5, 6, 7, 8][i]).images
        assert gap(together.images[i], alone) <= 1


def test_an_answer_does_not_depend_on_its_batch(pipe, pictures):
    questions = [QUESTION, "describe the image", "is there a red circle to the left of the blue star ?"]
    together = pipe.understand(pictures, questions, max_new_tokens=5).texts
    alone = [pipe.understand(*pair, max_new_tokens=5).texts[0] for pair in zip(pictures, questions, strict=True)]
    assert together == alone and len(set(together)) > 1


def test_a_reconstruction_does_not_depend_on_its_batch(pipe, pictures):
    together = pipe.reconstruct(pictures).images
    assert all(gap(a, pipe.reconstruct(b).images[0]) <= 1 for a, b in zip(together, pictures, strict=True))


LAYOUT = "a small red circle on column two row three on a gray background"


def test_a_layout_takes_the_prompts_place_on_a_blank_canvas(pipe):
    given = generate(pipe, layout=LAYOUT)
    assert given.metadata[0] == {**generate(pipe).metadata[0], "layout": LAYOUT}
    rows = [pipe.prompts.layout([LAYOUT]), pipe.prompts.layout([None])]
    f_v = pipe.model.tokenizer.encoder(torch.full((1, 3, 64, 64), 0.5))
    assert gap(given.images[0], by_hand(pipe, 4.5, rows, f_v)) <= 1
    assert gap(given.images[0], generate(pipe, LAYOUT).images[0]) > 8
    assert gap(given.images[0], generate(pipe, SQUARES, layout=LAYOUT).images[0]) == 0


def test_the_models_own_layout_is_drawn_with_the_images_seed_and_makes_the_image_again(pipe, monkeypatch):
    monkeypatch.setattr(layouts_module, "LAYOUT_TEMPERATURE", 30.0)  # else this model says one word again and again
    several = pipe.generate(
        [CIRCLE, SQUARES], layout=True, num_images_per_prompt=2, seed=[11, 4, 11, 14], num_inference_steps=STEPS
    )
    layouts = [values["layout"] for values in several.metadata]
    assert {*layouts} - {CIRCLE, SQUARES}
    for number, (prompt, seed) in enumerate([(CIRCLE, 11), (CIRCLE, 4), (SQUARES, 11), (SQUARES, 14)]):
        alone = pipe.generate(prompt, layout=True, seed=seed, num_inference_steps=STEPS)
        assert alone.metadata[0]["layout"] == layouts[number]
        assert gap(alone.images[0], several.images[number]) <= 1
        again = pipe.generate(prompt, layout=layouts[number], seed=seed, num_inference_steps=STEPS)
        assert gap(again.images[0], alone.images[0]) == 0
    assert [len(one.weights) for one in several.routing] == [
        len(pipe.prompts.layout([text]).ids[0][pipe.prompts.layout([text]).mask[0].bool()]) + 4 for text in layouts
    ]


def test_layouts_are_written_without_an_image(pipe, monkeypatch):
    monkeypatch.setattr(layouts_module, "LAYOUT_TEMPERATURE", 30.0)
    drawn = pipe.generate([CIRCLE, SQUARES], layout=True, seed=[3, 9], num_inference_steps=1)
    assert pipe.write_layouts([CIRCLE, SQUARES], seed=[3, 9]) == [values["layout"] for values in drawn.metadata]
    assert pipe.write_layouts(CIRCLE, seed=3) == [drawn.metadata[0]["layout"]]
    for bad in ([], ["zebra"], 3):
        with pytest.raises(InputError, match="prompt"):
            pipe.write_layouts(bad)


def test_the_model_says_whether_it_writes_layouts(pipe, folder):
    own = SparPipeline(replace(pipe.bundle, sampling=replace(pipe.bundle.sampling, layout=True)))
    assert generate(own).metadata[0]["layout"] == generate(pipe, layout=True).metadata[0]["layout"]
    own.origin = pipe.origin
    assert generate(own, layout=False).metadata[0] == {**generate(pipe).metadata[0], "no_layout": True}
    assert "layout" not in generate(own, height=32, width=64).metadata[0]  # the LLM knows the places of a square


@pytest.mark.parametrize("words", ["", "user", "circle " * 64])
def test_a_layout_that_no_user_could_give_or_without_an_end_is_the_prompt(pipe, monkeypatch, words):
    monkeypatch.setattr(pipe.model.language, "generate", lambda *_, **__: [pipe.prompts.encode(words)])
    assert generate(pipe, layout=True).metadata[0]["layout"] == CIRCLE


def test_a_layout_is_drawn_with_numbers_that_the_noise_does_not_have(pipe, monkeypatch):
    seeds = []

    def generate_words(*_, sampling, **__):
        seeds.extend(sampling.seeds)
        return [pipe.prompts.encode(LAYOUT)] * len(sampling.seeds)

    monkeypatch.setattr(pipe.model.language, "generate", generate_words)
    assert generate(pipe, layout=True, num_images_per_prompt=2).metadata[1]["layout"] == LAYOUT
    assert len({*seeds, *range(1000)}) == 1002


EDIT_LAYOUT = "no small red circle on column two row three, a small blue star on column five row three"


def test_the_layout_of_an_edit_follows_its_instruction_before_the_reference(pipe, pictures):
    words = "move the circle"
    given = edit(pipe, pictures[0], words, layout=EDIT_LAYOUT)
    assert given.metadata[0] == {**edit(pipe, pictures[0], words).metadata[0], "layout": EDIT_LAYOUT}
    rows = [pipe.prompts.edit([text]) for text in (f"{words}\n{EDIT_LAYOUT}", None)]
    f_v = pipe.model.tokenizer.encoder(to_tensor([pictures[0]]))
    assert gap(given.images[0], by_hand(pipe, 4.5, rows, f_v)) <= 1
    assert gap(given.images[0], edit(pipe, pictures[0], words).images[0]) > 4


def test_the_models_own_layouts_of_edits_are_of_their_images_and_make_the_images_again(pipe, pictures, monkeypatch):
    monkeypatch.setattr(layouts_module, "LAYOUT_TEMPERATURE", 30.0)
    instructions, seeds = ["remove the red circle", "move the star up"], [11, 4, 11, 14]
    several = edit(pipe, pictures[:2], instructions, layout=True, num_images_per_prompt=2, seed=seeds)
    layouts = [values.get("layout") for values in several.metadata]
    assert {*layouts} - {None}
    for number, seed in enumerate(seeds):
        source, words = pictures[number // 2], instructions[number // 2]
        alone = edit(pipe, source, words, layout=True, seed=seed)
        assert alone.metadata[0].get("layout") == layouts[number]
        assert gap(alone.images[0], several.images[number]) <= 1
        again = edit(pipe, source, words, layout=layouts[number], seed=seed)
        assert gap(again.images[0], alone.images[0]) == 0


def test_layouts_of_edits_are_written_without_a_new_image(pipe, pictures, monkeypatch):
    monkeypatch.setattr(layouts_module, "LAYOUT_TEMPERATURE", 30.0)
    words, seeds = ["remove the red circle", "move the star up", "make the ring blue"], [11, 5, 14]
    drawn = edit(pipe, pictures[:3], words, layout=True, seed=seeds, num_inference_steps=1)
    wanted = [values.get("layout", "") for values in drawn.metadata]
    assert pipe.write_layouts(words, image=pictures[:3], seed=seeds) == wanted and any(wanted)
    with pytest.raises(InputError, match="layout: expected images of 64 x 64 pixels, got 88 x 48"):
        pipe.write_layouts(words[0], image=pictures[0].resize((64, 32)))


def test_the_words_of_an_edits_layout_do_not_depend_on_the_batch_in_halves(folder, pictures, monkeypatch):
    monkeypatch.setattr(layouts_module, "LAYOUT_TEMPERATURE", 30.0)
    half = SparPipeline.from_pretrained(folder, device="cpu", dtype="bfloat16", weights="dtype", progress=False)
    words, images, seeds = ["remove the red circle"] * 8, [pictures[i % 3] for i in range(8)], [*range(8)]
    together = half.write_layouts(words, image=images, seed=seeds)
    assert any(together) and together == [
        half.write_layouts(text, image=image, seed=seed)[0]
        for text, image, seed in zip(words, images, seeds, strict=True)
    ]


def test_the_model_says_whether_it_writes_layouts_of_edits(pipe, pictures):
    own = SparPipeline(replace(pipe.bundle, sampling=replace(pipe.bundle.sampling, edit_layout=True)))
    own.origin = pipe.origin
    assert edit(own, pictures[0]).metadata == edit(pipe, pictures[0], layout=True).metadata
    plain = edit(pipe, pictures[0]).metadata[0]
    assert edit(own, pictures[0], layout=False).metadata[0] == {**plain, "no_layout": True}
    assert "layout" not in edit(own, pictures[0].resize((64, 32))).metadata[0]
    assert generate(own).metadata == generate(pipe).metadata  # of generation it says another thing


def test_edits_have_a_guidance_of_their_own_where_the_model_says_so(pipe, pictures):
    own = SparPipeline(replace(pipe.bundle, sampling=replace(pipe.bundle.sampling, edit_guidance=1.5)))
    assert (own.default_guidance, own.default_edit_guidance) == (pipe.default_guidance, 1.5)
    assert pipe.default_edit_guidance == pipe.default_guidance == 4.5
    edited = edit(own, pictures[0])
    assert edited.metadata[0]["guidance"] == 1.5 and generate(own).metadata[0]["guidance"] == 4.5
    assert gap(edited.images[0], edit(pipe, pictures[0], guidance_scale=1.5).images[0]) == 0
    assert edit(own, pictures[0], guidance_scale=3.0).metadata[0]["guidance"] == 3.0
    with pytest.raises(InputError, match="edit_guidance: expected"):
        replace(pipe.bundle.sampling, edit_guidance=-1.0)


@pytest.mark.parametrize("words", ["", "user", "circle " * 64])
def test_an_edit_without_a_sound_layout_is_drawn_of_its_instruction(pipe, pictures, monkeypatch, words):
    plain = edit(pipe, pictures[0])
    monkeypatch.setattr(pipe.model.language, "generate", lambda *_, **__: [pipe.prompts.encode(words)])
    again = edit(pipe, pictures[0], layout=True)
    assert again.metadata == [{**plain.metadata[0], "no_layout": True}]
    assert gap(again.images[0], plain.images[0]) <= 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layout": "a blurple circle"}, "layout: unknown words blurple"),
        ({"layout": ""}, "layout: expected some words"),
        ({"layout": True, "height": 32}, "layout: expected images of 64 x 64 pixels, got 64 x 32"),
        ({"layout": [LAYOUT, LAYOUT]}, "layout"),
        ({"layout": 3}, "layout"),
    ],
)
def test_a_bad_layout_gets_a_message(pipe, keywords, message):
    with pytest.raises(InputError, match=message):
        generate(pipe, **keywords)


def test_one_input_and_a_list_of_one_are_alike(pipe, pictures):
    assert gap(generate(pipe).images[0], generate(pipe, [CIRCLE], seed=[3]).images[0]) == 0
    one, listed = edit(pipe, pictures[0]), edit(pipe, [pictures[0]], ["remove the red circle"])
    assert gap(one.images[0], listed.images[0]) == 0
    assert pipe.understand(pictures[0], QUESTION).texts == pipe.understand([pictures[0]], [QUESTION]).texts


def test_images_are_ordered_prompt_by_prompt(pipe):
    out = generate(pipe, [CIRCLE, SQUARES], num_images_per_prompt=2)
    assert out.seeds == [3, 4, 5, 6]
    assert ["red" in r.tokens for r in out.routing] == [True, True, False, False]
    for i, text in enumerate([CIRCLE, CIRCLE, SQUARES, SQUARES]):
        assert gap(out.images[i], generate(pipe, text, seed=3 + i).images[0]) <= 1


def test_the_returned_seeds_reproduce_the_images(pipe):
    out = generate(pipe, [CIRCLE, SQUARES], seed=None)
    again = generate(pipe, [CIRCLE, SQUARES], seed=out.seeds)
    assert again.seeds == out.seeds and [gap(a, b) for a, b in zip(out.images, again.images, strict=True)] == [0, 0]
    assert generate(pipe, seed=None, num_inference_steps=1).seeds != out.seeds[:1]


@pytest.mark.parametrize("one", ["image", "text"])
def test_one_image_or_one_text_serves_all_of_the_others(pipe, pictures, one):
    images = [pictures[0]] * 2 if one == "image" else pictures[:2]
    texts = ["remove the red circle", "add a blue star"] if one == "image" else ["remove the red circle"] * 2
    short = edit(pipe, images[0] if one == "image" else images, texts if one == "image" else texts[0])
    full = edit(pipe, images, texts)
    assert [gap(a, b) for a, b in zip(short.images, full.images, strict=True)] == [0, 0]
    asked = pipe.understand(images[0] if one == "image" else images, QUESTION, max_new_tokens=2).texts
    assert len(asked) == (1 if one == "image" else 2)


def test_the_metadata_of_an_image_reproduces_it(pipe, pictures, tmp_path):
    out = generate(pipe, [CIRCLE, SQUARES], negative_prompt="a ring", num_images_per_prompt=2, guidance_scale=2)
    assert [note["prompt"] for note in out.metadata] == [CIRCLE] * 2 + [SQUARES] * 2
    assert out.metadata[3] | {"torch": "", "transformers": "", "diffusers": "", "commit": ""} == {
        "prompt": SQUARES, "negative_prompt": "a ring", "seed": 6, "steps": STEPS, "guidance": 2.0, "dtype": "float32",
        "device": "cpu", "weights": None, "compile": None, "decode_tile": None, "recipe": "tiny", "commit": "",
        "spar": spar.__version__, "torch": "", "transformers": "", "diffusers": "", "model": "model", "adapter": None,
    }  # fmt: skip
    paths = out.save(tmp_path / "many")
    assert [path.name for path in paths] == [f"{i}-seed{seed}.png" for i, seed in enumerate(out.seeds)]
    metadata = read_metadata(paths[3]).values
    assert metadata == {key: value for key, value in out.metadata[3].items() if value is not None}
    again = generate(
        pipe, metadata["prompt"], negative_prompt=metadata["negative_prompt"], seed=metadata["seed"],
        num_inference_steps=metadata["steps"], guidance_scale=metadata["guidance"],
    )
    assert gap(again.images[0], Image.open(paths[3])) <= 1  # it was one of four
    with pytest.raises(InputError, match="exists already"):
        out.save(tmp_path / "many")
    assert (
        "instruction" in edit(pipe, pictures[0]).metadata[0]
        and pipe.reconstruct(pictures).metadata[2]["recipe"] == "tiny"
    )


# ---- routing ---------------------------------------------------------------------------------------------------------


def test_routing_has_a_row_of_weights_for_each_token_of_the_prompt(pipe):
    for routing in generate(pipe, [CIRCLE, SQUARES]).routing:
        text = [token for token, kind in zip(routing.tokens, routing.kinds, strict=True) if kind == "text"]
        assert routing.kinds == ["text"] * len(text) + ["query"] * 4
        assert routing.weights.shape == (len(routing.tokens), 4) and routing.layers == (1, 2, 3, 4)
        assert np.allclose(routing.weights.sum(1), 1, atol=1e-5) and (routing.weights > 0).all()
        assert "<|endoftext|>" not in text  # padding is no token of the prompt
    assert "squares" in text


def test_routing_is_the_prompts_own_whatever_its_batch_and_guidance(pipe):
    together = generate(pipe, [CIRCLE, "a large green star above a small yellow ring"], guidance_scale=4.0).routing[0]
    alone = generate(pipe, CIRCLE, guidance_scale=1.0).routing[0]
    assert together.tokens == alone.tokens and np.allclose(together.weights, alone.weights, atol=1e-4)


def test_routing_counts_the_tokens_of_the_reference(pipe, pictures):
    routing = edit(pipe, pictures[0]).routing[0]
    assert routing.kinds.count("image") == 64 and routing.kinds.count("query") == 4
    assert len(routing.weights) == len(routing.tokens) and np.allclose(routing.weights.sum(1), 1, atol=1e-5)


# ---- chat ------------------------------------------------------------------------------------------------------------


def turn(text: str, *images: Image.Image, role: str = "user") -> dict:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return {"role": role, "content": parts}


def conversation(picture: Image.Image) -> list[dict]:
    return [turn(QUESTION, picture), turn("red", role="assistant"), turn("how many objects are there ?")]


def test_a_chat_of_one_turn_has_the_words_of_understand(pipe, pictures):
    for question in (QUESTION, "describe the image", "is there a red circle ?"):
        pieces = list(pipe.chat([turn(question, pictures[0])], max_new_tokens=8))
        assert "".join(pieces) == pipe.understand(pictures[0], question, max_new_tokens=8).texts[0]
        assert all(pieces) and len(pieces) > 1


def test_a_chat_is_the_models_greedy_answer_to_the_whole_conversation(pipe, pictures):
    """By hand: one long row, the whole pass again for each token."""
    messages = conversation(pictures[0])
    out = pipe.chat(messages, max_new_tokens=5)
    answer = "".join(out)
    model, texts = pipe.model, ["what color is the background ?", "red", "how many objects are there ?"]
    row = pipe.prompts.conversation([("user", [1, texts[0]]), ("assistant", texts[1:2]), ("user", texts[2:])]).ids
    length, eos = row.shape[1], model.config.text.eos_token_id
    with torch.no_grad():
        f_v = model.tokenizer.encoder(to_tensor(pictures[0]))
        for _ in range(5):
            mask = torch.ones_like(row)
            x = model.embed(row, f_v)
            final, _ = model.language(x, attention_bias(mask, x, causal=True), position_ids_from_mask(mask))
            token = model.language.logits(final[:, -1]).argmax(-1)
            if int(token) == eos:
                break
            row = torch.cat([row, token[None]], dim=1)
    assert answer == pipe.bundle.text_tokenizer.decode(row[0, length:], skip_special_tokens=True)
    assert (out.prompt_tokens, out.completion_tokens) == (length, row.shape[1] - length)


def test_images_are_moved_before_the_text_of_their_turn(pipe, pictures):
    """The order of the training data; in the other order the bundled model all but guesses."""
    image, text = ({"type": "image", "image": pictures[0]}, {"type": "text", "text": QUESTION})
    orders = [[image, text], [text, image]]
    answers = ["".join(pipe.chat([{"role": "user", "content": parts}], max_new_tokens=4)) for parts in orders]
    tokens = [pipe.chat([{"role": "user", "content": parts}]).prompt_tokens for parts in orders]
    assert answers[0] == answers[1] and tokens[0] == tokens[1]


def test_every_message_and_every_image_of_a_chat_counts(pipe, pictures):
    seen = []

    def logits(messages: list[dict]) -> torch.Tensor:
        tokens = pipe.chat(messages, max_new_tokens=1)
        list(tokens)
        return seen.pop()

    hook = pipe.model.language.network.norm.register_forward_hook(lambda *a: seen.append(a[2][0, -1].clone()))
    try:
        first, red, last = conversation(pictures[0])
        plain = logits([first, red, last])
        assert torch.equal(plain, logits([first, red, last]))
        for other in (
            [turn(QUESTION, pictures[1]), red, last],
            [turn("describe the image", pictures[0]), red, last],
            [first, turn("blue", role="assistant"), last],
            [first, red, turn("how many objects are there ?", pictures[1])],
            [turn("what is there ?", role="system"), first, red, last],
            [last],
        ):
            assert not torch.allclose(plain, logits(other), atol=1e-4)
    finally:
        hook.remove()


def test_a_chat_ends_where_the_model_ends_its_turn_or_at_the_limit(pipe, pictures, monkeypatch):
    out = pipe.chat(conversation(pictures[0]), max_new_tokens=3)
    assert out.finish_reason is None and out.completion_tokens == 0
    piece = next(out)
    assert piece and out.completion_tokens == 1 and out.finish_reason is None
    list(out)
    assert (out.completion_tokens, out.finish_reason) == (3, "length")
    stream = pipe.model.language.stream
    monkeypatch.setattr(pipe.model.language, "stream", lambda *a, **k: islice(stream(*a, **k), 2))  # ends by itself
    out = pipe.chat(conversation(pictures[0]), max_new_tokens=3)
    list(out)
    assert (out.completion_tokens, out.finish_reason) == (2, "stop")


def test_an_answer_may_be_empty_and_then_stand_in_the_conversation(pipe, pictures, monkeypatch):
    silent = [turn(QUESTION, pictures[0]), {"role": "assistant", "content": ""}, turn("describe the image")]
    list(pipe.chat(silent, max_new_tokens=1))
    monkeypatch.setattr(pipe.model.language, "stream", lambda *a, **k: iter(()))
    out = pipe.chat(silent)
    assert (list(out), out.completion_tokens, out.finish_reason) == ([], 0, "stop")


def test_a_chat_leaves_no_mode_of_torch_on(folder, pictures):
    half = SparPipeline.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    out = half.chat(conversation(pictures[0]), max_new_tokens=3)
    for _ in out:
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    assert out.completion_tokens == 3


def test_two_chats_at_once_do_not_meet(pipe, pictures):
    asked = [[turn(QUESTION, pictures[0])], [turn("describe the image", pictures[1])]]
    alone = ["".join(pipe.chat(messages, max_new_tokens=6)) for messages in asked]
    together = list(zip(*(pipe.chat(messages, max_new_tokens=6) for messages in asked), strict=False))
    assert all(whole.startswith("".join(part)) for whole, part in zip(alone, zip(*together, strict=True), strict=True))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([turn("a red zebra")], r"messages\[0\]: unknown words zebra"),
        ([turn("<IMG_CONTEXT>")], "control tokens"),
        ([turn(" ")], "expected some words"),
        ([turn("", role="system"), turn(" ")], r"messages\[1\]: expected some words"),
        ([turn("red " * 505)], "expected at most 512 tokens with their images and one for the answer, got 513"),
        ([turn("red " * 600)], r"messages\[0\]: expected at most 512 tokens, got 600"),
        ([turn("red " * 9000)], "messages.0.: expected at most 512 tokens, got a text of"),
        ([turn("how many ?", *[Image.new("RGB", (8, 8))] * 8)], "at most 512 tokens .* got 5[0-9][0-9]"),
        ([], "messages: expected 1 to"),
    ],
    ids=lambda value: str(value)[:32],
)  # fmt: skip
def test_a_chat_that_cannot_be_is_refused_at_the_call(pipe, messages, words):
    with pytest.raises(InputError, match=words):
        pipe.chat(messages)


# ---- images that come in -------------------------------------------------------------------------------------------


def test_an_image_may_be_a_path_bytes_or_an_image(pipe, pictures, tmp_path):
    pictures[0].save(tmp_path / "p.png")
    sources = [tmp_path / "p.png", str(tmp_path / "p.png"), (tmp_path / "p.png").read_bytes(), pictures[0]]
    images = pipe.reconstruct(sources).images
    assert [gap(images[0], image) for image in images] == [0] * 4
    assert gap(images[0], pipe.reconstruct(tuple(sources)).images[3]) == 0


def test_images_of_other_sizes_are_made_square_first(pipe):
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    assert gap(pipe.reconstruct(wide).images[0], pipe.reconstruct(to_square(wide, 64)).images[0]) == 0


@pytest.mark.parametrize(("size", "wanted"), [((90, 50), (88, 48)), ((50, 90), (48, 88)), ((70, 66), (64, 64))])
def test_an_edit_keeps_the_proportions_of_its_image(pipe, size, wanted):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = edit(pipe, Image.fromarray(noise))
    assert out.images[0].size == wanted
    assert out.routing[0].kinds.count("image") == wanted[0] * wanted[1] // 64
    other = edit(pipe, Image.fromarray(noise[::-1].copy()))
    assert gap(out.images[0], other.images[0]) > 4


def test_what_an_edit_cannot_keep_is_refused(pipe, pictures):
    with pytest.raises(InputError, match="same proportions in one call, got 88 x 48, 64 x 64 pixels"):
        edit(pipe, [pictures[0], Image.new("RGB", (90, 50))])
    with pytest.raises(InputError, match="expected an image at most 4 times as long as wide, got 90 x 20 pixels"):
        edit(pipe, Image.new("RGB", (90, 20)))


def test_reconstruct_is_the_tokenizer_there_and_back(pipe, pictures):
    tokenizer = pipe.model.tokenizer
    with torch.no_grad():
        wanted = to_pil(tokenizer.decode(tokenizer.encode(to_tensor(pictures)).z_f))
    assert max(gap(a, b) for a, b in zip(pipe.reconstruct(pictures).images, wanted, strict=True)) <= 1


# ---- saving and loading ----------------------------------------------------------------------------------------------

FRESH = """
import sys, numpy, torch
from spar.common.limits import MAX_NEW_TOKENS
from spar.inference.pipeline import SparPipeline
torch.set_num_threads(int(sys.argv[3]))
pipe = SparPipeline.from_pretrained(sys.argv[1], dtype=torch.float32, device="cpu")
image = pipe.generate("a red circle", seed=3, num_inference_steps=3).images[0]
edited = pipe.edit(image, "remove the red circle", seed=4, num_inference_steps=3).images[0]
answer = pipe.understand(image, "what color is the background ?", max_new_tokens=6).texts[0]
arrays = [numpy.asarray(image) for image in (image, edited, pipe.reconstruct(image).images[0])]
numpy.savez(sys.argv[2], *arrays, answer=numpy.array(answer))
"""


@pytest.mark.slow
def test_a_saved_model_gives_the_same_bits_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", FRESH, tmp_path / "model", tmp_path / "out.npz", str(torch.get_num_threads())]
    subprocess.run([*map(str, command)], check=True, timeout=300)
    with np.load(tmp_path / "out.npz") as found:
        (picture,) = generate(pipe).images
        assert np.array_equal(found["arr_0"], np.asarray(picture))
        assert np.array_equal(found["arr_1"], np.asarray(edit(pipe, picture, seed=4).images[0]))
        assert np.array_equal(found["arr_2"], np.asarray(pipe.reconstruct(picture).images[0]))
        assert str(found["answer"]) == pipe.understand(picture, QUESTION, max_new_tokens=6).texts[0]


def test_saving_in_bfloat16_halves_the_file_and_keeps_the_image(folder, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    part = Path("denoiser/model.safetensors")
    assert (tmp_path / "half" / part).stat().st_size < 0.6 * (folder / part).stat().st_size
    half = SparPipeline.from_pretrained(tmp_path / "half", dtype=torch.float32, device="cpu")
    assert float(half.model.tokenizer.latent_scale) == float(pipe.model.tokenizer.latent_scale)
    a, b = generate(pipe, guidance_scale=1.0).images[0], generate(half, guidance_scale=1.0).images[0]
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() < 8


def test_the_manifest_and_the_size_are_the_models(pipe, tiny_run):
    assert pipe.manifest["recipe"] == "tiny" and pipe.image_size == 64
    assert pipe.manifest == load_model(tiny_run.path / "model").manifest


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    (dict(prompt=""), "prompt: expected some words"),
    (dict(prompt="  \n"), "prompt: expected some words"),
    (dict(prompt=[]), "at least one prompt, got an empty list"),
    (dict(prompt=["a red circle", 7]), "prompt: expected text, got int"),
    (dict(prompt="a red zebra"), "prompt: unknown words zebra"),
    (dict(prompt="red " * 10_000), "prompt: expected at most 64 tokens"),
    (dict(prompt="red " * 65), "prompt: expected at most 64 tokens, got 65"),
    (dict(prompt="<|im_start|> red circle"), "control tokens"),
    (dict(prompt="<IMG_CONTEXT>"), "control tokens"),
    (dict(negative_prompt="a zebra"), "negative_prompt: unknown words zebra"),
    (dict(negative_prompt=SQUARES, guidance_scale=1), "negative_prompt: expected a guidance_scale other than 1"),
    (dict(negative_prompt=["red", "blue"]), "expected one negative_prompt, or 1, got 2"),
    (dict(height=63), "height: expected a multiple of 8 from 8 to 128, got 63"),
    (dict(height=0), "height: expected"),
    (dict(width=136), "width: expected a multiple of 8 from 8 to 128, got 136"),
    (dict(width=-8), "width: expected"),
    (dict(width=64.0), "width: expected"),
    (dict(num_inference_steps=0), "num_inference_steps: expected 1 to 1000, got 0"),
    (dict(num_inference_steps=1001), "num_inference_steps: expected"),
    (dict(num_inference_steps=2.5), "num_inference_steps: expected 1 to 1000, got 2.5"),
    (dict(num_inference_steps=True), "num_inference_steps: expected"),
    (dict(guidance_scale=-1), "guidance_scale: expected 0 to 100"),
    (dict(guidance_scale=float("nan")), "guidance_scale: expected"),
    (dict(guidance_scale="4"), "guidance_scale: expected"),
    (dict(step_cache=-0.1), "step_cache: expected 0 to 1.0, got -0.1"),
    (dict(step_cache=2), "step_cache: expected 0 to 1.0, got 2"),
    (dict(step_cache=None), "step_cache: expected 0 to 1.0, got None"),
    (dict(guidance_interval=(0.9, 0.1)), "expected two times, 0 <= first <= last <= 1, got (0.9, 0.1)"),
    (dict(guidance_interval=(0, 1), guidance_scale=1), "guidance_interval: expected a guidance_scale other than 1"),
    (dict(sampler="heun"), "sampler: expected one of dpmsolver++, euler, got 'heun'"),
    (dict(num_images_per_prompt=0), "num_images_per_prompt: expected 1 to 4096, got 0"),
    (dict(num_images_per_prompt=4096, prompt=["red", "blue"]), "images in all: expected 1 to 4096, got 8192"),
    (dict(seed=-1), "seed: expected a whole number from 0 to"),
    (dict(seed=2**63), "seed: expected a whole number"),
    (dict(seed=[1, 2]), "seed: expected one, or one for each of 1 images, got 2"),
    (dict(seed=[1.5]), "seed: expected a whole number"),
    (dict(seed="3"), "seed: expected a whole number"),
    (dict(prompt=None), "prompt: expected text or a list of texts, got NoneType"),
    (dict(prompt=5), "prompt: expected text or a list of texts, got int"),
    (dict(num_images_per_prompt=1.5), "num_images_per_prompt: expected 1 to 4096, got 1.5"),
    (dict(num_images_per_prompt=None), "num_images_per_prompt: expected 1 to 4096, got None"),
    (dict(seed=1.5), "seed: expected a whole number from 0 to"),
    (dict(seed=True), "seed: expected a whole number from 0 to"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD_PROMPTS, ids=str)
def test_a_bad_argument_gets_a_message(pipe, keywords, message, monkeypatch):
    monkeypatch.setattr(pipe.model, "velocity", lambda *_: pytest.fail("the denoiser ran"))
    try:
        generate(pipe, **keywords)
    except InputError as error:
        assert message in str(error)
    except BaseException as error:  # pytest.fail is one
        raise AssertionError(f"expected an InputError, got {type(error).__name__}: {error}") from error
    else:
        raise AssertionError("accepted")


def broken() -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()[:-200]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "at least one image, got an empty list"),
        (b"", "is empty"),
        (b"plain words", "of another type or damaged"),
        (broken(), "cannot be decoded"),
        ("nowhere.png", "there is no file 'nowhere.png'"),
        (Path("/"), "is a directory"),
        (None, "expected an image as a path, bytes, a Pillow image or an array, got NoneType"),
        (np.zeros((3, 4, 4, 5), np.uint8), "an array .H, W, C. of 1, 3 or 4 channels or as .H, W., got shape .4, 4, 5"),
        (torch.zeros(8, 8, 3), "as a tensor .C, H, W. of 1, 3 or 4 channels"),
        ("https://example.org/a.png", "in a local file, got the URL"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_image_is_refused_by_every_task(pipe, image, message):
    for task in (
        lambda: pipe.reconstruct(image), lambda: pipe.understand(image, QUESTION), lambda: edit(pipe, image)
    ):
        with pytest.raises(InputError, match=message):
            task()


def test_arrays_give_what_their_images_give(pipe, pictures):
    given = pipe.reconstruct(pictures[:2]).images
    wanted = [image.tobytes() for image in given]
    arrays = np.stack([np.asarray(image) for image in pictures[:2]])
    for batch in (arrays, list(arrays), to_tensor(pictures[:2]), torch.from_numpy(arrays).permute(0, 3, 1, 2)):
        assert [image.tobytes() for image in pipe.reconstruct(batch).images] == wanted
    assert gap(pipe.reconstruct(arrays[0]).images[0], given[0]) <= 1  # alone it may round differently


def test_reprs_are_short_and_say_what_it_is(pipe):
    out = pipe.generate(["a red circle", "a ring"], seed=3)
    for one in (pipe, out, out.routing[0], pipe.bundle, pipe.reconstruct(out.images)):
        assert len(repr(one)) < 400 and "\n" not in repr(one), one
    assert repr(out) == "GenerateOutput(2 images of 64 x 64 pixels)"
    assert f"{pipe.parameters / 1e6:.1f} M parameters, 64 x 64 pixels, float32 on cpu" in repr(pipe)
    assert repr(out.routing[0]).endswith(f"over layers {', '.join(map(str, out.routing[0].layers))})")


def test_a_notebook_shows_the_images_with_prompts_and_seeds(pipe):
    out = pipe.generate(["a red circle", "a ring"], seed=3)
    shown = out._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert "a red circle (seed 3)" in shown and "a ring (seed 4)" in shown
    assert pipe.reconstruct(out.images)._repr_html_().count("<img") == 2
    strange = replace(out, metadata=[{"prompt": "<b>&"}, {"instruction": '"'}])._repr_html_()
    assert "&lt;b&gt;&amp; (seed 3)" in strange and "&quot; (seed 4)" in strange and "<b>" not in strange


def test_sampling_shows_a_bar_unless_it_is_off_or_the_caller_watches(pipe, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **settings):
            self.n, self.settings = 0, settings
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.ended = True

        def update(self, steps):
            self.n += steps

    monkeypatch.setattr("spar.inference.progress.tqdm", Bar)
    wanted = pipe.generate("a red circle", num_inference_steps=3, seed=0).images[0]
    assert [(bar.n, bar.settings["total"], bar.ended) for bar in bars] == [(3, 3, True)]
    pipe.generate("a red circle", num_inference_steps=3, callback=lambda *_: None)
    monkeypatch.setattr(pipe, "progress", False)
    assert pipe.generate("a red circle", num_inference_steps=3, seed=0).images[0] == wanted
    assert len(bars) == 1


def test_no_bar_goes_to_a_file(pipe, capfd):
    pipe.generate("a red circle", num_inference_steps=2)
    assert capfd.readouterr() == ("", "")


def test_a_sequence_longer_than_the_language_models_positions_gets_a_message(pipe, pictures, monkeypatch):
    short = replace(pipe.model.language.config, max_positions=70)
    monkeypatch.setattr(pipe.model.language, "config", short)
    generate(pipe)
    with pytest.raises(InputError, match="the language model takes at most 70 tokens at once"):
        edit(pipe, pictures[0])
    with pytest.raises(InputError, match="the language model takes at most 70 tokens at once"):
        pipe.understand(pictures[0], QUESTION)


def test_an_image_is_made_from_one_reference(pipe, pictures):
    for images in ([pictures[:2]], [tuple(pictures[:2]), pictures[0]]):
        with pytest.raises(InputError, match="expected one reference image for each edit, got a list of 2"):
            edit(pipe, images)
        with pytest.raises(InputError, match="expected one image for each text, got a nested list"):
            pipe.understand(images, QUESTION)


def test_images_and_texts_must_pair_up(pipe, pictures):
    with pytest.raises(InputError, match="expected one image, or one for each of 3 questions, got 2"):
        pipe.understand(pictures[:2], [QUESTION] * 3)
    with pytest.raises(InputError, match="expected one instruction, or 3, got 2"):
        edit(pipe, pictures, ["remove the red circle"] * 2)
    with pytest.raises(InputError, match="expected one negative_prompt, or 2, got 3"):
        edit(pipe, pictures[:2], negative_prompt=["red"] * 3)


@pytest.mark.parametrize("tokens", [0, True, "9", 2.5, None])
def test_max_new_tokens_has_bounds(pipe, pictures, tokens):
    with pytest.raises(InputError, match="max_new_tokens: expected 1 or more"):
        pipe.understand(pictures[0], QUESTION, max_new_tokens=tokens)
    if tokens is not None:  # for a chat: as many as fit
        with pytest.raises(InputError, match="max_new_tokens: expected 1 or more"):
            pipe.chat(conversation(pictures[0]), max_new_tokens=tokens)


@pytest.mark.parametrize("words", [QUESTION, "red " * 400])
def test_more_new_tokens_than_there_can_be_are_cut_to_those(pipe, pictures, monkeypatch, words):
    """At most MAX_NEW_TOKENS, and at most what the model has positions for after a long question."""
    asked = []
    stream = pipe.model.language.stream

    def counted(embeddings, mask, *, max_new_tokens, sampling):
        asked.append((mask.shape[1], max_new_tokens))
        return islice(stream(embeddings, mask, max_new_tokens=max_new_tokens, sampling=sampling), 2)

    monkeypatch.setattr(pipe.model.language, "stream", counted)
    monkeypatch.setattr(pipe, "check_text", lambda *_: None)  # understand takes no question as long as a chat does
    pipe.understand(pictures[0], words, max_new_tokens=10**6)
    out = pipe.chat([turn(words, pictures[0])], max_new_tokens=10**6)
    list(out)
    longest = pipe.model.config.text.max_seq_len
    assert [new for _, new in asked] == [min(MAX_NEW_TOKENS, longest - length) for length, _ in asked]
    assert len(asked) == 2


def test_the_image_loss_is_the_flow_loss_on_noise_of_its_own(pipe, pictures):
    """By hand for the second pair; the first one's noise and number do not depend on the others."""
    texts = [CIRCLE, SQUARES, CIRCLE]
    losses = pipe.image_loss(pictures, texts, seed=7)
    model, total = pipe.model, 0.0
    with torch.no_grad():
        clean = model.tokenizer.normalize(model.tokenizer.encode(to_tensor(pictures[1])).z_f)
        tokens = pipe.prompts.generation([SQUARES])
        condition = model.condition(tokens.ids, tokens.mask)
        for number, time in enumerate((0.95, 0.9, 0.8, 0.7, 0.5)):
            noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(7 + 5 + number))[None]
            noisy = (1 - time) * clean + time * noise
            velocity = model.velocity(noisy, torch.tensor([time]), condition).velocity
            total += float((velocity - (noise - clean)).square().mean()) / 5
    assert losses[1] == pytest.approx(total, rel=1e-4)
    assert pipe.image_loss(pictures[0], CIRCLE, seed=7)[0] == pytest.approx(losses[0], rel=1e-4)
    assert pipe.image_loss(pictures[0], CIRCLE, seed=8)[0] != losses[0]


def test_answers_are_drawn_by_their_own_seeds(pipe, pictures):
    keywords = {"max_new_tokens": 6, "temperature": 5.0}
    together = pipe.understand(pictures[:3], QUESTION, seed=[4, 9, 4], **keywords)
    alone = [pipe.understand(pictures[i], QUESTION, seed=seed, **keywords) for i, seed in enumerate((4, 9, 4))]
    assert together.texts == [one.texts[0] for one in alone]
    assert (together.seeds, alone[1].seeds) == ([4, 9, 4], [9])
    counted = pipe.understand([pictures[0]] * 3, QUESTION, seed=8, **keywords)
    assert counted.seeds == [8, 9, 10] and len(set(counted.texts)) > 1
    out = pipe.chat(conversation(pictures[0]), seed=9, **keywords)
    assert "".join(out) and out.seed == 9
    again = pipe.understand(pictures[0], QUESTION, **keywords)
    assert again.texts == pipe.understand(pictures[0], QUESTION, seed=again.seeds, **keywords).texts


def test_a_small_nucleus_and_temperature_zero_take_the_likeliest_word(pipe, pictures):
    greedy = pipe.understand(pictures[0], QUESTION, max_new_tokens=6)
    assert greedy.seeds == []
    assert pipe.understand(pictures[0], QUESTION, max_new_tokens=6, seed=3).texts == greedy.texts
    drawn = pipe.understand(pictures[0], QUESTION, max_new_tokens=6, temperature=2.0, top_p=1e-9, seed=3)
    assert drawn.texts == greedy.texts


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": -1}, "temperature: expected"), ({"top_p": 0}, "top_p: expected above 0"),
     ({"temperature": 1, "seed": -1}, "seed: expected"), ({"seed": [1, 2]}, "seed: expected one, or one for each")],
)  # fmt: skip
def test_ways_to_draw_that_have_no_meaning_are_refused(pipe, pictures, wrong, message):
    with pytest.raises(InputError, match=message):
        pipe.understand(pictures[0], QUESTION, **wrong)
    with pytest.raises(InputError, match=message):
        pipe.chat(conversation(pictures[0]), **wrong)


def test_a_chat_that_is_cut_says_so(pipe, pictures, monkeypatch):
    monkeypatch.setattr("spar.common.limits.MAX_NEW_TOKENS", 3)
    out = pipe.chat(conversation(pictures[0]), max_new_tokens=4096)
    list(out)
    assert (out.completion_tokens, out.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"path": "nowhere"}, "expected a SPAR model folder, got nowhere, which does not exist"),
        ({"dtype": torch.int8}, "dtype: expected float32, bfloat16 or float16, got torch.int8"),
        ({"dtype": "float64"}, "dtype: expected float32, bfloat16 or float16, got 'float64'"),
        ({"dtype": "torch.float32"}, "dtype: expected float32, bfloat16 or float16, got 'torch.float32'"),
        ({"dtype": 16}, "dtype: expected float32, bfloat16 or float16, got 16"),
        ({"device": "tpu9"}, "device: expected one that is here, got 'tpu9'"),
        ({"device": "cuda:77"}, "device: expected one that is here, got 'cuda:77'"),
        ({"device": "hpu"}, "device: expected one that is here, got 'hpu'"),
        ({"device": "meta"}, "device: expected one that is here, got 'meta' .here: cpu"),
        ({"device": 1.5}, "device: expected one that is here, got '1.5'"),
    ],
    ids=str,
)
def test_from_pretrained_refuses_in_words(folder, keywords, message):
    with pytest.raises(InputError, match=message):
        SparPipeline.from_pretrained(**{"path": folder, "device": "cpu", **keywords})


def test_without_bundled_weights_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "BUNDLED", tmp_path)
    with pytest.raises(InputError, match="no bundled weights"):
        SparPipeline.from_pretrained(device="cpu")


def test_the_bundled_folder_is_the_default(monkeypatch, folder, pipe):
    monkeypatch.setattr(pipeline, "BUNDLED", folder)
    bundled = SparPipeline.from_pretrained(dtype=torch.float32, device="cpu")
    assert gap(generate(bundled).images[0], generate(pipe).images[0]) == 0


PROMPTS = (
    "star",
    "a green ring",
    "two yellow squares on a gray background",
    "a large red circle to the left of a small blue star",
    " and ".join(["a small white cross", "a large pink circle", "three green rings", "a black square"] * 3),
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bundled(request) -> SparPipeline:
    if request.param == "bfloat16" and not has_native_bfloat16():
        pytest.skip("elsewhere bfloat16 is computed by other means")
    return SparPipeline.from_pretrained(dtype=request.param)


def assert_same(bundled: SparPipeline, images: list[Image.Image], others: list[Image.Image]) -> None:
    """Within a level in float32; some processors round a product in bfloat16 by its rows, which shows at edges, most of
    all at sizes that the model was not trained at: there a hundredth of the values may differ by more than 64 levels.
    """
    for one, other in zip(images, others, strict=True):
        difference = np.abs(np.asarray(one, int) - np.asarray(other, int))
        largest, mean, beyond = (64, 1, 0.0) if one.size == (64, 64) else (255, 4, 0.01)
        assert difference.max() <= (1 if bundled.dtype == torch.float32 else largest)
        assert difference.mean() <= (1 if bundled.dtype == torch.float32 else mean)
        assert (difference > 64).mean() <= beyond


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (40, 104)])
def test_an_image_is_the_same_whatever_stands_beside_it(bundled, size):
    """Prompts of every length in one call, in another order, several draws of each, and each alone."""
    settings = {"height": size[0], "width": size[1], "num_inference_steps": 4}

    def draw(*arguments: object, **more: object) -> list[Image.Image]:
        return bundled.generate(*arguments, **settings, **more).images

    alone = [draw(prompt, seed=i)[0] for i, prompt in enumerate(PROMPTS)]
    seeds = list(range(len(PROMPTS)))
    assert_same(bundled, draw(list(PROMPTS), seed=seeds), alone)
    assert_same(bundled, draw(list(PROMPTS[::-1]), seed=seeds[::-1]), alone[::-1])
    assert_same(bundled, draw(PROMPTS[1], seed=0, num_images_per_prompt=3)[1:2], alone[1:2])


@pytest.mark.slow
def test_the_bundled_model_writes_another_layout_for_each_seed(bundled):
    out = bundled.generate("a red circle", num_images_per_prompt=6, seed=0, num_inference_steps=1)
    layouts = [values["layout"] for values in out.metadata]
    assert bundled.write_layouts(["a red circle"] * 6, seed=0) == layouts
    assert len({*layouts}) >= 4 and all("red circle on column" in text for text in layouts)


@pytest.mark.slow
def test_an_edit_is_the_same_whatever_stands_beside_it(bundled):
    picture = bundled.generate(PROMPTS[3], seed=0).images[0]
    words = ["remove the star", "change the background to navy", "add a large green ring to the left of the blue star"]
    alone = [bundled.edit(picture, one, seed=3, num_inference_steps=4).images[0] for one in words]
    assert_same(bundled, bundled.edit(picture, words, seed=[3] * 3, num_inference_steps=4).images, alone)


def test_an_image_of_a_small_model_is_computed_on_one_thread_and_a_large_batch_on_all(pipe, monkeypatch):
    seen, velocity = [], type(pipe.model).velocity

    def watched(self, *arguments):
        seen.append(torch.get_num_threads())
        return velocity(self, *arguments)

    monkeypatch.setattr(type(pipe.model), "velocity", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for small_work, threads in ((float("inf"), 1), (0, 2)):
            monkeypatch.setattr("spar.common.threads.SMALL_WORK", small_work)
            seen.clear()
            generate(pipe, num_inference_steps=2)
            assert set(seen) == {threads} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
