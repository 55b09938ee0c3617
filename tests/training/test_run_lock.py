"""Two trainings never write into one folder; a lock that a dead process left is free."""

import os
import subprocess
import sys

import pytest

from spar.common.errors import InputError
from spar.recipes import recipe
from spar.training.run_lock import LOCK, run_lock
from spar.training.trainer import train

HOLD = "import sys, pathlib\nfrom spar.training.run_lock import run_lock\n" \
       "with run_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"  # fmt: skip


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_writes_is_refused_with_its_number_and_machine(other, tmp_path):
    before = (tmp_path / LOCK).read_bytes()
    with pytest.raises(InputError, match=rf"is being written by process {other.pid} on \S+ \(since .*\): wait for it"):
        with run_lock(tmp_path):
            pass
    assert (tmp_path / LOCK).read_bytes() == before


def test_a_lock_that_a_killed_process_left_is_free(other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / LOCK).is_file()
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_file_without_sense_is_free_or_says_no_more_than_it_knows(tmp_path):
    (tmp_path / LOCK).write_text("\x00 no json")
    with run_lock(tmp_path):
        (tmp_path / LOCK).write_text("[]")
        with pytest.raises(InputError, match="is being written by another process"):
            with run_lock(tmp_path):
                pass


def test_a_training_holds_its_folder_and_a_second_one_is_refused(tiny_run, tmp_path):
    run, refused = tmp_path / "run", []
    begin = {"stages": ("unified-3",), "init_from": tiny_run.path / "unified-2" / "done"}

    def second(*_):
        if not refused:
            with pytest.raises(InputError, match=f"is being written by process {os.getpid()}"):
                train(recipe("tiny"), run, **begin, resume=True)
            refused.append(True)

    assert train(recipe("tiny"), run, **begin, report=second) is not None
    assert refused and not (run / LOCK).exists()
    assert (run / "model" / "config.json").is_file()


def test_a_forked_child_does_not_hold_the_lock_beyond_its_parent(tmp_path):
    script = (
        "import os, sys, time, pathlib\nfrom spar.training.run_lock import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n        print(os.getpid(), flush=True); time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(child, 9)
