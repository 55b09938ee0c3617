"""Every format comes through one interface: planted samples come back, planted faults are named."""

import builtins
import os
import pickle

import numpy as np
import pytest

from spar.common.errors import InputError
from spar.data import webdataset
from spar.data.convert import convert
from spar.data.mixture import Mixture
from spar.data.samples import BadSample, Sample
from spar.data.sources import open_source
from spar.data.validate import validate


def texts(source) -> list[str]:
    return [source.read(index).text for index in range(len(source))]


# ---- tar shards -----------------------------------------------------------------------------------------------------


def test_webdataset_shards_of_captions(sets):
    for shard in range(3):
        sets.pairs(f"{shard:06d}.tar", range(5 * shard, 5 * shard + 5))
    for path in (f"{sets.folder}", f"{sets.folder}/*.tar", f"{sets.folder}/{{000000..000002}}.tar"):
        source = open_source(path)
        assert (source.kind, source.format, len(source)) == ("text_to_image", "webdataset", 15)
        assert texts(source) == [f"picture {n}" for n in range(15)]
    assert source.read(7) == Sample(sets.picture(7), "picture 7", "00000007", "000001.tar")
    for wrong in (-1, 15):
        with pytest.raises(IndexError):
            source.read(wrong)


def test_a_quoted_path_may_begin_with_the_home_folder(sets, monkeypatch):
    sets.pairs("000000.tar", range(3))
    monkeypatch.setenv("HOME", str(sets.folder))
    assert texts(open_source("~/*.tar")) == texts(open_source("~")) == [f"picture {n}" for n in range(3)]


def test_captions_in_json_and_a_jpg_that_is_a_png(sets):
    members = {
        "1.jpg": sets.picture(1), "1.json": '{"caption": " one "}',
        "2.jpg": sets.picture(2), "2.json": '{"text": "two"}',
        "3.jpg": sets.picture(3), "3.json": '{"caption": "no"}', "3.txt": "three",
        "4.jpg": b"", "4.json": "[]",
    }  # fmt: skip
    source = open_source(str(sets.tar("a.tar", members)))
    assert texts(source) == ["one", "two", "three", ""]
    assert source.sizes().tolist() == [[40, 30]] * 3 + [[0, 0]]


def test_edit_pairs(sets):
    source = open_source(str(sets.edits("a.tar", range(3))))
    assert source.kind == "edit"
    assert source.read(2) == Sample(
        sets.picture(102, "JPEG"), "edit 2", "00000002", "a.tar", input_images=(sets.picture(2, "JPEG"),)
    )
    members = {f"1.input_{n}.png": sets.picture(n) for n in (1, 0, 2)} | {"1.output.png": sets.picture(9), "1.txt": "x"}
    assert open_source(str(sets.tar("b.tar", members))).read(0).input_images == tuple(sets.picture(n) for n in range(3))


def test_imagenet_has_labels(sets):
    path = sets.tar("imagenet-val-000000.tar", {"00000000.jpg": sets.picture(0, "JPEG"), "00000000.cls": "65"})
    source = open_source(str(path))
    assert source.format == "imagenet" and source.read(0).label == 65 and source.read(0).text == ""


def test_samples_that_lack_something_are_bad_and_named(sets, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_TEXT_BYTES", 100)
    members = {
        "0.jpg": sets.picture(0), "0.txt": "fine", "1.txt": "no picture",
        "2.jpg": sets.picture(2), "2.txt": b"\xff\xfe", "3.jpg": sets.picture(3), "3.json": "{",
        "4.jpg": sets.picture(4), "4.input.jpg": b"", "5.jpg": sets.picture(5), "5.txt": "x" * 101,
    }  # fmt: skip
    source = open_source(str(sets.tar("a.tar", members)))
    for index, reason in (
        (1, "found none"), (2, "text cannot be read"), (3, "text cannot be read"), (4, "without references"),
        (5, "at most 100 bytes"),
    ):  # fmt: skip
        with pytest.raises(BadSample, match=reason) as caught:
            source.read(index)
        assert (caught.value.key, caught.value.origin) == (str(index), "a.tar")
    assert source.read(0).text == "fine"


def test_a_shard_that_shrinks_later_gives_bad_samples_only(sets):
    path = sets.pairs("a.tar", range(10))
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:10_000])
    assert source.read(0).text == "picture 0"
    with pytest.raises(BadSample, match="the shard ends"):
        source.read(9)


def test_few_files_stay_open_and_a_source_travels_to_workers(sets, monkeypatch):
    monkeypatch.setattr(webdataset, "OPEN_SHARDS", 2)
    for shard in range(5):
        sets.pairs(f"{shard}.tar", range(shard, shard + 1))
    for cache in (None, sets.folder / "cache"):
        source = open_source(str(sets.folder), cache=cache)
        assert texts(source) == [f"picture {n}" for n in range(5)] and len(source._open) == 2
        there = pickle.loads(pickle.dumps(source))
        assert there._open == {} and texts(there) == texts(source)


def test_identity_is_that_of_the_samples(sets):
    first = open_source(str(sets.pairs("a.tar", range(3)))).identity
    assert open_source(str(sets.pairs("moved/b.tar", range(3)))).identity == first
    assert open_source(str(sets.pairs("a.tar", range(1, 4)))).identity != first


def test_indexing_in_processes_finds_the_same(sets):
    for shard in range(3):
        sets.pairs(f"{shard}.tar", range(shard, shard + 2))
    assert open_source(str(sets.folder), workers=2).identity == open_source(str(sets.folder)).identity


# ---- lists of files -------------------------------------------------------------------------------------------------


def test_image_folder(sets):
    sets.file("s/a.png", sets.picture(1))
    sets.file("b.png", sets.picture(2))
    sets.file("metadata.jsonl", '{"file_name": "s/a.png", "text": "one"}\n\n{"file_name": "b.png", "caption": "two"}\n')
    source = open_source(str(sets.folder))
    assert (source.format, source.kind, texts(source)) == ("folder", "text_to_image", ["one", "two"])
    assert source.read(0) == Sample(sets.picture(1), "one", "s/a.png", str(sets.folder))
    assert source.sizes().tolist() == [[40, 30], [40, 30]]


def test_image_folder_of_edits(sets):
    for number in range(3):
        sets.file(f"{number}.png", sets.picture(number))
    sets.file(
        "metadata.jsonl",
        '{"input_file_name": "0.png", "output_file_name": "1.png", "instruction": "x"}\n'
        '{"input_file_name": ["0.png", "1.png"], "file_name": "2.png", "text": "y"}\n',
    )
    source = open_source(str(sets.folder))
    assert [len(source.read(i).input_images) for i in range(2)] == [1, 2] and texts(source) == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 2"), ('{"text": "x"}', "line 2"), ("[]", "line 2"), ('{"file_name": "a", "text": 3}', "line 2"),
     ('{"file_name": "a", "input_file_name": "b"}', "one kind")],
)  # fmt: skip
def test_wrong_metadata_is_refused_with_its_line(sets, line, words):
    sets.file("metadata.jsonl", '{"file_name": "s/a.png", "text": "one"}\n' + line)
    with pytest.raises(InputError, match=words):
        open_source(str(sets.folder))


def test_files_outside_the_root_or_missing_are_bad_samples(sets):
    sets.file("secret.png", sets.picture(0))
    sets.file("set/folder.png/x", b"")
    os.mkfifo(sets.folder / "set/pipe.png")
    names = ("../secret.png", str(sets.folder / "secret.png"), "none.png", "folder.png", "pipe.png")
    sets.file("set/metadata.jsonl", "".join(f'{{"file_name": "{name}", "text": "x"}}\n' for name in names))
    source = open_source(str(sets.folder / "set"))
    for index, reason in enumerate(("inside its root", "inside its root", "No such file", "directory", "a file of")):
        with pytest.raises(BadSample, match=reason):
            source.read(index)


def test_sharegpt(sets):
    for number in range(3):
        sets.file(f"images/{number}.png", sets.picture(number))
    one = {"input_prompt": "one", "output_image": "images/1.png"}
    made = open_source(str(sets.json("text_to_image.json", [one])))
    assert made.read(0) == Sample(sets.picture(1), "one", "images/1.png", str(sets.folder))
    two = one | {"input_image": ["images/0.png"]}
    edit = open_source(str(sets.json("text_and_image_to_image.json", [two])))
    assert edit.kind == "edit" and edit.read(0).input_images == (sets.picture(0),)
    with pytest.raises(InputError, match="item 1: KeyError"):
        open_source(str(sets.json("text_to_image.json", [one, {"input_prompt": "x"}])))


def test_gpt_edit_keeps_items_of_two_images_and_counts_the_rest(sets):
    for number in range(4):
        sets.file(f"gpt-edit/hqedit/{number}.png", sets.picture(number))
    conversations = [{"from": "gpt", "value": "?"}, {"from": "human", "value": "<image>\nmake it\nred <image>"}]
    items = [
        {"image": ["0.png", "1.png"], "conversations": conversations},
        {"image": ["0.png", "1.png", "2.png"], "conversations": conversations},
        {"image": ["0.png", "1.png"], "conversations": []},
        {"image": ["2.png", "3.png"], "conversations": conversations},
    ]
    sets.json("json/hq, part.json", items)
    other = sets.json("json/omni.json", items[:1])
    sets.file("data.txt", f"gpt-edit/hqedit,json/hq.json,false\n\n{sets.folder}/gpt-edit/hqedit,{other},true\n")
    sets.json("json/hq.json", items)
    source = open_source(str(sets.folder / "data.txt"))
    assert (source.format, source.kind, texts(source)) == ("gptedit", "edit", ["make it red"] * 3)
    assert source.read(1).input_images == (sets.picture(2),) and source.read(1).image == sets.picture(3)
    assert list(source.skipped.values()) == [2]


def test_llava_keeps_conversations_about_one_image_and_counts_the_rest(sets):
    for number in range(3):
        sets.file(f"coco/{number}.png", sets.picture(number))

    def item(image, *turns):
        values = [{"from": who, "value": text} for who, text in turns]
        return {"id": "1", **({"image": image} if image else {}), "conversations": values}

    asked, said = ("human", "<image>\nwhat is it?"), ("gpt", " a square ")
    items = [
        item("coco/0.png", asked, said, ("human", "what\ncolour? <image>"), ("gpt", "red")),
        item(None, asked, said),
        item(["coco/0.png", "coco/1.png"], asked, said),
        item(["coco/1.png"], ("system", "be brief"), ("user", "and this?"), ("assistant", "a ring"), asked),
        item("coco/2.png", said, asked),
        item("coco/2.png", asked),
        item("coco/2.png", ("human", "<image>"), said),
        item([f"coco/{n}.png" for n in range(20)], asked, said),
        item("coco/2.png", asked, ("gpt", " ")),
    ]
    source = open_source(str(sets.json("llava.json", items)))
    assert (source.format, source.kind, len(source)) == ("llava", "dialogue", 3)
    assert source.read(0).turns == (("what is it?", "a square"), ("what\ncolour?", "red"))
    assert source.read(0).image == sets.picture(0) and source.read(0).text == ""
    assert source.read(0).words == "what is it?\na square\nwhat\ncolour?\nred"
    assert source.read(1).turns == (("and this?", "a ring"),)
    with pytest.raises(BadSample, match="expected a question and an answer in each turn, got an empty one"):
        source.read(2)
    assert source.skipped == {
        "conversation about no image": 1, "conversation about several images": 2,
        "conversation whose turns do not alternate": 2, "conversation with a turn of the image alone": 1,
    }  # fmt: skip
    other = open_source(str(sets.json("other.json", [item("coco/0.png", asked, ("gpt", "another"))])))
    assert other.identity != source.identity
    with pytest.raises(InputError, match="expected image and conversations, each turn with from and value in .*item 1"):
        open_source(str(sets.json("other.json", [items[0], {"image": "coco/0.png", "conversations": [{}]}])))
    with pytest.raises(InputError, match="expected captions or edits, .* got dialogues"):
        convert([source], sets.folder)
    report = validate(source, workers=0)
    assert (report.kind, report.bad, report.captions["empty"], report.captions["shortest"]) == ("dialogue", 1, 0, 9)
    assert open_source(f"{sets.folder}/llav*.json").format == "llava"           # a pattern names it too
    with pytest.raises(InputError, match="found none; left out: 1 of 'conversation about no image'"):
        open_source(str(sets.json("llava.json", items[1:2])))


@pytest.mark.parametrize("text", ["one,two", "root,none.json,false", "root,data.txt,false"])
def test_a_wrong_index_is_refused(sets, text):
    with pytest.raises(InputError, match="expected"):
        open_source(str(sets.file("data.txt", text)))


# ---- parquet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(sets):
    """Writes a parquet file of these columns, two rows a group."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, columns: dict):
        path = sets.folder / name
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
        return path

    return write


def test_parquet_of_captions(sets, parquet):
    images = [{"bytes": sets.picture(n), "path": f"{n}.png"} for n in range(5)]
    parquet("a.parquet", {"image": images, "caption": [f"picture {n}" for n in range(5)], "other": [0] * 5})
    parquet("b.parquet", {"image": images[:1], "caption": ["last"], "other": [0]})
    source = open_source(str(sets.folder))
    assert (source.format, source.kind) == ("parquet", "text_to_image")
    assert texts(source) == [f"picture {n}" for n in range(5)] + ["last"]
    assert source.read(3) == Sample(sets.picture(3), "picture 3", "a-3", "a.parquet")
    assert source.read(5).key == "b-0" and source.sizes().tolist() == [[40, 30]] * 6
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_parquet_of_edits_and_rows_that_lack_something(sets, parquet):
    picture = [sets.picture(n) for n in range(3)]
    columns = {
        "input_images": [[picture[0], picture[1]], [], [picture[0]]], "edited_image": [picture[2], picture[2], None],
        "instruction": ["x", "y", "z"], "id": [7, 8, 9],
    }  # fmt: skip
    source = open_source(str(parquet("a.parquet", columns)))
    assert source.read(0) == Sample(picture[2], "x", "7", "a.parquet", input_images=(picture[0], picture[1]))
    for index, reason in ((1, "got 0"), (2, "got NoneType")):
        with pytest.raises(BadSample, match=reason) as caught:
            source.read(index)
        assert caught.value.key == str(7 + index)


def test_parquet_that_cannot_be_used_is_refused(sets, parquet):
    with pytest.raises(InputError, match="one of the columns .* got 1 rows with a"):
        open_source(str(parquet("a.parquet", {"a": [1]})))
    with pytest.raises(InputError, match="expected a parquet file"):
        open_source(str(sets.file("b.parquet", b"no")))


def test_without_pyarrow_parquet_says_how_to_get_it(sets, monkeypatch):
    load = builtins.__import__

    def missing(name, *args, **keywords):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return load(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'spar-unified\[data\]'"):
        open_source(str(sets.file("a.parquet", b"")))


# ---- detection ------------------------------------------------------------------------------------------------------


def test_unknown_formats_are_refused(sets):
    sets.file("list.json", "[]")
    with pytest.raises(InputError, match="name one of its lists: list.json"):
        open_source(str(sets.folder))
    with pytest.raises(InputError, match="or give the format"):
        open_source("some.zip")
    with pytest.raises(InputError, match="format: expected"):
        open_source("a.tar", "zip")
    with pytest.raises(InputError, match="hf://"):
        open_source("pipe:cat a.tar")
    source = open_source(str(sets.tar("a.tar", {"0.png": sets.picture(0), "0.txt": "one"})))
    for weight in (0, -1, float("nan")):
        with pytest.raises(InputError, match="weight above 0"):
            Mixture([source], [weight], batch=1)


def test_sizes_of_files_are_kept_in_the_cache(sets, monkeypatch):
    sets.file("a.png", sets.picture(1))
    sets.file("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n')
    source = open_source(str(sets.folder), cache=sets.folder / "cache")
    first = source.sizes()
    (sets.folder / "a.png").unlink()
    assert np.array_equal(source.sizes(), first) and first.tolist() == [[40, 30]]
    assert open_source(str(sets.folder)).sizes().tolist() == [[0, 0]]
