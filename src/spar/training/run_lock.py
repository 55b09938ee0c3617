"""One writer for a run's folder: a lock that ends with its process, and says whose it is."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spar.common.errors import InputError

try:
    import fcntl
except ImportError:  # a system without it: nothing can be known of other writers
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
_HELD: set[int] = set()  # open locks, which a forked child must let go: else it would hold them beyond this process


def _let_go() -> None:
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run's folder, which is made where it is missing.

    The kernel releases the lock when the process ends, however it ends: a lock file that is left over is free.

    Raises:
        InputError: another process holds it; the message has its number and machine.
    """
    path = run / LOCK
    handle = _acquire(path, run)
    _HELD.add(handle)
    try:
        own = {"process": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(own).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        _HELD.discard(handle)
        os.close(handle)


def _acquire(path: Path, run: Path) -> int:
    """The open and locked file; opened anew where its last holder has removed it in between."""
    while True:
        try:
            run.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"cannot write the run folder {run}: {error.strerror}") from error
        if fcntl is None:
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"{run} is being written by {_holder(path)}: wait for it or stop it, or give another folder"
            ) from None
        except OSError:  # a file system without locks: nothing can be known of other writers
            return handle
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _holder(path: Path) -> str:
    """Whose lock it is, as its holder has written it."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return f"process {held['process']} on {held['host']} (since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
