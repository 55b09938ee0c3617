"""The index of a shard: what is a member and what is not, hostile and broken tars, and the cache."""

import io
import os
import pickle
import tarfile

import pytest
from PIL import Image

from spar.cli.main import main
from spar.common import limits as caps
from spar.common.errors import InputError
from spar.data import tar_index as tars
from spar.data.convert import convert
from spar.data.sources import open_source
from spar.data.tar_index import CLS, IMAGE, INPUT, JSON, TXT, cached_index, index_tar, role_of
from spar.data.validate import validate


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("00000001.jpg", ("00000001", IMAGE, 0)),
        ("0335161/0000001.JPG", ("0335161/0000001", IMAGE, 0)),
        ("./a.WebP", ("a", IMAGE, 0)),
        ("a.txt", ("a", TXT, 0)),
        ("a.json", ("a", JSON, 0)),
        ("a.cls", ("a", CLS, 0)),
        ("a.b/c.input.jpg", ("a.b/c", INPUT, 0)),
        ("c.input_3.png", ("c", INPUT, 3)),
        ("c.output.jpeg", ("c", IMAGE, 0)),
        ("c.1.jpg", "several dots in the name, whose extension begins at the first"),
        ("._c.jpg", "._ files of macOS"),
        ("c.abcdefghijklmnopqrstu", "another extension"),
        ("c.pkl", ".pkl"),
        ("c.input.pth", ".input.pth"),
        ("c.input_99.jpg", "more than 8 references"),
        ("../c.jpg", "name leaves the folder"),
        ("/etc/c.jpg", "name leaves the folder"),
        ("a/..\\..\\c.jpg", "name leaves the folder"),
    ],
)
def test_a_members_name_says_what_it_is(name, found):
    assert role_of(name) == found


def test_members_are_found_where_they_lie(sets):
    path = sets.tar("a.tar", {"x/1.jpg": sets.picture(1, "JPEG"), "x/1.txt": "one", "2.txt": "two", "2.PNG": b"?"})
    index = index_tar(path)
    assert [index.keys[i] for i in range(2)] == ["x/1", "2"]
    data = path.read_bytes()
    read = [{role: data[offset : offset + size] for role, offset, size in index.members(i)} for i in range(2)]
    assert read == [{IMAGE: sets.picture(1, "JPEG"), TXT: b"one"}, {IMAGE: b"?", TXT: b"two"}]
    assert index.sizes.tolist() == [[40, 30], [0, 0]]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_come_whole(sets, format):
    name = "folder/" * 30 + "größe.jpg"
    index = index_tar(sets.tar("a.tar", {name: b"x", "b.jpg": b"y"}, format=format))
    assert [index.keys[i] for i in range(2)] == [name.removesuffix(".jpg"), "b"]


def test_members_of_one_sample_need_not_be_neighbours(sets):
    index = index_tar(sets.tar("a.tar", {"1.jpg": b"x", "2.jpg": b"y", "1.txt": "one", "2.txt": "two"}))
    assert [[role for role, *_ in index.members(i)] for i in range(2)] == [[IMAGE, TXT], [IMAGE, TXT]]


def test_references_stand_in_their_order(sets):
    members = {"1.input_1.jpg": b"bb", "1.input_0.jpg": b"a", "1.output.jpg": b"c", "1.txt": "x"}
    assert [size for role, _, size in index_tar(sets.tar("a.tar", members)).members(0) if role == INPUT] == [1, 2]


def test_what_is_not_read_is_counted_and_never_touched(sets):
    class Bomb:
        def __reduce__(self):
            return os.system, ("touch exploded",)

    members = {"1.jpg": sets.picture(1), "1.pkl": pickle.dumps(Bomb()), "1.png": b"second", "../2.jpg": b"x"}
    path = sets.tar("a.tar", members)
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    source = open_source(str(path))
    assert source.skipped == {
        ".pkl": 1, "a second of its kind in one sample": 1, "name leaves the folder": 1, "no regular file": 1,
    }  # fmt: skip
    assert len(source) == 1 and source.read(0).image == sets.picture(1)
    assert not os.path.exists("exploded") and sorted(p.name for p in sets.folder.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("length", [10_000, 10_240, 10_300])  # in a member's padding, between two, in a header
def test_a_truncated_shard_keeps_its_whole_members_and_says_so(sets, length):
    path = sets.pairs("a.tar", range(10))
    data = path.read_bytes()
    path.write_bytes(data[:length])
    source = open_source(str(path))
    assert 3 < len(source) < 10 and "truncated" in source.damage[0] and "a.tar" in source.damage[0]
    assert source.read(0).text == "picture 0"


def test_a_shard_broken_in_the_middle_says_where(sets):
    data = bytearray(sets.tar("a.tar", {"1.jpg": b"x" * 600, "2.jpg": b"y"}).read_bytes())
    data[1536:1540] = b"????"
    assert "breaks at byte 1536" in index_tar(sets.file("b.tar", bytes(data))).damage


@pytest.mark.parametrize(("data", "words"), [(b"", "truncated"), (b"\0" * 10240, "found none")])
def test_an_empty_shard_has_no_samples(sets, data, words):
    with pytest.raises(InputError, match=words):
        open_source(str(sets.file("a.tar", data)))


def test_what_is_no_tar_is_refused(sets):
    for name, data in (("a.tar", b"hello" * 300), ("b.tar", sets.picture())):
        with pytest.raises(InputError, match="expected an uncompressed tar"):
            index_tar(sets.file(name, data))
    with tarfile.open(sets.folder / "c.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    with pytest.raises(InputError, match="is compressed"):
        index_tar(sets.folder / "c.tar")


def test_headers_that_claim_too_much_are_refused(sets, monkeypatch):
    path = sets.tar("a.tar", {f"{n}.jpg": b"x" for n in range(5)})
    monkeypatch.setattr(tars, "MAX_MEMBERS", 4)
    with pytest.raises(InputError, match="at most 4 members"):
        index_tar(path)
    record = tarfile.TarInfo("long")
    record.type, record.size = tarfile.XHDTYPE, caps.MAX_EXTENDED_HEADER + 1
    with pytest.raises(InputError, match="extended header"):
        index_tar(sets.file("b.tar", record.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096))


def test_a_header_of_negative_size_ends_the_pass(sets):
    """As in CVE-2025-8194: a size below zero must not lead to an endless loop."""
    info = tarfile.TarInfo("1.jpg")
    info.size = -1024
    assert "truncated" in index_tar(sets.file("a.tar", _with_one(info))).damage


def _with_one(info: tarfile.TarInfo) -> bytes:
    good = tarfile.TarInfo("0.jpg")
    return good.tobuf() + info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048


def test_an_image_whose_header_lies_deep_still_has_its_size(sets):
    data = sets.picture(1, "JPEG", icc_profile=b"p" * 100_000)
    assert index_tar(sets.tar("a.tar", {"1.jpg": data})).sizes.tolist() == [[40, 30]]


def test_sizes_are_upright(sets):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert index_tar(sets.tar("a.tar", {"1.jpg": sets.picture(1, "JPEG", exif=exif)})).sizes.tolist() == [[30, 40]]


def test_the_cache_serves_while_the_shard_is_the_same(sets, monkeypatch):
    path, cache = sets.pairs("a.tar", range(3)), sets.folder / "cache"
    made = []
    monkeypatch.setattr(tars, "index_tar", lambda path: made.append(path) or index_tar(path))
    first, again = cached_index(path, cache), cached_index(path, cache)
    assert len(made) == 1 and first.digest() == again.digest() and again.keys[2] == "00000002"
    assert (again.skipped, again.damage) == (first.skipped, first.damage)
    os.utime(path, ns=(1, 1))  # another time
    cached_index(path, cache)
    sets.pairs("a.tar", range(40))  # another size
    os.utime(path, ns=(1, 1))
    assert len(cached_index(path, cache)) == 40 and len(made) == 3
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged
    assert len(cached_index(path, cache)) == 40 and len(made) == 4


def test_samples_that_lie_after_an_end_mark_are_damage(sets):
    """As in two tars put together, or a hole in the middle: what follows the mark is not read, and that is said."""
    first, second = sets.pairs("1.tar", range(2)).read_bytes(), sets.pairs("2.tar", range(2, 4)).read_bytes()
    source = open_source(str(sets.file("both.tar", first + second)))
    assert len(source) == 2 and f"data that are not read follow at byte {len(first)}" in source.damage[0]
    holed = bytearray(sets.pairs("3.tar", range(40)).read_bytes())
    holed[4096:30_000] = bytes(30_000 - 4096)
    assert "data that are not read follow at byte 3" in index_tar(sets.file("holed.tar", bytes(holed))).damage


def test_a_part_that_was_never_written_is_damage(sets):
    data = sets.pairs("a.tar", range(40)).read_bytes()
    half = len(data) // 2 // 512 * 512
    path = sets.file("half.tar", data[:half] + bytes(len(data) - half))
    source = open_source(str(path))
    assert 0 < len(source) < 40 and "a part was never written" in source.damage[0]
    assert main(["data", "check", str(path), "--workers", "1"]) == 1
    out = sets.folder / "out"
    out.mkdir()
    convert([source], out, bad_share=1)
    assert "never written" in (out / "dropped.jsonl").read_text()
    with pytest.raises(InputError, match="holds 51200 bytes of zeros"):
        open_source(str(sets.file("empty.tar", bytes(51200))))


@pytest.mark.parametrize("count", range(1, 21))
def test_the_zeros_that_fill_a_tars_last_record_are_no_damage(sets, count):
    path = sets.tar("a.tar", {f"{number}.txt": b"x" for number in range(count)})
    assert index_tar(path).damage == ""
    whole = path.read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    for zeros in (512, 1024):  # what some writers leave
        assert index_tar(sets.file("b.tar", whole + bytes(zeros))).damage == ""


@pytest.mark.parametrize("place", range(0, 30_000, 4000))
def test_no_sample_of_a_damaged_shard_is_lost_silently(sets, place):
    """Wherever zeros lie: each sample is read as it was, is bad, or the shard says that it is damaged."""
    data = bytearray(sets.pairs("a.tar", range(20)).read_bytes())
    data[place : place + 4096] = bytes(4096)
    try:
        source = open_source(str(sets.file("b.tar", bytes(data))))
    except InputError as error:
        assert place == 0 and "b.tar" in str(error)
        return
    report = validate(source, workers=1)
    assert report.wrong and (len(source) == 20 or source.damage)


def test_reasons_are_few_and_an_error_has_them(sets):
    good = {"ok.png": sets.picture(1), "ok.txt": "x"}
    frames = {f"shot.{number:04}.png": b"?" for number in range(500)}
    macos = {f"._{number:04}.png": b"?" for number in range(500)}
    others = {f"{number}.x{number}": b"?" for number in range(500)}
    source = open_source(str(sets.tar("a.tar", good | frames | macos | others)))
    assert len(source.skipped) <= caps.MAX_REASONS + 1 and sum(source.skipped.values()) == 1500
    assert source.skipped["several dots in the name, whose extension begins at the first"] == 500
    assert source.skipped["._ files of macOS"] == 500
    with pytest.raises(InputError, match="found none; 500 members skipped .several dots"):
        open_source(str(sets.tar("b.tar", frames)))


def test_separators_of_windows_separate_folders(sets):
    index = index_tar(sets.tar("a.tar", {"v1.0\\1.png": b"x", "v1.0/1.txt": "one"}))
    assert len(index) == 1 and index.keys[0] == "v1.0/1"
