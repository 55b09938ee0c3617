"""Files appear whole or not at all."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from spar.checkpoints.safetensors_io import write_tensors
from spar.common.files import atomic_file, swap_folders


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
