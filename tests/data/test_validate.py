"""The data doctor: what is planted is found and named, and a clean set is clean."""

import json

import pytest

from spar.cli.main import main
from spar.data.sources import open_source
from spar.data.validate import CHUNK, validate


def test_a_clean_set_is_clean(sets):
    report = validate(open_source(str(sets.pairs("a.tar", range(8), size=(300, 300)))), workers=1)
    assert report.wrong == () and report.notes == ()
    assert (report.samples, report.checked, report.bad, report.duplicates) == (8, 8, 0, 0)
    assert report.captions == {"empty": 0, "too_long": 0, "shortest": 9, "median": 9, "longest": 9}
    assert (report.formats, report.shorter_sides, report.aspects) == (
        {"PNG": 8}, {"224 to 447": 8}, {"3:4 to 4:3": 8},
    )  # fmt: skip


@pytest.fixture
def planted(sets) -> str:
    """Ten samples, each with its own fault but for 0 and 9."""
    members = {
        "0.jpg": sets.picture(0), "0.txt": "fine",
        "1.jpg": sets.picture(0), "1.txt": "fine",
        "2.jpg": sets.picture(0), "2.txt": "the same picture in other words",
        "3.jpg": sets.noise(3)[:900], "3.txt": "half a picture",
        "4.jpg": b"GIF89a" + bytes(100), "4.txt": "another format",
        "5.txt": "no picture",
        "6.jpg": sets.picture(6),
        "7.jpg": sets.picture(7, size=(10, 100)), "7.txt": "long " * 100,
        "8.jpg": sets.picture(8, "WEBP"), "8.pkl": b"never read", "../8.png": b"x", "8.txt": "ok",
        "9.jpg": sets.picture(9, "JPEG", size=(1200, 1100)), "9.txt": "fine too",
    }  # fmt: skip
    return str(sets.tar("planted.tar", members))


def test_what_is_planted_is_found_and_named(planted):
    report = validate(open_source(planted), max_characters=100, workers=2)
    assert {bad.key: bad.origin for bad in report.named_bad} == dict.fromkeys("345", "planted.tar") and report.bad == 3
    reasons = {bad.key: bad.reason for bad in report.named_bad}
    assert "truncated" in reasons["3"] and "PNG, JPEG or WEBP" in reasons["4"] and "found none" in reasons["5"]
    assert (report.duplicates, report.named_duplicates, report.repeated_pictures) == (1, (("1", "0"),), 1)
    assert (report.captions["empty"], report.captions["too_long"]) == (1, 1)
    assert report.skipped == {".pkl": 1, "name leaves the folder": 1}
    assert report.formats == {"PNG": 5, "WEBP": 1, "JPEG": 1}
    assert report.shorter_sides == {"below 224": 6, "1024 and more": 1} and report.aspects["below 1:2"] == 1
    assert "1 files for 2 workers" in report.notes[0]
    assert len(report.wrong) == 5


def test_processes_find_the_same(sets):
    source = open_source(str(sets.pairs("a.tar", range(CHUNK + 300), size=(8, 8))), cache=sets.folder / "cache")
    alone, shared = (validate(source, workers=workers) for workers in (1, 2))
    assert alone.formats == shared.formats == {"PNG": CHUNK + 300} and alone.captions == shared.captions
    assert alone.duplicates == shared.duplicates == 0


def test_a_limit_spreads_over_the_set(sets):
    report = validate(open_source(str(sets.pairs("a.tar", range(50)))), limit=5, workers=1)
    assert (report.samples, report.checked) == (50, 5)


def test_a_damaged_shard_is_wrong(sets):
    path = sets.pairs("a.tar", range(10))
    path.write_bytes(path.read_bytes()[:10_000])
    assert "truncated" in validate(open_source(str(path)), workers=1).wrong[-1]


def test_imagenet_needs_no_words(sets):
    report = validate(open_source(str(sets.tar("a.tar", {"1.jpg": sets.picture(5, "JPEG"), "1.cls": "17"}))), workers=1)
    assert report.wrong == ()


def test_the_command_says_it_and_its_status_too(sets, planted, capsys):
    assert main(["data", "check", str(sets.pairs("clean.tar", range(5))), "--workers", "1"]) == 0
    assert "wrong" not in capsys.readouterr().out
    assert main(["data", "check", planted, "--max-characters", "100"]) == 1
    out = capsys.readouterr().out
    assert "bad: 3" in out and "duplicate: 1" in out and "PNG: 5" in out and "1 files for 4 workers" in out
    assert main(["data", "check", planted, str(sets.folder / "clean.tar"), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["bad"] == 3 and first["named_bad"][0]["key"] == "3" and second["wrong"] == []


@pytest.mark.parametrize("verb", ["check", "convert"])
def test_both_verbs_explain_their_arguments(capsys, verb):
    assert main(["data", verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: spar data {verb}" in text
    flags = {"check": ("--json", "--limit", "--max-characters"), "convert": ("-o", "--overwrite", "--shard-size")}
    for flag in ("PATH", "--format", "--cache", "--workers", *flags[verb]):
        assert flag in text
