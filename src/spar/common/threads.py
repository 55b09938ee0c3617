"""Number of CPU threads, and the time that they spin while they wait for each other.

torch's kernels run in OpenMP teams that synchronize after every operation. GNU's OpenMP lets waiting threads spin for
milliseconds, which is fastest on an idle machine; with a busy process the awaited thread has no core, and everything
takes several times as long. The command line therefore shortens the spinning before torch loads, and work that is too
small to gain from a second thread runs on one. Measured: docs/log.md, 2026-11-28. torch is imported late.
"""

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

SPIN_COUNT = "1000"
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Multiply-adds of one pass below which one thread is about as fast as two on an idle machine, and faster on a busy one.
SMALL_WORK = 1.5e9


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Shorten the spinning of waiting threads; call it before torch loads. The user's own settings take precedence."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


@contextmanager
def threads_for(work: float) -> Iterator[None]:
    """Use one thread for a pass of fewer than SMALL_WORK multiply-adds, else as many as torch has."""
    import torch

    threads = torch.get_num_threads()
    if work >= SMALL_WORK or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
