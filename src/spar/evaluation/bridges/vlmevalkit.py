"""SPAR as a model of VLMEvalKit (commit e8e78f0), with a launcher: VLMEvalKit itself has no plug-in.

    python -m spar.evaluation.bridges.vlmevalkit --spar-model FOLDER --data MME --work-dir outputs

The launcher adds the class to `vlmeval.vlm` and a model to `vlmeval.config.supported_VLM`, then calls `main` of
VLMEvalKit's own `run.py` with all other arguments.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from spar.checkpoints.bundled import DEFAULT_MODEL
from spar.common.errors import InputError

CLASS_NAME = "Spar"  # in `vlmeval.vlm`
RUNNER = "vlmevalkit_run"  # the module that run.py is loaded as


class VlmEvalKitModel:
    """The methods of VLMEvalKit's `BaseModel` that a model has of its own; `model_class` joins the two.

    Answers take the likeliest token each time, as VLMEvalKit's InternVL does. The prompts are the data sets' own.

    Args:
        model: a folder, the name of a bundled model, or `hf://OWNER/NAME`.
        dtype: of matrix products; by default as in `SparPipeline.from_pretrained`, and so the device.
        device: of the model.
        max_tiles: of an image; by default the model's own number.
        max_new_tokens: of an answer; by default as many as fit.
    """

    INTERLEAVE = True  # a message may have several images

    def __init__(
        self, model: str = DEFAULT_MODEL, dtype: str | None = None, device: str | None = None,
        max_tiles: int | None = None, max_new_tokens: int | None = None,
    ) -> None:  # fmt: skip
        from spar.inference.loading import load_pipeline

        super().__init__()
        self.pipeline = load_pipeline(model, dtype=dtype, device=device, progress=False)
        self.settings: dict[str, Any] = {"max_tiles": max_tiles, "max_new_tokens": max_new_tokens}

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to one message, a list of `{"type": "text" | "image", "value": text or path}`."""
        return self._answer([{"role": "user", "content": _parts(message)}])

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a conversation, messages `{"role": ..., "content": as in generate_inner}`."""
        return self._answer([{"role": turn["role"], "content": _parts(turn["content"])} for turn in message])

    def _answer(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return "".join(self.pipeline.chat(messages, **self.settings))


def _parts(items: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A message in the form of `chat`, which refuses a video."""
    return [{"type": item["type"], item["type"]: item["value"]} for item in items]


def model_class() -> type:
    """The class for `vlmeval.vlm`, whose base is VLMEvalKit's."""
    base = importlib.import_module("vlmeval.vlm.base").BaseModel
    return type(CLASS_NAME, (VlmEvalKitModel, base), {"__doc__": VlmEvalKitModel.__doc__, "__module__": __name__})


def register(name: str, **settings: Any) -> None:
    """Make `--model NAME` known to VLMEvalKit, and the class to its `--config`."""
    spar = model_class()
    setattr(importlib.import_module("vlmeval.vlm"), CLASS_NAME, spar)
    importlib.import_module("vlmeval.config").supported_VLM[name] = partial(spar, **settings)


def find_runner() -> Path:
    """VLMEvalKit's `run.py`, which lies beside its package in a checkout and in no wheel.

    Raises:
        InputError: no package, or one without `run.py`.
    """
    found = importlib.util.find_spec("vlmeval")
    if found is None or not found.submodule_search_locations:
        raise InputError(
            "VLMEvalKit: expected its checkout as the current folder or installed with pip install -e, got no package "
            "vlmeval"
        )
    path = Path(next(iter(found.submodule_search_locations))).parent / "run.py"
    if not path.is_file():
        raise InputError(f"VLMEvalKit: expected run.py beside its package, as in a checkout, got none at {str(path)!r}")
    return path


def load_runner(path: Path) -> ModuleType:
    """`run.py` as a module. It is loaded before anything else of VLMEvalKit: it first gives each process its GPUs."""
    spec = importlib.util.spec_from_file_location(RUNNER, path)
    if spec is None or spec.loader is None:
        raise InputError(f"VLMEvalKit: expected a Python file, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[RUNNER] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    """Register SPAR and run VLMEvalKit; without `--model` and `--config` on SPAR alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--spar-model", dest="model", default=DEFAULT_MODEL)
    parser.add_argument("--spar-name", dest="name", default="SPAR")
    parser.add_argument("--spar-dtype", dest="dtype")
    parser.add_argument("--spar-device", dest="device")
    parser.add_argument("--spar-max-tiles", dest="max_tiles", type=int)
    parser.add_argument("--spar-max-new-tokens", dest="max_new_tokens", type=int)
    own, others = parser.parse_known_args(arguments)
    settings = vars(own)
    name = settings.pop("name")
    if not any(word.split("=")[0] in ("--model", "--config") for word in others):
        others += ["--model", name]
    path = find_runner()
    runner = load_runner(path)
    register(name, **settings)
    sys.argv = [str(path), *others]  # run.py reads its arguments and writes them into the run's status
    runner.load_env()
    runner.main()


if __name__ == "__main__":
    main()
