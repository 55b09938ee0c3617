"""The loader: the same samples for any workers, ranks and restarts; shares, buckets and bad samples."""

import json
import re
import shlex
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spar.cli.main import main
from spar.common.errors import InputError
from spar.data import bad_samples as module
from spar.data import loader as loading
from spar.data.buckets import make_buckets
from spar.data.loader import MIN_TRIES, Loader, check_shared_memory, read_again, to_pixels
from spar.data.mixture import Mixture
from spar.data.samples import BadSample, Kind, Sample
from spar.data.sources import open_source

SIDE = 28
SQUARE = ((SIDE, SIDE),)


class Plain:
    """A source without files: sample n is called n, and those in `bad` cannot be read."""

    format, damage, skipped = "plain", (), {}

    def __init__(self, name: str, count: int, picture: bytes, *, kind: Kind = "text_to_image", bad=(), sizes=None):
        self.name, self.identity, self.count, self.picture, self.kind = name, name, count, picture, kind
        self.bad, self._sizes = {*bad}, np.full((count, 2), 40, np.uint16) if sizes is None else sizes

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(str(index), "there", "planted")
        return Sample(self.picture, f"text {index}", str(index), "there")

    def sizes(self) -> np.ndarray:
        return self._sizes


@pytest.fixture
def plain(sets):
    return lambda name, count, **keywords: Plain(name, count, sets.picture(), **keywords)


def mixture(*sources, weights=None, batch=6, seed=0, buckets=SQUARE) -> Mixture:
    return Mixture(sources, weights or [1] * len(sources), batch=batch, seed=seed, buckets=buckets)


def keys(loader: Loader, start: int, stop: int) -> list[tuple[str, ...]]:
    return [batch.keys for batch in loader.batches(start, stop)]


# ---- order ----------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order(plain):
    loader = Loader(mixture(plain("a", 60)), workers=0)
    first, second = (sum(keys(loader, start, start + 10), ()) for start in (0, 10))
    assert sorted(first) == sorted(second) == sorted(map(str, range(60))) and first != second


def test_resuming_equals_not_stopping(plain):
    whole = Loader(mixture(plain("a", 50), plain("b", 7), weights=[3, 1]), workers=0)
    again = Loader(mixture(plain("a", 50), plain("b", 7), weights=[3, 1]), workers=0)
    state = json.loads(json.dumps(whole.state(13)))
    resumed = again.resume(state)
    assert [next(resumed).keys for _ in range(7)] == keys(whole, 0, 20)[13:]


def test_more_workers_than_processors_are_no_warning(plain, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    loader = Loader(mixture(plain("a", 50)), workers=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "This DataLoader will create")
        assert keys(loader, 0, 2) == keys(Loader(mixture(plain("a", 50)), workers=0), 0, 2)


def test_other_data_or_settings_are_no_resume(plain):
    state = Loader(mixture(plain("a", 50))).state(3)
    for other in (
        mixture(plain("b", 50)), mixture(plain("a", 50), seed=1), mixture(plain("a", 50), batch=12),
        mixture(plain("a", 50), plain("b", 5)), mixture(plain("a", 50), buckets=((56, 56),)),
    ):  # fmt: skip
        with pytest.raises(InputError, match="that the run began with"):
            Loader(other).resume(state)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_same_batches_by_turns(plain, world):
    made = mixture(plain("a", 50), plain("b", 7), weights=[3, 1])
    alone = keys(Loader(made, workers=0), 0, 12)
    parts = [keys(Loader(made, rank=rank, world=world, workers=0), 0, 12) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert [parts[place % world][step][place // world] for place in range(6)] == [*batch]


def test_ranks_that_the_batch_does_not_suit_are_refused(plain):
    for rank, world in ((0, 4), (2, 2), (-1, 1)):
        with pytest.raises(InputError, match="divides the batch"):
            Loader(mixture(plain("a", 50)), rank=rank, world=world)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_even_when_shards_are_fewer(sets, workers):
    source = open_source(str(sets.pairs("a.tar", range(20))), cache=sets.folder / "cache")
    alone = [*Loader(mixture(source), workers=0).batches(0, 8)]
    shared = [*Loader(mixture(source), workers=workers).batches(0, 8)]
    for one, other in zip(alone, shared, strict=True):
        assert (one.step, one.keys, one.texts) == (other.step, other.keys, other.texts)
        assert torch.equal(one.images, other.images)


def test_the_training_keeps_its_random_numbers(plain):
    before = torch.get_rng_state()
    assert len([*Loader(mixture(plain("a", 50)), workers=1).batches(0, 2)]) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_shares_of_samples_in_every_stretch(plain):
    made = mixture(plain("long", 997), plain("short", 10), plain("journey", 100), weights=[0.6, 0.2, 0.2], batch=20)
    for start in (0, 500):
        counts = Counter(int(number) for step in range(start, start + 50) for number in made.batch_indices(step).source)
        assert {number: count / 1000 for number, count in counts.items()} == pytest.approx(
            {0: 0.6, 1: 0.2, 2: 0.2}, abs=0.01
        )
    assert made.epochs(50) == pytest.approx({"long": 600 / 997, "short": 20.0, "journey": 2.0})


def test_a_batch_is_of_one_kind(sets, plain):
    edits = open_source(str(sets.edits("edits.tar", range(10))))
    loader = Loader(mixture(edits, plain("pictures", 20), weights=[1, 3]), workers=0)
    kinds = Counter()
    for batch in loader.batches(0, 40):
        kinds[batch.kind] += 1
        assert len(set(batch.sources)) == 1 and len(batch.images) == 6
        assert batch.owners.tolist() == ([*range(6)] if batch.kind == "edit" else [])
        assert len(batch.inputs) == len(batch.owners)
    assert kinds == pytest.approx({"edit": 10, "text_to_image": 30}, abs=2)


# ---- images -------------------------------------------------------------------------------------------------------


def test_pixels_and_words_belong_together(sets):
    path = sets.edits("a.tar", range(10))
    (batch,) = Loader(mixture(open_source(str(path)), batch=10), workers=0).batches(0, 1)
    made = mixture(open_source(str(sets.pairs("b.tar", range(30)))), batch=30)
    (pictures,) = Loader(made, workers=0).batches(0, 1)
    assert pictures.images.dtype == torch.uint8 and pictures.images.shape == (30, 3, SIDE, SIDE)
    for image, text in zip(pictures.images, pictures.texts, strict=True):
        assert int(image[0, 5, 5]) == int(text.split()[1])
    for row, text in enumerate(batch.texts):
        number = int(text.split()[1])
        assert abs(int(batch.images[row, 0, 5, 5]) - number - 100) <= 2
        assert abs(int(batch.inputs[row, 0, 5, 5]) - number) <= 2
    pixels = to_pixels(pictures.images)
    assert pixels.dtype == torch.float32 and torch.equal((pixels * 255).round().to(torch.uint8), pictures.images)


def test_every_batch_is_of_one_bucket_near_its_images(sets):
    members = {}
    for number in range(60):
        size = ((40, 40), (80, 40), (40, 80))[number % 3]
        members |= {f"{number}.png": sets.picture(number, size=size), f"{number}.txt": str(number % 3)}
    source = open_source(str(sets.tar("a.tar", members)))
    assert make_buckets(56, 2.0) == ((56, 56),)  # 2 x 2 tokens: no other shape of four is within an aspect of two
    sizes = {"0": (56, 56), "1": (56, 112), "2": (112, 56)}
    made = Mixture([source], [1], batch=4, buckets=((56, 112), (56, 56), (112, 56)))
    seen = Counter()
    for batch in Loader(made, workers=0).batches(0, 15):
        assert set(batch.texts) == {batch.texts[0]} and tuple(batch.images.shape[-2:]) == sizes[batch.texts[0]]
        seen[batch.texts[0]] += 4
    assert seen == pytest.approx({"0": 20, "1": 20, "2": 20}, abs=4)
    steps = [batch.keys for batch in Loader(made, workers=0).batches(7, 15)]
    assert steps == keys(Loader(made, workers=0), 0, 15)[7:]


# ---- bad samples ----------------------------------------------------------------------------------------------------


def test_a_bad_sample_is_replaced_named_and_the_rest_stays(sets, plain):
    clean = keys(Loader(mixture(plain("a", 60)), workers=0), 0, 10)
    file = sets.folder / "bad.jsonl"
    loader = Loader(mixture(plain("a", 60, bad=[17, 18])), workers=0, bad_samples=file)
    batches = [*loader.batches(0, 20)]
    assert [batch.keys for batch in batches[:10]] == [
        tuple("19" if key in ("17", "18") else key for key in batch) for batch in clean
    ]
    # 17 stands for itself and asks 18, twice: once an epoch; each is named once.
    assert sum(len(batch.bad) for batch in batches) == 6  # 17 and 18 for the row of 17, 18 for its own
    assert sum(batch.replaced for batch in batches) == loader.bad_samples.bad == 4
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["17", "18"]
    assert lines[0] | {"key": ""} == {"source": "a", "origin": "there", "key": "", "reason": "planted"}


def test_replacements_are_the_same_for_everybody(plain):
    made = mixture(plain("a", 60, bad=range(0, 60, 7)))
    alone = keys(Loader(made, workers=0, bad_share=1), 0, 10)
    parts = [keys(Loader(made, rank=rank, world=2, workers=0, bad_share=1), 0, 10) for rank in (0, 1)]
    assert [batch[0::2] for batch in alone] == parts[0] and [batch[1::2] for batch in alone] == parts[1]


def test_more_bad_samples_than_the_budget_end_the_run(sets, plain, monkeypatch):
    monkeypatch.setattr(module, "MIN_SAMPLES", 60)
    file = sets.folder / "bad.jsonl"
    loader = Loader(mixture(plain("a", 600, bad=range(0, 600, 20))), workers=1, bad_share=0.02, bad_samples=file)
    batches = loader.batches()
    with pytest.raises(InputError, match=r"at most 2.0% bad samples, got \d+ of \d+, .* 'a': planted; all are named"):
        for _ in range(600):
            next(batches)
    assert 60 <= loader.bad_samples.seen < 600  # 5 % are bad: three deviations above 2 % are soon passed
    few = Loader(mixture(plain("b", 600, bad=[5])), workers=0)
    assert len([*few.batches(0, 100)]) == 100


def test_nothing_but_bad_neighbours_is_one_sentence(plain):
    for workers in (0, 1):
        loader = Loader(mixture(plain("a", 60, bad=range(60))), workers=workers)
        with pytest.raises(
            InputError, match=rf"^expected a good sample among {MIN_TRIES + 1} neighbours in 'a'.*planted$"
        ):
            next(loader.batches())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cluster_of_bad_samples_within_the_budget_ends_no_run(plain, workers):
    """17 neighbours of 2,017 are 0.84 %: the rows that fall on them get others, and each counts once."""
    loader = Loader(mixture(plain("a", 2017, bad=range(400, 417))), workers=workers, bad_share=0.01)
    steps = 2 * 2017 // len(next(Loader(mixture(plain("b", 2017)), workers=0).batches(0, 1)).keys)
    batches = [*loader.batches(0, steps)]
    assert len(batches) == steps and 17 <= loader.bad_samples.bad <= 34
    assert not {str(number) for number in range(400, 417)} & {key for batch in batches for key in batch.keys}


def test_a_read_that_fails_for_a_moment_is_tried_again(monkeypatch):
    monkeypatch.setattr(loading, "READ_PAUSE", 0.0)

    class Flaky:
        name, failures = "nfs", 2

        def read(self, number):
            if self.failures:
                self.failures -= 1
                raise OSError(5, "Input/output error")
            return f"sample {number}"

    source = Flaky()
    assert read_again(source, 3) == "sample 3"
    source.failures = 99
    with pytest.raises(BadSample, match="cannot be read after 3 tries: Input/output error"):
        read_again(source, 3)


def test_shared_memory_that_is_too_small_is_said_before_a_worker_begins(tmp_path, monkeypatch):
    check_shared_memory(1000, tmp_path / "none")
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 * 2**20))
    check_shared_memory(64 * 2**20, tmp_path)
    with pytest.raises(InputError, match=r"expected 65 MiB of shared memory .* got 64 MiB free in .*--data.workers 0"):
        check_shared_memory(65 * 2**20, tmp_path)


def test_broken_images_and_missing_words_are_bad_samples(sets):
    good = sets.noise(1)
    members = {f"{n}.jpg": good for n in range(20)} | {f"{n}.txt": "words" for n in range(20)}
    members |= {"3.jpg": good[: len(good) // 2], "5.jpg": b"GIF89a" + bytes(50), "7.txt": " ", "9.jpg": b""}
    made = mixture(open_source(str(sets.tar("a.tar", members))), batch=20)
    loader = Loader(made, workers=0)
    (batch,) = loader.batches(0, 1)
    reasons = {one.key: one.reason for one in batch.bad}
    assert sorted(reasons) == ["3", "5", "7", "9"] and {"3", "5", "7", "9"} & {*batch.keys} == set()
    assert "truncated" in reasons["3"] and "PNG, JPEG or WEBP" in reasons["5"]
    assert "caption" in reasons["7"] and "empty" in reasons["9"]
    (pictures,) = Loader(made, workers=0, captions=False).batches(0, 1)
    assert sorted(one.key for one in pictures.bad) == ["3", "5", "9"] and "7" in pictures.keys


def test_a_damaged_shard_is_named_before_the_first_step(sets):
    path = sets.pairs("a.tar", range(20))
    path.write_bytes(path.read_bytes()[:20_000])
    loader = Loader(mixture(open_source(str(path))), rank=1, world=2, workers=0, bad_samples=sets.folder / "bad.jsonl")
    (line,) = (sets.folder / "bad.1.jsonl").read_text().splitlines()
    assert "truncated" in json.loads(line)["reason"] and loader.bad_samples.bad == 0


def test_the_guide_says_what_works(sets, monkeypatch, capsys):
    """Every command and the program of docs/data.md."""
    for shard in range(2):
        sets.pairs(f"shards/{shard:06d}.tar", range(20 * shard, 20 * shard + 20))
    sets.edits("edits/0.tar", range(20))
    sets.file("photos/a.png", sets.picture())
    sets.file("photos/metadata.jsonl", '{"file_name": "a.png", "text": "words"}')
    monkeypatch.chdir(sets.folder)
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    commands = re.search(r"```sh\n(.*?)```", guide, re.S)[1].splitlines()
    assert len(commands) == 3
    for line in commands:
        assert main(shlex.split(line, comments=True)[1:]) == 0
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", guide, re.S)[1], {})
    assert len(capsys.readouterr().out.splitlines()) == 3
