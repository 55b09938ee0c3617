"""SPAR as a pipeline of diffusers: the same pixels, by diffusers' conventions."""

import json
import re
import types

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spar import SparDiffusionPipeline, SparPipeline
from spar.common.errors import InputError
from spar.inference.diffusers_call import seeds_of

STEPS = {"num_inference_steps": 3}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tiny_run):
    return tiny_run.path / "model"


@pytest.fixture(scope="module")
def own(folder) -> SparPipeline:
    return SparPipeline.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture
def pipe(folder) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder)


def fresh(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_diffusers_opens_a_folder_and_draws_the_same_pixels(pipe, own, folder):
    assert type(pipe) is SparDiffusionPipeline and {*pipe.components} == {"network"}
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "SparDiffusionPipeline"
    wanted = own.generate(PROMPT, seed=3, num_images_per_prompt=2, **STEPS).images
    given = pipe(PROMPT, generator=fresh(3), num_images_per_prompt=2, **STEPS).images
    assert all(map(same, given, wanted))
    (given,) = pipe([PROMPT, PROMPT], generator=[fresh(3), fresh(4)], return_dict=False, **STEPS)
    assert all(map(same, given, wanted))


def test_with_an_image_it_edits(pipe, own):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    wanted = own.edit(picture, "remove the red circle", seed=3, **STEPS).images[0]
    assert same(pipe("remove the red circle", picture, generator=fresh(3), **STEPS).images[0], wanted)


def test_a_layout_is_the_pipelines_own(pipe, own):
    text = "a large red circle on column two row three on a navy background"
    for layout in (text, True, False):
        made = pipe("a red circle", layout=layout, generator=torch.Generator().manual_seed(3), num_inference_steps=3)
        wanted = own.generate("a red circle", layout=layout, seed=3, num_inference_steps=3)
        assert np.array_equal(np.asarray(made.images[0]), np.asarray(wanted.images[0]))
        edited = pipe("remove the circle", made.images[0], layout=layout, generator=fresh(3), **STEPS)
        wanted = own.edit(made.images[0], "remove the circle", layout=layout, seed=3, **STEPS)
        assert np.array_equal(np.asarray(edited.images[0]), np.asarray(wanted.images[0]))


def test_types_of_output(pipe, own):
    image = pipe(PROMPT, generator=fresh(3), **STEPS).images[0]
    array = pipe(PROMPT, generator=fresh(3), output_type="np", **STEPS).images
    tensor = pipe(PROMPT, generator=fresh(3), output_type="pt", **STEPS).images
    assert array.shape == (1, 64, 64, 3) and tensor.shape == (1, 3, 64, 64)
    assert np.array_equal((array[0] * 255).round().astype(np.uint8), np.asarray(image))
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array[0])
    latent = pipe(PROMPT, generator=fresh(3), output_type="latent", **STEPS).images
    with torch.no_grad():
        decoded = own.model.decode(latent)
    assert np.abs(decoded[0].permute(1, 2, 0).numpy() - array[0]).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(InputError, match="output_type: expected one of pil, np, pt, latent, got 'jpg'"):
        pipe(PROMPT, output_type="jpg")


def test_a_used_generator_draws_other_images_again_and_again(pipe):
    generator = fresh(3)
    first, second = (pipe(PROMPT, generator=generator, **STEPS).images[0] for _ in range(2))
    assert not same(first, second)
    generator = fresh(3)
    again = [pipe(PROMPT, generator=generator, **STEPS).images[0] for _ in range(2)]
    assert same(again[0], first) and same(again[1], second)
    assert seeds_of(None) is None and seeds_of([fresh(5), fresh(7)]) == [5, 7]


def test_a_fresh_generator_of_any_device_gives_its_own_seed(monkeypatch):
    class Generator:
        """One of another device, whose state begins with its seed and the number of draws."""

        def __init__(self, device):
            self.device, self.seed, self.draws = device, 0, 0

        def manual_seed(self, seed):
            self.seed, self.draws = seed, 0
            return self

        def initial_seed(self):
            return self.seed

        def get_state(self):
            return torch.tensor([self.seed, self.draws, *range(42)], dtype=torch.uint8)

    def randint(_high, _shape, *, generator, device):
        generator.draws += 1
        return torch.tensor(1000 + generator.draws)

    own = {"Generator": Generator, "randint": randint, "equal": torch.equal}
    monkeypatch.setattr("spar.inference.diffusers_call.torch", types.SimpleNamespace(**own))
    generator = Generator(types.SimpleNamespace(type="mps")).manual_seed(7)
    assert [seeds_of(generator) for _ in range(3)] == [7, 1002, 1003]


def test_what_is_no_generator_or_callback_is_refused_and_an_empty_negative_prompt_asks_for_nothing(pipe, own):
    for given in (5, [5], "cpu", [fresh(1), None]):
        with pytest.raises(InputError, match="generator: expected a torch.Generator, or one for each image, got"):
            pipe(PROMPT, generator=given)
    with pytest.raises(InputError, match="callback_on_step_end: expected a function, got 5"):
        pipe(PROMPT, callback_on_step_end=5)
    wanted = own.generate([PROMPT] * 2, seed=3, num_inference_steps=1).images
    for negative in ("", " ", ["", ""], None):
        keywords = {"negative_prompt": negative, "callback_on_step_end_tensor_inputs": None, "num_inference_steps": 1}
        for one in (pipe, own):
            assert all(map(same, one([PROMPT] * 2, generator=fresh(3), **keywords).images, wanted))
    for wrong, words in ((["", "red"], "negative_prompt: expected some words"), ([], "at least one negative_prompt")):
        with pytest.raises(InputError, match=words):
            pipe([PROMPT] * 2, negative_prompt=wrong)


def test_a_callback_sees_each_step_and_may_stop(pipe):
    seen = []
    pipe(PROMPT, callback_on_step_end=lambda *given: seen.append(given), generator=fresh(3), **STEPS)
    assert [(one[0] is pipe, one[1], [*one[3]]) for one in seen] == [(True, step, ["latents"]) for step in range(3)]

    def stop(one, step, _time, _tensors):
        one._interrupt = step == 1

    image = pipe(PROMPT, callback_on_step_end=stop, generator=fresh(3), **STEPS).images[0]
    assert image.size == (64, 64)
    with pytest.raises(InputError, match="expected latents, got prompt_embeds"):
        pipe(PROMPT, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_it_moves_casts_saves_and_loads_as_a_pipeline_does(pipe, own, folder, tmp_path):
    assert pipe.to("cpu", torch.bfloat16) is pipe and pipe.dtype == torch.bfloat16
    assert {value.dtype for value in pipe.network.model.parameters()} == {torch.float32}  # as stored
    half = SparPipeline.from_pretrained(folder, dtype="bfloat16", device="cpu").generate(PROMPT, seed=3, **STEPS)
    assert same(pipe(PROMPT, generator=fresh(3), **STEPS).images[0], half.images[0])
    pipe.to(torch.float32).save_pretrained(tmp_path / "saved")
    pipe.set_progress_bar_config(disable=True)
    loaded = SparDiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    wanted = own.generate(PROMPT, seed=3, **STEPS).images[0]
    assert same(loaded(PROMPT, generator=fresh(3), **STEPS).images[0], wanted)
    assert same(SparDiffusionPipeline(loaded.network)(PROMPT, generator=fresh(3), **STEPS).images[0], wanted)


def test_offload_is_the_pipelines_own_and_a_device_ends_it(pipe, monkeypatch):
    made = []

    def build(*given, **keywords):
        made.append((given[2], keywords))
        return SparPipeline(*given[:2], torch.device("cpu"))

    monkeypatch.setattr("spar.inference.diffusers_pipeline.SparPipeline", build)
    pipe.enable_model_cpu_offload(gpu_id=0, device="cuda:1")
    pipe._pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert pipe._pipeline().progress is False  # the same one
    pipe.to("cpu")
    pipe._pipeline()
    assert made == [(torch.device("cuda:0"), {"offload": True}), (torch.device("cpu"), {"offload": False})]


def test_what_diffusers_has_and_this_pipeline_has_not_is_refused(pipe, tmp_path):
    for call in (pipe.enable_sequential_cpu_offload, pipe.enable_group_offload, lambda: pipe.push_to_hub("me/it")):
        with pytest.raises(InputError, match="is not for this pipeline"):
            call()
    with pytest.raises(InputError, match="expected a folder alone, got push_to_hub"):
        pipe.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()


def test_every_keyword_of_loading_has_an_effect_or_is_refused(folder, pipe, monkeypatch):
    load = SparDiffusionPipeline.from_pretrained
    for name, value in {
        "device_map": "cuda", "token": "hf_x", "cache_dir": "/tmp", "variant": "fp16", "local_files_only": True,
        "nonsense": 1,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: expected none of them for a SPAR folder"):
            load(folder, **{name: value})
    with pytest.raises(InputError, match="revision: a local folder has none, got 'v1'"):
        load(folder, revision="v1")
    with pytest.raises(InputError, match="torch_dtype: expected it or dtype"):
        load(folder, torch_dtype="bfloat16", dtype="float32")
    with pytest.raises(InputError, match="dtype, revision: expected none of them"):
        load(folder, network=pipe.network, dtype="bfloat16", revision="v1")
    asked = []
    monkeypatch.setattr("spar.inference.diffusers_pipeline.model_folder", lambda name: asked.append(name) or folder)
    assert load("me/it", revision="v1", variant=None, low_cpu_mem_usage=True, dtype="bfloat16").dtype == torch.bfloat16
    load("hf://me/it@v1", revision="v1")
    with pytest.raises(InputError, match="revision: expected that of hf://me/it@v2, or none, got 'v1'"):
        load("me/it@v2", revision="v1")
    assert asked == ["hf://me/it@v1"] * 2


def test_the_own_pipeline_takes_what_a_user_of_diffusers_types(pipe, folder):
    half = SparPipeline.from_pretrained(folder, torch_dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.to("cpu", torch.float32) is half and half.dtype == torch.float32
    wanted = pipe(PROMPT, generator=fresh(3), output_type="np", **STEPS).images
    assert np.array_equal(half(PROMPT, generator=fresh(3), output_type="np", **STEPS).images, wanted)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    edited = pipe("remove the red circle", image=picture, generator=fresh(3), **STEPS).images[0]
    for image in (picture, np.asarray(picture), torch.from_numpy(np.array(picture)).permute(2, 0, 1)):
        assert same(half("remove the red circle", image=image, generator=fresh(3), **STEPS).images[0], edited)

    def stop(one, step, _time, _tensors):
        one._interrupt = step == 1

    assert half(PROMPT, callback_on_step_end=stop, **STEPS).images[0].size == (64, 64)
    with pytest.raises(InputError, match="output_type: expected one of"):
        half(PROMPT, output_type="jpg")
    for given in ({"seed": 3}, {"callback": print}):  # the own names, which this call would not hear
        with pytest.raises(InputError, match=f"diffusers' names, got {[*given][0]}"):
            half(PROMPT, **given)
    with pytest.raises(InputError, match="torch_dtype: expected it or dtype"):
        SparPipeline.from_pretrained(folder, torch_dtype="bfloat16", dtype="float32")


def test_numbers_of_numpy_are_numbers(own):
    wanted = own.generate(PROMPT, seed=3, num_images_per_prompt=2, guidance_scale=2.5, **STEPS)
    counts = {"num_inference_steps": np.int64(3), "num_images_per_prompt": np.int32(2)}
    given = own.generate(PROMPT, seed=np.int64(3), guidance_scale=np.float32(2.5), **counts)
    assert given.metadata == wanted.metadata and all(map(same, given.images, wanted.images))
    wide = own.generate([PROMPT] * 2, height=np.int64(64), num_images_per_prompt=np.uint8(200), num_inference_steps=1)
    assert len(wide.images) == 400
    assert own.generate([PROMPT] * 2, seed=np.arange(3, 5), guidance_scale=2.5, **STEPS).seeds == [3, 4]
    json.dumps(given.metadata)
    for seed in (np.float64(3), np.bool_(True), np.int64(-1), "3", np.array(3), torch.tensor(3)):
        with pytest.raises(InputError, match="seed: expected"):
            own.generate(PROMPT, seed=seed, **STEPS)


def test_weights_in_a_type_stay_in_it(folder):
    half = SparPipeline.from_pretrained(folder, dtype="bfloat16", weights="dtype", device="cpu")
    assert half.to("cpu").to(torch.bfloat16) is half
    with pytest.raises(InputError, match=r"to: expected torch.bfloat16, in which the weights are, got torch.float32"):
        half.to(torch.float32)
    with pytest.raises(InputError, match="dtype: expected float32, bfloat16 or float16"):
        half.to(torch.float64)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "named", "shown"),
    [(("bfloat16",), {}, "'bfloat16'"), (("gpu",), {}, "'gpu'"), ((), {"dtype": "float16"}, "dtype='float16'"),
     (("cpu", 3), {}, "'cpu', 3"), ((), {"devce": "cpu"}, "devce='cpu'")],
)  # fmt: skip
def test_what_is_no_place_to_move_to_is_refused_in_words(own, folder, given, named, shown):
    before = own.device, own.dtype
    message = re.escape(f"to: expected a device, a type such as torch.bfloat16, or both, got {shown} (")
    for pipe in (own, SparDiffusionPipeline.from_pretrained(folder)):
        with pytest.raises(InputError, match=message):
            pipe.to(*given, **named)
    assert (own.device, own.dtype) == before
