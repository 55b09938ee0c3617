"""The contract of vLLM-Omni's diffusers backend (0.30), without it: how it finds, loads and calls a pipeline."""

import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spar import SparPipeline
from spar.common.errors import InputError
from spar.serving.vllm_omni import SparCapabilities, register

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tiny_run):
    return tiny_run.path / "model"


@pytest.fixture
def loaded(folder) -> DiffusionPipeline:
    """As its loader has it: with bfloat16 as torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cpu")
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def own(folder) -> SparPipeline:
    return SparPipeline.from_pretrained(folder, dtype="bfloat16", device="cpu")


def answer(pipe: DiffusionPipeline, sampling: dict, inputs: dict, seed: int, count: int = 1) -> list[Image.Image]:
    """A request: what the call does not take falls away, and three arguments are added."""
    accepted = set(inspect.signature(pipe.__call__).parameters)
    arguments = {name: value for name, value in (inputs | sampling).items() if value is not None and name in accepted}
    arguments |= {name: count for name in accepted if re.fullmatch(r"num_[a-z]+_per_prompt", name)}
    arguments |= {"output_type": "pil", "generator": torch.Generator("cpu").manual_seed(seed)}
    with torch.inference_mode():
        return pipe(**arguments).images


SAMPLING = {
    "num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64, "layers": 4, "resolution": 640,
    "num_frames": 1, "eta": 0.0, "extra_args": {},
}  # fmt: skip


def test_its_processes_are_told_of_the_pipeline(monkeypatch):
    (entry,) = importlib.metadata.entry_points(group="vllm_omni.general_plugins", name="spar")
    assert entry.load() is register
    told, registry = [], types.ModuleType("vllm_omni.diffusion.registry")
    registry.register_diffusion_model = lambda *names: told.append(names)
    for name in ("vllm_omni", "vllm_omni.diffusion"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm_omni.diffusion.registry", registry)
    register()
    register()
    assert told == [("SparDiffusionPipeline", "spar.serving.vllm_omni", "SparCapabilities")] * 2
    assert SparCapabilities.dummy_run_num_frames == 0
    with pytest.raises(InputError, match="expected --diffusion-load-format diffusers"):
        SparCapabilities(od_config=None)


def test_a_new_process_opens_the_folder_after_the_plugin_alone(folder):
    code = (
        "import sys, types\n"
        "for name in ('vllm_omni', 'vllm_omni.diffusion', 'vllm_omni.diffusion.registry'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['vllm_omni.diffusion.registry'].register_diffusion_model = print\n"
        "from spar.serving.vllm_omni import register\n"
        "register()\n"
        "from diffusers import DiffusionPipeline\n"
        f"print(type(DiffusionPipeline.from_pretrained({str(folder)!r})).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["SparDiffusionPipeline"], done.stderr[-2000:]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SparDiffusionPipeline" and "_diffusers_version" in index


def test_weights_and_constants_stay_in_float32(loaded):
    held = [*loaded.network.model.parameters(), *loaded.network.model.buffers()]
    assert {value.dtype for value in held if value.is_floating_point()} == {torch.float32}
    assert not hasattr(loaded, "transformer") and not hasattr(loaded, "vae")


def test_requests_are_answered_as_by_the_pipeline(loaded, own):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    wanted = own.generate(PROMPT, seed=7, num_images_per_prompt=2, **settings).images
    given = answer(loaded, SAMPLING, {"prompt": PROMPT, "negative_prompt": None}, seed=7, count=2)
    assert len(given) == 2 and all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    text = "remove the red circle"
    wanted = own.edit(picture, text, seed=7, **settings).images[0]
    for more in ({}, {"layout": False}, {"height": 512, "width": 512}):  # an edit has the image's own size
        given = answer(loaded, SAMPLING | more, {"prompt": text, "image": [picture]}, seed=7)
        assert np.array_equal(given[0], wanted)
