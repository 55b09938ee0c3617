"""`spar list` and `spar completion` say what there is, and tables fit the terminal."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from spar.checkpoints.inspect import inspect
from spar.cli.completion import completion_script
from spar.cli.console import new_table, show_table
from spar.cli.main import VERBS, main
from spar.evaluation.benchmarks import BENCHMARKS, MEASURED
from spar.inference.pipeline import BUNDLED
from spar.recipes import RECIPES, recipe


def test_list_names_every_recipe_model_and_benchmark(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["recipes"]] == [*RECIPES]
    for row in found["recipes"]:
        own = recipe(row["name"])
        assert (row["stages"], row["pixels"]) == (len(own.stages), own.image_size)
        assert row["steps"] == sum(stage.steps for stage in own.stages) and row["what"].endswith(".")
    assert [row["name"] for row in found["benchmarks"]] == [*BENCHMARKS, "zero-shot", "recon"] == [*MEASURED]
    assert [row["name"] for row in found["models"]] == ["spar, the default", "dualtoken"]
    for row in found["models"]:
        assert row["parameters"] == inspect(Path(row["folder"])).parameters
    assert found["models"][0]["folder"] == str(BUNDLED)


def test_list_prints_the_same_as_tables(capsys, monkeypatch, tmp_path):
    folder = tmp_path / "none" / "weights"                                     # an installation without
    monkeypatch.setattr("spar.checkpoints.bundled.BUNDLED_MODELS", {"spar": folder})
    assert main(["list"]) == 0
    lines = capsys.readouterr().out
    for name in [*RECIPES, *BENCHMARKS]:
        assert re.search(rf"^│ {name} +│", lines, re.M), name
    assert "models" in lines


# ---- completion -----------------------------------------------------------------------------------------------------


def complete(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _spar; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def script() -> str:
    return completion_script("bash", VERBS)


def test_bash_completes_verbs_flags_names_and_files(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_text("")
    assert complete(script, "spar", "re") == ["reconstruct", "report"]
    assert set(complete(script, "spar", "")) == {*VERBS}
    assert complete(script, "spar", "train", "dual") == [name for name in RECIPES if name.startswith("dual")]
    assert complete(script, "spar", "train", "--conf") == ["--config"]
    assert complete(script, "spar", "generate", "a ring", "--num-im") == ["--num-images-per-prompt"]
    assert complete(script, "spar", "generate", "a ring", "--save") == ["--save-steps"]
    assert complete(script, "spar", "eval", "shapes-v") == ["shapes-vqa", "shapes-vqa-bind"]
    for words in (("edit", "pho"), ("demo", "--images", "pho")):
        assert complete(script, "spar", *words) == ["photo.png"]
    assert complete(script, "spar", "nonsense", "--x") == []


def test_every_verb_has_its_flags_and_nothing_of_their_explanations(script):
    for verb in VERBS:
        words = re.search(rf'^ +{verb}\) words="(.*)" ;;$', script, re.M)[1].split()
        assert "--help" in words or verb == "data"
        assert len(set(words)) == len(words) and all(re.fullmatch(r"-{0,2}[a-z][a-z0-9-]*", word) for word in words)
    assert "--data.cache" not in script and "--public" in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_verb_prints_a_script_that_its_shell_can_read(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == completion_script(shell, VERBS) and "generate" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


# ---- tables ---------------------------------------------------------------------------------------------------------


def shown(width: int) -> list[str]:
    """The lines of a table of three columns, on a terminal of that width."""
    stream = io.StringIO()
    table = new_table("stage", ">parameters", "what it prepares", title="plan of a run")
    table.add_row("unified-2", "12,345,678", "the alignment of the teacher's features with the denoiser's own")
    table.add_row("dit", "9", "")
    show_table(Console(file=stream, width=width), table)
    return stream.getvalue().rstrip("\n").splitlines()


@pytest.mark.parametrize("width", [200, 100, 60, 42, 36, 30])
def test_a_table_fits_the_terminal_and_breaks_no_word(width):
    lines = shown(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(word in text for word in ("unified-2", "12,345,678", "alignment", "denoiser's"))
    assert (" │ " in text) == (width >= 42)


def test_rows_become_lines_without_the_empty_cells():
    lines = [line.rstrip() for line in shown(36)]
    assert lines[0] == "plan of a run" and lines[1].split() == ["stage", "unified-2"]
    assert lines[-2].split() == ["stage", "dit"] and lines[-1].split() == ["parameters", "9"]
