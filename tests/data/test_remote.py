"""Data elsewhere: the same samples as from files here, by ranges alone; faults are tried again, and nothing is told."""

import http.server
import re
import threading

import numpy as np
import pytest

from spar.cli.main import main
from spar.common.errors import InputError
from spar.data import remote
from spar.data.remote import RemoteFile, find_remote, open_reader, shown
from spar.data.samples import BadSample
from spar.data.sources import open_source
from spar.data.tar_index import index_tar


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def served(sets):
    """A server of the sets' folder that knows ranges; gives its address and the ranges that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body: bool):
            path = sets.folder / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            asked.append((self.command, wanted and (int(wanted[1]), int(wanted[2]))))
            part = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {wanted[1]}-{wanted[2]}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def same(own, other) -> None:
    assert len(own) == len(other) and own.identity == other.identity and own.kind == other.kind
    assert np.array_equal(own.sizes(), other.sizes())
    for index in (0, len(own) - 1, len(own) // 2):
        assert own.read(index) == other.read(index)


def test_shards_in_a_store_are_those_of_a_folder(sets, memory, tmp_path):
    for name, numbers in (("a-0.tar", range(5)), ("a-1.tar", range(5, 9))):
        memory.pipe(f"/bucket/set/{name}", sets.pairs(name, numbers).read_bytes())
    local = open_source(f"{sets.folder}/a-{{0..1}}.tar")
    for pattern in ("memory://bucket/set/a-{0..1}.tar", "memory://bucket/set/*.tar"):
        same(open_source(pattern, cache=tmp_path / "cache"), local)
    assert len([*(tmp_path / "cache").iterdir()]) == 2  # an index a shard, found again by the second pattern


def test_a_table_in_a_store_is_that_of_a_file(sets, memory, tmp_path):
    pytest.importorskip("pyarrow")
    rows = {"image": [sets.picture(n) for n in range(4)], "caption": [f"picture {n}" for n in range(4)]}
    import pyarrow.parquet

    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=2)
    memory.pipe("/b/t.parquet", path.read_bytes())
    same(open_source("memory://b/t.parquet"), open_source(str(path)))
    pyarrow.parquet.write_table(pyarrow.table({"image": ["/etc/passwd"], "caption": ["x"]}), path)
    memory.pipe("/b/u.parquet", path.read_bytes())
    with pytest.raises(BadSample, match="expected an image's bytes in the row, got the path '/etc/passwd'"):
        open_source("memory://b/u.parquet").read(0)


def test_a_server_is_asked_for_ranges_alone_and_for_each_byte_once(sets, served, monkeypatch):
    pytest.importorskip("aiohttp")
    address, asked = served
    path = sets.pairs("a.tar", range(40))
    monkeypatch.setattr(remote, "AHEAD", 16384)
    source = open_source(f"{address}/a.tar")
    ranges = [wanted for command, wanted in asked if command == "GET"]
    assert ranges and all(wanted is not None for wanted in ranges)
    assert sum(end - start + 1 for start, end in ranges) < 1.5 * path.stat().st_size
    same(source, open_source(str(path)))
    with pytest.raises(InputError, match=f"expected files that '{address}/none.tar' names, found none"):
        open_source(f"{address}/none.tar")


def test_a_server_that_fails_is_not_one_without_the_file(served, monkeypatch):
    """fsspec says "not found" of every failure."""
    pytest.importorskip("aiohttp")
    address, _ = served
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.send_error", lambda self, _: self.answer_with(503))
    monkeypatch.setattr(
        "http.server.BaseHTTPRequestHandler.answer_with",
        lambda self, code: (self.send_response(code), self.send_header("Content-Length", "0"), self.end_headers()),
        raising=False,
    )
    with pytest.raises(InputError, match="none.tar' cannot be read: .* after 4 attempts .status 503"):
        open_source(f"{address}/none.tar")


@pytest.mark.parametrize(
    "address",
    ["https://h/a.tar?token=secret", "https://me:secret@h/a.tar", "s3://secret@b/a.tar", "https://h/a.tar#secret"],
)
def test_an_address_that_may_hold_a_secret_is_refused(address):
    with pytest.raises(InputError, match="expected an address without a user and a query") as raised:
        open_source(address)
    assert "secret" not in str(raised.value)


def test_short_and_long_answers(memory, sets):
    memory.pipe("/b/a.tar", sets.pairs("a.tar", range(2)).read_bytes())
    reader, whole = open_reader(RemoteFile("memory://b/a.tar")), memory.cat_file
    try:
        memory.cat_file = lambda path, start, end: whole(path, start, end)[:-1]
        with pytest.raises(OSError, match="cannot be read after 4 attempts"):
            reader.pread(100, 0)
        memory.cat_file = lambda path, start, end: whole(path)
        with pytest.raises(InputError, match="its server sends no ranges"):
            reader.pread(100, 0)
    finally:
        del memory.cat_file


def test_a_whole_read_asks_in_large_pieces(memory, sets):
    data = sets.pairs("a.tar", range(20)).read_bytes()
    memory.pipe("/b/a.tar", data)
    reader, pieces = open_reader(RemoteFile("memory://b/a.tar"), whole=True), []
    memory_cat = memory.cat_file

    def cat_file(path, start=None, end=None, **keywords):
        pieces.append((start, end))
        return memory_cat(path, start, end, **keywords)

    memory.cat_file = cat_file
    try:
        assert [reader.pread(512, 0), reader.pread(512, 512)] == [data[:512], data[512:1024]]
        assert len(index_tar(RemoteFile("memory://b/a.tar"))) == 20
        assert pieces == [(0, len(data))] * 2 and reader.pread(10, len(data)) == b""
    finally:
        del memory.cat_file


@pytest.mark.parametrize(("faults", "works"), [(3, True), (4, False)])
def test_a_read_is_tried_four_times_and_tells_no_secret(memory, sets, faults, works):
    memory.pipe("/b/a.tar", sets.pairs("a.tar", range(2)).read_bytes())
    source, left, whole = open_source("memory://b/a.tar"), [faults], memory.cat_file

    def cat_file(*arguments, **keywords):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("token=secret")
        return whole(*arguments, **keywords)

    memory.cat_file = cat_file
    try:
        if works:
            assert source.read(1).text == "picture 1"
        else:
            with pytest.raises(OSError, match="b/a.tar cannot be read after 4 attempts .RuntimeError") as raised:
                source.read(1)
            assert "secret" not in str(raised.value)
    finally:
        del memory.cat_file


def test_what_is_no_address_and_what_may_not_be_read(memory, capsys):
    for wrong, message in (
        ("http://example.org/a.tar", "expected https://"), ("ftp://x/a.tar", "expected a local path, hf://"),
        ("file:///a.tar", "expected a local path, hf://"), ("memory://b/none.tar", "expected files that"),
        ("memory://b/list.json", "expected files that"), ("memory://b/{0..3}.tar", "expected files that"),
        ("https://[h/a.tar", "expected an address such as"), ("HTTP://example.org/a.tar", "expected https://"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            open_source(wrong)
        assert "secret" not in str(raised.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fsspec.filesystem", lambda scheme: (_ for _ in ()).throw(ImportError("Install s3fs")))
        with pytest.raises(InputError, match="reading s3:// needs a package that is not installed: Install s3fs"):
            open_source("S3://b/a.tar")
    memory.pipe("/b/list.json", b"[]")
    with pytest.raises(InputError, match="expected a list of samples in a local file"):
        open_source("memory://b/list.json", "sharegpt")
    assert main(["data", "check", "memory://b/none.tar"]) == 2
    assert "found none" in capsys.readouterr().err


def test_an_address_is_shown_without_user_and_query():
    assert shown("https://me:key@host:8/x/a.tar?token=1#y") == "https://host:8/x/a.tar"
    assert (shown("s3://bucket/a.tar"), shown("x/a.tar")) == ("s3://bucket/a.tar", "x/a.tar")
    assert (shown("s3://b/a#1.tar"), shown("pipe:x")) == ("s3://b/a#1.tar", "pipe:x")
    assert (RemoteFile("s3://b/d/a#1.tar").name, RemoteFile("https://h/d/a.tar").stem) == ("a#1.tar", "a")
    assert find_remote([]) == []
