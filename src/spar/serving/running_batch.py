"""The jobs of a running batch: they join and leave between its steps, and one that fails fails alone."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence

from spar.serving.jobs import JoiningJob, SteppedBatch, fail, finish, free
from spar.serving.joining import BatchCosts

log = logging.getLogger(__name__)

Jobs = Sequence[JoiningJob]


class RunningBatch:
    """A batch, its name, and the jobs of its rows."""

    def __init__(self, name: Hashable, batch: SteppedBatch, costs: BatchCosts) -> None:
        self.name, self.batch, self.costs, self.jobs = name, batch, costs, list[JoiningJob]()

    @property
    def weight(self) -> float:
        return sum(job.weight for job in self.jobs)

    def welcomes(self, jobs: Jobs) -> bool:
        """Whether it is worth it that jobs join now rather than at the end."""
        return not self.jobs or self.costs.worth_joining(self.batch.left(), [job.steps for job in jobs])

    def join(self, jobs: Jobs) -> None:
        start = time.perf_counter()
        self.batch.join([job.inputs for job in jobs])
        self.costs.preparation.observe(len(jobs), time.perf_counter() - start)
        self.jobs += jobs

    def step(self) -> None:
        """Advance all jobs but those that were cancelled, which leave."""
        self._leave([job for job in self.jobs if job.future.cancelled()])
        if self.jobs:
            start = time.perf_counter()
            self.batch.step()
            self.costs.step.observe(len(self.jobs), time.perf_counter() - start)

    def answer(self) -> int:
        """Show previews and finish jobs as the step allows, each of which may fail alone; returns how many left."""
        before = len(self.jobs)
        run_apart([self.jobs[row] for row in self.batch.previews()], self._show, self._drop)
        run_apart([self.jobs[row] for row in self.batch.finished()], self._finish, self._drop)
        return before - len(self.jobs)

    def _rows(self, jobs: Jobs) -> list[int]:
        return [self.jobs.index(job) for job in jobs]

    def _show(self, jobs: Jobs) -> None:
        self.batch.show(self._rows(jobs))

    def _finish(self, jobs: Jobs) -> None:
        results = self.batch.finish(self._rows(jobs))
        self.jobs = [job for job in self.jobs if job not in jobs]
        for job, result in zip(jobs, results, strict=True):
            finish(job.future, result)

    def _leave(self, jobs: Jobs) -> None:
        if jobs:
            self.batch.leave(self._rows(jobs))
            self.jobs = [job for job in self.jobs if job not in jobs]

    def _drop(self, job: JoiningJob, error: Exception) -> None:
        fail(job.future, error)
        self._leave([job])


def run_apart(jobs: Jobs, run: Callable[[Jobs], None], fail: Callable[[JoiningJob, Exception], None]) -> None:
    """Run all jobs at once; if that fails, each alone, so that only the faulty ones fail."""
    if not jobs:
        return
    try:
        run(jobs)
        return
    except Exception as error:
        if len(jobs) == 1:
            fail(jobs[0], error)
            return
        log.warning("what was to run for %d jobs failed and is run one by one: %s", len(jobs), type(error).__name__)
        free(error)
    for job in jobs:
        run_apart([job], run, fail)


def groups_of(jobs: Jobs) -> list[list[JoiningJob]]:
    """The jobs of a batch that can join it together, the oldest first."""
    groups: dict[Hashable, list[JoiningJob]] = {}
    for job in jobs:
        groups.setdefault(job.key, []).append(job)
    return [*groups.values()]
