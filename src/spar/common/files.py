"""Reading of regular files, and atomic writing: a reader sees the old or the new file or folder, never a part."""

import errno
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spar.common.errors import InputError

_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # Windows has no such flag


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file to read. A pipe or a device is refused at once, as its reader would wait for a writer.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a file of data, but a pipe or a device", str(path))
    return file


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write, which then replaces `path`; its folder is created.

    Its name is this process's own, so that several may write one file. What fails leaves the old file, and no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{zlib.crc32(path.name.encode()):08x}.part")
    try:
        with usual_mode(temporary):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give a file that is written meanwhile the mode of any new file there; safetensors would make it the user's alone.

    The mode is that of an empty file made first, since reading the process's umask would change it for other threads.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which then replaces `folder` and its contents.

    Callers check first that `folder` may be replaced. If stopped at any point, the old or the new folder is complete
    under its name.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = folder.absolute()
    temporary, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        swap_folders(temporary, folder, old)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap_folders(new: Path, folder: Path, old: Path) -> None:
    """Put a whole folder in another's place, which is `old` until then; that is kept where it is all that there is."""
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
