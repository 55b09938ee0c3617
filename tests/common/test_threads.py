"""Threads: a small pass runs on one, the number that torch had comes back, and what the user has set stays."""

import os
import subprocess
import sys

import pytest
import torch

from spar.common.threads import SMALL_WORK, SPIN_COUNT, limit_spinning, threads_for


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("work", "threads"), [(0, 1), (SMALL_WORK - 1, 1), (SMALL_WORK, 2), (1e15, 2)])
def test_small_work_has_one_thread_and_the_others_come_back(two_threads, work, threads):
    with threads_for(work):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads_for(work):
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_spinning_is_limited_unless_the_user_says_how_to_wait(before, after):
    limit_spinning(before)
    assert before == after


@pytest.mark.slow
def test_the_command_line_limits_it_before_torch_loads():
    code = """
import sys
from spar.cli import main as cli
def check():
    assert "torch" not in sys.modules
    print("limited")
cli.limit_spinning = check
cli.main(["doctor"])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("limited\n")
