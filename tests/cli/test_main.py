"""The command line: every verb, what it refuses and how, and one real training with all that is done with its model."""

import gc
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InductorError

import spar
from spar.cli import console
from spar.cli.console import WRONG_INPUT
from spar.cli.failures import LESS_MEMORY
from spar.cli.main import VERBS, main
from spar.cli.parsing import parse
from spar.cli.recipe_flags import build_recipe, recipe_arguments
from spar.cli.result_arguments import Benchmark, EvalArguments
from spar.cli.train_arguments import TrainArguments
from spar.common import limits
from spar.common.errors import InputError
from spar.processing.images import to_pil
from spar.worlds.shapes.tokenizer import VOCABULARY

SAMPLING_FLAGS = ("--model", "--dtype", "--device", "--output", "-o", "--overwrite", "--seed", "--steps", "--guidance",
                  "--num-inference-steps", "--guidance-scale", "--num-images-per-prompt", "-n", "--negative-prompt",
                  "--grid", "--save-steps", "--sampler", "--guidance-interval", "--step-cache")
FLAGS = {
    "train": ("RECIPE", "--config", "--stage", "--run", "--resume", "--init-from", "--from-scratch", "--device",
              "--track", "--dry-run"),
    "plan": ("RECIPE", "--stage", "--gpus", "--gpu", "--mfu", "--strategy", "--grad-accum-steps",
             "--activation-checkpointing"),
    "cache": ("RECIPE", "--init-from", "--output", "--batch", "--device", "--precision"),
    "build": (
        "RECIPE", "--mllm", "--autoencoder", "--dit", "--vision", "--llm", "-o", "--revision", "--seed", "--overwrite"
    ),
    "convert": ("FORMAT", "PATH", "--mllm", "--autoencoder", "--dit", "--router", "--factor", "--recipe", "--vision",
                "--llm", "--settings", "-o"),
    "export": ("FORMAT", "MODEL", "-o", "--dtype", "--overwrite"),
    "push": ("FOLDER", "REPO_ID", "--public", "--message", "--dry-run"),
    "generate": (
        "PROMPT", *SAMPLING_FLAGS, "--prompts", "--format", "--batch", "--check", "--height", "--width", "--layout",
        "--no-layout",
    ),
    "edit": (
        "IMAGE", "INSTRUCTION", *SAMPLING_FLAGS, "--prompts", "--batch", "--check", "--format", "--images", "--layout",
        "--no-layout",
    ),
    "understand": ("IMAGE", "QUESTION", "--model", "--max-new-tokens", "--temperature", "--top-p", "--seed",
                   "--max-tiles"),
    "reconstruct": ("IMAGE", "--model", "-o", "--overwrite"),
    "info": ("PATH", "--json"),
    "eval": ("shapes-gen, shapes-edit, shapes-vqa, shapes-recon", "shapes-paraphrase, shapes-chat", "--model",
             "--limit", "--seed", "--steps", "--guidance", "--images-per-prompt", "--combinations", "-o"),
    "judge": ("BENCHMARK", "FOLDER", "--prompts", "--template", "--judge", "--endpoint",
              "--key-variable", "--images", "--parallel", "-o"),
    "compare": ("FIRST", "SECOND", "MORE", "--json", "--html", "--draw"),
    "study": ("STUDY", "-o", "--init-from", "--seeds", "--reuse", "--device"),
    "report": ("RUN", "-o"),
    "demo": ("-o", "--images", "--model"),
    "serve": ("--host", "--port", "--token-file", "--max-batch", "--max-queue", "--timeout", "--model"),
    "ui": ("--host", "--port", "--token-file", "--model"),
    "data": ("check", "convert"),
    "list": ("--json",),
    "doctor": ("--help",),
    "completion": ("SHELL", "bash"),
}  # fmt: skip


class FakePipe:
    """Plain images whose red channel is the seed; every call is written down."""

    image_size = 64
    system, tasks = "SPAR", ("generate", "edit", "understand", "reconstruct")
    manifest = {"recipe": "fake"}
    loaded = SimpleNamespace(sampling=SimpleNamespace(steps=20, guidance=4.5))

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []
        self.words: tuple[str, ...] = ("red",)  # of no world that is known
        tokenizer = SimpleNamespace(unk_token="?", get_vocab=lambda: dict.fromkeys(self.words))
        self.bundle = SimpleNamespace(text_tokenizer=tokenizer)
        self.model = torch.nn.Linear(2, 2)

    def run_metadata(self) -> dict:
        return {"dtype": "float32", "device": "cpu", "recipe": "fake"}

    def check_settings(self, keywords: dict) -> None:
        self.settings = keywords

    def _draw(self, count: int, seed: int | None) -> SimpleNamespace:
        seeds = [seed + index for index in range(count)] if isinstance(seed, int) else list(seed)
        assert len(seeds) == count
        images = [Image.new("RGB", (64, 64), (value % 256, 0, 0)) for value in seeds]
        routing = [
            SimpleNamespace(tokens=["red", "q"], kinds=["text", "query"], layers=(1, 2), weights=np.full((2, 2), 0.5))
            for _ in seeds
        ]
        shared = {"steps": 20, "guidance": 4.5, "decode_tile": None, "model": "spar", "spar": "9"}
        metadata = [{"seed": value, **shared} for value in seeds]
        return SimpleNamespace(images=images, seeds=seeds, routing=routing, metadata=metadata)

    def check_text(self, text: str, what: str) -> None:
        if "zebra" in text:
            raise InputError(f"{what}: no zebra is known")

    def preview(self, state: list[int]) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64), (value, value, value)) for value in state]

    def generate(self, prompt: Sequence[str], *, num_images_per_prompt: int = 1, seed=None, **keywords):
        if keywords.get("callback"):
            for done in (1, 2, 3):
                keywords["callback"](done, 3, [80 * done] * len(seed))
        keywords |= {"num_images_per_prompt": num_images_per_prompt, "seed": seed}
        self.calls.append(("generate", (prompt,), keywords))
        out = self._draw(len(prompt) * num_images_per_prompt, seed)
        for index, note in enumerate(out.metadata):
            note["prompt"] = prompt[index // num_images_per_prompt]
        return out

    def edit(self, image, instruction, *, num_images_per_prompt: int = 1, seed=None, **keywords):
        keywords |= {"num_images_per_prompt": num_images_per_prompt, "seed": seed}
        self.calls.append(("edit", (image, instruction), keywords))
        return self._draw(len(instruction) * num_images_per_prompt, seed)

    def understand(self, image, question, **keywords):
        self.calls.append(("understand", (image, question), keywords))
        return SimpleNamespace(texts=[f"answer to {text}" for text in question])

    def reconstruct(self, image):
        self.calls.append(("reconstruct", (image,), {}))
        images = [Image.new("RGB", (64, 64), "gray") for _ in image]
        return SimpleNamespace(images=images, metadata=[{"spar": "9"} for _ in image])


@pytest.fixture
def pipe(monkeypatch, tmp_path) -> FakePipe:
    """A pipeline that needs no weights, in a folder of its own."""
    fake = FakePipe()
    monkeypatch.setattr("spar.cli.loading.load_pipeline", lambda *_: fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def no_load(monkeypatch, tmp_path) -> None:
    """Fails the test if a verb goes as far as loading a model."""

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("spar.cli.loading.load_pipeline", load)
    monkeypatch.chdir(tmp_path)


def error_of(capsys, argv: str | list[str]) -> tuple[int, str]:
    """The exit status and stderr, which must be one line of error."""
    capsys.readouterr()
    status = main(shlex.split(argv) if isinstance(argv, str) else argv)
    error = capsys.readouterr().err
    assert error.startswith("spar: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return status, error


def test_garbage_is_not_collected_while_the_model_loads_but_is_afterwards(monkeypatch, tmp_path, capsys):
    seen = []

    def load(path, **_):
        seen.append(gc.isenabled())
        raise InputError("no such model")

    monkeypatch.setattr("spar.inference.pipeline.SparPipeline.from_pretrained", load)
    assert error_of(capsys, ["generate", "a red circle", "-o", str(tmp_path / "out.png")])[0] == WRONG_INPUT
    assert seen == [False] and gc.isenabled()
    gc.unfreeze()


# ---- help and start -------------------------------------------------------------------------------------------------


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(VERBS) == list(FLAGS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_arguments(capsys, verb):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: spar {verb}" in text
    assert [flag for flag in FLAGS[verb] if flag not in text] == []


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spar {spar.__version__}\n"


def test_help_and_wrong_arguments_load_no_heavy_library(tmp_path):
    code = (
        "import sys; from spar.cli.main import VERBS, main; main(['--help'])\n"
        "for verb in VERBS: main([verb, '--help'])\n"
        "assert main(['generate', 'x', '--steps', '0']) == main(['edit', 'x', 'y', '-o', 'x.jpg']) == 2\n"
        "print('loaded:', *{'torch', 'transformers', 'diffusers', 'scipy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "spar", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ---- bad input ------------------------------------------------------------------------------------------------------

WRONG = [
    ("", "expected a verb"),
    ("genrate x", "perhaps you meant generate"),
    ("generate", "at least one prompt"),
    ("generate x --steps 0", "--steps: expected 1 to 1000, got 0"),
    ("generate x --num-inference-steps 0", "--steps: expected 1 to 1000, got 0"),
    ("generate x --steps 1001", "got 1001"),
    ("generate x --steps two", "expected a whole number, got 'two'"),
    ("generate x --steps 2.5", "expected a whole number, got '2.5'"),
    ("generate x --steps", "expected a value, got none"),
    ("generate x --guidance -1", "--guidance: expected 0 to 100, got -1.0"),
    ("generate x --guidance nan", "got nan"),
    ("generate x --guidance much", "expected a number, got 'much'"),
    ("generate x --seed -1", "--seed: expected 0 to 9223372036854775807, got -1"),
    ("generate x --seed 9223372036854775808", "got 9223372036854775808"),
    ("generate x -n 0", "--num-images-per-prompt: expected 1 to 4096, got 0"),
    ("generate x y -n 4096", "number of images: expected 1 to 4096, got 8192"),
    ("generate x --dtype int8", "'float16', got 'int8'"),
    ("generate 'a red \udcff circle'", "prompt: expected text in UTF-8"),
    ("generate x --negative-prompt \udcff", "--negative-prompt: expected text in UTF-8"),
    ("train tiny --into runs/x", "unknown arguments: --into, runs/x (spar train --help lists all)"),
    ("generate x --stepps 3", "unknown arguments: --stepps, 3; perhaps you meant"),
    ("generate x -o out.jpg", "ends in .png"),
    ("generate x y -o out.png", "expected a folder for 2 images"),
    ("generate x -o there.png", "'there.png' exists already"),
    ("generate x --seed 3 -o folder.png", "folder.png/0-seed3.png' exists already"),
    ("generate x -o sheet.png --grid", "sheet-grid.png' exists already"),
    ("generate x -o sheet.png --save-steps", "sheet.gif' exists already"),
    ("generate --save-steps", "expected at least one prompt (PROMPT), got none"),
    ("generate x -n 65 --save-steps", "number of images with --save-steps: expected 1 to 64, got 65"),
    ("generate x -o there.png/out.png", "'there.png' is not a folder"),
    ("generate x y -o there.txt", "there.txt' is not a folder"),
    ("edit", "expected IMAGE, got nothing"),
    ("edit there.png", "at least one instruction"),
    ("edit there.png x -o there.png", "exists already"),
    ("understand there.png", "at least one question"),
    ("understand there.png x --max-new-tokens 0", "--max-new-tokens: expected 1 or more, got 0"),
    ("reconstruct", "at least one image"),
    ("reconstruct empty", "expected images"),
    ("generate x --model=", "--model: expected a path, got an empty text"),
    ("generate x -o ''", "--output: expected a path, got an empty text"),
    ("edit '' x", "expected a path, got an empty text"),
    ("generate x -o -", "--output: expected a path, got '-': neither standard input nor output is used"),
    ("train tiny --run new --dry-run --track nope", "--track: expected one of"),
    ("info ''", "expected a path, got an empty text"),
    ("reconstruct there.png ''", "none of them empty, got ['there.png', '']"),
    ("train tiny --run ''", "--run: expected a path, got an empty text"),
    ("train tiny --init-from=", "--init-from: expected a path, got an empty text"),
    ("train tiny --resume ''", "--resume: expected never, auto or the folder of a run, got ''"),
    ("train tiny --run full", "full holds no run, but data.json, which a run would write over or remove"),
    ("train tiny --run full --dry-run", "full holds no run, but data.json"),
    ("reconstruct there.png there.png -o there.png", "expected a folder for 2 images"),
    ("info", "expected PATH, got nothing"),
    ("info nowhere.png", "there is no file 'nowhere.png'"),
    ("info there.png", "'there.png', which is not a PNG"),
    ("info empty", "config.json is missing in empty"),
    ("push", "expected FOLDER, got nothing"),
    ("push empty", "expected REPO_ID, got nothing"),
    ("push empty name", "REPO_ID: expected OWNER/NAME, got 'name'"),
    ("push empty me/model", "config.json is missing in empty"),
    ("eval", "expected BENCHMARK, got nothing"),
    ("eval shapes", "expected one of 'shapes-gen'"),
    ("eval shapes-gen --limit 0", "--limit: expected 1 to 4096, got 0"),
    ("eval shapes-gen --combinations all", "'held_out', got 'all'"),
    ("eval shapes-gen -o there.txt", "'there.txt' exists already"),
    ("eval all -o there.txt", "there.txt' is not a folder"),
    ("report", "expected RUN, got nothing"),
    ("report nowhere", "'nowhere' is not a folder"),
    ("report empty", "has neither"),
    ("demo -o full", "has other contents"),
    ("demo --images nowhere", "No such file"),
    ("demo --images empty", "found none"),
    ("demo --limit 0", "--limit: expected 1"),
    ("data", "data: expected one of check, convert, got nothing"),
    ("data chek x", "got 'chek'"),
    ("data check", "at least one data set"),
    ("data check there.txt", "expected lines image_root,annotation.json,flag"),
    ("data check empty", "found none"),
    ("data check nowhere.tar", "there is no 'nowhere.tar'"),
    ("data check 'pipe:cat x.tar'", "expected a local path, hf://"),
    ("data check empty --workers 0", "--workers: expected 1 to 256, got 0"),
    ("data check empty --format zip", "expected one of 'auto'"),
    ("data convert empty", "expected -o, got nothing"),
    ("data convert empty -o full", "has other contents"),
    ("data convert empty -o new --shard-size 0", "--shard-size: expected 1"),
    ("build spar-1b --mllm ./nowhere --autoencoder a/b --dit a/b -o new", "mllm: there is no such folder or file, got"),
    ("build spar-1b -o new\udcff", "--output: expected text in UTF-8"),
    ("build spar-1b -o full --overwrite", "has other contents"),
    ("convert unilip nofile.pth -o new", "unilip: there is no such folder or file, got 'nofile.pth'"),
    ("export internvl spar -o full --overwrite", "has other contents"),
    ("cache tiny --init-from spar --batch 0", "--batch: expected 1 to 4096, got 0"),
    ("cache tiny --init-from spar --batch -1", "--batch: expected 1 to 4096, got -1"),
    ("doctor x", "unknown arguments: x"),
    ("train", "recipe's name first"),
    ("train --seed 3 tiny", "recipe's name first"),
    ("train tiny --config there.txt", "expected a recipe's name or --config, got tiny and there.txt"),
    ("train --config there.txt", "expected a file that ends in .json, .yaml, .yml, got 'there.txt'"),
    ("plan --config nowhere.yaml", "there is no file 'nowhere.yaml'"),
    ("train --config", "expected the recipe's name first"),
    ("completion tcsh", "expected one of"), ("list recipes", "unknown arguments: recipes"),
    ("train large", "unknown recipe 'large'"),
    ("train tiny --resume nowhere", "expected never, auto or the folder of a run"),
    ("train tiny --stage unified-4", "no stage 'unified-4'"),
    ("train tiny --device tpu9", "device: expected one that is here"),
    ("train tiny --init-from empty", "expected a finished stage"),
    ("train tiny --run there.txt", "there.txt' is not a folder"),
    ("train tiny --model.denoiser.lyers 4", "perhaps you meant --model.denoiser.layers"),
    ("train tiny --model.denoiser.layers four", "expected a whole number, got 'four'"),
    ("train tiny --model.denoiser.align-depth 9", "expected 1 to 2, got 9"),
    ("train tiny --model.router.kind best", "expected one of 'dtr'"),
    ("train tiny --model.vision.hidden-size 30", "its sizes do not fit together"),
    ("train tiny --model.autoencoder.channels 3 5 7 9", "channels"),
    ("train tiny --stages.unified-4.steps 4", "unknown arguments: --stages.unified-4.steps"),
    ("train tiny --stages.unified-2.steps 0", "spar: error: stage unified-2: steps must be at least 1, got 0"),
    ("train tiny --stages.unified-2.data.edit-share 2", "stages.unified-2.data: edit_share: expected 0 to 1, got 2.0"),
    ("train tiny --stages.unified-2.lr fast", "--stages.unified-2.lr: expected a number, got 'fast'"),
    ("train tiny --stages.dit.objective.mse 1", "unknown arguments: --stages.dit.objective.mse"),
    ("train tiny --stages.dit.data.edit-share 0.5", "unknown arguments: --stages.dit.data.edit-share"),
    ("train tiny --data.source parquet", "--data.source: expected one of 'files', 'none', 'shapes', got 'parquet'"),
    ("train tiny --data.source", "--data.source: expected a value, got none"),
    ("train tiny --data.source files", "expected --data.sets, got nothing"),
    ("train tiny --data.source none", "no data source given (--data.source)"),
    ("train tiny --data.sets x.tar", "--data.sets belongs to --data.source files, got source shapes"),
    ("train tiny --data.bad-share=0.5", "--data.bad-share belongs to --data.source files, got source shapes"),
    ("train tiny --data.bad_share 0.5", "--data.bad_share belongs to --data.source files, got source shapes"),
    ("train tiny --data.source files --data.sets x.tar --data.scenes 3",
     "--data.scenes belongs to --data.source shapes, got source files"),
    ("train tiny --data.source=none --data.edits 3", "--data.edits belongs to --data.source shapes, got source none"),
    ("plan spar-1b --data.workers 2", "--data.workers belongs to --data.source files, got source none"),
    ("train tiny --data.senes 3", "unknown arguments: --data.senes, 3; perhaps you meant --data.scenes"),
    ("train tiny --data.source files --data.sets x.tar --stages.unified-2.data.position-captions 0.5",
     "unknown arguments: --stages.unified-2.data.position-captions"),
    ("train tiny --data.source files --data.sets x.tar",
     "captions_and_edits, dialogues, captions_and_dialogues, which is nothing for encoder (tags), mllm (q"),
    ("train tiny --stages.dit.name mllm", "stages of different names"),
    ("train tiny --stages.dit.trainable model.decoder.*", "matches no parameter"),
    ("train tiny --alignment.teacher external", "go together"),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[ascii(line) for line, _ in WRONG])
def test_wrong_input_gets_one_line_and_leaves_nothing(capsys, no_load, tmp_path, line, words):
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "there.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for file in ("full/mine.txt", "full/data.json", "folder.png/0-seed3.png", "sheet-grid.png", "sheet.gif"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    status, error = error_of(capsys, line)
    assert status == 2 and words in error
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_the_home_folder_is_put_in_where_no_shell_does_it(capsys, pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["generate", "a red circle", "--seed", "7", "--output=~/new/out.png"]) == 0
    assert Path("home/new/out.png").is_file() and not Path("~").exists()
    assert main(["info", "~/new/out.png"]) == 0
    Path("~").mkdir()
    Path("~/own.txt").touch()
    assert error_of(capsys, "info ~/own.txt")[1].endswith("got '~/own.txt', which is not a PNG\n")  # it exists


def test_a_folder_without_permission_is_refused_before_the_work(capsys, no_load, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    status, error = error_of(capsys, "generate x -o new/out.png")
    assert status == 2 and "cannot be written" in error


def test_an_error_is_one_printable_line(capsys, monkeypatch):
    def verb(argv):
        raise InputError("two\nlines and an \x1b[31mescape")

    monkeypatch.setitem(VERBS, "doctor", verb)
    assert error_of(capsys, "doctor")[1] == "spar: error: two lines and an ?[31mescape\n"


def test_a_full_disk_is_no_traceback_and_leaves_no_file(capsys, pipe, monkeypatch, tmp_path):
    save, written = Image.Image.save, []

    def full(self, *args, **keywords):
        if written:
            raise OSError(28, "No space left on device")
        written.append(save(self, *args, **keywords))

    monkeypatch.setattr(Image.Image, "save", full)
    status, error = error_of(capsys, "generate 'a red circle' -n 2 --seed 4")
    assert status == 2 and "out/1-seed5.png" in error and "No space left on device" in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("line", ["generate 'a red circle'", "edit a.png 'remove it'", "reconstruct a.png", "demo"])
def test_ctrl_c_ends_quietly_and_leaves_nothing(capsys, pipe, monkeypatch, tmp_path, line):
    def stop(*args, **keywords):
        raise KeyboardInterrupt

    for task in ("generate", "edit", "reconstruct"):
        monkeypatch.setattr(pipe, task, stop)
    assert main(shlex.split(line)) == 130
    assert capsys.readouterr().err == "spar: stopped\n"
    assert [*tmp_path.iterdir()] == []


class FullGpu(torch.OutOfMemoryError):
    def __init__(self) -> None:
        super().__init__("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.80 GiB")


class FullMachine(RuntimeError):
    def __init__(self) -> None:
        super().__init__("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to "
                         "allocate 400 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip


class NoCompiler(InductorError):
    def __init__(self) -> None:
        RuntimeError.__init__(self, "InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")


def draw_nan() -> None:
    to_pil(torch.full((1, 3, 8, 8), float("nan")))


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (FullGpu, "out of memory (tried to allocate 20.50 gib): try a smaller --batch, --decode-tile 16"),
        (FullMachine, "out of memory (tried to allocate 400 bytes): try a smaller --batch"),
        (MemoryError, "out of memory: try a smaller --batch"),
        (NoCompiler, "torch.compile fails here (InvalidCxxCompiler: No working C++ compiler found): go on without "
                     "--compile"),
        (draw_nan, "numbers that are not finite: try --dtype float32"),
    ],
)  # fmt: skip
def test_a_failure_of_the_machine_is_one_line_that_names_the_way_out(capsys, pipe, monkeypatch, failure, words):
    def fail(*args, **keywords):
        raise failure()

    monkeypatch.setattr(pipe, "generate", fail)
    status, error = error_of(capsys, "generate 'a red circle'")
    assert status == 1 and words in error


def test_what_is_no_known_failure_keeps_its_traceback(pipe, monkeypatch):
    def fail(*args, **keywords):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(pipe, "generate", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["generate", "a red circle"])


@pytest.mark.parametrize("verb", LESS_MEMORY)
def test_what_takes_less_memory_are_flags_of_the_verb(capsys, verb):
    assert main([verb, *(["tiny"] if verb == "train" else []), "--help"]) == 0
    text = capsys.readouterr().out
    named = [flag.replace("STAGE", "unified-2") for flag in re.findall(r"--[\w.-]+", LESS_MEMORY[verb])]
    assert [flag for flag in named if flag not in text] == []


# ---- the four tasks -------------------------------------------------------------------------------------------------


def test_every_sampling_flag_reaches_the_pipeline(pipe):
    flags = "--seed 5 --steps 3 --guidance 2.5 -n 2 --negative-prompt 'a blue star'"
    expected = {
        "seed": [5, 6, 7, 8], "num_inference_steps": 3, "guidance_scale": 2.5, "num_images_per_prompt": 2,
        "negative_prompt": "a blue star", "callback": None,
    }  # fmt: skip
    own = "--height 64 --width 128 --layout 'a ring'"
    assert main(shlex.split(f"generate 'a red circle' 'a red ring' {own} {flags}")) == 0
    assert main(shlex.split(f"edit in.png 'remove it' -o edited {flags}")) == 0
    assert pipe.calls == [
        ("generate", (["a red circle", "a red ring"],), {**expected, "height": 64, "width": 128, "layout": "a ring"}),
        ("edit", (Path("in.png"), ["remove it"]), {**expected, "seed": [5, 6]}),
    ]


def test_an_image_may_be_drawn_without_a_layout(capsys, pipe):
    assert main(shlex.split("generate 'a red circle' --no-layout")) == 0
    assert pipe.calls[0][2]["layout"] is False
    assert "got both" in error_of(capsys, "generate 'a red circle' --no-layout --layout 'a ring'")[1]


def test_the_pipelines_own_names_work_too(pipe):
    for flags in ("--steps 3 --guidance 2", "--num-inference-steps 3 --guidance-scale 2",
                  "--num_inference_steps=3 --guidance_scale=2"):  # fmt: skip
        assert main(["generate", "a red circle", "--seed", "1", "--overwrite", *flags.split()]) == 0
    assert pipe.calls[0] == pipe.calls[1] == pipe.calls[2]
    assert pipe.calls[0][2]["num_inference_steps"] == 3 and pipe.calls[0][2]["guidance_scale"] == 2.0


def test_an_image_carries_how_it_was_made(capsys, pipe):
    prompt = "a red circle — größer\n"
    assert main(["generate", prompt, "--seed", "9"]) == 0
    assert capsys.readouterr().out == "out.png  (seed 9)\n"
    with Image.open("out.png") as image:
        assert image.getpixel((0, 0)) == (9, 0, 0)
        assert image.text == {
            "prompt": prompt, "seed": "9", "steps": "20", "guidance": "4.5", "model": "spar", "spar": "9"
        }  # fmt: skip
    assert main(["edit", "out.png", "remove it", "-o", "edited.png"]) == 0
    with Image.open("edited.png") as image:
        digest = hashlib.sha256(Path("out.png").read_bytes()).hexdigest()
        assert (image.text["image"], image.text["image_sha256"]) == ("out.png", digest)


def test_several_images_stand_in_a_folder_each_prompts_together(pipe):
    assert main(["generate", "a red circle", "a red ring", "-n", "6", "--seed", "0", "-o", "many"]) == 0
    made = sorted(Path("many").iterdir())
    assert [path.name for path in made] == [f"{index:02d}-seed{index}.png" for index in range(12)]
    notes = [Image.open(path).text for path in made]
    assert [note["prompt"] for note in notes] == ["a red circle"] * 6 + ["a red ring"] * 6
    assert [note["seed"] for note in notes] == [str(seed) for seed in range(12)]


def test_a_grid_and_the_steps_are_written_beside_the_images(capsys, pipe):
    assert main(["generate", "a ring", "a star", "-n", "3", "--seed", "4", "-o", "many", "--grid", "--save-steps"]) == 0
    names = [f"{index}-seed{4 + index}" for index in range(6)]
    assert {path.name for path in Path("many").iterdir()} == {
        "grid.png", *(f"{name}.png" for name in names), *(f"{name}.gif" for name in names)
    }  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 13 and printed[-1] == "many/grid.png  (all images)"
    with Image.open("many/grid.png") as sheet:
        assert sheet.size == (3 * 64 + 2 * 4, 2 * 64 + 4)  # a row for each prompt
        assert [sheet.getpixel((x, y))[0] for y in (1, 69) for x in (1, 69, 137)] == [4, 5, 6, 7, 8, 9]
    with Image.open("many/2-seed6.gif") as steps:
        assert steps.n_frames == 3
    assert main(["edit", "in.png", "remove it", "-o", "one.png", "--grid"]) == 0
    with Image.open("one-grid.png") as sheet, Image.open("one.png") as image:
        assert sheet.tobytes() == image.tobytes()


def test_many_images_are_drawn_in_batches_and_each_is_what_it_would_be(capsys, pipe):
    line = ["generate", "a ring", "a star", "-n", "10", "--seed", "4", "--grid", "--save-steps"]
    assert main([*line, "-o", "many"]) == 0
    first = ["a ring"] * 10 + ["a star"] * 6
    asked = [(call[1][0], call[2]["seed"], call[2]["num_images_per_prompt"]) for call in pipe.calls]
    assert asked == [(first, [*range(4, 20)], 1), (["a star"] * 4, [*range(20, 24)], 1)]
    assert main([*line, "-o", "once", "--batch", "20"]) == 0
    assert pipe.calls[2][1] == (["a ring", "a star"],) and pipe.calls[2][2]["num_images_per_prompt"] == 10
    many, once = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("many", "once"))
    assert many == once and len(many) == 41
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 82 and sum("(seed " in line for line in printed) == 40
    assert main(["edit", "in.png", "remove it", "-n", "3", "--batch", "2", "-o", "edited", "--seed", "1"]) == 0
    assert [(call[1], call[2]["seed"]) for call in pipe.calls[3:]] == [
        ((Path("in.png"), ["remove it"] * 2), [1, 2]), ((Path("in.png"), ["remove it"]), [3])
    ]  # fmt: skip
    assert "prompt: no zebra is known" in error_of(capsys, "generate 'a ring' zebra --batch 1 -o none")[1]
    assert len(pipe.calls) == 5 and not Path("none").exists()


def test_a_batch_that_fails_leaves_those_before_it(capsys, pipe, monkeypatch):
    calls, make = [], pipe.generate

    def second_fails(*args, **keywords):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*args, **keywords)

    monkeypatch.setattr(pipe, "generate", second_fails)
    assert main(["generate", "a ring", "-n", "3", "--batch", "2", "--seed", "0", "-o", "many"]) == 130
    assert sorted(path.name for path in Path("many").iterdir()) == ["0-seed0.png", "1-seed1.png"]
    assert capsys.readouterr().out == "many/0-seed0.png  (seed 0)\nmany/1-seed1.png  (seed 1)\n"


def test_a_bar_of_several_batches_moves_over_all_of_them(pipe, monkeypatch):
    moved = []

    @contextmanager
    def bar(title):
        yield lambda done, total: moved.append((done, total))

    monkeypatch.setattr("spar.cli.outputs.progress_bar", bar)
    assert main(["generate", "a ring", "-n", "4", "--batch", "2"]) == 0
    assert moved == [(done, 6) for done in range(1, 7)]


def test_a_random_seed_is_in_the_name(pipe):
    assert main(["generate", "a ring", "a star"]) == 0
    first, second = sorted(path.stem.split("-seed") for path in Path("out").iterdir())
    assert [first[0], second[0]] == ["0", "1"] and int(second[1]) == int(first[1]) + 1
    assert pipe.calls[0][2]["seed"] == [int(first[1]), int(second[1])]


def test_info_says_how_an_image_was_made(capsys, pipe):
    assert main(["generate", "it's a \x1b[31mred\ncircle", "--seed", "9"]) == 0
    capsys.readouterr()
    assert main(["info", "out.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = ["size", "prompt", "seed", "steps", "guidance", "model", "spar", "reproduce"]
    assert [line.split()[0] for line in lines] == keys
    assert lines[1].endswith("it's a ?[31mred?circle") and not any("\x1b" in line for line in lines)
    assert main(["info", "out.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"] | {"model": "", "spar": ""} == {
        "prompt": "it's a \x1b[31mred\ncircle", "seed": 9, "steps": 20, "guidance": 4.5, "model": "", "spar": ""
    }  # fmt: skip
    assert main(found["reproduce"][1:] + ["-o", "again.png"]) == 0
    assert pipe.calls[1][1:] == ((["it's a \x1b[31mred\ncircle"],), {
        "seed": [9], "num_inference_steps": 20, "guidance_scale": 4.5, "num_images_per_prompt": 1,
        "negative_prompt": None, "height": 64, "width": 64, "callback": None,
    })  # fmt: skip


def test_what_exists_is_replaced_only_when_asked(capsys, pipe):
    Path("out.png").write_bytes(b"mine")
    assert error_of(capsys, ["generate", "a red circle"])[0] == 2
    assert Path("out.png").read_bytes() == b"mine" and pipe.calls == []
    assert main(["generate", "a red circle", "--overwrite"]) == 0
    assert Image.open("out.png").size == (64, 64)


def test_words_without_quotes_are_noticed(capsys, pipe):
    assert main(["generate", "red", "circle"]) == 0
    assert capsys.readouterr().err.startswith("spar: note: 2 prompts of one word each")


def test_what_lies_outside_of_the_models_world_is_noted(capsys, pipe):
    assert main(["generate", "a white circle"]) == 0
    assert capsys.readouterr().err == ""  # nothing is known of this model's world
    pipe.words = VOCABULARY
    assert main(["generate", "a red circle", "a circle on a red background", "--overwrite"]) == 0
    assert capsys.readouterr().err.startswith("spar: note: no background of the model's world is red; they are gray")
    Image.effect_noise((300, 200), 90).convert("RGB").save("in.png")
    assert main(["edit", "in.png", "make the circle white", "--overwrite"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and "no object of the model's world is white" in notes[0]
    assert "the image (it was cut to a square and resized from" in notes[1]
    assert main(["understand", "in.png", "what color ?"]) == 0
    assert "is outside the model's world" in capsys.readouterr().err
    for number in range(8):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(f"plain-{number}.png")
    assert main(["reconstruct", *(f"plain-{number}.png" for number in range(8)), "-o", "rebuilt"]) == 0
    noted = capsys.readouterr().err.splitlines()
    assert len(noted) == 6 and noted[0].startswith("spar: note: plain-0.png: the image is outside")
    assert noted[-1].endswith("and 3 more like these")


def test_understand_prints_answers_and_nothing_else(capsys, pipe):
    assert main(["understand", "in.png", "what color ?", "how many ?", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr() == ("answer to what color ?\nanswer to how many ?\n", "")
    drawn = {"temperature": 0.0, "top_p": 1.0, "seed": None, "max_tiles": None}
    asked = (Path("in.png"), ["what color ?", "how many ?"])
    assert pipe.calls == [("understand", asked, {"max_new_tokens": 5, **drawn})]


def test_reconstruct_takes_files_and_folders_and_keeps_their_names(capsys, pipe, monkeypatch):
    monkeypatch.setattr("spar.cli.tasks.RECONSTRUCT_BATCH", 2)
    Path("photos").mkdir()
    for name in ("a.png", "a.jpg", "b.WEBP", "notes.txt"):
        (Path("photos") / name).write_bytes(b"")
    assert main(["reconstruct", "photos", "c.png"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.jpg.png", "a.png.png", "b.png", "c.png"]
    assert [len(arguments[0]) for _, arguments, _ in pipe.calls] == [2, 2]
    assert main(["reconstruct", "c\udcff.png", "-o", "back.png"]) == 0
    assert Image.open("back.png").text["image"] == "c?.png"


def test_a_bad_image_costs_no_other_ones_reconstruction(capsys, pipe, monkeypatch):
    monkeypatch.setattr("spar.cli.tasks.RECONSTRUCT_BATCH", 2)
    Path("photos").mkdir()
    for name in "abcde":
        Path(f"photos/{name}.png").write_bytes(b"")
    make = pipe.reconstruct

    def reconstruct(images):
        if Path("photos/d.png") in images:
            raise InputError("photos/d.png is no image")
        return make(images)

    monkeypatch.setattr(pipe, "reconstruct", reconstruct)
    assert main(["reconstruct", "photos"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "out/a.png\nout/b.png\n" and printed.err == "spar: error: photos/d.png is no image\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png"]


def test_the_limits_are_the_pipelines_own():
    from spar.common import seeds
    from spar.inference import pipeline

    assert pipeline.limits is limits and limits.MAX_SEED == seeds.MAX_SEED


# ---- recipes as flags -----------------------------------------------------------------------------------------------


def parse_flags(base, argv: list[str]):
    from spar.recipes import REGISTRY
    from spar.training.data import DataConfig

    return parse(recipe_arguments(base, TrainArguments, REGISTRY[DataConfig], argv), argv, "spar train", none=True)


def from_flags(base, argv: list[str]):
    """The recipe that the flags make of another."""
    return build_recipe(parse_flags(base, argv), base)


@pytest.mark.slow
def test_any_field_of_a_recipe_is_a_flag():
    from spar.recipes import RECIPES, recipe

    for name in RECIPES:
        base = recipe(name)
        assert from_flags(base, [name]) == base
    base = recipe("tiny")
    line = (
        "tiny --run there --seed 3 --model.denoiser.layers 4 --model.streams.semantic-stream False "
        "--model.denoiser.interpolation_scale 0.5 --model.autoencoder.channels 16 16 16 32 "
        "--stages.unified-2.steps 10 --stages.unified-2.data.edit-share 0.4 --stages.unified-2.objective.align 0.25 "
        "--stages.tokenizer-3.objective.gan-start 2 --data.edits 8 --stage dit --stage unified-2"
    )
    args = parse_flags(base, line.split())
    assert (args.run, args.stage) == (Path("there"), ("dit", "unified-2"))
    model = replace(
        base.model,
        denoiser=replace(base.model.denoiser, layers=4, interpolation_scale=0.5),
        streams=replace(base.model.streams, semantic_stream=False),
        autoencoder=replace(base.model.autoencoder, channels=(16, 16, 16, 32)),
    )
    stages = []
    for stage in base.stages:
        if stage.name == "unified-2":
            data, objective = replace(stage.data, edit_share=0.4), replace(stage.objective, align=0.25)
            stage = replace(stage, steps=10, data=data, objective=objective)
        if stage.name == "tokenizer-3":
            stage = replace(stage, objective=replace(stage.objective, gan_start=2))
        stages.append(stage)
    data = replace(base.data, edits=8)
    assert build_recipe(args, base) == replace(base, seed=3, model=model, stages=tuple(stages), data=data)


@pytest.mark.parametrize("chosen", ["--data.source files", "--data.source=files"])
def test_data_sets_reduce_lessons_to_plain_captions_and_edits(chosen):
    """What they have nothing for stays as it is; a stage's own flags are then those of what it is reduced to."""
    from spar.recipes import recipe
    from spar.training.data import CaptionData, MixedData
    from spar.training.files_data import FilesData

    base = recipe("tiny")
    line = f"tiny {chosen} --data.sets a.tar 2=b.tar --data.max-aspect 2 --stages.unified-1.data.edit-share 0.5"
    found = from_flags(base, line.split())
    assert found.data == FilesData(sets=("a.tar", "2=b.tar"), max_aspect=2.0)
    shares = {s.name: s.data.edit_share for s in base.stages if isinstance(s.data, MixedData)} | {"unified-1": 0.5}
    assert len(shares) == 3 and shares["unified-2"] > 0
    for before, stage in zip(base.stages, found.stages, strict=True):
        data = MixedData(edit_share=shares[stage.name]) if stage.name in shares else before.data
        assert type(stage.data) is type(data) and stage == replace(before, data=data)
    assert found.stage("dit").data == CaptionData()
    assert found == replace(base, data=found.data, stages=found.stages)


@pytest.mark.slow
def test_a_source_that_is_chosen_anew_begins_with_its_own_defaults():
    from spar.recipes import recipe
    from spar.recipes.shapes.data import ShapesData
    from spar.training.data import NoData

    assert from_flags(recipe("tiny"), ["tiny", "--data.source", "none"]).data == NoData()
    assert from_flags(recipe("tiny"), ["tiny", "--data.source", "shapes"]).data == recipe("tiny").data
    line = ["spar-1b", "--data.source", "shapes", "--data.edits", "5"]
    assert from_flags(recipe("spar-1b"), line).data == ShapesData(edits=5)


def test_recipe_help_lists_fields_by_stage_name(capsys):
    assert main(["train", "tiny", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--stages.unified-2.objective.align" in text and "--model.denoiser.layers" in text
    assert "--stages.unified-2.data.position-captions" in text and "--stages.mllm.data.questions" in text
    assert "--stages.dit.objective.align" not in text and "--stages.dit.data.edit-share" not in text


@pytest.mark.slow
def test_recipe_help_lists_the_flags_of_the_source_that_is_chosen(capsys):
    own, other = ("--data.scenes", "--data.edits"), ("--data.sets", "--data.bad-share", "--data.cache")
    for line, there, gone in (("", own, other), ("--data.source files", other, own), ("--data.source none", (), own)):
        assert main(["train", "tiny", *line.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert all(flag in text for flag in ("--data.source", *there)) and not any(flag in text for flag in gone)


def read_tables(text: str) -> list[dict[str, dict[str, str]]]:
    """The printed tables: by the first column's word each row, by the columns' names its cells."""
    found: list[dict[str, dict[str, str]]] = []
    columns: list[str] = []
    row: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("┃│").split(line[:1])] if line[:1] in ("┃", "│") else []
        if line.startswith("┃"):
            columns = cells
            found.append({})
        elif cells and cells[0]:
            row = found[-1][cells[0]] = dict(zip(columns, cells, strict=True))
        elif cells:  # a row that was broken goes on
            row |= {name: f"{row[name]} {cell}".strip() for name, cell in zip(columns, cells, strict=True)}
    return found


@pytest.mark.slow
def test_a_dry_run_says_what_would_train_and_writes_nothing(capsys, monkeypatch, tmp_path):
    from spar.recipes import recipe
    from spar.training.config import freeze
    from spar.training.modules import TrainingModules

    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--dry-run"]) == 0
    plan, cost = read_tables(capsys.readouterr().out)
    modules, base = TrainingModules(recipe("tiny"), {}), recipe("tiny")
    assert [*plan] == [stage.name for stage in base.stages] and [*cost] == [*plan, "all"]
    everything = sum(p.numel() for p in modules.parameters())
    for stage in base.stages:
        freeze(modules, stage)
        trainable = sum(p.numel() for p in modules.parameters() if p.requires_grad)
        assert cost[stage.name]["trainable"] == f"{trainable:,}"
        assert cost[stage.name]["frozen"] == f"{everything - trainable:,}"
        assert cost[stage.name]["in all"].endswith(" MiB") and float(cost[stage.name]["in all"].split()[0]) > 0
        assert plan[stage.name]["objective"] == stage.objective.kind and plan[stage.name]["steps"] == "3"
    assert all(cost[name]["time"].endswith(" s") for name in cost)
    starts = {name: row["starts from"] for name, row in plan.items()}
    assert starts["encoder"] == "random weights" and starts["mllm"] == "the end of encoder"
    assert starts["unified-3"] == "the end of unified-2"
    prepares = {name: row["prepares"] for name, row in plan.items() if row["prepares"]}
    assert prepares == {
        "mllm": "tag embeddings", "tokenizer-1": "teacher from encoder", "unified-1": "connector from LLM",
        **dict.fromkeys(("unified-2", "unified-3"), "teacher mean"),
    }  # fmt: skip
    measures = {name: row["then measures"] for name, row in plan.items() if row["then measures"]}
    assert measures == {
        "encoder": "whitening", "autoencoder": "native scale",
        **dict.fromkeys(("tokenizer-1", "tokenizer-2", "tokenizer-3"), "latent scale"),
    }  # fmt: skip
    data = {name: row["data"] for name, row in plan.items()}
    mixed = recipe("tiny").stage("unified-2").data
    words = f"48 scenes: captions, {mixed.edit_share:.0%} edits, {mixed.layouts:.0%} of the rest layouts"
    words += f", {mixed.edit_layouts:.0%} of the edits with layouts"
    assert (data["encoder"], data["mllm"]) == ("48 scenes: tags", "48 scenes: questions")
    assert (data["unified-1"], data["unified-2"]) == ("48 scenes: captions", words)
    assert (plan["encoder"]["batch"], plan["dit"]["batch"]) == ("4", "4 x 2")  # two draws of noise an image
    assert not any(row["removes"] for row in plan.values())
    assert [*tmp_path.iterdir()] == []
    assert main(["train", "tiny", "--dry-run", "--stage", "unified-1"]) == 2  # as the run itself would say
    assert "starts from the end of tokenizer-3, which is not in runs/tiny" in capsys.readouterr().err


def test_a_dry_run_in_a_run_that_has_ended_says_what_would_be_removed_or_skipped(capsys, tiny_run):
    line = ["train", "tiny", "--run", str(tiny_run.path), "--dry-run"]
    before = sorted(tiny_run.path.rglob("*"))
    assert main([*line, "--stage", "tokenizer-2", "--stage", "unified-1"]) == 0
    plan, cost = read_tables(capsys.readouterr().out)
    assert [*plan] == ["tokenizer-2", "unified-1"] and [*cost] == [*plan, "all"]
    names = [stage.name for stage in tiny_run.recipe.stages]
    assert plan["tokenizer-2"]["removes"] == ", ".join([*names[names.index("tokenizer-2") :], "model"])
    assert plan["unified-1"]["trains"] == "model.router.*, model.connector.*"
    assert plan["unified-1"]["removes"] == "" and plan["unified-1"]["starts from"] == "the end of tokenizer-2"
    assert main([*line, "--resume", "auto"]) == 0
    plan, cost = read_tables(capsys.readouterr().out)
    assert {row["starts from"] for row in plan.values()} == {"done already"} and [*cost] == ["all"]
    assert not any(row[name] for row in plan.values() for name in ("prepares", "then measures", "removes"))
    assert sorted(tiny_run.path.rglob("*")) == before


@pytest.mark.slow
def test_a_dry_run_counts_the_steps_that_are_left(capsys, monkeypatch, tmp_path):
    from spar.cli.console import show_time
    from spar.recipes import recipe
    from spar.training import estimate as module
    from spar.training.checkpoint import write_meta
    from spar.training.distributed import ParallelismConfig

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "measure_peak", lambda device, precision: 1e9)
    state = Path("r/encoder/state")
    state.mkdir(parents=True)
    write_meta(state, {"stage": "encoder", "step": 6000, "seconds": 9.0})
    flags = ["tiny", "--stages.encoder.steps", "8000"]
    line = ["train", *flags, "--run", "r", "--stage", "encoder", "--dry-run"]
    times = []
    for resume in ("never", "auto"):
        assert main([*line, "--resume", resume]) == 0
        plan, cost = read_tables(capsys.readouterr().out)
        times.append((plan["encoder"]["starts from"], cost["encoder"]["time"], cost["all"]["time"]))
    machine = module.HardwareConfig.of_this_machine("cpu", ParallelismConfig())
    (found,) = module.estimate(from_flags(recipe("tiny"), flags), machine, ("encoder",))
    whole, left = show_time(found.seconds), show_time(found.seconds / 4)
    assert found.seconds > 600 and whole != left
    assert times == [("random weights", whole, whole), ("its state after 6000 steps", left, left)]


def test_plan_prints_the_two_tables_of_a_dry_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--dry-run"]) == 0
    plan, cost = read_tables(capsys.readouterr().out)
    assert main(["plan", "tiny", "--gpus", "2"]) == 0
    output = capsys.readouterr()
    planned, estimated = read_tables(output.out)
    assert planned == plan
    assert [(name, *row) for name, row in estimated.items()] == [(name, *row) for name, row in cost.items()]
    assert "2 x h200: 40% of 989 TFLOP/s each" in output.out and output.err == ""
    for name, row in cost.items():
        same = ("trainable", "frozen", "TFLOP a step")
        assert [estimated[name][key] for key in same] == [row[key] for key in same]
    assert estimated["dit"]["at once"] == "2" and estimated["dit"]["in all"] == "4.0 GiB"  # the reserve of a GPU
    assert [*tmp_path.iterdir()] == []


def test_plan_shows_any_stage_without_a_run_that_it_could_start_from(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "tiny", "--stage", "unified-2"]) == 0
    plan, cost = read_tables(capsys.readouterr().out)
    assert [*plan] == ["unified-2"] and [*cost] == ["unified-2", "all"]


@pytest.mark.slow
def test_plan_says_how_often_each_sample_of_data_sets_is_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    rows = [{"file_name": f"{index}.png", "text": "a red circle"} for index in range(8)]
    for row in rows:
        Image.new("RGB", (64, 64), "red").save(Path("set") / row["file_name"])
    (Path("set") / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "plan tiny --gpus 1 --stage encoder --data.source files --data.sets set".split()
    assert "which is nothing for encoder (tags)" in error_of(capsys, line)[1]
    line = "plan spar-1b --gpus 64 --stage tokenizer-1 --data.source files --data.sets set".split()
    assert main([*line, "--stages.tokenizer-1.steps", "10000"]) == 0
    output = capsys.readouterr()
    plan, cost, epochs = read_tables(output.out)
    assert plan["tokenizer-1"]["data"] == "1 data sets: images"
    assert epochs == {"tokenizer-1": {"epochs": "tokenizer-1", "set": f"{10_000 * 2048 / 8:,.2f}"}}
    assert "spar: note: model.tokenizer.encoder, " in output.err and "start from random weights unless" in output.err


def test_rows_of_a_plan_are_not_broken_where_there_is_no_terminal(capsys, tiny_run):
    assert main(["train", "tiny", "--run", str(tiny_run.path), "--dry-run", "--stage", "encoder"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 3 and all(line.split()[1] in ("encoder", "all") for line in rows)


@pytest.fixture
def run_training(monkeypatch, tmp_path):
    """Replaces training; the list holds the keywords of each call, `stop` is raised or returned."""
    calls = []

    def execute(plan, **keywords):
        calls.append((plan, keywords))
        if isinstance(execute.result, type):
            raise execute.result
        return execute.result

    execute.result, execute.calls = object(), calls
    monkeypatch.setattr("spar.training.trainer.execute", execute)
    monkeypatch.chdir(tmp_path)
    return execute


@pytest.mark.slow
def test_resume_is_never_auto_or_a_folder(run_training, capsys):
    from spar.common.config import to_dict
    from spar.recipes import recipe

    Path("old").mkdir()
    Path("old/recipe.json").write_text(json.dumps(to_dict(recipe("tiny"))))
    for line, run, fresh in (
        ("", "runs/tiny", True),
        ("--resume auto", "runs/tiny", False),
        ("--resume never --run r", "r", True),
        ("--resume old", "old", False),
    ):
        assert main(["train", "tiny", *line.split()]) == 0
        plan, keywords = run_training.calls[-1]
        assert (str(plan.run), plan.fresh, keywords["device"]) == (run, fresh, torch.device("cpu"))
    assert "one folder" in error_of(capsys, "train tiny --resume old --run other")[1]


def test_training_says_where_it_computes(run_training, capsys, monkeypatch):
    assert main(["train", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("training on cpu (")
    monkeypatch.setenv("RANK", "1")  # of several processes the first one prints
    assert main(["train", "tiny", "--run", "other"]) == 0
    assert "training on" not in capsys.readouterr().out


@pytest.mark.parametrize("result", [None, KeyboardInterrupt])
def test_a_stopped_training_says_how_to_go_on(run_training, capsys, result):
    run_training.result = result
    for line in ("--run 'my run' --seed 3", "--resume auto"):
        assert main(["train", "tiny", *shlex.split(line)]) == 130
        said = f"spar: stopped; the run has not begun; begin again with: spar train tiny {line}\n"
        assert capsys.readouterr().err == said


def test_a_loss_that_is_not_finite_ends_in_one_line(run_training, capsys):
    from spar.training.loop import NonFiniteLoss

    run_training.result = NonFiniteLoss
    assert error_of(capsys, "train tiny")[0] == 1


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (FullGpu, "gib): try --parallelism.grad-accum-steps 2 or more, --parallelism.activation-checkpointing True"),
        (NoCompiler, "C++ compiler found): go on without --parallelism.compile"),
    ],
)
def test_a_training_without_memory_or_compiler_says_what_needs_less_and_how_to_go_on(
    run_training, capsys, failure, words
):
    run_training.result = failure
    status, error = error_of(capsys, "train tiny --seed 3")
    assert status == 1 and words in error
    assert error.endswith("; the run has not begun; begin again with: spar train tiny --seed 3\n")


# ---- scores, reports, demo, doctor ----------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(monkeypatch) -> list:
    """Benchmarks that answer at once and note their options."""
    from spar.evaluation import benchmarks as table
    from spar.evaluation.results import Result, Score

    asked = []

    def fake(name):
        def run(pipe, options, progress):
            asked.append((name, options))
            settings = {"combinations": options.combinations, "label": options.label}
            return Result(name, (Score("overall", 0.5, 0.25, 0.75, 4), Score("psnr", 30.0, 29.0, 31.0, 4)), settings)

        return run

    for name in table.BENCHMARKS:
        monkeypatch.setitem(table.BENCHMARKS, name, fake(name))
    return asked


def test_eval_writes_results_and_shows_intervals(capsys, pipe, benchmarks):
    from spar.evaluation.options import EvalOptions
    from spar.evaluation.results import read_result

    flags = "--limit 2 --seed 4 --steps 3 --guidance 2 --images-per-prompt 1 --combinations held_out --label mine"
    assert main(["eval", "shapes-gen", "-o", "results/gen.json", *flags.split()]) == 0
    given = {"limit": 2, "seed": 4, "num_inference_steps": 3, "guidance_scale": 2.0, "images_per_prompt": 1}
    assert benchmarks == [("shapes-gen", EvalOptions(**given, combinations="held_out", label="mine"))]
    assert read_result("results/gen.json").score("overall").low == 0.25
    out = capsys.readouterr().out
    assert "held-out" in out and "0.250 to 0.750" in out and out.endswith("results/gen.json\n")
    assert error_of(capsys, "eval shapes-gen -o results/gen.json")[0] == 2


def test_eval_leaves_defaults_to_the_benchmarks(pipe, benchmarks):
    from spar.evaluation.benchmarks import BENCHMARKS, MEASURED, suits
    from spar.evaluation.options import EvalOptions

    own = [name for name in BENCHMARKS if suits(name, pipe.tasks)]
    assert main(["eval", "all", "-o", "scores"]) == 0
    assert benchmarks == [(name, EvalOptions()) for name in own]
    assert set(get_args(Benchmark)) == {*MEASURED, "all"}
    assert sorted(path.stem for path in Path("scores").iterdir()) == sorted(own)
    shared = {field.name for field in fields(EvalOptions)} - {"batch", "layout"}  # --no-layout
    assert shared <= {field.name for field in fields(EvalArguments)}


def test_report_shows_a_runs_curves_and_results(capsys, tmp_path):
    from spar.evaluation.results import Result, Score, write_result

    run = tmp_path / "run"
    run.mkdir()
    rows = [{"stage": "dit", "step": step, "loss": 1 / (step + 1), "seconds": 2.0 * step} for step in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "recipe.json").write_text("{}")
    write_result(run / "gen.json", Result("shapes-gen", (Score("overall", 0.625, 0.5, 0.75, 8),)))
    for _ in range(2):  # the default page is replaced
        assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "dit" in page and "0.625" in page and "<script" not in page
    status, error = error_of(capsys, ["report", str(run), "-o", str(run / "report.html")])
    assert status == 2 and "exists already" in error


def test_demo_writes_one_folder_whole(capsys, pipe, benchmarks):
    Path("photos").mkdir()
    Image.new("RGB", (40, 30), "red").save("photos/mine.png")
    assert main(["demo", "-o", "demo", "--images", "photos"]) == 0
    assert capsys.readouterr().out.endswith("demo/report.html\n")
    page = Path("demo/report.html").read_text()
    assert "a large red circle to the left of a small blue star" in page and "mine.png" in page
    folders = {path.name: len([*path.iterdir()]) for path in Path("demo").iterdir() if path.is_dir()}
    assert folders == {"gallery": 12, "edits": 20, "reconstructions": 2, "results": 4}
    assert sorted(path.name for path in Path().iterdir()) == ["demo", "photos"]
    assert "exists already" in error_of(capsys, "demo -o demo")[1]
    Path("demo/old.txt").write_text("old")
    assert main(["demo", "-o", "demo", "--overwrite"]) == 0
    assert not Path("demo/old.txt").exists() and "mine.png" not in Path("demo/report.html").read_text()


def test_a_demo_replaces_no_other_folder_with_a_report(capsys, no_load):
    Path("run").mkdir()
    for name in ("report.html", "recipe.json"):  # as in a run and a study
        Path("run", name).write_text("mine")
    assert "has other contents" in error_of(capsys, "demo -o run --overwrite")[1]
    assert sorted(path.name for path in Path("run").iterdir()) == ["recipe.json", "report.html"]


def test_the_demos_prompts_are_captions_that_the_judge_can_check():
    from spar.reporting.demo import PROMPTS
    from spar.worlds.shapes.captions import parse as parse_caption

    assert len({parse_caption(prompt) for prompt in PROMPTS}) == len(PROMPTS)


def test_doctor_fails_only_on_what_is_wrong(capsys, monkeypatch):
    from spar.cli import doctor

    command = "pip install spar-unified[gpu]"
    good = [doctor.Check("torch", True, "2.13"), doctor.Check("extra [gpu]", None, "not here", command)]
    monkeypatch.setattr(doctor, "run_checks", lambda: good)
    assert main(["doctor"]) == 0
    assert "pip install spar-unified[gpu]" in capsys.readouterr().out
    bad = doctor.Check("weights", False, "damaged", "install anew")
    monkeypatch.setattr(doctor, "run_checks", lambda: [*good, bad])
    assert main(["doctor"]) == 1
    assert "install anew" in capsys.readouterr().out


def test_a_terminal_is_told_where_the_model_is(monkeypatch, capsys):
    from spar.cli.loading import load_pipeline
    from spar.cli.task_arguments import ReconstructArguments

    asked = []
    loaded = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    monkeypatch.setattr("spar.inference.loading.load_pipeline", lambda *_, **given: asked.append(given) or loaded)
    for there in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda there=there: there
        monkeypatch.setattr("sys.stderr", stream)
        assert load_pipeline(ReconstructArguments(image=(Path("x"),), dtype="float16")) is loaded
        assert ("spar: on cpu (" in stream.getvalue() and ") in bfloat16\n" in stream.getvalue()) == there
    assert asked[0]["dtype"] == "float16" and asked[0]["progress"] is False


def test_a_bar_shows_the_brackets_of_a_pattern(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress_bar("checking part-[ab].tar"):
        pass
    assert "checking part-[ab].tar" in terminal.getvalue()


# ---- for real -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny run of every stage, made by the command line."""
    folder = tmp_path_factory.mktemp("real") / "run"
    assert main(["train", "tiny", "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def model(run, monkeypatch, tmp_path) -> str:
    monkeypatch.chdir(tmp_path)
    return str(run / "model")


@pytest.mark.slow
def test_train_ends_in_a_model_and_never_writes_over_a_run(run, capsys):
    from spar.recipes import recipe

    stages = [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == [stage.name for stage in recipe("tiny").stages]
    assert (run / "model" / "config.json").is_file()
    before = (run / "recipe.json").read_bytes()
    status, error = error_of(capsys, ["train", "tiny", "--run", str(run)])
    assert status == 2 and "--resume auto" in error
    status, error = error_of(capsys, ["train", "tiny", "--run", str(run), "--seed", "1", "--resume", "auto"])
    assert status == 2 and "another recipe" in error
    assert (run / "recipe.json").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on_where_it_stood(capsys, monkeypatch, tmp_path):
    display = console.training_display

    @contextmanager
    def interrupting():
        with display() as (announce, report):

            def stop(stage, step, steps, values):
                report(stage, step, steps, values)
                if step == 4:
                    signal.raise_signal(signal.SIGINT)

            yield announce, stop

    monkeypatch.chdir(tmp_path)
    argv = ["train", "tiny", "--run", "r", "--stages.encoder.steps", "8", "--stage", "encoder"]
    monkeypatch.setattr("spar.cli.training.training_display", interrupting)
    assert main(argv) == 130
    command = capsys.readouterr().err.partition("go on with: spar ")[2]
    assert Path("r/encoder/state/meta.json").is_file() and not Path("r/encoder/done").exists()
    monkeypatch.setattr("spar.cli.training.training_display", display)
    assert main(shlex.split(command)) == 0
    steps = [json.loads(line)["step"] for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(8)) and Path("r/encoder/done/meta.json").is_file()
    assert "encoder 8/8" in capsys.readouterr().out


@pytest.mark.slow
def test_the_four_tasks_run_on_a_trained_model(model, capsys):
    assert main(["generate", "a large red circle", "--model", model, "--seed", "3", "--steps", "2"]) == 0
    assert Image.open("out.png").size == (64, 64) and Image.open("out.png").text["model"] == "model"
    assert main(["edit", "out.png", "remove the red circle", "-o", "e.png", "--model", model, "--steps", "2"]) == 0
    assert Image.open("e.png").size == (64, 64)
    assert main(["reconstruct", "out.png", "-o", "r.png", "--model", model, "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["understand", "out.png", "what color is the circle ?", "--model", model]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    repeated = ["generate", "a large red circle", "--model", model, "--seed", "3", "--steps", "2", "-o", "again.png"]
    assert main(repeated) == 0
    assert Image.open("again.png").tobytes() == Image.open("out.png").tobytes()


@pytest.mark.slow
def test_an_image_is_made_again_from_what_info_says(model, capsys):
    """Every sampling flag at a value of its own; the model is named without its place, so that is given again."""
    flags = "--seed 5 --steps 3 --guidance 2.5 --dtype float32".split()
    words, same = ["--negative-prompt", "a blue star", "--model", model], ["--dtype", "float32", "--model", model]
    Path("first").mkdir()
    assert main(["generate", "a large red circle", *flags, *words, "--height", "72", "-o", "first/out.png"]) == 0
    assert main(["edit", "first/out.png", "remove the red circle", *flags, *words, "-o", "first/edited.png"]) == 0
    assert main(["reconstruct", "first/edited.png", "-o", "first/back.png", *same]) == 0
    for name in ("out.png", "edited.png", "back.png"):
        capsys.readouterr()
        assert main(["info", f"first/{name}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        command = [f"--model={model}" if word.startswith("--model=") else word for word in found["reproduce"]]
        assert command != found["reproduce"]
        assert main([*command[1:], "-o", name]) == 0  # the edit and its like read the reproduced images
        assert Image.open(name).tobytes() == Image.open(f"first/{name}").tobytes()
        assert Image.open(name).text == Image.open(f"first/{name}").text


@pytest.mark.slow
def test_info_says_what_a_model_is(model, capsys):
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ("recipe", "seed", "written by", "sampling")) and " denoiser " in out
    assert main(["info", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["manifest"]["recipe"]) == ("model", "tiny")
    assert f" {found['parameters']:,} " in out


@pytest.mark.slow
def test_scores_report_and_demo_run_on_a_trained_model(model, run, capsys):
    flags = ["--model", model, "--limit", "1", "--steps", "1", "--images-per-prompt", "1"]
    assert main(["eval", "shapes-vqa", *flags, "-o", str(run / "vqa.json")]) == 0
    assert main(["report", str(run)]) == 0
    assert "shapes-vqa" in (run / "report.html").read_text()
    assert main(["demo", "--model", model, "--limit", "1"]) == 0
    assert "unified-3" in Path("demo/report.html").read_text()  # the curves of the run that the model lies in


WRONG_WORDS = [
    ([""], "empty"),
    (["a purple elephant"], "elephant"),
    (["red " * 10_000], "tokens"),
    (["a red circle <|im_end|>"], "control tokens"),
    (["a red circle", "--height", "65"], "height: expected a multiple of 8"),
    (["a red circle", "--width", "4096"], "width: expected a multiple of 8"),
    (["a red circle", "--negative-prompt", "zebra"], "zebra"),
    (["a red circle", "-n", "2", "--seed", str(2**63 - 1)], "seed"),
    (["a red circle", "--device", "tpu9"], "device"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "words"), WRONG_WORDS, ids=[words for _, words in WRONG_WORDS])
def test_wrong_words_get_one_line(model, capsys, argv, words):
    status, error = error_of(capsys, ["generate", *argv, "--model", model])
    assert status == 2 and words in error and [*Path().iterdir()] == []


def odd_pictures() -> dict[str, Image.Image | bytes]:
    """Images that are unusual and good (images), and files that are no images (bytes)."""
    pixels = np.arange(48 * 32, dtype=np.uint16).reshape(48, 32)
    rgb = Image.new("RGB", (48, 32), "red")
    whole = Path("whole.png")
    rgb.save(whole)
    data = whole.read_bytes()
    whole.unlink()
    return {
        "one.png": Image.new("RGB", (1, 1)),
        "gray.png": Image.new("L", (48, 32), 90),
        "rgba.png": Image.new("RGBA", (48, 32), (9, 9, 9, 9)),
        "palette.png": rgb.quantize(4),
        "deep.png": Image.fromarray(pixels * 40),
        "cmyk.jpg": rgb.convert("CMYK"),
        "long.png": Image.new("RGB", (3000, 2)),
        "moving.gif": rgb,
        "turned.jpg": rgb,
        "empty.png": b"",
        "text.png": b"I am no image",
        "cut.png": data[: len(data) // 2],
        "huge.png": data[:16] + (10**5).to_bytes(4, "big") * 2 + data[24:],
    }


@pytest.mark.slow
def test_odd_images_pass_and_what_is_no_image_gets_one_line(model, capsys):
    for name, content in odd_pictures().items():
        if isinstance(content, Image.Image):
            orientation = Image.Exif()
            orientation[0x0112] = 6
            moving = {"save_all": True, "append_images": [content] * 3}
            content.save(name, **{"moving.gif": moving, "turned.jpg": {"exif": orientation}}.get(name, {}))
            assert main(["reconstruct", name, "-o", f"back-{name}.png", "--model", model]) == 0, name
        else:
            Path(name).write_bytes(content)
            for argv in (["reconstruct", name], ["edit", name, "remove the circle"], ["understand", name, "color ?"]):
                status, error = error_of(capsys, [*argv, "--model", model])
                assert status == 2 and name in error, argv
    status, error = error_of(capsys, ["understand", "nowhere.png", "color ?", "--model", model])
    assert status == 2 and "no file 'nowhere.png'" in error
    assert not Path("out.png").exists()


def damage_config(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | changes))


DAMAGES = {
    "missing": (None, "does not exist"),
    "a file": (lambda folder: None, "is a file"),
    "empty": (lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()], "config.json is missing"),
    "partial": (lambda folder: (folder / "router" / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut": (lambda folder: (folder / "router" / "model.safetensors").write_bytes(b"short"), "damaged"),
    "foreign": (lambda folder: (folder / "config.json").write_text('{"_class_name": "Sana"}'), "no spar folder"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
    "old": (lambda folder: damage_config(folder, format_version=0), "format version 0"),
    "no sizes": (lambda folder: damage_config(folder, model={}), "missing field"),
    "unknown field": (lambda folder: damage_config(folder, model={"depth": 3}), "unknown field depth"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGES)
def test_a_model_folder_that_is_none_gets_one_line(model, capsys, case):
    import shutil

    damage, words = DAMAGES[case]
    folder = Path("damaged")
    if case == "a file":
        folder.write_text("")
    elif damage is not None:
        shutil.copytree(model, folder)
        damage(folder)
    status, error = error_of(capsys, ["generate", "a red circle", "--model", str(folder)])
    assert status == 2 and words in error and not Path("out.png").exists()


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_wants_its_extra_and_a_token_for_others(no_load, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.delenv("SPAR_API_TOKEN", raising=False)
    assert "--port: expected 0 to 65535, got 70000" in error_of(capsys, "ui --port 70000")[1]
    assert "other machines can reach this address, which needs a token" in error_of(capsys, "ui --host 0.0.0.0")[1]
    monkeypatch.setattr("spar.serving.auth.find_spec", lambda name: None if name == "gradio" else name)
    assert "this needs gradio: pip install 'spar-unified[ui]'" in error_of(capsys, "ui")[1]


# ---- a recipe that starts from a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--init-from ", "--init-from=", "--init_from ", "--init_from="])
def test_a_recipe_takes_the_sizes_and_forms_of_the_folder_that_it_starts_from(flag, tmp_path):
    from spar.cli.train_arguments import TrainArguments
    from spar.cli.training import _recipe
    from spar.inference.pipeline import BUNDLED

    def chosen(flags):
        words = shlex.split(f"shapes {flags}")
        return _recipe(words, TrainArguments, "spar train", "")[1].model

    own = chosen("")
    assert (own.text.vocab_size, own.connector.reference) == (192, "added")
    older = json.loads((BUNDLED / "config.json").read_text())
    older["model"]["text"]["vocab_size"] = 128
    older["model"]["connector"]["reference"] = "replaced"
    (tmp_path / "config.json").write_text(json.dumps(older))
    start = f"{flag}{tmp_path}"
    files = chosen(f"{start} --data.source files --data.sets somewhere")
    assert (files.text.vocab_size, files.connector.reference) == (128, "replaced")  # the folder's own
    assert (chosen(start).text.vocab_size, chosen(start).connector.reference) == (192, "replaced")  # with today's words
    assert chosen(f"{start} --model.connector.reference added").connector.reference == "added"  # a flag has its way
    assert chosen("--init-from runs/none/dit/done") == own


# ---- models of the other system --------------------------------------------------------------------------------------


def test_a_model_of_dualtoken_is_used_by_the_same_commands(dual_run, tmp_path, capsys):
    model, out = ["--model", str(dual_run.path / "model"), "--dtype", "float32"], tmp_path / "out.png"
    drawn = ["generate", "a red circle", *model, "--seed", "3", "--temperature", "0.5", "--top-k", "4", "-o", str(out)]
    assert main(drawn) == 0
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "--temperature=0.5" in shown and "--top-k=4" in shown and "--top-p=0.95" in shown
    first = out.read_bytes()
    assert main([*drawn, "--overwrite"]) == 0
    assert out.read_bytes() == first
    assert main(["understand", str(out), "how many objects are there?", *model]) == 0
    assert main(["reconstruct", str(out), *model, "-o", str(tmp_path / "again.png")]) == 0
    assert main(["info", str(dual_run.path / "model")]) == 0
    assert "temperature 0.7" in capsys.readouterr().out
    assert main(["edit", str(out), "remove the circle", *model, "-o", str(tmp_path / "edited.png")]) == 2
    assert "DualToken does not define editing" in capsys.readouterr().err


def test_a_setting_that_a_system_lacks_is_refused(tiny_run, dual_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spars, duals = (["--model", str(run.path / "model")] for run in (tiny_run, dual_run))
    assert main(["generate", "a red circle", *spars, "--temperature", "0.5"]) == 2
    assert "temperature: SPAR has no such setting, got 0.5" in capsys.readouterr().err
    assert main(["generate", "a red circle", *duals, "--decode-tile", "8"]) == 2
    assert "decode_tile: DualToken has no such setting, got 8" in capsys.readouterr().err
    for wrong in (["--temperature", "-1"], ["--top-k", "-1"], ["--top-p", "2"]):
        assert main(["generate", "a red circle", *duals, *wrong]) == 2
    assert not list(tmp_path.glob("*.png"))


def test_eval_all_leaves_out_what_a_system_does_not_define(dual_run, tmp_path, capsys):
    model = ["--model", str(dual_run.path / "model"), "--limit", "2", "--images-per-prompt", "1"]
    assert main(["eval", "all", *model, "-o", str(tmp_path / "all")]) == 0
    written = {path.stem for path in (tmp_path / "all").iterdir()}
    assert {"shapes-zero-shot", "shapes-codes", "shapes-gen", "shapes-chat"} <= written
    assert not {"shapes-edit", "shapes-edit-bind"} & written
    assert "DualToken does not define what these need: shapes-edit, shapes-edit-bind" in capsys.readouterr().err
    assert main(["eval", "shapes-edit", *model, "-o", str(tmp_path / "edit.json")]) == 2
    assert "shapes-edit needs a model that can edit; DualToken has generate" in capsys.readouterr().err
