"""A recipe's file gives what its flags would, flags change it further, and any other file gets one line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from spar.cli.main import main
from spar.cli.recipe_files import read_recipe_file
from spar.cli.train_arguments import TrainArguments
from spar.cli.training import _recipe
from spar.common import settings_files
from spar.common.config import to_dict
from spar.common.errors import InputError
from spar.recipes import RECIPES, recipe
from spar.training.files_data import FilesData


def write(folder: Path, text: str, name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def chosen(*argv: str):
    return _recipe(list(argv), TrainArguments, "spar train", "")[1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_recipe_comes_back_from_json_and_from_yaml(name, tmp_path):
    values = to_dict(recipe(name))
    for text, ending in ((json.dumps(values), "json"), (json.dumps(values), "yaml"), (yaml.safe_dump(values), "yml")):
        assert read_recipe_file(write(tmp_path, text, f"recipe.{ending}")) == (recipe(name), True)


def test_a_name_and_what_differs_is_what_the_flags_make(tmp_path):
    path = write(tmp_path, """
recipe: tiny
seed: 3
stages:
  dit: {steps: 9, lr: 2e-3}
  unified-2:
    data: {edit_share: 0.25}
    objective: {align: 0}
flow: {training_shift: 2}
""")
    flags = ["--seed", "3", "--stages.dit.steps", "9", "--stages.dit.lr", "2e-3", "--flow.training-shift", "2",
             "--stages.unified-2.data.edit-share", "0.25", "--stages.unified-2.objective.align", "0"]  # fmt: skip
    assert chosen("--config", str(path)) == chosen("tiny", *flags) != recipe("tiny")
    assert read_recipe_file(path)[1] is False


@pytest.mark.parametrize(
    ("text", "name"), [('{"recipe": "tiny", "seed": 3}', "own.json"), ("recipe: tiny\nseed: 3", "own.yaml")]
)
def test_a_file_may_begin_with_a_byte_order_mark(text, name, tmp_path):
    assert read_recipe_file(write(tmp_path, "\ufeff" + text, name)) == (replace(recipe("tiny"), seed=3), False)


def test_flags_change_a_file_further(tmp_path):
    path = write(tmp_path, "recipe: tiny\nseed: 3\nlog_every: 7")
    assert chosen(f"--config={path}", "--seed", "5") == replace(recipe("tiny"), seed=5, log_every=7)


def test_another_source_of_data_begins_with_its_own_fields(tmp_path):
    path = write(tmp_path, "recipe: tiny\ndata: {kind: files, sets: [a.tar, 0.5=b.tar]}")
    found = chosen("--config", str(path))
    assert found.data == FilesData(sets=("a.tar", "0.5=b.tar"))
    assert found == chosen("tiny", "--data.source", "files", "--data.sets", "a.tar", "0.5=b.tar")


def test_a_folder_to_start_from_gives_the_sizes_unless_the_file_does(tiny_run, tmp_path):
    start = ["--init-from", str(tiny_run.path / "model")]
    named = write(tmp_path, "recipe: shapes", "named.yaml")
    sized = write(tmp_path, "recipe: shapes\nmodel: {router: {kind: last}}", "sized.yaml")
    assert chosen("--config", str(named), *start).model.denoiser == recipe("tiny").model.denoiser
    assert chosen("--config", str(sized), *start).model.denoiser == recipe("shapes").model.denoiser


def test_the_file_of_a_run_plans_that_run_again(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(tiny_run.path / "recipe.json"), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main(["train", "tiny", "--dry-run"]) == 0
    assert planned.splitlines()[:15] == capsys.readouterr().out.splitlines()[:15]  # after these, how fast the CPU is
    assert main(["plan", "--config", str(tiny_run.path / "recipe.json"), "--gpus", "1"]) == 0
    assert [*tmp_path.iterdir()] == []


def test_the_example_of_the_guide_is_a_recipe(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", guide, re.M | re.S)
    found = chosen("--config", str(write(tmp_path, text)))
    assert (found.seed, found.model.router.kind, found.data) == (3, "last", FilesData(sets=("DATA",)))
    assert (found.stage("unified-2").steps, found.stage("unified-2").lr) == (100, 5e-4)


BOMB = "a: &a [1]\nb: [*a, *a]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an object with fields in .*, got NoneType"), ("- 1", "got list"), ("1: 2", "got dict"),
        ("recipe: large", "unknown recipe 'large'"), ("recipe: 3", "recipe: expected a name, got 3"),
        ("recipe:", "recipe: expected a name, got None"),
        ("recipe: tiny\nstages: {dit: {steps: 1.5}}", ": stages.dit.steps: expected int, got 1.5"),
        ("recipe: tiny\nstages: {dit: {optimizer: sgd}}", ": stages.dit.optimizer: expected one of adamw, muon"),
        ("recipe: tiny\nstages: {dit: {data: {images: 3}}}", ": stages.dit.data: unknown field images"),
        ("seed: 3", "kind: expected one of .*spar.*, got None"),
        ("recipe: tiny\nsede: 3", "unknown field sede"),
        ("recipe: tiny\nseed: x", "seed: expected int, got 'x'"),
        ("recipe: tiny\nmodel: 3", "model: expected an object with fields, got 3"),
        ("recipe: tiny\nstages: [1]", "stages: expected fields by stage, of .*unified-2.*, got .1."),
        ("recipe: tiny\nstages: {unified-9: {}}", "got .'unified-9'."),
        ("recipe: tiny\nstages: {dit: 3}", "stages.dit: expected an object with fields, got 3"),
        ("recipe: tiny\nstages: {dit: {steps: 0}}", "steps must be at least 1"),
        ("recipe: tiny\ndata: {kind: tapes}", "data.kind: expected one of .*files.*, got 'tapes'"),
        ("recipe: tiny\nname: ../elsewhere", "name: expected the name of a folder, got '../elsewhere'"),
        ("recipe: tiny\nname: ''", "got ''"), ("recipe: tiny\nname: -x", "got '-x'"),
        ("recipe: tiny\nrecipe: shapes", "each key once, got 'recipe' twice"),
        ("recipe: tiny\n? [a]\n: 1", "cannot be read"), ("recipe: tiny\n1: 2", "got dict"),
        (BOMB, "got an alias"), ("a: [", "cannot be read"), ("!!python/object:os.system {}", "cannot be read"),
        ("[" * 5000, "cannot be read"), ("\udcff", "cannot be read"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_is_no_recipe_is_refused(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_recipe_file(path)


def test_files_have_a_limit_and_an_ending(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="ends in .json, .yaml, .yml"):
        read_recipe_file(write(tmp_path, "recipe: tiny", "own.toml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="there is no file"):
        read_recipe_file(tmp_path / "folder.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe_file(write(tmp_path, "{", "own.json"))
    monkeypatch.setattr(settings_files, "MAX_BYTES", 1024)
    with pytest.raises(InputError, match="at most 1 KiB"):
        read_recipe_file(write(tmp_path, "#" * 1025))
