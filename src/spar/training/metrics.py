"""What a run writes down of its steps: JSON lines for every reader, TensorBoard for curves while it goes on."""

import json
import logging
from pathlib import Path
from typing import Any

from spar.common.files import atomic_file

log = logging.getLogger("spar.training")


class MetricsLogger:
    """One JSON line and one TensorBoard point a logged step.

    Lines from step `start` of the stage on are dropped first: a crash loses the steps since the last save, which are
    then trained and logged again.
    """

    def __init__(self, run: Path, stage: str, start: int) -> None:
        self.path = run / "metrics.jsonl"
        self._forget(stage, start)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tensorboard")
        except ImportError:
            log.warning("TensorBoard is not installed: metrics go to %s only", self.path)

    def _forget(self, stage: str, start: int) -> None:
        if not self.path.exists():
            return
        lines, kept = self.path.read_text(encoding="utf-8").splitlines(), []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut in the middle by a crash
                continue
            if row["stage"] != stage or row["step"] < start:
                kept.append(line)
        if len(kept) < len(lines):
            with atomic_file(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
