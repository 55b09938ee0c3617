"""Seeds of images: one of each, checked."""

import secrets
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from spar.common.errors import InputError
from spar.common.limits import MAX_SEED


def list_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Expand to one checked seed per image."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Integral) and not isinstance(seed, bool):  # numpy's too
        seeds = [int(seed) + i for i in range(count)]
    else:
        given: Any = seed
        several = isinstance(given, Iterable) and getattr(given, "ndim", 1) != 0  # an array without any is one value
        seeds = list(given) if several else [given] * count
    if len(seeds) != count:
        raise InputError(f"seed: expected one, or one for each of {count} images, got {len(seeds)}")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= MAX_SEED:
            raise InputError(f"seed: expected a whole number from 0 to {MAX_SEED}, got {value!r}")
    return [int(value) for value in seeds]
