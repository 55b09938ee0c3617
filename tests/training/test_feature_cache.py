"""Cached features: the same losses as from pictures, no picture decoded, stale and broken-off caches refused; in memory
each row once."""

import functools
import io
import json
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spar.checkpoints.spar_format import load_model
from spar.cli.main import main
from spar.cli.recipe_flags import chosen_source
from spar.common.errors import InputError
from spar.models.encoder import SemanticEncoder
from spar.recipes import REGISTRY, recipe
from spar.training import feature_cache as module
from spar.training.checkpoint import load_group
from spar.training.config import Recipe
from spar.training.data import DataConfig
from spar.training.distributed import ParallelismConfig
from spar.training.feature_cache import FeatureCache, InMemoryFeatureCache, cache_key, sample_id, write_cache
from spar.training.files_data import FilesData, open_sources
from spar.training.trainer import train
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.render import render

CAPTIONS = ("a red circle", "a blue star", "a green ring", "two red squares")


@pytest.fixture
def data(tmp_path) -> FilesData:
    """Twelve pictures of the world in a folder with captions, one of which is broken, and nine edits of one color."""
    own = tmp_path / "own"
    own.mkdir()
    lines = []
    for i in range(12):
        Image.fromarray(render(scene_at("train", i))).save(own / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % 4]}))
    (own / "3.png").write_bytes((own / "3.png").read_bytes()[:200])
    (own / "metadata.jsonl").write_text("\n".join(lines))
    pairs = []
    for i in range(9):
        for side in ("before", "after"):
            Image.fromarray(render(scene_at("train", 20 + i + 9 * (side == "after")))).save(tmp_path / f"{side}{i}.png")
        names = {"input_image": [f"before{i}.png"], "output_image": f"after{i}.png"}
        pairs.append({"input_prompt": "remove the star", **names})
    (tmp_path / "edits.json").write_text(json.dumps(pairs))
    return FilesData(sets=(str(own), str(tmp_path / "edits.json")), workers=0, bad_share=0.5)


def on_files(recipe: Recipe, data: FilesData) -> Recipe:
    """The recipe with data sets, as `--data.source files` makes it."""
    return replace(recipe, data=data, stages=tuple(replace(s, data=data.nearest(s.data)) for s in recipe.stages))


def write(data: FilesData, model: Path, folder: Path, **options) -> int:
    options = {"side": 64, "batch": 5, "precision": torch.float32, **options}
    return write_cache(load_model(model).model.tokenizer, open_sources(data), folder, **options)


def test_training_from_the_cache_has_the_losses_of_training_from_pictures(tiny_run, data, tmp_path, monkeypatch):
    model, folder = tiny_run.path / "model", tmp_path / "features"
    assert write(data, model, folder) == 1
    seen: dict[str, int] = {"pictures": 0, "cache": 0}
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in seen}
    plain, name = SemanticEncoder.forward, ""

    def counting(self, pixels):
        seen[name] += len(pixels)
        return plain(self, pixels)

    monkeypatch.setattr(SemanticEncoder, "forward", counting)
    stages = tuple(replace(s, steps=8) if s.name == "unified-2" else s for s in tiny_run.recipe.stages)
    for name in seen:
        chosen = data if name == "pictures" else replace(data, cache=str(folder))
        train(
            on_files(replace(tiny_run.recipe, stages=stages), chosen), tmp_path / name, stages=("unified-2",),
            init_from=model, parallelism=ParallelismConfig(precision="fp32"),
            report=lambda stage, step, steps, v, rows=losses[name]: rows.append((v["loss"], v["grad_norm"])),
        )  # fmt: skip
    assert seen["cache"] == 0 < seen["pictures"]  # the teacher's mean is measured on the cached features
    assert len(losses["cache"]) == 8
    for (a, g), (b, h) in zip(losses["pictures"], losses["cache"], strict=True):
        assert a == pytest.approx(b, rel=1e-4) and g == pytest.approx(h, rel=1e-3)
    lines = (tmp_path / "cache" / "bad_samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"3.png"}


def test_a_caption_that_is_no_unicode_is_left_out_and_named(tiny_run, data, tmp_path, caplog):
    table = tmp_path / "own" / "metadata.jsonl"
    table.write_text(table.read_text().replace('"5.png", "text": "a blue star"', '"5.png", "text": "a \\ud83d"'))
    assert write(data, tiny_run.path / "model", tmp_path / "features") == 2
    assert "'5.png'" in caplog.text and "half a surrogate pair" in caplog.text


def test_a_cache_of_another_use_of_colour_profiles_is_stale(tiny_run, data):
    tokenizer, sources = load_model(tiny_run.path / "model").model.tokenizer, open_sources(data)
    assert cache_key(tokenizer, 64, sources, profiles=False) != cache_key(tokenizer, 64, sources)


def test_a_row_is_what_the_tokenizer_makes_of_its_own_picture(tiny_run, data, tmp_path):
    model = tiny_run.path / "model"
    write(data, model, tmp_path / "features")
    tokenizer, sources = load_model(model).model.tokenizer, open_sources(data)
    cache = FeatureCache(tmp_path / "features", cache_key(tokenizer, 64, sources))
    assert len(cache.ids) == 20 and sample_id(sources[0].identity, 3) not in cache
    for source, index in ((sources[0], 7), (sources[1], 4)):
        found = cache.rows([sample_id(source.identity, index)])
        scene = 7 if source is sources[0] else 20 + 4 + 9
        pixels = torch.from_numpy(render(scene_at("train", scene))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            wanted = module.encode(tokenizer, pixels)
        for name, value in wanted.items():
            assert torch.allclose(found[name].float(), value, rtol=1e-2, atol=1e-2)
        assert ("reference" in found) == (source is sources[1])
    with pytest.raises(KeyError):
        cache.rows([17])


def test_a_cache_of_other_weights_size_or_samples_is_stale(tiny_run, data, tmp_path):
    model, folder = tiny_run.path / "model", tmp_path / "features"
    write(data, model, folder)
    tokenizer, sources = load_model(model).model.tokenizer, open_sources(data)
    FeatureCache(folder, cache_key(tokenizer, 64, sources))
    for key in (cache_key(tokenizer, 32, sources), cache_key(tokenizer, 64, sources[:1])):
        with pytest.raises(InputError, match="is stale: it was made with other tokenizer weights"):
            FeatureCache(folder, key)
    before = cache_key(tokenizer, 64, sources)
    next(tokenizer.decoder.parameters()).data += 1  # the decoder has no say
    assert cache_key(tokenizer, 64, sources) == before
    config = tokenizer.config
    tokenizer.config = replace(config, streams=replace(config.streams, fusion="residual"))  # of the same weights
    with pytest.raises(InputError, match="stale"):
        FeatureCache(folder, cache_key(tokenizer, 64, sources))
    tokenizer.config = config
    tokenizer.latent_scale *= 1.01
    with pytest.raises(InputError, match="stale"):
        FeatureCache(folder, cache_key(tokenizer, 64, sources))
    recipe_ = on_files(tiny_run.recipe, replace(data, cache=str(folder)))
    with pytest.raises(InputError, match="stale"):  # the run's own check, against the weights that it starts from
        train(recipe_, tmp_path / "run", stages=("unified-2",), init_from=tiny_run.path / "tokenizer-2" / "done")


def test_a_broken_off_cache_is_refused_until_it_is_finished(tiny_run, data, tmp_path, monkeypatch):
    model, folder = tiny_run.path / "model", tmp_path / "features"
    monkeypatch.setattr(module, "ROWS", 4)
    work, calls = module._features, []

    def breaking(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(module, "_features", breaking)
    with pytest.raises(KeyboardInterrupt):
        write(data, model, folder)
    key = cache_key(load_model(model).model.tokenizer, 64, open_sources(data))
    with pytest.raises(InputError, match="is not finished"):
        FeatureCache(folder, key)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == 2 and write(data, model, folder) == 1
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())  # not made twice
    assert len(FeatureCache(folder, key).ids) == 20
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and holds no cache"):
        write(data, model, tmp_path / "other")


def test_a_broken_off_cache_goes_on_with_its_sets_in_another_order(tiny_run, data, tmp_path, monkeypatch):
    """Its files were numbered by the order: rows of one set were taken for those of the other, and never computed."""
    model, folder, turned = tiny_run.path / "model", tmp_path / "features", replace(data, sets=data.sets[::-1])
    work = module._features

    def breaking(tokenizer, piece, *rest):
        if len(piece[2]):
            raise KeyboardInterrupt
        return work(tokenizer, piece, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_features", breaking)
        with pytest.raises(KeyboardInterrupt):
            write(data, model, folder)
    assert len(list(folder.glob("*.safetensors"))) == 1 and write(turned, model, folder) == 1
    found = FeatureCache(folder, cache_key(load_model(model).model.tokenizer, 64, open_sources(data)))
    assert len({*found.ids.tolist()}) == 20


@pytest.mark.slow
def test_the_command_writes_what_training_reads(tiny_run, data, tmp_path, capsys):
    model, folder = tiny_run.path / "model", tmp_path / "features"
    named = ["--data.source", "files", "--data.sets", *data.sets, "--data.workers", "0", "--data.bad-share", "0.5"]
    assert main(["cache", "tiny", "--init-from", str(model), *named, "-o", str(folder)]) == 0
    assert "features of 20 samples, 1 bad ones left out" in capsys.readouterr().out
    run = ["--init-from", str(model), "--data.cache", str(folder), "--run", str(tmp_path / "run")]
    assert main(["train", "tiny", "--stage", "unified-2", *run, *named]) == 0
    assert main(["cache", "tiny", "--init-from", str(model), "-o", str(folder)]) == 2
    assert "expected data sets" in capsys.readouterr().err


def test_samples_of_one_key_are_told_apart_and_the_folder_may_move(tiny_run, tmp_path):
    """Two shards that both begin with 00000, read again by another path."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for i in range(3):
                picture = io.BytesIO()
                Image.fromarray(render(scene_at("train", 10 * number + i))).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("txt", b"a red circle")):
                    member = tarfile.TarInfo(f"{i:05}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    data = FilesData(sets=(str(shards / "*.tar"),), workers=0)
    assert write(data, tiny_run.path / "model", tmp_path / "features") == 0
    (tmp_path / "elsewhere").symlink_to(shards)
    moved = replace(data, sets=(str(tmp_path / "elsewhere" / "*.tar"),))
    (source,) = open_sources(moved)
    key = cache_key(load_model(tiny_run.path / "model").model.tokenizer, 64, [source])
    found = FeatureCache(tmp_path / "features", key).rows([sample_id(source.identity, i) for i in range(6)])["latent"]
    assert len({row.float().numpy().tobytes() for row in found}) == 6


def stop_at_first(wanted: bool, stage: str, step: int, *_: object) -> None:
    if wanted and step == 0:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_from_a_cache_is_stopped_and_resumed(tiny_run, data, tmp_path):
    model, folder = tiny_run.path / "model", tmp_path / "features"
    write(data, model, folder)
    asked = on_files(tiny_run.recipe, replace(data, cache=str(folder)))
    ends = []
    for name in ("whole", "parted"):
        run = {"stages": ("unified-2",), "init_from": model}
        stop = functools.partial(stop_at_first, name == "parted")
        if train(asked, tmp_path / name, report=stop, **run) is None:
            assert train(asked, tmp_path / name, resume=True, **run) is not None
        ends.append(load_group(tmp_path / name / "unified-2" / "done", "modules"))
        bad = (tmp_path / name / "bad_samples.jsonl").read_text().splitlines() if name == "parted" else []
        assert len(bad) == len(set(bad))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    (tmp_path / "own" / "5.png").write_bytes((tmp_path / "own" / "6.png").read_bytes() + b"\0")
    with pytest.raises(InputError, match="stale"):  # another picture under the same name
        train(asked, tmp_path / "later", stages=("unified-2",), init_from=model)


def test_a_cache_wants_data_sets_and_no_external_teacher():
    with pytest.raises(InputError, match="data.sets: expected paths of data sets, got none"):
        FilesData(sets=(), cache="features")
    with pytest.raises(InputError, match="--data.cache belongs to --data.source files, got source shapes"):
        chosen_source(recipe("tiny"), ["--data.cache", "features"], REGISTRY[DataConfig])
    tiny = recipe("tiny")
    with pytest.raises(InputError, match="an external teacher reads images"):
        replace(
            tiny, data=FilesData(sets=("x",), cache="y"), stages=tiny.stages[-1:],
            alignment=replace(tiny.alignment, teacher="external", external="z"),
        )  # fmt: skip


def test_a_stage_that_reads_the_autoencoders_own_latents_has_nothing_in_a_cache(tiny_run, data, tmp_path):
    with pytest.raises(InputError, match=r"stage dit: .*cache.* holds no latents of the autoencoder"):
        cached = on_files(tiny_run.recipe, replace(data, cache="features"))
        train(cached, tmp_path / "run", stages=("dit",), init_from=tiny_run.path / "autoencoder" / "done")


# ---- in memory -------------------------------------------------------------------------------------------------------


class Counted:
    """Features that are a function of the index, and a record of what was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, pixels):
        rows = pixels[:, 0, 0, 0]
        self.asked += [int(row) for row in rows]
        return {"f": rows[:, None] * torch.tensor([1.0, -2.0]), "g": rows}


def shown(keys: list[int]) -> tuple[np.ndarray, torch.Tensor]:
    """Keys, and images that show them."""
    return np.array(keys), torch.tensor(keys).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_the_cache_computes_each_row_once_and_gives_it_back():
    compute, cache = Counted(), InMemoryFeatureCache()
    for keys in ([3, 1, 3], [1, 2], [9, 3, 2, 1], [*range(20)]):
        given = cache(*shown(keys), compute)
        assert given["g"].tolist() == keys  # in the order of asking, repeated where asked twice
        assert given["f"].tolist() == [[i, -2 * i] for i in keys]
    assert sorted(compute.asked) == [*range(20)]


def test_the_cache_keeps_no_gradient():
    weight, cache = torch.ones(1, requires_grad=True), InMemoryFeatureCache()
    assert not cache(*shown([1, 2]), lambda x: {"f": weight * x[:, 0, 0]})["f"].requires_grad


def test_the_cache_rounds_to_bfloat16_the_first_time_too():
    cache = InMemoryFeatureCache()
    first, second = (cache(*shown([0]), lambda x: {"f": torch.full((len(x), 1), 1.001)})["f"] for _ in range(2))
    assert first.dtype == torch.bfloat16 and torch.equal(first, second) and float(first) == 1.0
    exact = InMemoryFeatureCache(torch.float32)(*shown([0]), lambda x: {"f": torch.full((len(x), 1), 1.001)})["f"]
    assert exact.dtype == torch.float32 and float(exact) == pytest.approx(1.001)
