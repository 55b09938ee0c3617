"""The documents stay true: the names that they give exist, and the scores are those of the results files."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from spar.evaluation.results import read_result
from spar.evaluation.targets import RECIPE_TARGETS, TARGETS, scores_table

ROOT = Path(__file__).parents[1]
GUIDES = [path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"]  # the log keeps the names of its days
NAMES = sorted(set(re.findall(r"`(spar(?:\.\w+)+)`", "".join(p.read_text() for p in GUIDES))))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_documents_exists(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is no module")


def test_the_map_names_the_main_classes():
    assert {"spar.models.denoiser.Denoiser", "spar.losses.alignment.alignment_loss"} <= set(NAMES)


SCORES = {"scores": ("docs/results", TARGETS), "scores of the recipe": ("docs/results/recipe", RECIPE_TARGETS)}


@pytest.mark.parametrize("mark", SCORES)
def test_the_scores_of_the_readme_are_those_of_the_results_files(mark):
    folder, targets = SCORES[mark]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", text, re.S)[1]
    results = [read_result(path) for path in sorted((ROOT / folder).glob("*.json"))]
    assert results
    assert shown.strip() == scores_table(results, targets).strip()


@pytest.mark.slow
def test_the_examples_of_the_guide_to_use_run(tmp_path, monkeypatch, capsys):
    """Every block of docs/use.md, in order, in one folder and one namespace."""
    from spar.cli.main import main

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "use.md").read_text(encoding="utf-8"), re.M | re.S)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    names: dict = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "docs/use.md", "exec"), names)  # the repository's own text
        else:
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
    output = capsys.readouterr().out
    for promised in re.findall(r"print\(\w+\)  # (.*)", "".join(block for _, block in blocks)):
        assert promised in output
    gap = np.abs(np.asarray(names["again"].images[0]).astype(int) - np.asarray(names["out"].images[1]))
    assert gap.mean() < 1 and names["steps"] == [(1, 8), (2, 8)]  # in bfloat16 single pixels move by more
    assert names["first"] == "navy" and names["second"] and names["answer"].finish_reason == "stop"
    assert names["back"].shape == names["pixels"].shape
    assert (tmp_path / "model" / "README.md").is_file() and "would go to OWNER/NAME, private" in output


def test_measured_numbers_in_the_guides_are_those_of_the_benchmarks():
    folder = ROOT / "benchmarks" / "results"
    training, serving = ((ROOT / "docs" / name).read_text() for name in ("training.md", "serving.md"))
    runs = json.loads((folder / "train_step_h200.json").read_text())
    shown = re.findall(r"^\| (\S+), \d+ px \| (\d+) \| (yes|no) \| (\S+) \| (\S+) \| (\S+) \|$", training, re.M)
    measured = {
        (row["stage"], str(row["batch"]), "yes" if run["compile"] else "no", f"{row['images_per_second']:.1f}",
         f"{row['mfu']:.2f}", f"{row['peak_memory_gib']:.1f}")
        for run in runs for row in run["results"]
    }  # fmt: skip
    assert len(shown) == 3 and set(shown) <= measured
    load = json.loads((folder / "serve_load.json").read_text())
    shown = re.search(r"takes (\S+) seconds; .* gets (\S+) images a second, eight together (\S+)\s", serving)
    assert shown.groups() == (
        f"{load['first_image_s']:.1f}", f"{load['one']['images_per_s']:.1f}", f"{load['eight']['images_per_s']:.1f}"
    )
