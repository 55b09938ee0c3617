"""Text that is no caption is a bad sample at `read`, in every format, and the same in every door after it."""

import json
import os
from pathlib import Path

import pytest

from spar.cli.main import main
from spar.common.limits import MAX_TEXT_BYTES
from spar.data import captions
from spar.data.captions import caption_of, clean_caption, first_text, is_text
from spar.data.convert import convert
from spar.data.loader import Loader
from spar.data.mixture import Mixture
from spar.data.samples import BadSample
from spar.data.sources import open_source
from spar.data.validate import validate

BAD = {
    "half a surrogate pair": ("a red circle \ud83d", "half a surrogate pair .*U\\+D83D at character 13"),
    "the other half": ("\ude00", "half a surrogate pair"),
    "a byte that is not UTF-8": ("caf\udce9", "bytes that are not UTF-8"),
    "NUL": ("a red\0circle", "a NUL at character 5"),
    "zero width": ("\u200b\u200d\ufeff", "show nothing"),
    "fillers and blanks": (" \u3164\u2800\ufe0f ", "show nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_caption_is_bad_and_named(case):
    text, reason = BAD[case]
    with pytest.raises(BadSample, match=f"text cannot be read: .*{reason}") as caught:
        clean_caption(text, "7", "a.tar")
    assert (caught.value.key, caught.value.origin) == ("7", "a.tar")
    str(caught.value).encode()  # it can be logged and printed


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\ufeffa circle\n", "a circle"), (" \t\n", ""), ("", ""), ("\ufeff", ""), ("😀", "😀"),
        ("👨\u200d👩", "👨\u200d👩"), ("می\u200cخواهم", "می\u200cخواهم"), ("a\u200b", "a\u200b"),
        ("\ufffd", "\ufffd"), ("\ue000", "\ue000"),
    ],
)  # fmt: skip
def test_what_is_a_caption_keeps_its_characters(text, clean):
    assert clean_caption(text, "", "") == clean


def test_a_caption_has_a_limit(monkeypatch):
    monkeypatch.setattr(captions, "MAX_TEXT_BYTES", 10)
    assert clean_caption("ä" * 5, "", "") == "äääää"
    with pytest.raises(BadSample, match="at most 10 bytes, got 12"):
        clean_caption("ä" * 6, "", "")
    assert MAX_TEXT_BYTES == 2**20


def test_the_first_text_of_the_most_specific_field_counts():
    assert caption_of({"text": "b", "caption": "a", "width": 3}) == "a"
    assert caption_of({"caption": "", "text": ["", "b", "c"]}) == "b" and caption_of({"caption": 3}) == ""
    assert [first_text(value) for value in ("a", ["b"], [], None, 3)] == ["a", "b", "", "", ""]
    assert all(map(is_text, ("", None, float("nan"), ["a", None])))
    assert not any(map(is_text, (3, 0.5, [1], {})))


def readers(sets, text: str):
    """A set of two samples in each format: the text, then a good one. JSON holds what is no Unicode by escapes."""
    value, raw = json.dumps(text), text.encode("utf-8", "surrogatepass" if "\ud83d" in text else "surrogateescape")
    png, other = sets.picture(1), sets.picture(2)
    yield "txt", sets.tar("txt/0.tar", {"a.png": png, "a.txt": raw, "b.png": other, "b.txt": "fine"})
    yield "json", sets.tar(
        "json/0.tar", {"a.png": png, "a.json": f'{{"caption": {value}}}', "b.png": other, "b.json": '{"text": "fine"}'}
    )
    for name in ("jsonl", "list", "beside"):
        sets.file(f"{name}/a.png", png)
        sets.file(f"{name}/b.png", other)
    lines = f'{{"file_name": "a.png", "text": {value}}}\n{{"file_name": "b.png", "text": "fine"}}\n'
    yield "metadata.jsonl", sets.file("jsonl/metadata.jsonl", lines).parent
    pairs = ((value, "a"), ('"fine"', "b"))
    items = [f'{{"input_prompt": {one}, "output_image": "{image}.png"}}' for one, image in pairs]
    yield "sharegpt", sets.file("list/t2i.json", f"[{', '.join(items)}]")
    sets.file("beside/b.txt", "fine")
    yield "beside", sets.file("beside/a.txt", raw).parent


@pytest.mark.parametrize("case", ["half a surrogate pair", "NUL", "zero width"])
def test_every_reader_finds_it_and_every_door_says_the_same(sets, case):
    text, reason = BAD[case]
    for name, path in readers(sets, text):
        source = open_source(str(path))
        with pytest.raises(BadSample, match="text cannot be read"):
            source.read(0)
        assert source.read(1).text == "fine", name
        report = validate(source, workers=1)
        assert (report.bad, report.checked) == (1, 2) and "text cannot be read" in report.named_bad[0].reason
        out = Path(sets.folder / f"out-{name}")
        out.mkdir()
        assert convert([source], out, bad_share=1).dropped == 1
        assert json.loads((out / "dropped.jsonl").read_text())["reason"] == report.named_bad[0].reason
        loader = Loader(Mixture([source], [1.0], batch=2, buckets=((28, 28),)), workers=0)
        batch = next(loader.batches())
        assert batch.texts == ("fine", "fine") and [bad.reason for bad in batch.bad] == [report.named_bad[0].reason]


def test_a_byte_order_mark_is_no_part_of_a_text(sets):
    for name, path in readers(sets, "\ufeffa circle"):
        assert open_source(str(path)).read(0).text == "a circle", name
    marked = "\ufeff" + '{"file_name": "a.png", "text": "x"}\n'
    assert open_source(str(sets.file("jsonl/metadata.jsonl", marked).parent)).read(0).text == "x"
    path = sets.tar("utf16.tar", {"a.png": sets.picture(1), "a.txt": "a circle".encode("utf-16")})
    with pytest.raises(BadSample, match="expected UTF-8, got UTF-16"):
        open_source(str(path)).read(0)


def test_a_missing_text_that_pandas_wrote_is_an_empty_one(sets):
    for name, path in readers(sets, "?"):
        if name in ("json", "metadata.jsonl", "sharegpt"):
            path = path / "metadata.jsonl" if path.is_dir() else path
            path.write_bytes(path.read_bytes().replace(b'"?"', b"NaN"))
            source = open_source(str(path.parent if name == "metadata.jsonl" else path))
            assert [source.read(0).text, source.read(1).text] == ["", "fine"], name


def test_names_that_are_no_unicode_break_nothing(sets, capsys):
    names = [json.dumps(name) for name in ("\ud83d.png", "\udcff.png", "a\0.png")]
    lines = "".join(f'{{"file_name": {name}, "text": "x"}}\n' for name in names)
    source = open_source(str(sets.file("metadata.jsonl", lines).parent))
    for index in range(3):
        with pytest.raises(BadSample):
            source.read(index)
    assert validate(source, workers=1).bad == 3 and source.sizes().tolist() == [[0, 0]] * 3
    path = sets.tar("a.tar", {os.fsdecode(b"\xff.png"): b"?", "b.png": sets.picture(1), "b.txt": "x"})
    assert main(["data", "check", str(path), "--workers", "1"]) == 1
    assert main(["data", "check", str(path), "--workers", "1", "--json"]) == 1
