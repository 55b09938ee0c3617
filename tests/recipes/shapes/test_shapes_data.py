"""The shapes world as training data: dealt by (seed, stage, step) alone, and true to its scenes."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from spar.common.errors import InputError
from spar.data.batches import Captioned, Descriptions, Dialogues, Edits, Images, Layouts
from spar.recipes import recipe
from spar.recipes.shapes.curricula import CaptionLessons, MixedLessons, QuestionData, UnifiedLessons
from spar.recipes.shapes.data import (
    FOLLOWING,
    KIND_WEIGHTS,
    ShapesData,
    ShapesTrainingData,
    dense_tags,
    draw_edit,
    layout_order,
)
from spar.recipes.shapes.dense_tagging import (
    TagData,
    Tagged,
    TaggedCaptionData,
    TaggedCaptions,
    TaggedEdits,
    TaggedLayouts,
)
from spar.training.config import StageConfig
from spar.training.data import CaptionData, ImageData, MixedData, StageData
from spar.worlds.shapes.captions import describe, edit_layout
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.edits import ALL_EDIT_KINDS
from spar.worlds.shapes.forms import paraphrase
from spar.worlds.shapes.questions import cell_text
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import BINDING_KINDS, SHAPES, unique_objects
from spar.worlds.shapes.tokenizer import check_words, split_words

DATA = ShapesData(scenes=60, edits=50)
GRID = 8
KINDS = ("color", "background", *4 * ("place",))


@pytest.fixture(scope="module")
def training_data():
    return ShapesTrainingData(DATA, GRID, seed=3)


def batch(training_data: ShapesTrainingData, stage: str, step: int) -> tuple:
    """Everything that a step could ask for, as plain values."""
    rng = training_data.rng(stage, step)
    some, edits = training_data.draw(rng, 6), training_data.draw(rng, 6, edits=True)
    told = training_data.instructions(rng, edits)
    pictures = [training_data.pixels(some), training_data.pixels(edits), training_data.pixels(edits, edited=True)]
    return (
        some.tolist(), edits.tolist(), training_data.captions(rng, some), told,
        training_data.turns(rng, some, QuestionData(KINDS)), [picture.numpy().tobytes() for picture in pictures],
    )


def test_a_batch_is_a_function_of_seed_stage_and_step(training_data):
    again = ShapesTrainingData(DATA, GRID, seed=3)
    batch(again, "mllm", 0)  # what was asked before does not count
    assert batch(again, "unified-2", 7) == batch(training_data, "unified-2", 7)


@pytest.mark.parametrize(("seed", "stage", "step"), [(4, "unified-2", 7), (3, "unified-3", 7), (3, "unified-2", 8)])
def test_another_seed_stage_or_step_gives_another_batch(training_data, seed, stage, step):
    other = ShapesTrainingData(DATA, GRID, seed=seed)
    ours, theirs = batch(training_data, "unified-2", 7), batch(other, stage, step)
    assert ours[0] != theirs[0] and ours[1] != theirs[1]


def test_pictures_are_the_renders_of_the_scenes(training_data):
    for i in (0, 39):
        shown = (training_data.pixels(np.array([i]))[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(shown, render(scene_at("train", i, KIND_WEIGHTS)))


def test_edited_pictures_show_the_edits_target(training_data):
    for i, edit in enumerate(training_data.edits):
        shown = (
            (training_data.pixels(np.array([i]), edited=True)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        )
        assert np.array_equal(shown, render(edit.target)) and not np.array_equal(shown, training_data.images[i])
        (told,) = training_data.instructions(np.random.default_rng(i), np.array([i]))
        assert told == paraphrase(edit.instruction, np.random.default_rng(i))


def test_draws_cover_their_range_and_no_more(training_data):
    drawn = training_data.draw(np.random.default_rng(0), 900)
    edits = training_data.draw(np.random.default_rng(0), 900, edits=True)
    assert set(drawn) == set(range(60)) and set(edits) == set(range(50))


def test_draws_keep_to_the_kinds_asked_for(training_data):
    for edits in (False, True):
        scenes = training_data.scenes[: len(training_data.edits) if edits else None]
        for kinds in ({"single"}, {"two", "multi"}):
            wanted = {i for i, scene in enumerate(scenes) if scene.kind in kinds}
            drawn = training_data.draw(np.random.default_rng(0), 300, edits=edits, kinds=tuple(kinds))
            assert set(drawn) == wanted
    drawn = training_data.draw(np.random.default_rng(0), 3000, kinds=("single", "two", "two"))
    assert np.mean(training_data.kinds[drawn] == "two") == pytest.approx(2 / 3, abs=0.03)
    few = ShapesTrainingData(ShapesData(scenes=1, edits=1), GRID, 3)
    other = "multi" if few.scenes[0].kind == "single" else "single"
    with pytest.raises(InputError, match=f"expected scenes of the kinds {other}"):
        few.draw(np.random.default_rng(0), 2, kinds=(other,))


def test_words_are_of_the_scene_and_of_the_vocabulary(training_data):
    indices = np.arange(40)
    for text in training_data.captions(np.random.default_rng(1), indices):
        check_words(text)
    rows = training_data.turns(np.random.default_rng(1), indices, QuestionData(KINDS))
    for row, i in zip(rows, indices, strict=True):
        named, places = len(unique_objects(training_data.scenes[i])), [t for t in row if t.answer.startswith("column")]
        assert training_data.scenes[i].background in [turn.answer for turn in row]
        assert (named > 0) <= len(places) <= min(named, 4)  # none twice, where the draws repeat themselves
        assert row[-1].answer == describe(training_data.scenes[i])
        for turn in row:
            check_words(turn.question), check_words(turn.answer)


def test_turns_go_on_with_a_conversation_in_their_share(training_data):
    rows = training_data.turns(np.random.default_rng(4), np.arange(40).repeat(6), QuestionData(KINDS))
    lengths = []
    for row in rows:
        for turn in row:
            lengths = [*lengths[:-1], lengths[-1] + 1] if turn.follows else [*lengths, 1]
    counted = np.bincount(lengths, minlength=4) / len(lengths)
    assert counted[4:].sum() == 0 and counted[3] > 0.15 and counted[2] > 0.15  # as far as a row has turns left
    assert np.mean(np.array(lengths) > 1) == pytest.approx(FOLLOWING, abs=0.12)


def test_scenes_that_need_binding_are_over_a_third_of_those_with_several_objects():
    scenes = [scene_at("train", i, KIND_WEIGHTS) for i in range(3000)]
    several = [scene for scene in scenes if len(scene.objects) > 1]
    assert np.mean([scene.kind in BINDING_KINDS for scene in several]) > 1 / 3
    edits = [draw_edit(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes[:800])]
    assert {edit.kind for edit in edits} == set(ALL_EDIT_KINDS)


@pytest.mark.parametrize("step", range(6))
def test_prompts_are_answered_with_what_the_image_will_show(training_data, step):
    given = dealt(training_data, QuestionData(prompt_share=1.0), step)
    assert isinstance(given, Descriptions)
    for row, key in enumerate(given.keys):
        scene = training_data.edits[key].target if given.edits else training_data.scenes[key]
        assert given.texts[row] == describe(scene)
        check_words(given.prompts[row])
    assert torch.equal(given.pixels, training_data.pixels(given.keys))


def test_edits_come_with_the_tags_of_what_the_image_will_show(training_data):
    given = dealt(training_data, QuestionData(prompt_share=1.0, edit_prompts=1.0))
    assert isinstance(given, TaggedEdits)
    after = dense_tags([training_data.edits[key].target for key in given.keys], GRID)
    before = dense_tags([training_data.scenes[key] for key in given.keys], GRID)
    assert all(torch.equal(given.tags[name], value) for name, value in after.items())
    owned = (after["shape"] + before["shape"]) > 0
    assert given.counted[owned].all() and 0.05 < given.counted[~owned].float().mean() < 0.3
    assert type(dealt(training_data, QuestionData(prompt_share=1.0, edit_prompts=0.0))) is Descriptions


def test_edits_are_answered_with_layouts_of_what_they_change(training_data):
    given = dealt(training_data, QuestionData(prompt_share=1.0, edit_prompts=1.0, edit_layouts=True))
    plain = dealt(training_data, QuestionData(prompt_share=1.0, edit_prompts=1.0))
    assert isinstance(given, TaggedLayouts) and given.edits and given.prompts == plain.prompts
    assert torch.equal(given.counted, plain.counted)
    for text, key in zip(given.texts, given.keys, strict=True):
        check_words(text)
        assert text == edit_layout(training_data.scenes[key], training_data.edits[key].target)


def test_edits_are_drawn_of_their_instructions_with_their_layouts(training_data):
    plain, laid_out = (
        dealt(training_data, MixedLessons(edit_share=1.0, edit_layouts=share)) for share in (0.0, 1.0)
    )
    assert isinstance(laid_out, Edits) and torch.equal(laid_out.pixels, plain.pixels)
    layouts = training_data.edit_layouts(plain.keys)
    assert laid_out.texts == tuple(f"{said}\n{layout}" for said, layout in zip(plain.texts, layouts, strict=True))


def test_errors_of_layouts_misplace_what_goes_or_changes_and_nothing_else(training_data):
    kinds, indices = [edit.kind for edit in training_data.edits], np.arange(len(training_data.edits))
    right = training_data.edit_layouts(indices)
    wrong = training_data.edit_layouts(indices, np.random.default_rng(0), 1.0)
    cell, misplaced = r"on column \w+ row \w+", Counter()
    for kind, one, other in zip(kinds, right, wrong, strict=True):
        assert re.sub(cell, "", one) == re.sub(cell, "", other)
        before, after = re.findall(cell, one), re.findall(cell, other)
        misplaced[kind] += before != after
        if kind in ("add", "background"):
            assert one == other
        elif kind == "move":
            assert before[1] == after[1]
        else:
            assert len({*after}) == 1  # the new object stands where the old one was
    assert all(misplaced[kind] > kinds.count(kind) / 2 for kind in {*kinds} - {"add", "background"})
    assert training_data.edit_layouts(indices, np.random.default_rng(0), 0.0) == right


def test_captions_are_answered_with_layouts_in_their_own_order(training_data):
    data = QuestionData(prompt_share=1.0, edit_prompts=0.0, layouts=True, scene_kinds=("position",))
    given = dealt(training_data, data)
    assert isinstance(given, TaggedLayouts) and not given.edits
    for row, key in enumerate(given.keys):
        scene, text = training_data.scenes[key], given.texts[row]
        check_words(text), check_words(given.prompts[row])
        first, second = (f"{item.color} {item.shape} on {cell_text(item)}" for item in scene.objects)
        assert first in text and second in text and text.endswith(f"on a {scene.background} background")
        said = [word for word in split_words(given.prompts[row]) if word in SHAPES]
        if len(said) == 2:  # no synonyms
            assert [word for word in split_words(text) if word in SHAPES] == said
    tags = dense_tags([training_data.scenes[key] for key in given.keys], GRID)
    assert all(torch.equal(given.tags[name], value) for name, value in tags.items())
    owned = tags["shape"] > 0
    assert given.counted[owned].all() and 0.05 < given.counted[~owned].float().mean() < 0.3


def test_what_a_phrase_names_follows_each_other_in_a_layout():
    scenes = [scene_at("train", i, {"twins": 1.0}) for i in range(40)]
    orders = [layout_order(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    assert all(sorted(order) == list(range(len(scene.objects))) for scene, order in zip(scenes, orders, strict=True))
    for scene, order in zip(scenes, orders, strict=True):
        pairs = [scene.objects[index].pair for index in order]
        assert len([1 for a, b in pairwise(pairs) if a == b]) == len(pairs) - len(set(pairs))
        ranks: dict[tuple[str, str, str], list[float]] = {}
        for index in order:
            item = scene.objects[index]
            ranks.setdefault((item.shape, item.color, item.size), []).append(item.x)
        assert all(xs == sorted(xs) for xs in ranks.values())
    assert len({tuple(order) for order in orders}) > 6


@pytest.mark.parametrize(("share", "expected"), [(0.0, Captioned), (1.0, Layouts)])
def test_a_share_of_the_steps_without_edits_has_layouts(training_data, share, expected):
    assert type(dealt(training_data, MixedLessons(layouts=share))) is expected
    assert type(dealt(training_data, MixedLessons(layouts=share, edit_share=1.0))) is Edits
    kinds = {type(dealt(training_data, MixedLessons(layouts=0.5), step)) for step in range(12)}
    assert kinds == {Captioned, Layouts}


def test_a_share_of_the_images_of_an_autoregressive_model_has_layouts_as_texts(training_data):
    """The others of its steps teach the LLM to write them."""
    own = UnifiedLessons(layouts=True, prompt_share=1.0, edit_prompts=0.0, caption_share=1.0, layout_captions=1.0)
    found = dealt(training_data, own)
    assert type(found) is Captioned and all(" on column " in text for text in found.texts)
    assert not any(" on column " in text for text in dealt(training_data, replace(own, layout_captions=0.0)).texts)
    asked = dealt(training_data, replace(own, caption_share=0.0))
    assert type(asked) is TaggedLayouts and all(" on column " in text for text in asked.texts)
    with pytest.raises(InputError, match="layout_captions: expected layouts true"):
        UnifiedLessons(layout_captions=0.5)


def test_an_image_is_asked_some_of_the_questions_drawn_anew(training_data):
    indices = np.arange(40)
    every = training_data.turns(np.random.default_rng(5), indices, QuestionData(KINDS))
    some = training_data.turns(np.random.default_rng(5), indices, QuestionData(KINDS, per_image=2))
    assert sum(map(len, some)) < 0.7 * sum(map(len, every))
    backgrounds = np.mean([training_data.scenes[i].background in [t.answer for t in some[i]] for i in indices])
    assert 0.1 < backgrounds < 0.7  # one question of six
    assert all(row[-1].answer == describe(training_data.scenes[i]) for i, row in enumerate(some))


def test_a_share_of_the_captions_says_where_things_lie(training_data):
    indices = np.arange(40).repeat(15)
    for share in (0.0, 0.3, 1.0):
        captions = training_data.captions(np.random.default_rng(2), indices, position_captions=share)
        placed = np.mean(["column" in text for text in captions])
        assert 0.4 * share <= placed <= share  # a lesson may leave all its things unplaced


def test_dense_targets_are_flat_and_row_major(training_data):
    targets = dense_tags([training_data.scenes[i] for i in (2, 5)], 8)
    for row, i in enumerate((2, 5)):
        for name, grid in dense_targets(training_data.scenes[i], 8).items():
            assert np.array_equal(targets[name][row].numpy(), grid.reshape(64, *grid.shape[2:]))


def test_rendered_pictures_are_kept_and_read_back(training_data, tmp_path):
    first = ShapesTrainingData(DATA, GRID, 3, tmp_path)
    (file,) = tmp_path.glob("scenes-*.npy")
    marked = np.load(file)
    marked[0] = 7
    np.save(file, marked)
    second = ShapesTrainingData(DATA, GRID, 3, tmp_path)
    assert np.array_equal(first.images, training_data.images) and (second.images[0] == 7).all()
    more = ShapesTrainingData(ShapesData(scenes=61, edits=50), GRID, 3, tmp_path)
    assert len(more.images) == 61  # not the kept ones
    assert len(list(tmp_path.glob("scenes-*.npy"))) == 2 and not list(tmp_path.glob("*.part*"))


# ---- what a stage is given -------------------------------------------------------------------------------------------


def staged(data: StageData) -> StageConfig:
    """A stage of the data, six images a step."""
    objectives = (stage.objective for name in ("shapes", "dualtoken-tiny") for stage in recipe(name).stages)
    objective = next(one for one in objectives if {*data.gives} <= {*one.takes})
    return StageConfig("s", objective, ("*",), steps=9, warmup=0, data=data, batch=6)


def dealt(training_data: ShapesTrainingData, data: StageData, step: int = 0) -> Images:
    return training_data.get_batch(staged(data), step, slice(None))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (ImageData(), Images), (CaptionData(), Captioned), (MixedData(), Captioned), (MixedData(edit_share=1.0), Edits),
        (CaptionLessons(), Captioned), (MixedLessons(), Captioned), (MixedLessons(edit_share=1.0), Edits),
        (QuestionData(), Dialogues), (TagData(), Tagged), (TaggedCaptionData(), TaggedCaptions),
        (UnifiedLessons(caption_share=1.0), Captioned), (UnifiedLessons(caption_share=0.0), Dialogues),
    ],
)
def test_each_kind_of_data_is_dealt_as_what_it_says_it_gives(training_data, data, kind):
    given = dealt(training_data, data)
    assert type(given) is kind and kind in data.gives and len(given) == 6
    assert torch.equal(given.pixels, training_data.pixels(given.keys, edited=kind is Edits))


def test_every_kind_of_data_that_the_source_serves_is_dealt(training_data):
    for cls in ShapesData.serves:
        assert type(dealt(training_data, cls())) in cls.gives


def test_words_edits_and_tags_are_those_of_the_images_dealt(training_data):
    edits = dealt(training_data, MixedLessons(edit_share=1.0))
    assert len({*edits.texts}) > 1 and all(check_words(text) for text in edits.texts)
    assert torch.equal(edits.references, training_data.pixels(edits.keys))
    tagged = dealt(training_data, TagData())
    for name, value in dense_tags([training_data.scenes[i] for i in tagged.keys], GRID).items():
        assert torch.equal(tagged.tags[name], value)
    asked = dealt(training_data, QuestionData(KINDS))
    for key, turns in zip(asked.keys, asked.turns, strict=True):
        assert turns[-1].answer == describe(training_data.scenes[key]) and len(turns) > 1
    asked = dealt(training_data, QuestionData())
    assert [[turn.answer for turn in turns] for turns in asked.turns] == [
        [describe(training_data.scenes[key])] for key in asked.keys
    ]


def test_half_of_the_steps_edit_at_a_share_of_a_half_and_the_lessons_change_no_draw(training_data):
    plain, lessons = MixedData(edit_share=0.5), MixedLessons(edit_share=0.5, position_captions=1.0)
    batches = [(dealt(training_data, plain, step), dealt(training_data, lessons, step)) for step in range(100)]
    assert 30 < sum(isinstance(one, Edits) for one, _ in batches) < 70
    assert all(type(one) is type(other) and (one.keys == other.keys).all() for one, other in batches)
    taught = [text for _, other in batches if not isinstance(other, Edits) for text in other.texts]
    assert 0.4 < np.mean(["column" in text for text in taught]) < 1


def test_the_scenes_of_a_lesson_are_of_its_kinds(training_data):
    for data in (CaptionLessons(scene_kinds=("single",)), MixedLessons(scene_kinds=("single",), edit_share=1.0)):
        assert {*training_data.kinds[dealt(training_data, data).keys]} == {"single"}


def test_images_come_at_the_size_that_the_stage_asks_for(training_data):
    whole, small = dealt(training_data, ImageData()), dealt(training_data, ImageData(image_size=32))
    assert whole.pixels.shape[-2:] == (64, 64) and small.pixels.shape[-2:] == (32, 32)
    halved = torch.nn.functional.interpolate(whole.pixels, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(small.pixels, halved)


@pytest.mark.parametrize("cls", ShapesData.serves)
def test_rows_of_a_batch_are_those_of_the_whole_batch(training_data, cls):
    data = cls() if cls not in (MixedData, MixedLessons) else cls(edit_share=0.5)
    stage = staged(data)
    for step in range(4):
        whole = training_data.get_batch(stage, step, slice(None))
        part = training_data.get_batch(stage, step, slice(2, 5))
        assert type(part) is type(whole) and (part.keys == whole.keys[2:5]).all()
        assert torch.equal(part.pixels, whole.pixels[2:5])
        for name in ("texts", "turns"):
            assert getattr(part, name, ()) == getattr(whole, name, ())[2:5]
