"""The type of callbacks that report progress."""

from collections.abc import Callable

Advance = Callable[[int, int], None]  # called with what is done, and the whole
