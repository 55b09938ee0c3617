"""Work on many parts of a data set in several processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


def map_in_processes(function: Callable[[Part], Result], parts: Sequence[Part], workers: int) -> Iterator[Result]:
    """Yield the results in the parts' order; a single worker or part needs no further process."""
    if min(workers, len(parts)) < 2:
        yield from map(function, parts)
        return
    with ProcessPoolExecutor(min(workers, len(parts))) as pool:
        yield from pool.map(function, parts)
