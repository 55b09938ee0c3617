"""Files appear whole or not at all."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spar.checkpoints.safetensors_io import write_tensors
from spar.common.errors import InputError
from spar.common.files import atomic_directory, atomic_file, home_expanded, is_temporary, swap_folders


def test_a_file_is_replaced_whole_and_what_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "file.json"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert temporary.parent == path.parent and not path.exists()
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one" and [*path.parent.iterdir()] == [path]


def test_two_files_of_one_folder_are_written_at_once(tmp_path):
    with atomic_file(tmp_path / "a") as one, atomic_file(tmp_path / "b") as two:
        one.write_text("a"), two.write_text("b")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["a", "b"]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"1")
    assert path.read_bytes() == b"1"


def test_the_last_folder_that_there_is_goes_only_when_the_new_one_is_in_place(tmp_path):
    new, folder, old = (tmp_path / name for name in ("new", "folder", "folder.old"))
    old.mkdir()  # a swap was cut between its two renames
    (old / "file").write_text("one")
    with pytest.raises(FileNotFoundError):
        swap_folders(new, folder, old)
    assert (folder / "file").read_text() == "one"
    new.mkdir()
    swap_folders(new, folder, old)
    assert [*tmp_path.iterdir()] == [folder] and not [*folder.iterdir()]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_other_libraries_write_may_be_read_by_whom_other_files_may(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "made") as folder:
            (folder / "inner").mkdir()
            private, program = folder / "inner" / "weights", folder / "program"
            for path, mode in ((private, 0o600), (program, 0o700)):
                path.touch()
                path.chmod(mode)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert modes == {"weights": 0o666 & ~umask, "program": 0o700 | 0o666 & ~umask}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_may_be_read_by_whom_other_files_may(tmp_path, umask):
    before = os.umask(umask)
    try:
        tensors = {"a": torch.ones(3), "b": torch.ones(3)}
        write_tensors(tensors, tmp_path / "model.safetensors", shard_bytes=12)  # two shards and an index
        for _ in range(2):  # new, then over an older one
            with atomic_file(tmp_path / "cache.safetensors") as temporary:
                save_file(tensors, temporary)
            write_tensors(tensors, tmp_path / "whole.safetensors")
    finally:
        os.umask(before)
    files = [*tmp_path.iterdir()]
    assert len(files) == 5 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, **texts: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.fixture
def as_a_mount(monkeypatch) -> Callable[[Path], None]:
    """Lets a folder behave as the root of another file system: nothing is renamed out of it, nor itself."""

    def mount(folder: Path) -> None:
        rename = Path.rename

        def limited(self, target):
            if self == folder:
                raise OSError(errno.EBUSY, "Device or resource busy")
            if self.is_relative_to(folder) != Path(target).is_relative_to(folder):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", limited)

    return mount


@pytest.mark.parametrize("earlier", [False, True])
def test_folders_of_like_names_are_the_users_own(tmp_path, earlier):
    beside = [tmp_path / f"m.{end}" for end in ("old", "part", "new")]
    for folder in beside:
        put(folder, keep="mine")
    if earlier:
        put(tmp_path / "m", a="old")
    with atomic_directory(tmp_path / "m") as temporary:
        put(temporary, a="new")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "m") as temporary:
        put(temporary, a="newer")
        raise RuntimeError
    assert tree(tmp_path) == {"m/a": "new"} | {f"{folder.name}/keep": "mine" for folder in beside}
    assert len([*tmp_path.iterdir()]) == 4


def test_of_a_link_the_folder_that_it_names_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    for text in ("one", "two"):
        with atomic_directory(tmp_path / "link") as temporary:
            put(temporary, a=text)
        assert (tmp_path / "link").is_symlink() and tree(tmp_path / "disk") == {"real/a": text}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("place", ["empty", "working", "mount", "within a foreign folder"])
def test_a_folder_that_is_more_than_a_name_stays_and_gets_the_contents(tmp_path, monkeypatch, as_a_mount, place):
    folder = tmp_path / "out"
    put(folder)
    if place == "working":
        monkeypatch.chdir(folder)
    elif place == "mount":
        as_a_mount(folder)
    elif place == "within a foreign folder":
        rename = Path.rename

        def refused(self, target):
            if Path(target).parent == tmp_path:
                raise PermissionError(errno.EACCES, "Permission denied")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refused)
    same = folder.stat().st_ino
    for number in range(1 if place == "empty" else 3):
        with atomic_directory(Path() if place == "working" else folder) as temporary:
            put(temporary, **{"config": str(number), f"only-{number}": "x"})
            put(temporary / "part", weights=str(number))
            if number == 0:
                put(folder, notes="of the user, made meanwhile")
        own = {"config": str(number), f"only-{number}": "x", "part/weights": str(number)}
        assert tree(folder) == own | ({"notes": "of the user, made meanwhile"} if number == 0 else {})
    assert folder.stat().st_ino == same and [*tmp_path.iterdir()] == [folder]
    with pytest.raises(RuntimeError), atomic_directory(folder) as temporary:
        put(temporary, config="broken off")
        raise RuntimeError
    assert "broken off" not in tree(tmp_path).values() and [*tmp_path.iterdir()] == [folder]


def test_contents_that_cannot_be_moved_leave_the_old_ones(tmp_path, as_a_mount, monkeypatch):
    folder = tmp_path / "out"
    put(folder, config="old", weights="old")
    as_a_mount(folder)
    with pytest.raises(InputError, match="cannot write .*out: Is a directory"), atomic_directory(folder) as temporary:
        put(temporary, config="new", extra="new")
        (folder / "extra").mkdir()
    (folder / "extra").rmdir()
    assert tree(tmp_path) == {"out/config": "old", "out/weights": "old"}
    assert sorted(path.name for path in folder.iterdir()) == ["config", "weights"]


def test_a_folder_that_others_make_meanwhile_is_not_removed(tmp_path):
    with pytest.raises(InputError, match="cannot write"), atomic_directory(tmp_path / "out") as temporary:
        put(temporary, a="new")
        put(tmp_path / "out", b="theirs")
    assert tree(tmp_path) == {"out/b": "theirs"}


def test_a_name_may_be_of_bytes_that_are_no_text(tmp_path):
    with atomic_file(tmp_path / "a\udcff.png") as temporary:
        temporary.write_text("1")
    with atomic_directory(tmp_path / "b\udcff") as temporary:
        put(temporary, a="2")
    assert tree(tmp_path) == {"a\udcff.png": "1", "b\udcff/a": "2"}


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path):
    with atomic_file(tmp_path / "a") as one, atomic_directory(tmp_path / "b") as two:
        assert is_temporary(one) and is_temporary(two)
        one.write_text("a")
    names = ("model.part", ".part", ".12-abc.part", "12-0123abcd.part", ".m.12-0123abcd.old", ".m-0123abcd.part")
    assert not any(is_temporary(Path(name)) for name in names)


def test_a_file_system_without_modes_is_written_to(tmp_path, monkeypatch):
    def refused(self, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("1")
    assert tree(tmp_path) == {"a": "1"}


def test_a_home_folder_is_put_in_unless_there_is_something_of_that_very_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/mine")
    assert [home_expanded(path) for path in ("~/a/*.tar", "~")] == ["/mine/a/*.tar", "/mine"]
    for path in ("", "a", "./~/a", "a~/b", "0.5=~/a", "https://example.org/~/a", "~nobody-of-that-name/a"):
        assert home_expanded(path) == path
    Path("~").mkdir()
    Path("~/a").touch()
    assert [home_expanded(path) for path in ("~/a", "~/b")] == ["~/a", "/mine/b"]
