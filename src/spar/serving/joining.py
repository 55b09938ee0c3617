"""When images join a running batch: where all would finish earlier than if they waited, by what steps took so far.

A step of n rows takes about `fixed + each * n` seconds. Joining saves the fixed part of every step that is then shared,
and what a short request would have waited for longer ones. It costs those that run the newcomers' part of their steps,
and the preparation of prompts (the layout that the LLM writes above all), during which no step runs. Where steps cost
as much as their rows, as on a small CPU, or preparing is dear, joining at once makes everyone slower than waiting does
(benchmarks/joining_policies.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

# Who joins now pays by himself for what he could have shared with those that come later.
PREPARATION_SHARE = 2
FASTER, SLOWER = 0.5, 0.1  # how much of a newer measurement counts: that it was slow may be another process's doing


@dataclass
class LinearCost:
    """Seconds of a piece of work by its number of rows, on a line through what each number took lately."""

    measured: dict[int, float] = field(default_factory=dict)

    def observe(self, rows: int, seconds: float) -> None:
        before = self.measured.get(rows, seconds)
        self.measured[rows] = before + (FASTER if seconds < before else SLOWER) * (seconds - before)

    def line(self) -> tuple[float, float]:
        """`fixed` and `each`, neither below 0. After one number of rows alone another costs nothing, so that it is
        tried.
        """
        if not self.measured:
            return 0.0, 0.0
        # Fewer rows never take longer: a number of rows that has not come again since the first, cold one, counts as
        # more rows do.
        least = {rows: min(took for more, took in self.measured.items() if more >= rows) for rows in self.measured}
        count = len(least)
        rows, seconds = sum(least) / count, sum(least.values()) / count
        spread = sum((one - rows) ** 2 for one in least)
        slope = sum((one - rows) * took for one, took in least.items()) / spread if spread else 0.0
        each = min(max(slope, 0.0), seconds / rows)
        return seconds - each * rows, each


@dataclass
class BatchCosts:
    """What a step of a kind of batch costs, and the preparation of images that join."""

    step: LinearCost = field(default_factory=LinearCost)
    preparation: LinearCost = field(default_factory=LinearCost)

    def worth_joining(self, left: Sequence[int], steps: Sequence[int]) -> bool:
        """Whether the sum of all times to the end falls if images of so many `steps` join now.

        Args:
            left: steps that each running row has left, one at least; otherwise the images wait for the last of them.
            steps: of each image that waits.
        """
        fixed, each = self.step.line()
        first, more = self.preparation.line()
        gain, loss = 0.0, PREPARATION_SHARE * len(left) * (first + more * len(steps))
        for own in steps:
            gain += fixed * max(left) + each * sum(max(one - own, 0) for one in left)
            loss += each * sum(min(one, own) for one in left)
        return gain >= loss
