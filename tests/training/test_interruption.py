"""A signal to the whole process group, as systemd and schedulers send it: data workers get it too."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from spar.training.checkpoint import read_train_state
from spar.training.interruption import Interruption, listening


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_ends_saved_though_workers_get_it_too(tiny_run, tmp_path, number):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text("a red circle")
    (images / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{index}.png", "text": "a red circle"}}\n' for index in range(12))
    )
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "spar", "train", "tiny", "--stage", "tokenizer-3", "--init-from",
        str(tiny_run.path / "tokenizer-2" / "done"), "--run", str(run), "--data.source", "files", "--data.sets",
        str(images), "--data.workers", "2", "--stages.tokenizer-3.steps", "100000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    metrics, begun = run / "metrics.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 120:
        if metrics.is_file() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.05)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said[-3000:]
    assert "spar: stopped; stage tokenizer-3 is saved after " in said and "Traceback" not in said
    assert read_train_state(run / "tokenizer-3" / "state").step >= 3


def test_what_was_asked_for_is_noted_once():
    before = signal.getsignal(signal.SIGUSR1)
    with listening() as interruption:
        assert interruption == Interruption()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.take_save() and not interruption.take_save() and not interruption.stopped
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.stopped
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_the_process_ignores_stays_ignored():
    """As under nohup, which ignores SIGHUP for what it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.stopped
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once_and_a_passed_on_one_does_not(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("spar.training.interruption.time.monotonic", lambda: now[0])
    interruption = Interruption()
    interruption.note(signal.SIGINT)
    now[0] += 1.0
    interruption.note(signal.SIGINT)
    assert interruption.stopped
    now[0] += 2.0
    with pytest.raises(KeyboardInterrupt):
        interruption.note(signal.SIGINT)


@pytest.mark.slow
def test_an_error_with_living_workers_ends_the_process(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import torch\nfrom torch.utils.data import DataLoader\nfrom spar.data.loader import _begin_worker\n"
        "def numbers():\n"
        "    yield from DataLoader(list(range(1000)), num_workers=2, worker_init_fn=_begin_worker)\n"
        "batches = numbers()\nnext(batches)\nraise RuntimeError('out of memory')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "out of memory" in done.stderr
