"""What is read of a checkpoint, as the kernel sees it: compiled readers of tensors and tokenizers open files too."""

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

OPENED, OF_A_FOLDER = 0x20, 0x40000000  # inotify's IN_OPEN and IN_ISDIR
EVENT = struct.Struct("iIII")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], AbstractContextManager[set[str]]]:
    """`with opened(folder) as names`: the files below it that were opened, by their names from there.

    Hashing, which opens them once more for the record, does not count.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is Linux's")
    monkeypatch.setattr("spar.checkpoints.formats.checkpoint_source._sha256", lambda path: path.name)

    @contextmanager
    def watch(root: Path) -> Iterator[set[str]]:
        libc, names, watched = ctypes.CDLL(None), set[str](), dict[int, Path]()
        queue = libc.inotify_init1(os.O_NONBLOCK)
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            watched[libc.inotify_add_watch(queue, bytes(folder), OPENED)] = folder
        yield names
        data, place = os.read(queue, 2**20), 0
        os.close(queue)
        while place < len(data):
            number, kind, _, length = EVENT.unpack_from(data, place)
            name = data[place + EVENT.size :][:length].rstrip(b"\0").decode()
            if not kind & OF_A_FOLDER:
                names.add((watched[number] / name).relative_to(root).as_posix())
            place += EVENT.size + length

    return watch
