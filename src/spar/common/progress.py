"""How long work tells how far it is."""

from collections.abc import Callable

Advance = Callable[[int, int], None]  # called with what is done, and the whole
