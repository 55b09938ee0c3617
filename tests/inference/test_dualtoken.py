"""DualToken's pipeline: the contract of all pipelines, on the finished run of `dualtoken-tiny`."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from spar.checkpoints.dualtoken_format import load_dualtoken
from spar.common.errors import Cancelled, InputError
from spar.inference.dualtoken import DualTokenPipeline
from spar.inference.loading import load_pipeline
from spar.inference.pipeline import SparPipeline
from spar.inference.progress import StepRecorder
from spar.models.dualtoken.tokenizer import DualCodes


@pytest.fixture(scope="module")
def folder(dual_run):
    return dual_run.path / "model"


@pytest.fixture(scope="module")
def pipe(folder) -> DualTokenPipeline:
    """It writes no layouts unless it is told to."""
    made = DualTokenPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    assert made.bundle.sampling.layout
    made.bundle = replace(made.bundle, sampling=replace(made.bundle.sampling, layout=False))
    return made


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def gap(one: Image.Image, other: Image.Image) -> int:
    """The largest difference: a decoder of two images rounds other than of one."""
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_folder_says_its_system_and_is_loaded_by_it(folder, tiny_run):
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dualtoken"
    assert isinstance(load_pipeline(folder, device="cpu"), DualTokenPipeline)
    assert isinstance(load_pipeline(tiny_run.path / "model", device="cpu"), SparPipeline)


def test_a_folder_without_the_field_is_of_spar(tiny_run, tmp_path):
    copy = tmp_path / "old"
    shutil.copytree(tiny_run.path / "model", copy)
    header = json.loads((copy / "config.json").read_text())
    assert header.pop("model_type") == "spar"
    (copy / "config.json").write_text(json.dumps(header))
    assert isinstance(load_pipeline(copy, device="cpu"), SparPipeline)


def test_an_unknown_system_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(InputError, match="expected a model_type of spar, dualtoken in config.json, got 'other'"):
        load_pipeline(tmp_path)
    with pytest.raises(InputError, match="got .*nowhere, which does not exist"):
        load_pipeline(tmp_path / "nowhere")


def test_a_setting_of_the_other_system_is_refused_unless_it_is_at_its_default(folder):
    assert load_pipeline(folder, device="cpu", decode_tile=None, weights="float32", offload=False)
    with pytest.raises(InputError, match="decode_tile: DualToken has no such setting, got 8"):
        load_pipeline(folder, decode_tile=8)


def test_repr_notebook_steps_and_bar_are_those_of_all_pipelines(folder, pipe, monkeypatch):
    assert repr(pipe).startswith("DualTokenPipeline(model: ") and len(repr(pipe)) < 150 > len(repr(pipe.bundle))
    assert load_pipeline(folder, dtype="float16", device="cpu", progress=False).dtype is torch.float16
    recorder = StepRecorder(pipe.preview)
    out = pipe.generate("a red circle", num_images_per_prompt=2, seed=0, callback=recorder)
    assert out._repr_html_().count("a red circle (seed 1)") == 2  # under the image, and in its place where none shows
    assert len(recorder.of_image(1)) == pipe.default_steps
    assert all(gap(recorder.of_image(i)[-1], out.images[i]) <= 1 for i in range(2))
    shown = []
    monkeypatch.setattr("spar.inference.progress.tqdm", lambda **settings: shown.append(settings) or nullcontext(Bar()))
    pipe.generate("a red circle")
    assert shown[0]["total"] == pipe.default_steps == Bar.last


class Bar:
    """A bar that remembers where it stood."""

    n = last = 0

    def update(self, steps: int) -> None:
        self.n += steps
        Bar.last = self.n


def test_weights_of_the_products_type_change_no_image(folder):
    one, other = (
        DualTokenPipeline.from_pretrained(folder, dtype=torch.bfloat16, device="cpu", weights=weights)
        for weights in ("float32", "dtype")
    )
    assert same(*(pipe.generate("a red circle", seed=2).images[0] for pipe in (one, other)))
    with pytest.raises(InputError, match="expected float32 to save a pipeline, got dtype"):
        other.save_pretrained(folder)
    with pytest.raises(InputError, match="weights: expected float32 or dtype of a DualToken model, got 'int8'"):
        load_pipeline(folder, weights="int8")


def test_each_system_refuses_the_others_folder(folder, tiny_run):
    with pytest.raises(InputError, match="is no spar folder: its config.json says format 'dualtoken'"):
        SparPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="is no dualtoken folder: its config.json says format 'spar'"):
        DualTokenPipeline.from_pretrained(tiny_run.path / "model")


def test_a_saved_pipeline_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    again = load_dualtoken(tmp_path / "again")
    assert again.sampling == pipe.bundle.sampling and again.manifest == pipe.manifest
    own = pipe.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in again.model.state_dict().items())
    with pytest.raises(InputError, match="exists and is no DualToken folder"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").write_text("")
        pipe.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("part", ["tokenizer", "embedder", "semantic_head"])
def test_a_part_that_is_missing_is_named(folder, tmp_path, part):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / part)
    with pytest.raises(InputError, match=part):
        load_dualtoken(copy)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_seed_and_not_on_its_batch(pipe):
    both = pipe.generate(["a red circle", "two blue stars"], seed=[3, 4], num_images_per_prompt=1)
    alone = pipe.generate("two blue stars", seed=4)
    assert gap(both.images[1], alone.images[0]) <= 1 and both.seeds == [3, 4]
    other = pipe.generate("two blue stars", seed=5)
    assert not same(other.images[0], alone.images[0])
    assert alone.images[0].size == (64, 64)


def test_seeds_that_share_their_lower_32_bits_draw_other_images(pipe):
    one, other = pipe.generate(["a red circle"] * 2, seed=[7, 2**32 + 7]).images
    assert gap(one, other) > 1


def test_seeds_count_up_over_the_images_of_a_prompt(pipe):
    out = pipe.generate("a red circle", seed=7, num_images_per_prompt=2)
    assert out.seeds == [7, 8] and len(out.images) == 2
    assert gap(out.images[1], pipe.generate("a red circle", seed=8).images[0]) <= 1
    assert out.metadata[1]["seed"] == 8 and out.metadata[1]["prompt"] == "a red circle"


@pytest.mark.parametrize(
    "setting", [{"guidance_scale": 4.0}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.1},
                {"negative_prompt": "a blue star", "guidance_scale": 4.0}],
)  # fmt: skip
def test_each_setting_has_an_effect_and_stands_in_the_metadata(pipe, setting):
    plain, changed = pipe.generate("a red circle", seed=1), pipe.generate("a red circle", seed=1, **setting)
    assert not same(plain.images[0], changed.images[0])
    names = {"guidance_scale": "guidance"}
    assert all(changed.metadata[0][names.get(key, key)] == value for key, value in setting.items())


def test_the_negative_prompt_takes_the_unconditional_ones_place(pipe):
    shared = {"seed": 1, "guidance_scale": 4.0}
    plain = pipe.generate("a red circle", **shared)
    assert not same(plain.images[0], pipe.generate("a red circle", negative_prompt="a star", **shared).images[0])


def test_a_negative_prompt_needs_guidance_which_alone_reads_it(pipe):
    with pytest.raises(InputError, match="negative_prompt: expected a guidance_scale other than 1 beside it"):
        pipe.generate("a red circle", negative_prompt="a star", guidance_scale=1)


def test_the_callback_sees_every_row_and_may_cancel(pipe):
    seen = []

    def watch(done, rows, codes):
        seen.append((done, rows, codes.clone()))
        return

    out = pipe.generate("a red circle", seed=1, callback=watch)
    assert [step[:2] for step in seen] == [(row + 1, 8) for row in range(8)]
    assert same(pipe.preview(seen[-1][2])[0], out.images[0])
    for before, after in zip(seen, seen[1:], strict=False):
        assert torch.equal(before[2][:, : before[0]], after[2][:, : before[0]])  # rows that are done stay
    with pytest.raises(Cancelled, match="cancelled after 3 of 8 rows"):
        pipe.generate("a red circle", seed=1, callback=lambda done, *_: done < 3)
    assert same(pipe.generate("a red circle", seed=1).images[0], out.images[0])


def test_reconstruction_is_the_tokenizers(pipe):
    out = pipe.reconstruct([image(0), image(1)])
    codes = pipe._read_images(pipe._squares(image(1)))
    decoded = pipe.model.tokenizer.decode(codes.pixel).clamp(0, 1)
    own = np.asarray(out.images[1], np.float32) / 255
    np.testing.assert_allclose(own, decoded[0].permute(1, 2, 0).numpy(), atol=0.003)


def test_answers_are_the_same_alone_and_in_a_batch(pipe):
    questions = ["how many objects are there?", "what color is the background?"]
    both = pipe.understand([image(0), image(1)], questions, max_new_tokens=4).texts
    assert both == [pipe.understand(image(i), questions[i], max_new_tokens=4).texts[0] for i in (0, 1)]


def test_an_answer_reads_quantised_codes_alone(pipe, monkeypatch):
    """With the encoder's features changed within their codes' cells, the answer's states stay."""
    pixels = pipe._squares(image(0))
    codes = pipe._read_images(pixels)
    tokens = pipe.prompts.question(["how many objects are there?"])
    own = pipe.model.embed(tokens.ids, codes)
    monkeypatch.setattr(type(pipe.model.tokenizer), "features", None)          # nothing but codes is needed from here
    torch.testing.assert_close(pipe.model.embed(tokens.ids, codes), own)


def test_codes_are_understood_without_an_image(pipe):
    """Those of `encode` as the image; drawn ones as they were drawn, which the image's own codes need not be."""
    texts = ["how many objects are there?", "what color is the background?"]
    by_codes = pipe.understand_codes(pipe.encode(image()), texts, max_new_tokens=4).texts
    assert by_codes == pipe.understand(image(), texts, max_new_tokens=4).texts
    drawn = pipe.generate(["a red circle", "a blue star"], seed=1)
    assert drawn.codes.pixel.shape == drawn.codes.semantic.shape == (2, 8, 8, 2)
    assert same(pipe.preview(drawn.codes.pixel)[1], drawn.images[1])
    assert len(pipe.understand_codes(drawn.codes, "what is it?", max_new_tokens=2).texts) == 2
    pixel, semantic = drawn.codes.pixel, drawn.codes.semantic
    for wrong, message in (
        (DualCodes(pixel[:, :4], semantic), "codes.pixel: expected [B, 8, 8, 2] of this model, got [2, 4, 8, 2]"),
        (DualCodes(pixel, semantic + 16), "codes.semantic: expected 0 to 15, got 1"),
        (DualCodes(pixel[:0], semantic[:0]), "codes.pixel: expected those of at least one image, got 0"),
        (DualCodes(pixel, semantic[:1]), "codes.semantic: expected those of 2 images, as codes.pixel, got 1"),
        (DualCodes(pixel.float(), semantic), "codes.pixel: expected whole numbers (int64), got torch.float32"),
    ):
        with pytest.raises(InputError) as error:
            pipe.understand_codes(wrong, "what is it?")
        assert message in str(error.value)


def test_a_chat_streams_its_answer(pipe):
    content = [{"type": "image", "image": image()}, {"type": "text", "text": "what is it?"}]
    out = pipe.chat([{"role": "user", "content": content}], max_new_tokens=3)
    text = "".join(out)
    assert out.finish_reason in ("stop", "length") and out.completion_tokens <= 3 and isinstance(text, str)


def test_editing_says_that_it_is_not_defined(pipe):
    with pytest.raises(InputError, match="DualToken does not define editing: its tasks are generate, understand"):
        pipe.edit(image(), "remove the circle")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": ""}, "prompt: expected some words"),
        ({"prompt": "a zebra"}, "prompt: unknown words zebra"),
        ({"prompt": []}, "expected at least one prompt"),
        ({"height": 128}, "height: expected 64, the only side of this model, got 128"),
        ({"num_inference_steps": 20}, "num_inference_steps: expected"),
        ({"temperature": -1.0}, "temperature: expected"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, got 0.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_input_is_refused_in_words(pipe, wrong, message):
    with pytest.raises(InputError, match=message):
        pipe.generate(**{"prompt": "a red circle", **wrong})


def test_labels_are_read_once_for_the_same_texts_and_in_parts(pipe, monkeypatch):
    pictures = [image(seed) for seed in range(3)]
    tower, seen = pipe.model.tokenizer.text_tower, []
    labels = ["a red circle", "a blue star", "a green ring", "a red star", "a circle"]
    whole = pipe.classify(pictures, labels)
    monkeypatch.setattr("spar.inference.dualtoken.LABELS_AT_ONCE", 2)
    pipe.classify(pictures[0], ["a star"])
    hook = tower.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    try:
        assert pipe.classify(pictures, labels) == whole and seen == [2, 2, 1]
        assert pipe.classify(pictures, labels) == whole and seen == [2, 2, 1]
        pipe.classify(pictures[0], labels[:1])
        assert seen == [2, 2, 1, 1]
    finally:
        hook.remove()


def test_the_image_loss_is_the_codes_cross_entropy(pipe):
    texts = ["a red circle", "two blue stars"]
    losses = pipe.image_loss([image(0), image(1)], texts)
    codes, tokens = pipe.encode(image(1)), pipe.prompts.generation([texts[1]])
    with torch.no_grad():
        logits = pipe.model.image_logits(tokens.ids, tokens.mask, codes)
    by_hand = [
        float(-logits[name].log_softmax(-1).gather(-1, getattr(codes, name).flatten(0, 2)[..., None]).mean())
        for name in logits
    ]
    assert losses[1] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    assert pipe.image_loss(image(0), texts[0])[0] == pytest.approx(losses[0], rel=1e-4)


def test_an_image_may_be_drawn_of_a_layout_in_its_prompts_place(pipe):
    text = "a small red circle on column two row one on a gray background"
    given = pipe.generate("a red circle", layout=text, seed=3)
    written = pipe.generate(text, seed=3)
    assert torch.equal(given.codes.pixel, written.codes.pixel)
    assert given.metadata[0] == {**written.metadata[0], "prompt": "a red circle", "layout": text}
    assert "layout" not in pipe.generate("a red circle", layout=False, seed=3).metadata[0]
    own = pipe.generate("a red circle", layout=True, num_images_per_prompt=2, seed=3)
    texts = [values["layout"] for values in own.metadata]
    assert texts == pipe.write_layouts(["a red circle"] * 2, seed=3)
    for number, one in enumerate(texts):
        again = pipe.generate("a red circle", layout=one, seed=3 + number).codes.pixel
        assert torch.equal(own.codes.pixel[number], again[0])
    with pytest.raises(InputError, match="layout: .*unknown words elephant"):
        pipe.generate("a red circle", layout="an elephant")


def test_a_model_that_was_taught_to_writes_layouts_unless_it_is_told_not_to(pipe):
    bundle = replace(pipe.bundle, sampling=replace(pipe.bundle.sampling, layout=True))
    own = DualTokenPipeline(bundle)
    assert own.generate("a red circle", seed=1).metadata[0]["layout"] == own.write_layouts("a red circle", seed=1)[0]
    plain = own.generate("a red circle", layout=False, seed=1)
    assert plain.metadata[0]["no_layout"] is True
    assert torch.equal(plain.codes.pixel, pipe.generate("a red circle", seed=1).codes.pixel)
