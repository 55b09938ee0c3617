"""The documents stay true: the names that they give exist, and the scores are those of the results files."""

import importlib
import re
from pathlib import Path

import pytest

from spar.evaluation.results import read_result
from spar.evaluation.table import RECIPE_TARGETS, TARGETS, scores_table

ROOT = Path(__file__).parents[1]
NAMES = sorted(set(re.findall(r"`(spar(?:\.\w+)+)`", "".join(p.read_text() for p in (ROOT / "docs").glob("*.md")))))


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
