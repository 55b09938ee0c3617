"""`spar generate --prompts`: a file of prompts into a folder, broken off and gone on with, alone or by processes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from spar.cli.main import main
from spar.common.errors import InputError
from spar.data.sources import open_source
from spar.evaluation.prompt_formats import EDIT_FORMATS, FORMATS
from spar.inference.image_files import encode_image, read_metadata
from spar.inference.prompt_files import read_prompts

PROMPTS = ["a red circle", "a blue star", "two green rings"]
FAST = ["--steps", "2", "--dtype", "float32", "--device", "cpu"]
# Rank 1 dies after its first image.
KILLED = """
import os, signal, sys
from spar.cli.main import main
from spar.inference import prompt_files
save = prompt_files.save_images
def killing(*rest):
    save(*rest)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
prompt_files.save_images = killing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tiny_run) -> Path:
    return tiny_run.path / "model"


@pytest.fixture
def listed(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(model: Path, prompts: Path, folder: Path, *more: str) -> int:
    return main(["generate", "--prompts", str(prompts), "-o", str(folder), "--model", str(model), *FAST, *more])


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images are the same but for a level of 255: products are summed by the number of rows."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other).max()) <= 1


def same(one: Path, other: Path) -> bool:
    return alike(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_a_file_of_prompts_becomes_a_data_set(model, listed, tmp_path, capsys):
    folder = tmp_path / "drawn"
    assert run(model, listed, folder, "--seed", "7", "-n", "2", "--batch", "4") == 0
    assert capsys.readouterr().out == f"{folder}  (6 images of 3 prompts from seed 7 on; 6 new)\n"
    files = sorted(path.name for path in folder.glob("*.png"))
    assert files == [f"{i}-seed{7 + i}.png" for i in range(6)]
    plain = ["generate", *PROMPTS, "-o", str(tmp_path / "plain"), "--model", str(model), *FAST]
    assert main([*plain, "--seed", "7", "-n", "2"]) == 0
    assert all(same(folder / name, tmp_path / "plain" / name) for name in files)
    assert read_metadata(folder / files[3]).values["prompt"] == PROMPTS[1]
    source = open_source(str(folder))
    assert [source.read(i).text for i in range(len(source))] == [text for text in PROMPTS for _ in range(2)]


def test_a_folder_goes_on_where_it_was_broken_off(model, listed, tmp_path, capsys):
    folder = tmp_path / "drawn"
    assert run(model, listed, folder) == 0  # a seed is drawn, and kept
    before = contents(folder)
    lost = sorted(folder.glob("*.png"))[1]
    kept = lost.rename(tmp_path / "kept.png")
    (folder / "metadata.jsonl").unlink()
    capsys.readouterr()
    assert run(model, listed, folder) == 0
    assert "; 1 new)" in capsys.readouterr().out
    assert same(lost, kept) and contents(folder) | {lost.name: before[lost.name]} == before
    assert run(model, listed, folder, "--batch", "1") == 0 and "; 0 new)" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(model, listed, tmp_path, capsys):
    folder = tmp_path / "drawn"
    assert run(model, listed, folder, "--seed", "3") == 0
    before = contents(folder)
    other = tmp_path / "other.txt"
    other.write_text("a red star\n")
    for arguments, name in (
        ((other, folder), "prompts"), ((listed, folder, "--seed", "4"), "seed"),
        ((listed, folder, "--guidance", "2"), "settings"), ((listed, folder, "-n", "3"), "images"),
    ):  # fmt: skip
        assert run(model, *arguments) == 2
        assert f"was begun with another {name}: expected" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"mine")
    assert run(model, listed, tmp_path / "mine") == 2
    assert "expected an empty or new folder, or one that the same call began" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.png"]
    assert contents(folder) == before


def test_a_folder_of_another_models_images_is_left_alone(model, listed, tmp_path, capsys):
    folder = tmp_path / "drawn"
    assert run(model, listed, folder, "--seed", "3") == 0
    sorted(folder.glob("*.png"))[0].unlink()
    other = tmp_path / "other" / "model"
    shutil.copytree(model, other)
    weights = load_file(other / "router" / "model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, other / "router" / "model.safetensors")
    assert run(other, listed, folder, "--seed", "3") == 2
    assert "was begun with another weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts.json", "prompts.CSV", "prompts.parquet"])
def test_a_file_of_another_format_is_not_read_as_lines_of_prompts(name, tmp_path):
    path = tmp_path / name
    path.write_text('["a red circle"]\n')
    with pytest.raises(InputError, match="expected a text with a prompt a line, or .jsonl, got a"):
        read_prompts(path)


def test_prompts_are_read_from_text_and_json_lines(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\ufeff  a red circle \r\n\r\na blue star", encoding="utf-8")
    assert read_prompts(text).prompts == ("a red circle", "a blue star")
    lines.write_text('{"tag": "x", "prompt": "a red circle"}\n\n{"prompt": "two\\nlines"}\n')
    assert read_prompts(lines).prompts == ("a red circle", "two\nlines")
    for wrong in ('{"text": "a"}', '{"prompt": 3}', '{"prompt": " "}', "[1]", "a red circle", "[" * 5000):
        lines.write_text('{"prompt": "a red circle"}\n' + wrong)
        with pytest.raises(InputError, match='line 2: expected an object with a "prompt"'):
            read_prompts(lines)
    for path, data, message in (
        (text, b"\n \n", "expected a prompt a line, found none"), (text, b"\xff\xfe\xfa", "it is not UTF-8"),
        (tmp_path / "none.txt", None, "cannot be read: No such file"), (tmp_path, None, "cannot be read: Is a dir"),
        (text, b"a" * (2**20 + 1), "line 1: expected at most 1048576 characters"),
    ):  # fmt: skip
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_prompts(path)


def benchmark(folder: Path) -> dict[str, tuple[Path, int]]:
    """Prompt files in the forms of the benchmarks, and the number of images of a prompt."""
    include = [{"class": "circle", "count": 1}]
    entries = [{"tag": "single_object", "include": include, "prompt": text} for text in PROMPTS]
    (folder / "geneval.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = [{"prompt": text, "atom_count": 3, "vqa_list": [], "skills": []} for text in PROMPTS]
    (folder / "geneval2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wise").mkdir()
    for name, ids in (("culture", (1, 2)), ("science", (701,)), ("culture_rewrite", (1, 2))):
        lines = [{"Prompt": PROMPTS[i % 3], "prompt_id": i, "Explanation": "", "Category": ""} for i in ids]
        (folder / "wise" / f"{name}.json").write_text(json.dumps(lines))
    numbered = {f"{i:05}": {"id": f"{i:05}", "prompt": text, "prompt in Chinese": ""} for i, text in enumerate(PROMPTS)}
    (folder / "genai.json").write_text(json.dumps(numbered))
    (folder / "dpg").mkdir()
    for name, text in zip("abc", PROMPTS, strict=True):
        (folder / "dpg" / f"{name}.txt").write_text(text + "\n")
    return {
        "geneval": (folder / "geneval.jsonl", 2), "geneval2": (folder / "geneval2.jsonl", 1),
        "wise": (folder / "wise", 1), "dpg": (folder / "dpg", 4), "genai": (folder / "genai.json", 1),
    }  # fmt: skip


LAYOUTS = {
    "geneval": [
        f"{i:05}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    ],
    "geneval2": ["00000.png", "00001.png", "00002.png", "images.json"],
    "wise": ["1.png", "2.png", "701.png"],
    "dpg": ["a.png", "b.png", "c.png"], "genai": ["00000.jpeg", "00001.jpeg", "00002.jpeg"],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmark_has_the_layout_that_its_scorer_reads(name, model, tmp_path, capsys):
    path, each = benchmark(tmp_path)[name]
    folder, more = tmp_path / "out", ["--format", name, "-n", str(each), "--seed", "5"]
    assert run(model, path, folder, *more, "--batch", "5") == 0
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "generation.json")
    assert files == LAYOUTS[name]
    plain = tmp_path / "plain"
    prompts = [PROMPTS[i % 3] for i in (1, 2, 701)] if name == "wise" else PROMPTS
    own = ["-n", str(each), "--seed", "5", "-o", str(plain), "--model", str(model)]
    assert main(["generate", *prompts, *own, *FAST]) == 0
    drawn = [np.asarray(Image.open(one)) for one in sorted(plain.glob("*.png"))]
    found = [np.asarray(Image.open(folder / one)) for one in files if one.endswith((".png", ".jpeg"))]
    if name == "genai":
        assert Image.open(folder / files[0]).format == "JPEG"
        coded = [encode_image(Image.fromarray(one), "jpeg", {}) for one in drawn]
        drawn = [np.asarray(Image.open(BytesIO(one))).astype(float) for one in coded]
        assert len(found) == 3 and all(np.abs(x - y).mean() < 1 for x, y in zip(found, drawn, strict=True))
        (folder / files[1]).unlink()
        assert run(model, path, folder, *more, "--check") == 1
        assert f"{files[1]} is missing" in capsys.readouterr().out
        assert run(model, path, folder, *more) == 0 and "; 1 new" in capsys.readouterr().out
        assert run(model, path, folder, *more, "--check") == 0
        Image.open(folder / files[0]).save(folder / files[0], format="PNG")
        assert run(model, path, folder, *more, "--check") == 1
        assert f"{files[0]} is damaged" in capsys.readouterr().out
        return
    if name == "dpg":  # upper left, upper right, lower left, lower right
        found = [half for one in found for rows in np.split(one, 2) for half in np.split(rows, 2, axis=1)]
    assert len(found) == len(drawn) and all(map(alike, found, drawn))
    if name == "geneval":
        entries = [json.loads((folder / f"{i:05}" / "metadata.jsonl").read_text()) for i in range(3)]
        assert [entry["prompt"] for entry in entries] == PROMPTS and entries[0]["include"][0]["class"] == "circle"
    if name == "geneval2":
        assert json.loads((folder / "images.json").read_text()) == dict(zip(PROMPTS, files, strict=False))
    capsys.readouterr()
    assert run(model, path, folder, *more, "--check") == 0 and "is complete" in capsys.readouterr().out


def edits(folder: Path) -> tuple[Path, Path]:
    """Two pictures, and three instructions in both forms."""
    (folder / "pictures" / "daily object").mkdir(parents=True)
    for name, color in (("a.png", (200, 0, 0)), ("daily object/b.png", (0, 0, 200))):
        Image.new("RGB", (64, 64), color).save(folder / "pictures" / name)
    rows = [("a.png", "remove the red circle"), ("daily object/b.png", "remove the star"), ("a.png", "make it blue")]
    rows[2] = ("a.png", "change the background to navy")
    plain, imgedit = folder / "edits.jsonl", folder / "imgedit.json"
    plain.write_text("".join(json.dumps({"image": image, "prompt": text}) + "\n" for image, text in rows))
    keyed = {str(7 + i): {"id": image, "prompt": text, "edit_type": "remove"} for i, (image, text) in enumerate(rows)}
    imgedit.write_text(json.dumps(keyed))
    return plain, imgedit


def test_a_file_of_edits_becomes_what_single_edits_are(model, tmp_path, capsys):
    plain, imgedit = edits(tmp_path)
    own = ["edit", "--images", str(tmp_path / "pictures"), "--model", str(model), *FAST, "--seed", "5"]
    assert main([*own, "--prompts", str(plain), "-o", str(tmp_path / "one")]) == 0
    assert main([*own, "--prompts", str(imgedit), "--format", "imgedit", "-o", str(tmp_path / "two")]) == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["7.png", "8.png", "9.png", "generation.json"]
    for number, entry in enumerate(json.loads(imgedit.read_text()).values()):
        alone, picture = tmp_path / f"{number}.png", tmp_path / "pictures" / entry["id"]
        assert main(["edit", str(picture), entry["prompt"], "-o", str(alone), *own[3:-1], str(5 + number)]) == 0
        assert same(alone, tmp_path / "one" / f"{number}-seed{5 + number}.png")
        assert same(alone, tmp_path / "two" / f"{7 + number}.png")
        assert read_metadata(tmp_path / "two" / f"{7 + number}.png").values["image"] == picture.name
    capsys.readouterr()
    assert main([*own, "--prompts", str(imgedit), "--format", "imgedit", "-o", str(tmp_path / "two"), "--check"]) == 0
    Image.new("RGB", (64, 64), (0, 200, 0)).save(tmp_path / "pictures" / "a.png")  # another picture of the same name
    (tmp_path / "one" / "0-seed5.png").unlink()
    for more in ([], ["--check"]):
        assert main([*own, "--prompts", str(plain), "-o", str(tmp_path / "one"), *more]) == 2
        assert "was begun with another pictures" in capsys.readouterr().err
    (tmp_path / "pictures" / "a.png").unlink()
    assert main([*own, "--prompts", str(plain), "-o", str(tmp_path / "one"), "--check"]) == 2
    assert "expected the images of all instructions, 2 are missing, first" in capsys.readouterr().err
    assert main([*own, "--prompts", str(plain), "-o", str(tmp_path / "three")]) == 2
    assert "expected the images of all instructions, 2 are missing, first" in capsys.readouterr().err


def test_what_a_killed_call_left_before_its_first_image_is_no_other_content(model, tmp_path, capsys):
    path, folder = benchmark(tmp_path)["geneval"][0], tmp_path / "out"
    more = ["--format", "geneval", "--seed", "5"]
    assert run(model, path, folder, *more) == 0
    for file in folder.rglob("*.png"):
        file.rename(file.with_name(".123-0a1b2c3d.part"))
    for file in folder.rglob("metadata.jsonl"):
        file.unlink()
    assert run(model, path, folder, *more) == 0 and len([*folder.rglob("*.png")]) == len(PROMPTS)
    for file in folder.rglob("*.png"):
        file.rename(file.with_suffix(".mine"))
    capsys.readouterr()
    assert run(model, path, folder, *more) == 2
    assert "expected an empty or new folder, or one that the same call began" in capsys.readouterr().err


def test_a_check_says_what_is_missing_broken_or_of_another_prompt(model, tmp_path, capsys):
    path, folder = benchmark(tmp_path)["geneval"][0], tmp_path / "out"
    more = ["--format", "geneval", "-n", "2"]
    assert run(model, path, folder, *more, "--seed", "5") == 0
    (folder / "00000" / "samples" / "00000.png").unlink()
    broken = folder / "00000" / "samples" / "00001.png"
    broken.write_bytes(broken.read_bytes()[:500])
    (folder / "00001" / "samples" / "00000.png").write_bytes((folder / "00002" / "samples" / "00000.png").read_bytes())
    (folder / "00002" / "metadata.jsonl").write_text("{}")
    capsys.readouterr()
    assert run(model, path, folder, *more, "--check") == 1
    missing, damaged, other, lists, last = capsys.readouterr().out.splitlines()
    assert missing == "00000/samples/00000.png is missing" and damaged.startswith("00000/samples/00001.png is damaged")
    assert other == "00001/samples/00000.png shows another prompt: 'two green rings'"
    assert lists.startswith("00002/metadata.jsonl is missing or differs") and last == f"{folder}: 4 faults"
    assert run(model, path, tmp_path / "none", *more, "--check") == 2
    assert "generation.json is missing" in capsys.readouterr().err
    assert run(model, benchmark_of_other_prompts(tmp_path), folder, *more, "--check") == 2
    assert "begun with another prompts" in capsys.readouterr().err


def benchmark_of_other_prompts(folder: Path) -> Path:
    path = folder / "other.jsonl"
    path.write_text('{"tag": "single_object", "include": [], "prompt": "a red star"}\n')
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("geneval", '{"prompt": "a red circle"}', "line 1: expected tag and include of GenEval"),
        ("geneval", "a red circle", 'line 1: expected an object with a "prompt"'),
        ("geneval", "", "expected prompts, found an empty file"),
        ("geneval2", '{"prompt": "a red circle"}\n{"prompt": "a red circle"}', "got 'a red circle' twice"),
        ("wise", '[{"Prompt": "a red circle"}]', "expected a number as prompt_id, got None"),
        ("wise", '[{"Prompt": "a", "prompt_id": 1}, {"Prompt": "b", "prompt_id": 1}]', "got '1' twice"),
        ("wise", '[{"prompt": "a red circle", "prompt_id": 1}]', "entry 0: expected an object with 'Prompt'"),
        ("wise", "{}", "expected a JSON list of 1 to"),
        ("wise", "[", "expected a JSON list of objects with 'Prompt', which it is not"),
        ("dpg", "a red circle", "expected a folder of prompts"),
        ("edits", '{"prompt": "remove the star"}', "line 1: expected a file inside pictures as image, got None"),
        ("edits", '{"prompt": "remove the star", "image": "../a.png"}', "got '../a.png'"),
        ("edits", '{"prompt": "remove the star", "image": "/etc/passwd"}', "got '/etc/passwd'"),
        ("imgedit", "[]", "expected an object of 1 to"),
        ("imgedit", '{"a/b": {"id": "a.png", "prompt": "remove the star"}}', "'a/b': expected a number and an object"),
        ("imgedit", '{"1": {"id": "a.png"}}', "'1': expected a number and an object"),
        ("imgedit", "{", "expected an object of instructions, which it is not"),
        ("genai", '{"0/0": {"prompt": "a red circle"}}', "'0/0': expected a number and an object"),
        ("genai", '{"00000": "a red circle"}', "'00000': expected a number and an object"),
        ("gedit", "a red circle", "expected a parquet file"),
    ],
)
def test_a_malformed_file_of_a_benchmark_gets_a_message(name, data, message, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(data)
    with pytest.raises(InputError, match=message):
        if name in ("edits", "imgedit", "gedit"):
            EDIT_FORMATS["plain" if name == "edits" else name](path, Path("pictures"))
        else:
            FORMATS[name](path if name != "geneval2" else path.rename(tmp_path / "file.jsonl"))


def test_a_number_of_images_that_a_layout_has_no_files_for_is_refused(model, tmp_path, capsys):
    files = benchmark(tmp_path)
    for name, each, expected in (("geneval2", 2, "1"), ("wise", 4, "1"), ("dpg", 3, "1 or 4")):
        assert run(model, files[name][0], tmp_path / "out", "--format", name, "-n", str(each)) == 2
        assert f"--num-images-per-prompt: expected {expected} of {name}, got {each}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_with_a_file_gets_a_message(model, listed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ["generate", "--prompts", str(listed), "--model", str(model)]
    for arguments, message in (
        ([*file, "a red circle"], "expected none of PROMPT, --grid and --save-steps, got PROMPT"),
        ([*file, "--grid", "--save-steps"], "got --grid, --save-steps"),
        ([*file, "--overwrite"], "expected no --overwrite"),
        (["generate", "a red circle", "--batch", "0"], "--batch: expected 1 to 4096, got 0"),
        (["generate", "a red circle", "--format", "wise", "--check"], "--check, --format: expected --prompts FILE"),
        (["generate"], "expected at least one prompt (PROMPT), got none"),
        ([*file, "--top-k", "4"], "top_k: SPAR has no such setting"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    for wrong in (["--height", "63"], ["--seed", str(2**63 - 1)], ["--layout", "a zebra"]):
        assert main([*file, "-o", str(tmp_path / "drawn"), *FAST, *wrong]) == 2
    assert main([*file, "-o", str(tmp_path / "drawn"), *FAST, "--seed", "3"]) == 0  # nothing had been drawn
    capsys.readouterr()
    listed.write_text("a red circle\na zebra\n")
    assert main(file) == 2
    assert "prompt 2 of 2: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["generate", "a red circle"]) == 2
    assert "expected --prompts FILE, whose images several processes share" in capsys.readouterr().err


# ---- several processes -----------------------------------------------------------------------------------------------


def launch(*arguments: str, script: str | None = None) -> subprocess.CompletedProcess[str]:
    """`spar ...` on two processes, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    target = ["--", script] if script else ["-m", "--", "spar"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *target]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_processes_draw_what_one_draws_and_a_lost_one_is_no_loss(model, listed, tmp_path):
    alone, shared, script = tmp_path / "alone", tmp_path / "shared", tmp_path / "killed.py"
    more = ["--seed", "7", "-n", "2", "--batch", "1"]
    assert run(model, listed, alone, *more) == 0
    arguments = ["generate", "--prompts", str(listed), "-o", str(shared), "--model", str(model), *FAST, *more]
    script.write_text(KILLED)
    done = launch(*arguments, script=str(script))
    assert done.returncode != 0 and "rank      : 1" in done.stderr, done.stderr[-3000:]  # torchrun names it
    assert 1 <= len([*shared.glob("*.png")]) < 6 and not (shared / "metadata.jsonl").exists()
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(str(shared)) == 1 and "by this process of 2" in done.stdout
    files = sorted(path.name for path in alone.iterdir())
    assert files == sorted(path.name for path in shared.iterdir())
    assert all(same(alone / name, shared / name) for name in files if name.endswith(".png"))
    assert (alone / "metadata.jsonl").read_text() == (shared / "metadata.jsonl").read_text()


@pytest.mark.slow
def test_processes_score_cache_and_convert_what_one_does(model, tmp_path):
    scored = {}
    for name, call in (("alone", main), ("shared", lambda words: launch(*words).returncode)):
        words = ["eval", "all", "--limit", "1", "--images-per-prompt", "1", "--steps", "2", "--model", str(model)]
        assert call([*words, "--dtype", "float32", "-o", str(tmp_path / name)]) == 0
        scored[name] = {path.name: json.loads(path.read_text()) for path in (tmp_path / name).iterdir()}
    assert scored["shared"].keys() == scored["alone"].keys() and len(scored["alone"]) >= 9
    assert scored["shared"]["shapes-edit.json"]["settings"]["processes"] == 2
    for name, result in scored["alone"].items():
        for one, other in zip(scored["shared"][name]["scores"], result["scores"], strict=True):
            assert one["name"] == other["name"] and one["n"] == other["n"]
            assert one["value"] == pytest.approx(other["value"], abs=0.01, nan_ok=True), (name, one["name"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(pictures / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a red circle"}) for i in range(4)]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    words = ["cache", "tiny", "--init-from", str(model), "--data.source", "files", "--data.workers", "0"]
    words += ["--data.sets", str(pictures), "--precision", "fp32"]
    assert main([*words, "-o", str(tmp_path / "one")]) == 0
    done = launch(*words, "-o", str(tmp_path / "two"))
    assert done.returncode == 0 and done.stdout.count("features of 4 samples") == 1, done.stderr[-3000:]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    (pictures / "1.png").write_bytes(b"no picture")
    words = ["data", "convert", str(pictures), "--shard-size", "2", "--bad-share", "0.5"]
    assert main([*words, "-o", str(tmp_path / "three")]) == 0
    done = launch(*words, "-o", str(tmp_path / "four"))
    assert done.returncode == 0 and done.stdout.count("(3 samples in 2 shards, 1 left out)") == 1, done.stderr[-3000:]
    assert contents(tmp_path / "three") == contents(tmp_path / "four")
    assert {path.name for path in (tmp_path / "four").iterdir()} == {
        "000000.tar", "000001.tar", "converted.json", "dropped.jsonl"
    }  # fmt: skip


def gedit_rows() -> list[dict]:
    """Rows as `stepfun-ai/GEdit-Bench` has them: raw and smaller images, two languages, names with a hyphen."""
    def picture(color: str, side: int) -> dict:
        file = BytesIO()
        Image.new("RGB", (side, side), color).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    rows = [
        ("subject-remove", "k1", "remove the red circle", "en"), ("subject-remove", "k1", "remove the star", "cn"),
        ("color_alter", "k2", "change the background to navy", "en"),
    ]  # fmt: skip
    colors = ("red", "green", "navy")
    return [
        {
            "task_type": task, "key": key, "instruction": text, "instruction_language": language,
            "input_image": picture(color, 48), "input_image_raw": picture(color, 64), "Intersection_exist": True,
        }
        for (task, key, text, language), color in zip(rows, colors, strict=True)
    ]  # fmt: skip


def write_gedit(folder: Path, rows: list[dict]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (folder / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train-00000.parquet", row_group_size=2)
    return folder / "data"


def test_gedit_edits_the_images_of_its_tables(model, tmp_path, capsys):
    prompts, folder = write_gedit(tmp_path, gedit_rows()), tmp_path / "out"
    own = ["edit", "--prompts", str(prompts), "--format", "gedit", "--model", str(model), *FAST, "-o", str(folder)]
    assert main([*own, "--seed", "5"]) == 0
    stems = ["fullset/color_alter/en/k2", "fullset/subject-remove/cn/k1", "fullset/subject-remove/en/k1"]
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert found == sorted(f"{stem}{end}.png" for stem in stems for end in ("", "_SRCIMG"))
    for number, row in enumerate(gedit_rows()):
        stem = folder / "fullset" / row["task_type"] / row["instruction_language"] / row["key"]
        before = np.asarray(Image.open(BytesIO(row["input_image"]["bytes"])))
        assert np.array_equal(np.asarray(Image.open(f"{stem}_SRCIMG.png")), before)
        (tmp_path / "raw.png").write_bytes(row["input_image_raw"]["bytes"])
        alone = tmp_path / f"{number}.png"
        words = ["edit", str(tmp_path / "raw.png"), row["instruction"], "-o", str(alone), "--model", str(model)]
        assert main([*words, *FAST, "--seed", str(5 + number)]) == 0
        assert same(alone, Path(f"{stem}.png"))
        digest = hashlib.sha256(row["input_image_raw"]["bytes"]).hexdigest()
        assert read_metadata(f"{stem}.png").values["image_sha256"] == digest
    assert main([*own, "--check"]) == 0
    (folder / f"{stems[0]}_SRCIMG.png").unlink()
    (folder / f"{stems[1]}_SRCIMG.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main([*own, "--check"]) == 1
    missing, damaged, last = sorted(capsys.readouterr().out.splitlines(), key=lambda line: "missing" not in line)
    assert missing == f"{stems[0]}_SRCIMG.png is missing" and f"{stems[1]}_SRCIMG.png is damaged" in damaged + last
    assert main([*own, "--images", str(tmp_path)]) == 2
    assert "--images: expected none with --format gedit, whose images are in its" in capsys.readouterr().err
    english = EDIT_FORMATS["gedit-en"](prompts, prompts)
    assert [*english.prompts] == ["remove the red circle", "change the background to navy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "../k1"}, "row 0 of group 0: expected a name as key"),
        ({"task_type": ""}, "row 0 of group 0: expected text as task_type, got ''"),
        ({"instruction_language": "de"}, None),
        ({"key": "k1", "instruction_language": "cn"}, "got 'fullset/subject-remove/cn/k1' twice"),
    ],
)
def test_rows_that_are_none_of_gedit_get_a_message(change, message, tmp_path):
    rows = gedit_rows()
    rows[0] |= change
    path = write_gedit(tmp_path, rows)
    if message is None:  # another language: left out
        assert len(EDIT_FORMATS["gedit"](path, path).prompts) == 2
        return
    with pytest.raises(InputError, match=message):
        EDIT_FORMATS["gedit"](path, path)
    for name in ("key", "input_image"):
        without = write_gedit(tmp_path / name, [{k: v for k, v in row.items() if k != name} for row in gedit_rows()])
        with pytest.raises(InputError, match=f"expected columns .* missing {name}"):
            EDIT_FORMATS["gedit"](without, without)


def test_a_row_of_gedit_without_its_image_gets_a_message(tmp_path):
    rows = gedit_rows()
    rows[1]["input_image_raw"] = {"bytes": None, "path": "k1.png"}
    path = write_gedit(tmp_path, rows)
    with pytest.raises(InputError, match="expected an image as input_image_raw of row 1 of group 0, found none"):
        EDIT_FORMATS["gedit"](path, path).sources[1].read()
