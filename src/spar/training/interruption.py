"""Signals to a training: those that stop it, and one that asks for a save.

A signal is noted, not raised: the step in flight ends, or the end of a stage is written whole, before the run stops.
SIGINT, SIGTERM and SIGHUP stop; SIGUSR1 saves and goes on. A second Ctrl-C, AGAIN seconds after the first or later,
ends at once: what is being waited for may never come.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAVES = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))
AGAIN = 2.0  # seconds: a launcher may pass on a Ctrl-C that the group has got already


@dataclass
class Interruption:
    """What signals have asked for so far."""

    stopped: bool = False
    save: bool = False
    asked_at: float = 0.0

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def note(self, number: int) -> None:
        """Note one signal."""
        if number not in STOPS:
            self.save = True
            return
        if self.stopped and number == signal.SIGINT and time.monotonic() - self.asked_at > AGAIN:
            raise KeyboardInterrupt
        self.asked_at = self.asked_at if self.stopped else time.monotonic()
        self.stopped = True


@contextmanager
def listening() -> Iterator[Interruption]:
    """Note signals in place of what they did before; outside the main thread they are left to the process, and so are
    those that it ignores (under nohup).
    """
    found, old = Interruption(), {}
    heard = [number for number in (*STOPS, *SAVES) if signal.getsignal(number) is not signal.SIG_IGN]
    try:
        for number in heard:
            old[number] = signal.signal(number, lambda number, _: found.note(number))
    except ValueError:
        pass
    try:
        yield found
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

