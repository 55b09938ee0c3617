"""Folders of images: tables of captions, captions beside the images, classes; what leaves the folder is not read."""

import json
import os

import pytest

from spar.common.errors import InputError
from spar.data.samples import BadSample
from spar.data.sources import open_source
from spar.data.validate import validate


def texts(source) -> list[str]:
    return [source.read(index).text for index in range(len(source))]


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_in_csv(sets):
    for number in range(3):
        sets.file(f"s/{number}.png", sets.picture(number))
    lines = 'file_name,text,width\r\ns/0.png,"one, ""two""\nlines",3\r\ns/1.png,größe,\r\ns/2.png\r\n'
    sets.file("metadata.csv", "\ufeff" + lines)
    source = open_source(str(sets.folder))
    assert (source.format, source.kind) == ("folder", "text_to_image")
    assert texts(source) == ['one, "two"\nlines', "größe", ""] and source.read(1).image == sets.picture(1)


@pytest.mark.parametrize(
    ("table", "words"),
    [("image,text\na.png,x\n", "line 2: got the fields 'image', 'text'"),
     ("file_name\n" + "x" * 200_000, "line 2: field larger"),
     ("file_name\na.png\n" + "x" * 2**21, "line 3: a line of more"), ("", "found none")],
)  # fmt: skip
def test_a_wrong_csv_is_refused_with_its_line(sets, table, words):
    sets.file("metadata.csv", table)
    with pytest.raises(InputError, match=words):
        open_source(str(sets.folder))


def test_a_table_in_parquet(sets):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(3):
        sets.file(f"{number}.png", sets.picture(number))
    columns = {"file_name": ["1.png", "2.png"], "source_img_file_name": ["0.png", "1.png"], "instruction": ["x", None]}
    parquet.write_table(pyarrow.table(columns), sets.folder / "metadata.parquet")
    source = open_source(str(sets.folder))
    assert source.kind == "edit" and texts(source) == ["x", ""] and source.read(1).input_images == (sets.picture(1),)


def test_a_line_of_null_is_refused_and_ends_nothing_silently(sets):
    sets.file("metadata.jsonl", '{"file_name": "a.png"}\nnull\n{"file_name": "b.png"}\n')
    with pytest.raises(InputError, match="line 2: not an object"):
        open_source(str(sets.folder))


def test_a_list_of_captions_gives_its_first(sets):
    sets.file("a.png", sets.picture(1))
    sets.file("metadata.jsonl", '{"file_name": "a.png", "captions": ["", "one", "two"]}')
    assert texts(open_source(str(sets.folder))) == ["one"]
    path = sets.tar("a.tar", {"1.png": sets.picture(1), "1.json": '{"prompt": ["three", "four"]}'})
    assert texts(open_source(str(path))) == ["three"]


def test_separators_of_windows(sets):
    sets.file("s/a.png", sets.picture(1))
    sets.file("s\\b.png", sets.picture(2))  # a file of that very name
    rows = [{"file_name": name, "text": "x"} for name in ("s\\a.png", "s\\b.png", "..\\a.png")]
    sets.file("metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source = open_source(str(sets.folder))
    assert [source.read(index).image for index in range(2)] == [sets.picture(1), sets.picture(2)]
    with pytest.raises(BadSample, match="inside its root"):
        source.read(2)


# ---- links and pipes ------------------------------------------------------------------------------------------------


def test_a_link_that_leaves_the_folder_is_a_bad_sample(sets):
    secret = sets.file("secret.png", sets.picture(1))
    sets.file("set/a.png", sets.picture(2))
    sets.file("elsewhere/x.png", sets.picture(3))
    (sets.folder / "set/out.png").symlink_to(secret)
    (sets.folder / "set/in.png").symlink_to("a.png")
    (sets.folder / "set/folder").symlink_to(sets.folder / "elsewhere")
    rows = [{"file_name": name, "text": "x"} for name in ("in.png", "out.png", "folder/x.png")]
    sets.file("set/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source = open_source(str(sets.folder / "set"))
    assert source.read(0).image == sets.picture(2)
    for index in (1, 2):
        with pytest.raises(BadSample, match="a link that leaves it"):
            source.read(index)
    (sets.folder / "link").symlink_to(sets.folder / "set")  # the folder itself may be one
    assert open_source(str(sets.folder / "link")).read(0).image == sets.picture(2)


def test_the_hubs_cache_keeps_its_files_beside_the_snapshot(sets):
    sets.file("datasets--x--y/blobs/0a", sets.picture(1))
    rows = sets.file("datasets--x--y/blobs/0b", '{"file_name": "a.png", "text": "x"}')
    folder = sets.folder / "datasets--x--y/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to("../../blobs/0a")
    (folder / "metadata.jsonl").symlink_to(rows)
    assert open_source(str(folder)).read(0).image == sets.picture(1)


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "state.json", "t2i.json", "data.txt"]
)
def test_a_pipe_is_refused_at_once(sets, name):
    sets.file("s/a.png", sets.picture(1))
    os.mkfifo(sets.folder / f"s/{name}")
    path = sets.folder / "s" / ("" if name.startswith(("metadata", "state")) else name)
    with pytest.raises(InputError, match="pipe or a device|no such file"):
        open_source(str(path))


# ---- captions beside the images, and none ---------------------------------------------------------------------------


def test_captions_lie_beside_the_images(sets):
    sets.file("a.png", sets.picture(1))
    sets.file("a.txt", "one\n")
    sets.file("s/b.JPG", sets.picture(2, "JPEG"))
    sets.file("s/b.json", '{"caption": "two"}')
    sets.file("s/c.webp", sets.picture(3, "WEBP"))
    sets.file("s/d.png", sets.picture(4))
    sets.file("s/d.caption", "four")
    for other in ("s/notes.md", ".hidden.png", "._a.png", ".git/x.png", "Thumbs.db"):
        sets.file(other, b"?")
    source = open_source(str(sets.folder))
    assert (source.format, source.kind, texts(source)) == ("images", "text_to_image", ["one", "two", "", "four"])
    assert [source.read(index).key for index in range(4)] == ["a.png", "s/b.JPG", "s/c.webp", "s/d.png"]
    assert source.skipped == {"hidden file": 2, ".db": 1, ".md": 1}
    assert validate(source, workers=1).captions["empty"] == 1


def test_the_identity_is_that_of_the_captions_too(sets):
    sets.file("a.png", sets.picture(1))
    sets.file("a.txt", "one")
    before = open_source(str(sets.folder)).identity
    assert open_source(str(sets.folder)).identity == before
    sets.file("a.txt", "another")
    assert open_source(str(sets.folder)).identity != before


def test_a_bad_caption_beside_an_image_is_a_bad_sample(sets):
    for name, data in (("a", b"\xff\xfe"), ("b", b"caf\xe9"), ("c", b"x" * (2**20 + 1))):
        sets.file(f"{name}.png", sets.picture(1))
        sets.file(f"{name}.txt", data)
    sets.file("d.png", sets.picture(1))
    os.mkfifo(sets.folder / "d.txt")
    sets.file("e.png", sets.picture(1))
    sets.file("e.json", "{")
    source = open_source(str(sets.folder))
    for index, reason in enumerate(("UTF-16", "not UTF-8", "at most", "pipe", "text cannot be read")):
        with pytest.raises(BadSample, match=reason):
            source.read(index)


def test_a_folder_of_images_needs_no_captions(sets):
    for number in range(3):
        sets.file(f"photos/{number}.png", sets.picture(number, size=(300, 300)))
    source = open_source(str(sets.folder / "photos"))
    assert texts(source) == [""] * 3 and source.read(0).label is None
    assert validate(source, workers=1).wrong == ()


def test_folders_of_classes_have_labels(sets):
    for number, name in enumerate(("cat/0.png", "dog/0.png", "dog/1.png", "train/0.png")):
        sets.file(name, sets.picture(number))
    source = open_source(str(sets.folder))
    assert [source.read(index).label for index in range(4)] == [0, 1, 1, 2]
    assert validate(source, workers=1).captions["empty"] == 0


def test_a_folder_without_images_says_what_it_found(sets):
    sets.file("a.gif", b"?")
    with pytest.raises(InputError, match="expected .* images, .* found none"):
        open_source(str(sets.folder))
    with pytest.raises(InputError, match=r"found none; 1 files skipped \(.gif\)"):
        open_source(str(sets.folder), "images")
    with pytest.raises(InputError, match="expected .*tar in .* found none"):
        open_source(str(sets.folder), "webdataset")
    with pytest.raises(InputError, match="format: expected webdataset, .* got 'sharegpt'"):
        open_source(str(sets.folder), "sharegpt")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.parquet.gz"])
def test_a_compressed_set_says_decompress(sets, name):
    path = sets.file(f"s/{name}", b"\x1f\x8b")
    for given in (path, path.parent, f"{path.parent}/*.{name.partition('.')[2]}"):
        with pytest.raises(InputError, match="decompress"):
            open_source(str(given))


# ---- roots ----------------------------------------------------------------------------------------------------------


def test_the_root_of_a_data_set_stands_for_its_training_split(sets, caplog):
    for split, number in (("train", 1), ("test", 2)):
        sets.file(f"{split}/a.png", sets.picture(number))
        sets.file(f"{split}/metadata.jsonl", f'{{"file_name": "a.png", "text": "{split}"}}')
    sets.file("README.md", "?")
    assert texts(open_source(str(sets.folder))) == ["train"] and "only its folder train is read" in caplog.text


def test_the_root_of_images_in_splits(sets):
    for name in ("train/cat/0.png", "train/dog/1.png", "test/cat/2.png"):
        sets.file(name, sets.picture(1))
    source = open_source(str(sets.folder))
    assert [source.read(index).key for index in range(len(source))] == ["cat/0.png", "dog/1.png"]


def test_shards_of_the_training_split_alone_are_read(sets):
    for name, number in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)):
        sets.pairs(f"data/{name}.tar", range(number, number + 1))
    source = open_source(str(sets.folder))
    assert texts(source) == ["picture 0", "picture 1"]
    assert source.skipped == {"file of another split than train": 1}
    (sets.folder / "data/train-00000-of-00002.tar").unlink()
    (sets.folder / "data/train-00001-of-00002.tar").unlink()
    assert texts(open_source(str(sets.folder))) == ["picture 2"]


def test_img2dataset_in_files(sets):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for shard in range(2):
        for number in range(2):
            key = f"{shard:05d}/{shard:05d}{number:04d}"
            sets.file(f"{key}.jpg", sets.picture(2 * shard + number, "JPEG"))
            sets.file(f"{key}.txt", f"picture {2 * shard + number}")
            sets.json(f"{key}.json", {"caption": "?", "key": key, "status": "success"})
        sets.json(f"{shard:05d}_stats.json", {"count": 2})
        parquet.write_table(pyarrow.table({"key": [key], "caption": ["?"]}), sets.folder / f"{shard:05d}.parquet")
    source = open_source(str(sets.folder))
    assert source.format == "images" and texts(source) == [f"picture {number}" for number in range(4)]
    sets.pairs("tars/00000.tar", range(1))  # and its layout of shards
    parquet.write_table(pyarrow.table({"key": ["0"]}), sets.folder / "tars/00000.parquet")
    assert open_source(str(sets.folder / "tars")).format == "webdataset"
