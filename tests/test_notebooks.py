"""The notebooks run from top to bottom, cell by cell, and are kept without outputs."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read_cells(path: Path) -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


def run_cells(path: Path) -> dict:
    """Run the code cells in one namespace, as a kernel does; returns the names that they leave."""
    names: dict = {"__name__": "__main__"}
    for cell in read_cells(path):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {cell['id']}", "exec"), names)
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_no_outputs_and_names_its_cells(path):
    cells = read_cells(path)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["metadata"] == {} and all(len(line) <= 121 for line in cell["source"])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (path,) = NOTEBOOKS
    names = run_cells(path)
    output = capsys.readouterr().out
    assert names["answers"][:2] == ["navy", "yes"] and "refused: prompt: unknown words cat" in output
    assert len(names["out"].images) == len(names["edits"].images) == 3 and names["psnr"] > 30
    scores = names["scores"]
    assert scores[20, 4.5] > 0.75 > scores[4, 4.5] > scores[1, 4.5] and len(scores) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_fails_would_be_named(tmp_path):
    cell = {"cell_type": "code", "id": "bad", "source": ["1 / 0"]}
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "cells": [cell]}))
    with pytest.raises(ZeroDivisionError) as raised:
        run_cells(path)
    assert "x.ipynb, cell bad" in str(raised.traceback[-1].path)
