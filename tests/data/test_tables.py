"""Tables as the library `datasets` writes them: by hand in its layout, and by the library where it is installed."""

import json
import pickle
from pathlib import Path

import pytest

from spar.common.errors import InputError
from spar.data.samples import BadSample
from spar.data.sources import open_source
from spar.data.validate import validate

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


def texts(source) -> list[str]:
    return [source.read(index).text for index in range(len(source))]


@pytest.fixture
def write(sets):
    """Writes a parquet file of these columns."""

    def written(name: str, columns: dict) -> Path:
        path = sets.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), path)
        return path

    return written


def save_to_disk(folder: Path, columns: dict, files: int = 1, **state) -> Path:
    """The layout of `Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    table = pyarrow.table(columns)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    rows = -(-len(table) // files)
    for number, name in enumerate(names):
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(number * rows, rows), max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def rows(sets, count: int) -> dict:
    return {"image": [{"bytes": sets.picture(n), "path": f"{n}.png"} for n in range(count)],
            "text": [f"picture {n}" for n in range(count)]}  # fmt: skip


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_an_image_that_stayed_in_its_file_is_read_there(sets, write):
    inside, outside = sets.file("set/photos/1.png", sets.picture(1)), sets.file("other/2.png", sets.picture(2))
    paths = ["photos/1.png", str(inside), str(outside), str(sets.folder / "none.png"), "../other/2.png", "a\0b"]
    images = [{"bytes": None, "path": path} for path in paths]
    source = open_source(str(write("set/a.parquet", {"image": images, "text": ["x"] * len(images)})))
    assert [source.read(index).image for index in range(3)] == [sets.picture(1), sets.picture(1), sets.picture(2)]
    for index in range(3, 6):
        with pytest.raises(BadSample, match="embed the images"):
            source.read(index)
    assert source.sizes().tolist() == [[40, 30]] * 3 + [[0, 0]] * 3
    assert validate(source, workers=1).bad == 3


def test_a_table_of_the_hub_names_no_file_of_this_machine(sets, write):
    from spar.data.parquet import ParquetSource

    outside = sets.file("other/2.png", sets.picture(2))
    path = write("set/a.parquet", {"image": [{"bytes": None, "path": str(outside)}], "text": ["x"]})
    with pytest.raises(BadSample, match="embed the images"):
        ParquetSource("hf://datasets/x/y/a.parquet", [path]).read(0)


def test_a_column_of_json_has_captions(sets, write):
    images = [sets.picture(n) for n in range(4)]
    texts_of = ['{"caption": "one"}', '{"prompt": ["two"]}', "{", None]
    source = open_source(str(write("a.parquet", {"jpg": images, "json": texts_of})))
    assert [source.read(index).text for index in (0, 1, 3)] == ["one", "two", ""]
    with pytest.raises(BadSample, match="text cannot be read"):
        source.read(2)
    structs = [{"caption": "one", "width": 3}, {"caption": None, "width": 4}]
    assert texts(open_source(str(write("b.parquet", {"jpg": images[:2], "json": structs})))) == ["one", ""]


def test_captions_of_a_table(sets, write):
    images = [sets.picture(n) for n in range(4)]
    source = open_source(str(write("a.parquet", {"image": images, "caption": [["", "one", "two"], [], None, ["x"]]})))
    assert texts(source) == ["one", "", "", "x"]
    source = open_source(str(write("b.parquet", {"image": images, "text": [float("nan")] * 4})))
    assert texts(source) == [""] * 4
    number = open_source(str(write("c.parquet", {"image": images, "text": [1, 2, 3, 4]})))
    with pytest.raises(BadSample, match="expected text, got int"):
        number.read(0)


def test_one_text_that_is_no_unicode_leaves_the_other_rows(sets, write):
    text = pyarrow.array([b"one", b"caf\xe9", b"a\0b", "\u200b".encode()]).view(pyarrow.utf8())
    source = open_source(str(write("a.parquet", {"image": [sets.picture(n) for n in range(4)], "text": text})))
    assert source.read(0).text == "one"
    for index in (1, 2, 3):
        with pytest.raises(BadSample, match="text cannot be read") as caught:
            source.read(index)
        assert caught.value.key == f"a-{index}"
    assert validate(source, workers=1).bad == 3


def test_magicbrush(sets, write):
    columns = {
        "img_id": ["1"], "turn_index": [1], "source_img": [{"bytes": sets.picture(1), "path": "a.png"}],
        "mask_img": [{"bytes": sets.picture(2), "path": "b.png"}], "instruction": ["make it red"],
        "target_img": [{"bytes": sets.picture(3), "path": "c.png"}],
    }  # fmt: skip
    sample = open_source(str(write("data/train-00000-of-00001.parquet", columns).parent.parent)).read(0)
    assert (sample.image, sample.input_images, sample.text) == (sets.picture(3), (sets.picture(1),), "make it red")


def test_labels_of_a_table_without_captions(sets, write):
    images = [sets.picture(n, size=(300, 300)) for n in range(2)]
    source = open_source(str(write("a.parquet", {"image": images, "label": [3, 0]})))
    assert [source.read(index).label for index in range(2)] == [3, 0] and validate(source, workers=1).wrong == ()


# ---- save_to_disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 2])
def test_a_saved_data_set(sets, files):
    source = open_source(str(save_to_disk(sets.folder / "saved", rows(sets, 5), files)), cache=sets.folder / "cache")
    assert (source.format, source.kind, texts(source)) == ("arrow", "text_to_image", [f"picture {n}" for n in range(5)])
    assert source.read(4).image == sets.picture(4) and source.sizes().tolist() == [[40, 30]] * 5
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)
    other = open_source(str(save_to_disk(sets.folder / "more", rows(sets, 6), files)))
    assert other.identity != source.identity


def test_a_saved_dictionary_of_splits_stands_for_train(sets):
    for split, count in (("train", 3), ("test", 1)):
        save_to_disk(sets.folder / f"all/{split}", rows(sets, count))
    sets.json("all/dataset_dict.json", {"splits": ["test", "train"]})
    assert len(open_source(str(sets.folder / "all"))) == 3
    for wrong in ({"splits": ["../x"]}, {"splits": 3}, [], {}):
        sets.json("all/dataset_dict.json", wrong)
        with pytest.raises(InputError, match="expected the splits"):
            open_source(str(sets.folder / "all"))


@pytest.mark.parametrize(
    ("state", "words"),
    [({"_data_files": []}, "lists no files"), ({"_data_files": [{"filename": "../x.arrow"}]}, "lists no files"),
     ({"_data_files": [{"filename": "none.arrow"}]}, "no such file"), ({"_data_files": [{}]}, "lists no files"),
     ({"_data_files": 3}, "lists no files"), ({"_indices_files": [{"filename": "i.arrow"}]}, "flatten_indices")],
)  # fmt: skip
def test_a_wrong_state_is_refused(sets, state, words):
    folder = save_to_disk(sets.folder / "saved", rows(sets, 1), **state)
    with pytest.raises(InputError, match=words):
        open_source(str(folder))


def test_a_damaged_arrow_file_is_refused(sets):
    folder = save_to_disk(sets.folder / "saved", rows(sets, 5))
    path = folder / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="expected an Arrow stream"):
        open_source(str(folder))
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="expected an Arrow stream"):
        open_source(str(folder))


def test_offsets_that_leave_the_file_are_found_before_they_are_used(sets):
    offsets = bytes((0, 0, 0, 0, 255, 255, 255, 7, 8, 0, 0, 0))
    buffers = [None, *map(pyarrow.py_buffer, (offsets, b"8 bytes!"))]
    wrong = pyarrow.Array.from_buffers(pyarrow.binary(), 2, buffers)
    source = open_source(str(save_to_disk(sets.folder / "saved", {"image": wrong, "text": ["x", "y"]})))
    with pytest.raises(BadSample, match="cannot be read"):
        source.read(0)


# ---- the library itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def made(sets, monkeypatch):
    """A data set of `datasets`, of an imagefolder of three images and their captions."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    for number in range(3):
        sets.file(f"photos/train/{number}.png", sets.picture(number))
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(3)]
    sets.file("photos/train/metadata.jsonl", "\n".join(lines))
    cache = str(sets.folder / "hub")
    return datasets.load_dataset("imagefolder", data_dir=str(sets.folder / "photos"), split="train", cache_dir=cache)


def check(source, sets) -> None:
    assert texts(source) == [f"picture {number}" for number in range(3)]
    assert [source.read(number).image for number in range(3)] == [sets.picture(number) for number in range(3)]


def test_what_datasets_writes_is_read(made, sets):
    check(open_source(str(sets.folder / "photos")), sets)
    made.to_parquet(sets.folder / "tables/x.parquet")
    source = open_source(str(sets.folder / "tables"))
    check(source, sets)
    made.save_to_disk(sets.folder / "saved")
    check(open_source(str(sets.folder / "saved")), sets)
    made.save_to_disk(sets.folder / "parts", num_shards=2)
    check(open_source(str(sets.folder / "parts")), sets)
    (sets.folder / "photos").rename(sets.folder / "gone")
    with pytest.raises(BadSample, match="embed the images"):
        source.read(0)


def test_what_datasets_writes_of_several_splits_and_selections_is_read(made, sets):
    import datasets

    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(sets.folder / "splits")
    check(open_source(str(sets.folder / "splits")), sets)
    made.select([2, 0]).save_to_disk(sets.folder / "few")
    assert texts(open_source(str(sets.folder / "few"))) == ["picture 2", "picture 0"]


def test_tables_beside_images_and_classes_are_read_as_datasets_reads_them(sets, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    for number, name in enumerate(("cat/0.png", "dog/1.png")):
        sets.file(f"classes/{name}", sets.picture(number))
        sets.file(f"csv/{number}.png", sets.picture(number))
    sets.file("csv/metadata.csv", 'file_name,text\n0.png,"one, two"\n1.png,three\n')
    for name, column in (("classes", "label"), ("csv", "text")):
        folder = sets.folder / name
        theirs = datasets.load_dataset(
            "imagefolder", data_dir=str(folder), split="train", cache_dir=str(sets.folder / f"hub-{name}")
        )
        source = open_source(str(folder))
        ours = [source.read(index) for index in range(2)]
        assert [getattr(sample, column) for sample in ours] == list(theirs[column])
