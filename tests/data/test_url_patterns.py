"""Patterns: braces, globs, the Hub through a stub, and what is refused."""

import os
from types import SimpleNamespace

import pytest

from spar.common.errors import InputError
from spar.data.sources import open_source
from spar.data.url_patterns import expand_braces, find_files


def test_braces_keep_zeros_and_order():
    assert expand_braces("a-{008..011}.tar") == [f"a-{n:03d}.tar" for n in range(8, 12)]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert len(expand_braces("cc12m-train-{0000..2175}.tar")) == 2176


@pytest.mark.parametrize("pattern", ["{3..1}", "{0..999999999}", "{0..999}{0..999}", "a{b", "a}b", "{x,{1..2}}"])
def test_impossible_braces_are_refused(pattern):
    with pytest.raises(InputError, match="expected"):
        expand_braces(pattern)


def test_globs_and_braces_name_files(sets):
    for name in ("b.tar", "a.tar", "s/c.tar"):
        sets.file(name, b"")
    names = [path.name for path in find_files(f"{sets.folder}/*.tar")]
    assert names == ["a.tar", "b.tar"]
    assert [path.name for path in find_files(f"{sets.folder}/{{b,a}}.tar")] == ["b.tar", "a.tar"]
    assert [path.name for path in find_files(f"{sets.folder}/**/*.tar")] == ["a.tar", "b.tar", "c.tar"]
    with pytest.raises(InputError, match="there is no .*d.tar"):
        find_files(f"{sets.folder}/{{a,d}}.tar")


@pytest.mark.parametrize("pattern", ["pipe:cat x.tar", "ftp://x.org/{0..9}.tar", "ssh://b/x.tar", "file:///x.tar"])
def test_other_addresses_and_pipes_are_refused(pattern):
    with pytest.raises(InputError, match="expected a local path, hf://"):
        find_files(pattern)


@pytest.fixture
def hub(monkeypatch, sets):
    """A Hub of one repository; records what is fetched."""
    asked = []
    names = ["README.md", "train/1.tar", "train/0.tar", "train/old/2.tar"]

    class Api:
        def repo_info(self, repository, repo_type, revision):
            return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repository, name, repo_type, revision):
        asked.append((repository, name, repo_type, revision))
        if name not in names:
            raise RuntimeError("404 Client Error\nmore")
        return str(sets.folder / name)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_the_hub_gives_all_shards_of_one_commit(hub, sets):
    found = find_files("hf://datasets/BLIP3o/BLIP3o-60k/train/*.tar")
    assert [path.name for path in found] == ["0.tar", "1.tar"]
    assert hub == [("BLIP3o/BLIP3o-60k", f"train/{n}.tar", "dataset", "abc") for n in (0, 1)]


def test_named_files_need_no_listing_and_keep_their_revision(hub):
    find_files("hf://datasets/BLIP3o/BLIP3o-60k@v1/train/{0..1}.tar")
    assert {(name, revision) for _, name, _, revision in hub} == {("train/0.tar", "v1"), ("train/1.tar", "v1")}


def test_what_the_hub_refuses_is_one_sentence(hub):
    with pytest.raises(InputError, match="cannot be fetched: 404 Client Error$"):
        find_files("hf://datasets/BLIP3o/BLIP3o-60k/none.tar")
    with pytest.raises(InputError, match="the repository has none"):
        find_files("hf://datasets/BLIP3o/BLIP3o-60k/*.parquet")
    with pytest.raises(InputError, match="expected hf://datasets/"):
        find_files("hf://what")


@pytest.mark.parametrize("name", ["photos [v2]", "a{0..3}", "set{a,b}", "set[12]", "what?", "a*"])
def test_what_exists_is_itself_and_no_pattern(sets, name):
    for folder in (name, "set1", "a0", "photos v", "whatx"):
        sets.pairs(f"{folder}/0.tar", range(len(folder), len(folder) + 1))
    expected = f"picture {len(name)}"
    for path in (name, f"{name}/0.tar", f"{name}/*.tar", f"{name}/{{0..0}}.tar"):
        source = open_source(f"{sets.folder}/{path}")
        assert len(source) == 1 and source.read(0).text == expected, path
    assert [path.parent.name for path in find_files(f"{sets.folder}/s[e]t1/*.tar")] == ["set1"]


def test_only_files_of_data_are_found(sets):
    sets.file("folder.tar/x", b"")
    os.mkfifo(sets.folder / "pipe.tar")
    (sets.folder / "gone.tar").symlink_to(sets.folder / "none")
    for name, words in (("folder", "a folder"), ("pipe", "a pipe or a device"), ("gone", "a link to nothing")):
        with pytest.raises(InputError, match=f"is {words}"):
            find_files(f"{sets.folder}/{name}*")
