"""Reading of regular files, and atomic writing: a reader sees the old or the new file or folder, never a part."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spar.common.errors import InputError

_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # Windows has no such flag


def home_expanded(path: str) -> str:
    """A path with the home folder for a `~` at its beginning, where there is nothing of that very name."""
    return path if os.path.lexists(path) else os.path.expanduser(path)


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

    Its name is this call's own, so that several may write one file. What fails leaves the old file, and no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{_own_name()}.part")
    try:
        with usual_mode(temporary):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _own_name() -> str:
    """A name that no other process, thread or earlier call has."""
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def is_temporary(path: Path) -> bool:
    """Whether a path is what `atomic_file` or `atomic_directory` fills, which a process that was killed has left."""
    return re.fullmatch(r"\.(.+\.)?\d+-[0-9a-f]{8}\.part", path.name) is not None


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give a file that is written meanwhile the mode of any new file there; safetensors would make it the user's alone.

    The mode is that of an empty file made first, since reading the process's umask would change it for other threads.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    with suppress(OSError):  # CIFS and FAT have no modes to set
        path.chmod(mode)


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which then replaces `folder` and its contents.

    Callers check first that `folder` may be replaced. Of a link the folder that it names is replaced. An empty folder,
    the working folder and a mount stay and get the contents; what came into them meanwhile by other names stays too.
    Its files may be read by whom any new file there may. If stopped at any point, the old contents are whole in their
    place or beside it (`.NAME.*.old`), or the new ones.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    name = f".{folder.name[:50]}.{_own_name()}"
    temporary = folder.parent / f"{name}.part"
    before, stays = list[Path](), False
    try:
        if folder.exists():
            before = [*folder.iterdir()]
            temporary = _movable(folder, temporary)
            stays = not before or temporary.parent == folder or folder == Path.cwd()
        else:
            temporary.mkdir(parents=True)
        yield temporary
        _give_usual_modes(temporary)
        old = temporary.with_name(f"{name}.old")
        if stays:
            _swap_contents(temporary, folder, before, old)
        elif before:
            swap_folders(temporary, folder, old)
        else:
            temporary.rename(folder)  # refused where there is something by now
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    """Let those read a folder's files who may read any new file there; other libraries' safetensors are the user's
    alone.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    probe = folder / _own_name()
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in files:
        own = stat.S_IMODE(path.stat().st_mode)
        if own | mode != own:
            with suppress(OSError):  # CIFS and FAT have no modes to set
                path.chmod(own | mode)


def _movable(folder: Path, beside: Path) -> Path:
    """A new folder beside another one, or within it where none can be moved from there: a mount, a foreign parent."""
    within = folder / beside.name
    within.mkdir()
    try:
        within.rename(beside)
    except OSError:
        return within
    return beside


def _swap_contents(new: Path, folder: Path, before: list[Path], old: Path) -> None:
    """Move what is in `new` into a folder that stays, and remove what was there before; what fails is undone."""
    moves = [(path, old / path.name) for path in before]
    moves += [(path, folder / path.name) for path in new.iterdir()]
    done: list[tuple[Path, Path]] = []
    old.mkdir()
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def swap_folders(new: Path, folder: Path, old: Path) -> None:
    """Put a whole folder in another's place, which is `old` until then; that is kept where it is all that there is.

    `old` is the caller's own name: what is found there is left of an earlier swap that was cut, and goes.
    """
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
