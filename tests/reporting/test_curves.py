"""Training curves from metrics.jsonl."""

import pytest

from spar.common.errors import InputError
from spar.reporting.curves import read_metrics, stage_seconds

LINES = [
    '{"stage": "encoder", "step": 0, "loss": 3.0, "lr": 0.1, "seconds": 1.0}',
    '{"stage": "encoder", "step": 20, "loss": 2.0, "lr": 0.2, "seconds": 4.0}',
    '{"stage": "encoder", "step": 40, "loss": 1.5, "lr": 0.2, "seconds": 6.0}',
    '{"stage": "encoder", "step": 20, "loss": 2.5, "lr": 0.2, "seconds": 5.0}',
    '{"stage": "dit", "step": 0, "flow": 1.0, "seconds": 0.5}',
]


def write(tmp_path, *lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_series_a_stage_and_term_and_the_last_line_of_a_step_counts(tmp_path):
    curves = read_metrics(write(tmp_path, *LINES))
    assert {stage: list(terms) for stage, terms in curves.items()} == {"encoder": ["loss", "lr"], "dit": ["flow"]}
    steps, values = curves["encoder"]["loss"]
    assert steps.tolist() == [0, 20, 40] and values.tolist() == [3.0, 2.5, 1.5]


def test_a_last_line_cut_short_is_left_out_but_an_earlier_one_is_not(tmp_path):
    assert "dit" not in read_metrics(write(tmp_path, *LINES[:4], LINES[4][:20]))
    with pytest.raises(InputError, match="line 1"):
        read_metrics(write(tmp_path, "no json", *LINES))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")


def test_seconds_of_each_stage(tmp_path):
    assert stage_seconds(write(tmp_path, *LINES, "half a li")) == {"encoder": 6.0, "dit": 0.5}
