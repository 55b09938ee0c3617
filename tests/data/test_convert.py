"""Conversion: what goes in comes out, bytes unchanged, whole or not at all."""

import json
import tarfile
from pathlib import Path

import pytest

from spar.cli.main import main
from spar.common.errors import InputError
from spar.data.convert import convert
from spar.data.sources import open_source


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as file:
        return {info.name: file.extractfile(info).read() for info in file}


def test_round_trip_of_edits_under_their_true_extensions(sets):
    given = {}
    for number, kind in enumerate(("PNG", "JPEG", "WEBP")):
        given |= {
            f"{number}.input.jpg": sets.picture(number, kind), f"{number}.output.jpg": sets.picture(9 + number, kind),
            f"{number}.txt": f"größer {number}",
        }  # fmt: skip
    source = open_source(str(sets.tar("a.tar", given)))
    out = sets.folder / "out"
    out.mkdir()
    convert([source], out, shard=2)
    assert sorted(path.name for path in out.iterdir()) == ["000000.tar", "000001.tar", "converted.json"]
    assert [*members(out / "000000.tar")] == [
        "00000000.input.png", "00000000.output.png", "00000000.txt",
        "00000001.input.jpg", "00000001.output.jpg", "00000001.txt",
    ]  # fmt: skip
    converted = open_source(str(out))
    assert converted.kind == "edit" and len(converted) == 3
    for index in range(3):
        before, after = source.read(index), converted.read(index)
        assert (before.input_images, before.image, before.text) == (after.input_images, after.image, after.text)


def test_references_and_labels_survive(sets):
    given = {f"1.input_{n}.png": sets.picture(n) for n in range(3)} | {"1.output.png": sets.picture(7), "1.txt": "x"}
    label = {"1.jpg": sets.picture(5), "1.cls": "17"}
    for name, source in (("a", given), ("b", label)):
        out = sets.folder / name
        out.mkdir()
        source = open_source(str(sets.tar(f"{name}.tar", source)))
        convert([source], out)
        before, after = source.read(0), open_source(str(out)).read(0)
        assert vars(before) | {"key": "", "origin": ""} == vars(after) | {"key": "", "origin": ""}
    assert [*members(sets.folder / "b" / "000000.tar")] == ["00000000.png", "00000000.cls"]


def test_the_same_samples_give_the_same_bytes(sets):
    source = open_source(str(sets.pairs("a.tar", range(5))))
    made = []
    for name in ("a", "b"):
        out = sets.folder / name
        out.mkdir()
        convert([source, source], out, shard=4)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1] and len(made[0]) == 4


def test_bad_samples_are_left_out_and_named(sets):
    given = {f"{n}.png": sets.picture(n) for n in range(6)} | {"2.png": b"GIF89a", "4.png": sets.picture(4)[:40]}
    out = sets.folder / "out"
    out.mkdir()
    done = convert([open_source(str(sets.tar("a.tar", given)))], out)
    assert (done.samples, done.shards, done.dropped) == (4, 1, 2)
    assert [*members(out / "000000.tar")] == [f"{n:08d}.png" for n in range(4)]
    named = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in named] == ["2", "4"] and "damaged" in named[1]["reason"]


def test_what_cannot_become_one_set_is_refused(sets):
    edits, pictures = open_source(str(sets.edits("a.tar", range(2)))), open_source(str(sets.pairs("b.tar", range(2))))
    with pytest.raises(InputError, match="one kind, got edit and text_to_image"):
        convert([edits, pictures], sets.folder)
    nothing = open_source(str(sets.tar("c.tar", {"1.jpg": b"", "2.jpg": b""})))
    with pytest.raises(InputError, match="all 2 are bad, the last one: .* empty"):
        convert([nothing], sets.folder)


def test_the_command_writes_whole_and_never_over_what_exists(sets, capsys, monkeypatch):
    monkeypatch.chdir(sets.folder)
    for number in range(4):
        sets.file(f"set/{number}.png", sets.picture(number))
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) for n in range(4)]
    sets.file("set/metadata.jsonl", "\n".join(lines))
    argv = ["data", "convert", "set", "-o", "out", "--shard-size", "3"]
    assert main(argv) == 0 and capsys.readouterr().out == "out  (4 samples in 2 shards, 0 left out)\n"
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert main(argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    sets.tar("bad.tar", {"1.jpg": b""})
    assert main(["data", "convert", "bad.tar", "-o", "out", "--overwrite"]) == 2
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert sorted(path.name for path in sets.folder.iterdir()) == ["bad.tar", "out", "set"]
