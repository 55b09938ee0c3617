"""Kill a training over and over, some times inside a save, and compare what it leaves with an undisturbed one.

    python tests/chaos/kills.py --kills 50

One stage of `tiny` with an adversary, on images in a folder, with data workers and micro-batches, first on one process,
then on two. A kill is SIGKILL to all processes of the training, by turns as soon as a save has begun, at a random
moment after the first step, and at a random moment after the start, when the state is being read. The last line is
JSON; the exit status is 1 where a byte of the weights differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from spar.evaluation.environment import machine_info, version_info

STAGE, BEFORE = "tokenizer-3", "tokenizer-2"
WHEN = ("save", "step", "start")
DEADLINE = 300.0  # seconds until a training that does nothing has failed
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def make_images(folder: Path) -> None:
    """Sixteen images of noise with captions."""
    folder.mkdir()
    lines = []
    for index in range(16):
        noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": "a red circle"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def command(run: Path, data: Path, start: Path, steps: int, processes: int) -> list[str]:
    """The training's command line; on two processes each has half of the micro-batches of one."""
    launch = ["-m", "spar"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--", "spar"]
    return [
        sys.executable, *launch, "train", "tiny", "--run", str(run), "--resume", "auto", "--init-from", str(start),
        "--stage", STAGE, f"--stages.{STAGE}.steps", str(steps), "--data.source", "files", "--data.sets", str(data),
        "--data.workers", "1", "--save-minutes", "0.01", "--parallelism.grad-accum-steps", str(2 // processes),
        "--device", "cpu",
    ]  # fmt: skip


def finish(argv: list[str]) -> None:
    """Run a training to its end."""
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        raise SystemExit(f"a training that was not killed failed:\n{(done.stdout + done.stderr)[-4000:]}")


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that it has started, in whatever group: torchrun's are in groups of their own."""
    family = stopped_family(psutil.Process(pid))
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=DEADLINE)


def stopped_family(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants, each stopped before its children are listed, so that none is started unseen."""
    try:
        process.suspend()
        return [process, *(one for child in process.children() for one in stopped_family(child))]
    except psutil.NoSuchProcess:
        return []


class Killer:
    """Starts a training and kills it at a chosen moment."""

    def __init__(self, run: Path, seed: int) -> None:
        self.run, self.random = run, random.Random(seed)
        self.start_seconds = 10.0  # from a start to its first line, as the last one took
        self.done = {"kills": 0, "inside_a_save": 0, "ended_before": 0}

    def kill(self, argv: list[str], when: str) -> None:
        """One training, from its start to its end by SIGKILL at a moment of WHEN."""
        lines, begun = self._lines(), time.monotonic()
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                argv, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT
            )
            try:
                if when == "start":
                    time.sleep(self.random.uniform(0, self.start_seconds))
                elif self._wait(process, lambda: self._lines() > lines):
                    self.start_seconds = time.monotonic() - begun
                    if when == "save":
                        self._wait(process, self._saving)
                    else:
                        time.sleep(self.random.uniform(0, 2))
            finally:
                alive = process.poll() is None
                if alive:
                    kill_tree(process.pid)
                process.wait()
            if not alive and process.returncode:
                said.seek(0)
                raise SystemExit(f"a training failed by itself:\n{said.read()[-4000:]}")
        self.done["kills" if alive else "ended_before"] += 1
        self.done["inside_a_save"] += alive and self._saving()

    def _wait(self, process: subprocess.Popen, reached) -> bool:
        """Whether something comes true before the training's end."""
        begun = time.monotonic()
        while not reached():
            if process.poll() is not None:
                return False
            if time.monotonic() - begun > DEADLINE:
                raise SystemExit(f"a training did nothing for {DEADLINE:.0f} s")
            time.sleep(0.001)
        return True

    def _saving(self) -> bool:
        return any((self.run / STAGE / f"{name}.part").exists() for name in ("state", "done"))

    def _lines(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def chaos(work: Path, data: Path, start: Path, processes: int, kills: int, steps: int, seed: int) -> dict:
    """Both trainings; what happened, and the files of the finished stage that differ."""
    plain, killed = work / f"plain-{processes}", work / f"killed-{processes}"
    finish(command(plain, data, start, steps, processes))
    killer, begun, argv = Killer(killed, seed), time.monotonic(), command(killed, data, start, steps, processes)
    while killer.done["kills"] < kills and not killer.done["ended_before"]:
        killer.kill(argv, WHEN[killer.done["kills"] % len(WHEN)])
    finish(argv)
    wanted, found = (fingerprint(run / STAGE / "done") for run in (plain, killed))
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    left = sorted(path.name for path in (killed / STAGE).iterdir())
    return {
        "processes": processes, **killer.done, "steps": steps, "seed": seed,
        "seconds": round(time.monotonic() - begun), "files": len(wanted), "differing": differing, "left": left,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of the stage; by default enough for the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help=f"{BEFORE}/done of a run of tiny; by default one is trained")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start = arguments.start
        if start is None:
            finish([sys.executable, "-m", "spar", "train", "tiny", "--run", str(work / "start")])
            start = work / "start" / BEFORE / "done"
        make_images(work / "data")
        rounds, each = [], -(-arguments.kills // len(arguments.processes))
        for processes in arguments.processes:
            steps = arguments.steps or 40 + 30 * each
            rounds.append(chaos(work, work / "data", start, processes, each, steps, arguments.seed))
    circumstances = {"machine": machine_info(), "versions": version_info(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    print(json.dumps({"rounds": rounds, **circumstances}))
    return 1 if any(one["differing"] or not one["files"] for one in rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
