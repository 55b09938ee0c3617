"""The ComfyUI nodes by their contract: imported and run as ComfyUI does, and compared with the pipeline."""

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spar.common.errors import InputError
from spar.inference.pipeline import SparPipeline

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
TYPES = {"INT": int, "FLOAT": float, "STRING": str}


@pytest.fixture(scope="module")
def comfyui() -> ModuleType:
    """ComfyUI's `load_custom_node`: the folder's __init__.py under a name made of its path."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tiny_run) -> str:
    return str(tiny_run.path / "model")


def defaults(node: type) -> dict:
    """The widgets' values in a new node; sockets have none."""
    values = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        if isinstance(kind, list):
            values[name] = kind[0]
        elif kind in TYPES:
            values[name] = options[0]["default"]
    return values


def run(comfyui: ModuleType, name: str, **given):
    """One node as the executor runs it: by keywords, a fresh object, the result a tuple of its outputs."""
    node = comfyui.NODE_CLASS_MAPPINGS[name]
    out = getattr(node(), node.FUNCTION)(**{**defaults(node), **given})
    assert isinstance(out, tuple) and len(out) == len(node.RETURN_TYPES)
    for kind, value in zip(node.RETURN_TYPES, out, strict=True):
        if kind == "IMAGE":
            assert value.dtype == torch.float32 and value.dim() == 4 and value.shape[-1] == 3
            assert value.device.type == "cpu" and 0 <= float(value.min()) and float(value.max()) <= 1
    return out[0]


@pytest.fixture(scope="module")
def model(comfyui, folder) -> SparPipeline:
    return run(comfyui, "SparLoad", folder=folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))


def test_every_node_keeps_the_contract(comfyui):
    assert set(comfyui.NODE_CLASS_MAPPINGS) == set(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        assert inspect.ismethod(node.INPUT_TYPES) and node.INPUT_TYPES.__self__ is node
        assert isinstance(node.RETURN_TYPES, tuple) and len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert node.CATEGORY == "SPAR" and node.__doc__
        inputs = node.INPUT_TYPES()
        assert set(inputs) == {"required"}
        taken = list(inspect.signature(getattr(node, node.FUNCTION)).parameters)[1:]
        assert set(taken) == set(inputs["required"])
        for kind, *options in inputs["required"].values():
            assert isinstance(kind, list) or kind in {*TYPES, "IMAGE", "SPAR_MODEL"}
            if kind in ("INT", "FLOAT"):
                (limits,) = options
                assert limits["min"] <= limits["default"] <= limits["max"]
                assert isinstance(limits["default"], TYPES[kind])


def test_a_node_gives_what_the_pipeline_gives(comfyui, model, noise):
    pixels = [Image.fromarray((one.numpy() * 255).round().astype(np.uint8)) for one in noise]

    def same(image: torch.Tensor, wanted: list[Image.Image]) -> bool:
        return np.array_equal((image.numpy() * 255).round(), np.stack([np.asarray(one) for one in wanted]))

    drawn = run(
        comfyui, "SparGenerate", model=model, prompt="a red circle", negative_prompt="a blue star", width=32, height=72,
        batch_size=2, seed=5, steps=2, guidance=3.0,
    )
    out = model.generate(
        "a red circle", negative_prompt="a blue star", width=32, height=72, num_images_per_prompt=2, seed=5,
        num_inference_steps=2, guidance_scale=3.0,
    )
    assert drawn.shape == (2, 72, 32, 3) and same(drawn, out.images)
    edited = run(comfyui, "SparEdit", model=model, image=noise, instruction="remove the red circle", seed=7, steps=2)
    assert same(edited, model.edit(pixels, "remove the red circle", seed=[7, 8], num_inference_steps=2).images)
    assert same(run(comfyui, "SparReconstruct", model=model, image=noise), model.reconstruct(pixels).images)
    question = "what color is the background ?"
    answers = run(comfyui, "SparUnderstand", model=model, image=noise, question=question, max_new_tokens=4)
    assert answers == model.understand(pixels, question, max_new_tokens=4).texts and len(answers) == 2


def test_a_widget_at_its_lowest_leaves_the_choice_to_the_model(comfyui, model, monkeypatch):
    seen, out = [], SimpleNamespace(images=[Image.new("RGB", (8, 8))])
    monkeypatch.setattr(model, "generate", lambda *_, **given: seen.append(given) or out)
    run(comfyui, "SparGenerate", model=model, prompt="a red circle")
    assert seen == [
        {"width": None, "height": None, "num_images_per_prompt": 1, "seed": [0], "num_inference_steps": None,
         "guidance_scale": None, "negative_prompt": None, "callback": None}
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, 2**64 - 1])
def test_any_seed_of_the_widget_draws(comfyui, model, seed):
    drawn = run(comfyui, "SparGenerate", model=model, prompt="a red circle", seed=seed, batch_size=2, steps=1)
    again = model.generate("a red circle", seed=(seed + 1) % 2**63, num_inference_steps=1).images[0]
    assert np.abs((drawn[1].numpy() * 255).round() - np.asarray(again)).max() <= 1


def test_transparent_and_grey_images_come_in_too(comfyui, model, noise):
    clear = torch.cat([noise, torch.zeros(2, 64, 64, 1)], dim=-1)
    white = run(comfyui, "SparReconstruct", model=model, image=torch.ones(2, 64, 64, 3))
    assert torch.equal(run(comfyui, "SparReconstruct", model=model, image=clear), white)
    grey = noise[..., :1]
    wanted = run(comfyui, "SparReconstruct", model=model, image=grey.expand(-1, -1, -1, 3))
    assert torch.equal(run(comfyui, "SparReconstruct", model=model, image=grey), wanted)


class Stopped(Exception):
    """In the place of ComfyUI's InterruptProcessingException."""


def test_the_bar_moves_and_cancel_stops_between_two_steps(comfyui, model, noise, monkeypatch):
    seen, stop_at = [], 99

    class ProgressBar:
        def __init__(self, total: int) -> None:
            seen.append(("new", total))

        def update_absolute(self, value: int, total: int | None = None) -> None:
            seen.append((value, total))

    def throw() -> None:
        if len(seen) > stop_at:
            raise Stopped

    utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    utils.ProgressBar, management.throw_exception_if_processing_interrupted = ProgressBar, throw
    for module in (ModuleType("comfy"), utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    run(comfyui, "SparGenerate", model=model, prompt="a red circle", steps=3)
    assert seen == [("new", 3), (1, 3), (2, 3), (3, 3)]
    seen.clear()
    stop_at = 2
    with pytest.raises(Stopped):
        run(comfyui, "SparEdit", model=model, image=noise, instruction="remove the red circle", steps=5)
    assert seen == [("new", 5), (1, 5), (2, 5)]


def test_a_folder_that_was_written_anew_is_loaded_again(comfyui, tmp_path):
    changed = comfyui.NODE_CLASS_MAPPINGS["SparLoad"].IS_CHANGED
    others = {"device": "cpu", "dtype": "auto", "weights": "float32"}
    config = tmp_path / "config.json"
    config.write_text("{}")
    before = changed(folder=str(tmp_path), **others)
    assert changed(folder=str(tmp_path), **others) == before
    os.utime(config, (0, config.stat().st_mtime + 5))
    assert changed(folder=str(tmp_path), **others) != before
    assert changed(folder="", **others) == changed(folder=str(tmp_path / "nowhere"), **others) == 0


def test_bad_input_is_told_in_words(comfyui, model):
    with pytest.raises(InputError, match="expected a SPAR model folder"):
        run(comfyui, "SparLoad", folder="nowhere")
    with pytest.raises(InputError, match="prompt: expected some words"):
        run(comfyui, "SparGenerate", model=model)
    with pytest.raises(InputError, match="width: expected a multiple of 8"):
        run(comfyui, "SparGenerate", model=model, prompt="a red circle", width=63)


def test_the_nodes_take_a_model_of_dualtoken(comfyui, dual_run):
    model = run(comfyui, "SparLoad", folder=str(dual_run.path / "model"), device="cpu", dtype="float32")
    image = run(comfyui, "SparGenerate", model=model, prompt="a red circle", seed=3)
    own = np.asarray(model.generate("a red circle", seed=3).images[0], np.float32) / 255
    np.testing.assert_allclose(image[0].numpy(), own, atol=1e-6)
    assert run(comfyui, "SparReconstruct", model=model, image=image).shape == image.shape
    with pytest.raises(InputError, match="DualToken does not define editing"):
        run(comfyui, "SparEdit", model=model, image=image, instruction="remove it")
