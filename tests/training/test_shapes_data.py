"""Training data: dealt by (seed, stage, step) alone, true to its scenes, and frozen features computed once."""


import numpy as np
import pytest
import torch

from spar.common.errors import InputError
from spar.processing.prompts import DESCRIBE, PromptEncoder
from spar.training.config import DataConfig
from spar.training.shapes_data import InMemoryFeatureCache, ShapesTrainingData
from spar.worlds.shapes.captions import caption, describe
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import unique_objects
from spar.worlds.shapes.tokenizer import build_tokenizer, check_words

DATA = DataConfig(scenes=12, edits=5)
KINDS = ("color", "background", *4 * ("place",))


@pytest.fixture(scope="module")
def prompts():
    return PromptEncoder(build_tokenizer(), 64)


@pytest.fixture(scope="module")
def training_data(prompts):
    return ShapesTrainingData(DATA, prompts, seed=3)


def batch(training_data: ShapesTrainingData, stage: str, step: int) -> tuple:
    """Everything that a step could ask for, as plain values."""
    rng = training_data.rng(stage, step)
    some, edits = training_data.draw(rng, 6), training_data.draw(rng, 6, edits=True)
    pictures = [training_data.pixels(some), training_data.pixels(edits), training_data.pixels(edits, edited=True)]
    return (
        some.tolist(), edits.tolist(), training_data.captions(rng, some), training_data.instructions(edits),
        training_data.turns(rng, some, KINDS), [picture.numpy().tobytes() for picture in pictures],
    )


def test_a_batch_is_a_function_of_seed_stage_and_step(prompts, training_data):
    again = ShapesTrainingData(DATA, prompts, seed=3)
    batch(again, "mllm", 0)  # what was asked before does not count
    assert batch(again, "unified-2", 7) == batch(training_data, "unified-2", 7)


@pytest.mark.parametrize(("seed", "stage", "step"), [(4, "unified-2", 7), (3, "unified-3", 7), (3, "unified-2", 8)])
def test_another_seed_stage_or_step_gives_another_batch(prompts, training_data, seed, stage, step):
    other = ShapesTrainingData(DATA, prompts, seed=seed)
    ours, theirs = batch(training_data, "unified-2", 7), batch(other, stage, step)
    assert ours[0] != theirs[0] and ours[1] != theirs[1]


def test_pictures_are_the_renders_of_the_scenes(training_data):
    for i in (0, 11):
        shown = (training_data.pixels(np.array([i]))[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(shown, render(scene_at("train", i)))


def test_edited_pictures_show_the_edits_target(training_data):
    for i, edit in enumerate(training_data.edits):
        shown = (
            (training_data.pixels(np.array([i]), edited=True)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        )
        assert np.array_equal(shown, render(edit.target)) and not np.array_equal(shown, training_data.images[i])
        assert training_data.instructions(np.array([i])) == [edit.instruction]


def test_draws_cover_their_range_and_no_more(training_data):
    drawn = training_data.draw(np.random.default_rng(0), 500)
    edits = training_data.draw(np.random.default_rng(0), 500, edits=True)
    assert set(drawn) == set(range(12)) and set(edits) == set(range(5))


def test_draws_keep_to_the_kinds_asked_for(prompts, training_data):
    for edits in (False, True):
        scenes = training_data.scenes[: len(training_data.edits) if edits else None]
        for kinds in ({"single"}, {"two", "multi"}):
            wanted = {i for i, scene in enumerate(scenes) if scene.kind in kinds}
            drawn = training_data.draw(np.random.default_rng(0), 300, edits=edits, kinds=tuple(kinds))
            assert set(drawn) == wanted
    drawn = training_data.draw(np.random.default_rng(0), 3000, kinds=("single", "two", "two"))
    assert np.mean(training_data.kinds[drawn] == "two") == pytest.approx(2 / 3, abs=0.03)
    few = ShapesTrainingData(DataConfig(scenes=1, edits=1), prompts, 3)
    other = "multi" if few.scenes[0].kind == "single" else "single"
    with pytest.raises(InputError, match=f"expected scenes of the kinds {other}"):
        few.draw(np.random.default_rng(0), 2, kinds=(other,))


def test_words_are_of_the_scene_and_of_the_vocabulary(training_data):
    indices = np.arange(12)
    captions = training_data.captions(np.random.default_rng(1), indices)
    rng = np.random.default_rng(1)
    assert captions == [caption(training_data.scenes[i], rng) for i in indices]
    for row, i in zip(training_data.turns(np.random.default_rng(1), indices, KINDS), indices, strict=True):
        asked = [turn.question for turn in row]
        named, colored = len(unique_objects(training_data.scenes[i])), "what color is the background?" in asked
        assert colored and len(set(asked)) == len(asked)  # none twice, where the draws repeat themselves
        assert (named > 0) <= sum(text.startswith("where is") for text in asked) <= min(named, 4)
        assert (row[-1].question, row[-1].answer) == (DESCRIBE, describe(training_data.scenes[i]))
        for turn in row:
            check_words(turn.question), check_words(turn.answer)


def test_a_share_of_the_captions_says_where_things_lie(training_data):
    indices = np.arange(12).repeat(50)
    for share in (0.0, 0.3, 1.0):
        captions = training_data.captions(np.random.default_rng(2), indices, position_captions=share)
        placed = np.mean(["column" in text for text in captions])
        assert 0.4 * share <= placed <= share  # a lesson may leave all its things unplaced


def test_dense_targets_are_flat_and_row_major(training_data):
    targets = training_data.dense(np.array([2, 5]), 8)
    for row, i in enumerate((2, 5)):
        for name, grid in dense_targets(training_data.scenes[i], 8).items():
            assert np.array_equal(targets[name][row].numpy(), grid.reshape(64, *grid.shape[2:]))


def test_rendered_pictures_are_kept_and_read_back(prompts, training_data, tmp_path):
    first = ShapesTrainingData(DATA, prompts, 3, tmp_path)
    (file,) = tmp_path.glob("scenes-*.npy")
    marked = np.load(file)
    marked[0] = 7
    np.save(file, marked)
    second = ShapesTrainingData(DATA, prompts, 3, tmp_path)
    assert np.array_equal(first.images, training_data.images) and (second.images[0] == 7).all()
    assert (
        len(ShapesTrainingData(DataConfig(scenes=13, edits=5), prompts, 3, tmp_path).images) == 13
    )  # not the kept ones
    assert len(list(tmp_path.glob("scenes-*.npy"))) == 2 and not list(tmp_path.glob("*.part*"))


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
