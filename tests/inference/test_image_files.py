"""Metadata of images: it is read as written, with its types, and a hostile file gets a message."""

import os
import zlib
from pathlib import Path

import pytest
from PIL import Image

from spar.cli.parsing import parse
from spar.cli.task_arguments import GenerateArguments
from spar.common.errors import InputError
from spar.inference.image_files import MAX_HEADER_BYTES, METADATA_KEYS, read_metadata, save_images

FULL = {
    "prompt": "a red circle — größer\n", "negative_prompt": "--x 'y' \\ \0", "seed": 2**63 - 1, "steps": 20,
    "guidance": 0.1, "dtype": "bfloat16", "device": "cuda:1", "decode_tile": 16, "model": "mine", "adapter": "lora",
    "recipe": "shapes", "commit": "4e50", "spar": "0.1.0", "torch": "2.13.0+cpu",
}  # fmt: skip


def saved(path: Path, metadata: dict, size=(8, 6)) -> Path:
    save_images([Image.new("RGB", size, "red")], [path], [metadata])
    return path


def test_metadata_is_read_as_it_was_written(tmp_path):
    image = read_metadata(saved(tmp_path / "a.png", FULL))
    assert image.values == FULL and [type(value) for value in image.values.values()] == [type(v) for v in FULL.values()]
    assert (image.width, image.height) == (8, 6)
    assert {*FULL} <= {*METADATA_KEYS}


def test_none_is_not_written_and_foreign_keys_are_ignored(tmp_path):
    path = saved(tmp_path / "a.png", {"spar": "0.1.0", "seed": 3, "adapter": None, "Software": "GIMP"})
    assert read_metadata(path).values == {"seed": 3, "spar": "0.1.0"}


def test_the_command_that_reproduces_an_image(tmp_path):
    assert read_metadata(saved(tmp_path / "a.png", FULL)).reproduce_command() == [
        "spar", "generate", FULL["prompt"], "--height=6", "--width=8", f"--negative-prompt={FULL['negative_prompt']}",
        f"--seed={2**63 - 1}", "--steps=20", "--guidance=0.1", "--dtype=bfloat16", "--device=cuda:1",
        "--decode-tile=16", "--model=mine", "--adapter=lora",
    ]  # fmt: skip
    edited = {"instruction": "remove it", "image": "in.png", "seed": 0, "model": "bundled", "spar": "0.1.0"}
    assert read_metadata(saved(tmp_path / "b.png", edited)).reproduce_command() == [
        "spar",
        "edit",
        "in.png",
        "remove it",
        "--seed=0",
    ]
    laid_out = {"prompt": "a circle", "layout": "a ring", "seed": 0, "model": "bundled", "spar": "0.1.0"}
    plain = {"prompt": "a circle", "no_layout": True, "seed": 0, "model": "bundled", "spar": "0.1.0"}
    for number, (values, flag) in enumerate([(laid_out, "--layout=a ring"), (plain, "--no-layout")]):
        command = read_metadata(saved(tmp_path / f"layout-{number}.png", values)).reproduce_command()
        assert command == ["spar", "generate", "a circle", "--height=6", "--width=8", "--seed=0", flag]
    again = {"image": "in.png", "model": "mine", "spar": "0.1.0"}
    command = read_metadata(saved(tmp_path / "c.png", again)).reproduce_command()
    assert command == ["spar", "reconstruct", "in.png", "--model=mine"]
    compiled = {"prompt": "-1 degrees", "seed": 0, "compile": True, "spar": "0.1.0"}  # nor is the model known
    image = read_metadata(saved(tmp_path / "d.png", compiled))
    assert image.values["compile"] is True and image.reproduce_command() == [
        "spar", "generate", "--height=6", "--width=8", "--seed=0", "--compile", "--model=MODEL", "--", "-1 degrees"
    ]  # fmt: skip
    args = parse(GenerateArguments, image.reproduce_command()[2:], "spar generate")
    assert (args.prompt, args.seed, args.compile, args.model) == (("-1 degrees",), 0, True, Path("MODEL"))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_with(path: Path, *chunks: bytes) -> Path:
    """A PNG with further chunks after its header."""
    whole = saved(path, {"spar": "0.1.0"}).read_bytes()
    path.write_bytes(whole[:33] + b"".join(chunks) + whole[33:])
    return path


def test_a_path_may_be_text(tmp_path):
    saved(tmp_path / "a.png", {"spar": "0.1.0", "prompt": "a red circle"})
    assert read_metadata(str(tmp_path / "a.png")) == read_metadata(tmp_path / "a.png")
    with pytest.raises(InputError, match="there is no file"):
        read_metadata("")


def test_a_bomb_of_compressed_text_is_refused_without_its_memory(tmp_path):
    bomb = zlib.compress(b"a" * 2**26, 9)
    for kind, head in ((b"zTXt", b"prompt\0\0"), (b"iTXt", b"prompt\0\1\0\0\0")):
        with pytest.raises(InputError, match="cannot be read: Decompressed data too large"):
            read_metadata(png_with(tmp_path / "a.png", chunk(kind, head + bomb)))


def test_only_the_head_of_a_long_file_is_read(tmp_path, monkeypatch):
    long = png_with(tmp_path / "a.png", chunk(b"tEXt", b"prompt\0" + b"a" * MAX_HEADER_BYTES))
    with pytest.raises(InputError, match="cannot be read|has no metadata"):
        read_metadata(long)
    behind = saved(tmp_path / "b.png", {"spar": "0.1.0"})
    with behind.open("ab") as file:
        file.truncate(2**33)  # a hole: eight gigabytes that take no room
    assert read_metadata(behind).values == {"spar": "0.1.0"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "which is not a PNG"),
        (b"plain words", "which is not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "which is not a PNG|cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0"), "which is not a PNG|cannot be read"),
    ],
)
def test_what_is_no_whole_png_gets_a_message(tmp_path, data, words):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=f"expected a PNG written by spar, or a folder of weights, .*({words})"):
        read_metadata(tmp_path / "a.png")


def test_other_files_get_a_message(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("plain.png", "has no metadata of spar"), ("a.jpg", "is not a PNG"), ("nowhere", "there is no file"),
        ("pipe", "there is no file"),
    ):
        with pytest.raises(InputError, match=words):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize(("key", "value"), [("seed", "x"), ("steps", "2.5"), ("guidance", "much"), ("decode_tile", "")])
def test_a_value_that_is_not_a_number_gets_a_message(tmp_path, key, value):
    with pytest.raises(InputError, match=f"got {key} '{value}', which is not a number"):
        read_metadata(saved(tmp_path / "a.png", {"spar": "0.1.0", key: value}))
