"""One writer for a run's folder: a lock that ends with its process, and says whose it is."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spar.common.errors import InputError

LOCK = "lock"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run's folder, which exists.

    The kernel releases the lock when the process ends, however it ends: a lock file that is left over is free.

    Raises:
        InputError: another process holds it; the message has its number and machine.
    """
    path = run / LOCK
    handle = _acquire(path, run)
    try:
        own = {"process": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(own).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, run: Path) -> int:
    """The open and locked file; opened anew where its last holder has removed it in between."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"cannot write the run folder {run}: {error.strerror}") from error
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
