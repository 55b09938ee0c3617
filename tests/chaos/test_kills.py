"""`kills.py`, short: `make chaos` runs it long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (2, 1)])  # the first one is inside a save
def test_a_training_that_is_killed_ends_bit_identical(tiny_run, processes, kills):
    start = tiny_run.path / "tokenizer-2" / "done"
    options = ["--kills", str(kills), "--processes", str(processes), "--steps", "60", "--start", str(start)]
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (result,) = json.loads(done.stdout.splitlines()[-1])["rounds"]
    assert result["kills"] == kills and result["inside_a_save"] >= 1
    assert result["differing"] == [] and result["files"] >= 1 and result["left"] == ["done"]
