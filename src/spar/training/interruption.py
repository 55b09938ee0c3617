"""Signals to a training: those that stop it, and one that asks for a save.

A signal is noted, not raised: the step in flight ends, or the end of a stage is written whole, before the run stops.
SIGINT, SIGTERM and SIGHUP stop; SIGUSR1 saves and goes on.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAVES = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


@dataclass
class Interruption:
    """What signals have asked for so far."""

    stopped: bool = False
    save: bool = False

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def note(self, number: int) -> None:
        """Note one signal."""
        if number in STOPS:
            self.stopped = True
        else:
            self.save = True


@contextmanager
def listening() -> Iterator[Interruption]:
    """Note signals in place of what they did before; outside the main thread they are left to the process."""
    found = Interruption()
    try:
        old = {number: signal.signal(number, lambda number, _: found.note(number)) for number in (*STOPS, *SAVES)}
    except ValueError:
        old = {}
    try:
        yield found
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

