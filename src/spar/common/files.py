"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spar.common.errors import InputError


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A new folder to fill; once it is whole, it takes the place of `folder`, whatever that held.

    Callers check first that what is there may be replaced. Stopped at any point, the older or the new folder is whole
    under its name.

    Raises:
        InputError: a folder that cannot be written.
    """
    folder = folder.absolute()
    aside, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        _swap(aside, folder, old)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, folder: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
