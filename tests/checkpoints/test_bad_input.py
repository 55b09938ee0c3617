"""What a stranger gets wrong with published checkpoints: each ends with one line that names it, and nothing is left."""

import importlib.util
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.cli.main import main

PARTS = ("--mllm", "mllm", "--autoencoder", "autoencoder", "--dit", "dit")
BUILD = ("build", "spar-1b", *PARTS, "-o", "out")
MODEL = ("convert", "unilip", "model", *PARTS, "-o", "out")
FILE = ("convert", "unilip", "tokenizer.pth", "--factor", "10.6", *PARTS, "-o", "out")
EXPORT = ("export", "internvl", "spar-model", "-o", "out")
PUSH = ("push", "spar-model", "me/model", "--dry-run")
SHARD, INDEX = "mllm/model-00002-of-00005.safetensors", "mllm/model.safetensors.index.json"
DIT, WEIGHTS = "dit/transformer/diffusion_pytorch_model.safetensors", "spar-model/language/model.safetensors"


@pytest.fixture(scope="module")
def pristine(foreign, tmp_path_factory) -> Path:
    """All kinds of sources, in the published layouts; of SPAR a whole folder. Read them, never write into them."""
    path = Path(__file__).with_name("test_from_unilip.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    unilip = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unilip)
    root = tmp_path_factory.mktemp("sources")
    original = unilip.Original(foreign)
    unilip.write_published(foreign, root, original)
    shutil.rmtree(root / "mllm")
    foreign.save_hf(foreign.mllm(layers=6), root / "mllm", shard="100KB")  # as many as spar-1b's connector copies
    foreign.save_dit(foreign.dit(layers=6), root / "dit")
    shutil.copytree(BUNDLED_MODELS["spar"], root / "spar-model")
    return root


@pytest.fixture
def sources(pristine, tmp_path, monkeypatch) -> Path:
    """The same, as the working folder, to be damaged."""
    monkeypatch.chdir(shutil.copytree(pristine, tmp_path / "work"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Path()


def gone(name: str) -> Callable[..., None]:
    return lambda _: Path(name).unlink()


def cut(name: str) -> Callable[..., None]:
    return lambda _: Path(name).write_bytes(Path(name).read_bytes()[: Path(name).stat().st_size // 2])


def text(name: str, content: str) -> Callable[..., None]:
    def write(_) -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)

    return write


def mapped(key: str, file: str) -> Callable[..., None]:
    def edit(_) -> None:
        values = json.loads(Path(INDEX).read_text())
        values["weight_map"][key] = file
        Path(INDEX).write_text(json.dumps(values))

    return edit


def retyped(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """Other numbers in a file's first matrix."""

    def edit(foreign) -> None:
        def first(tensors: dict[str, torch.Tensor]) -> None:
            key = next(key for key, value in sorted(tensors.items()) if value.dim() == 2)
            tensors[key] = change(tensors[key])

        foreign.edit_tensors(Path(name), first)

    return edit


def linked(_) -> None:
    Path("spar-model/more.json").symlink_to("/etc/hostname")


class Code:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def nothing(_) -> None:
    pass


WORDS = "mllm/tokenizer.json"
CASES = {
    "a missing shard": (BUILD, gone(SHARD), f"{Path(SHARD).name} is missing in mllm"),
    "shards without an index": (BUILD, gone(INDEX), "found only model-00001.*, without an index"),
    "an index of no such file": (BUILD, mapped("lm_head.weight", "x.safetensors"), "x.safetensors is missing"),
    "an index of no such tensor": (BUILD, mapped("more", Path(SHARD).name), "disagree about 1 tensors"),
    "an index of a file elsewhere": (BUILD, mapped("more", "../x"), "expected names of files beside it, got '../x'"),
    "half an index": (BUILD, cut(INDEX), f"{INDEX} is not readable JSON"),
    "half a shard": (BUILD, cut(SHARD), f"{SHARD} is damaged or no safetensors file"),
    "a pointer in place of a file": (BUILD, text(DIT, "version https://git-lfs"), f"{DIT} is damaged or no"),
    "whole numbers": (BUILD, retyped(DIT, torch.Tensor.char), r"1 of another type \(\S+ is int8, expected float32\)"),
    "weights not finite": (BUILD, retyped(DIT, lambda x: x * torch.nan), f"{DIT}: expected finite weights, got "),
    "no configuration": (BUILD, gone("mllm/config.json"), "config.json is missing in mllm"),
    "half a configuration": (BUILD, cut("dit/transformer/config.json"), "config.json is not readable JSON"),
    "half a scheduler": (BUILD, cut("dit/scheduler/scheduler_config.json"), "config.json is not readable JSON"),
    "no words": (BUILD, gone(WORDS), "tokenizer.json or vocab.json and merges.txt, found none"),
    "half the words": (BUILD, cut(WORDS), "mllm holds no readable text tokenizer"),
    "half the words' settings": (BUILD, cut("mllm/tokenizer_config.json"), "mllm holds no readable text tokenizer"),
    "another part": ((*BUILD[:2], "--mllm", "dit", *BUILD[4:]), nothing, "dit: expected"),
    "a model of ours": ((*BUILD[:2], "--mllm", "spar-model", *BUILD[4:]), nothing, "spar-model: expected"),
    "a recipe of another system": (("build", "dualtoken-3b", *BUILD[2:]), nothing, "--mllm.*: not for this system"),
    "half of UniLIP": (MODEL, cut("model/model.safetensors"), "model/model.safetensors is damaged"),
    "UniLIP without words of its parts": (MODEL, gone(WORDS), "mllm: expected a text tokenizer"),
    "UniLIP without its factor": (
        MODEL, lambda foreign: foreign.edit_json(Path("model/config.json"), unilip_factor=...), "above 0, got None"
    ),
    "parts that another machine has": (
        ("convert", "unilip", "model", "-o", "out"),
        lambda foreign: foreign.edit_json(Path("model/config.json"), mllm_hf_path="/data/InternVL3"),
        "mllm: there is no such folder or file, got '/data/InternVL3'",
    ),
    "no UniLIP": (("convert", "unilip", "mllm", *MODEL[3:]), nothing, "expected a checkpoint of UniLIP"),
    "half a pickled file": (FILE, cut("tokenizer.pth"), r"is damaged: PytorchStreamReader failed [^.]+\n"),
    "a page in place of a file": (FILE, text("tokenizer.pth", "<html>"), "is damaged: Unsupported operand 60\n"),
    "code": (FILE, lambda _: torch.save({"a": Code()}, "tokenizer.pth"), "Trying to load unsupported GLOBAL posix"),
    "settings of a training": (
        FILE, lambda _: torch.save({"a": Namespace()}, "tokenizer.pth"),
        "damaged: Unsupported global: GLOBAL argparse.Namespace was not an allowed global by default\n",
    ),
    "numbers beside tensors": (
        FILE, lambda _: torch.save({"epoch": 3}, "tokenizer.pth"), "tensors, got others too, such as 'epoch'"
    ),
    "other contents": ((*BUILD, "--overwrite"), text("out/mine.txt", "mine"), "the folder 'out' has other contents"),
    "a folder of others": ((*BUILD, "--overwrite"), text("out/config.json", "{}"), "out exists and is no SPAR folder"),
    "a file as the folder": (MODEL, text("out", "mine"), "output: expected a folder, but 'out' is not a folder"),
    "a source as the folder": ((*BUILD[:-1], "mllm", "--overwrite"), nothing, "mllm exists and is no SPAR folder"),
    "an earlier model": ((*BUILD[:-1], "spar-model"), nothing, "exists already; give another name, or --overwrite"),
    "export of InternVL": ((*EXPORT[:2], "mllm", *EXPORT[3:]), nothing, "mllm is no spar folder"),
    "export of half a model": (EXPORT, cut(WEIGHTS), f"{WEIGHTS} is damaged or no safetensors file"),
    "export without weights": (EXPORT, gone(WEIGHTS), "model.safetensors is missing in spar-model/language"),
    "export not finite": (EXPORT, retyped(WEIGHTS, lambda x: x * torch.inf), f"{WEIGHTS}: expected fin"),
    "export of whole numbers": (EXPORT, retyped(WEIGHTS, torch.Tensor.char), "int8, expected float32"),
    "export without words": (EXPORT, gone("spar-model/text_tokenizer/tokenizer.json"), "tokenizer.json is missing"),
    "export over a model": ((*EXPORT[:-1], "spar-model", "--overwrite"), nothing, "'spar-model' has other contents"),
    "push of InternVL": (("push", "mllm", *PUSH[2:]), nothing, "expected a model_type of spar, dualtoken"),
    "push of half a model": (PUSH, cut(WEIGHTS), f"{WEIGHTS} is damaged or no safetensors file"),
    "push without weights": (PUSH, gone(WEIGHTS), "model.safetensors is missing in spar-model/language"),
    "push of half a manifest": (PUSH, cut("spar-model/manifest.json"), "manifest.json is not readable JSON"),
    "push of a link": (PUSH, linked, "expected plain files, but more.json is a link"),
    "push to no repository": ((*PUSH[:2], "model", "--dry-run"), nothing, "REPO_ID: expected OWNER/NAME, got 'model'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong_and_nothing_is_left(foreign, sources, capfd, name):
    words, damage, message = CASES[name]
    damage(foreign)
    before = {path: path.is_file() and path.read_bytes() for path in sources.rglob("*")}
    assert main([*words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("spar: error: ") and err.count("\n") == 1 and len(err) < 400
    assert re.search(message, err), err
    assert ".part" not in err and {path: path.is_file() and path.read_bytes() for path in sources.rglob("*")} == before


@pytest.mark.parametrize("words", [BUILD, MODEL, EXPORT])
def test_a_folder_without_permission_is_refused_before_the_work(sources, capfd, monkeypatch, words):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for name in ("mllm", "model", "spar-model"):
        shutil.rmtree(name)  # nothing is read before
    assert main([*words]) == 2
    assert "cannot be written" in capfd.readouterr().err and not Path("out").exists()
