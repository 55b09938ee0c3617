"""Truths about captions, the vocabulary and the tokenizer: they are true, and parse to their claim."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import spar
from spar.common.errors import InputError
from spar.worlds.shapes.captions import (
    DESCRIBE,
    VOCABULARY,
    Claim,
    Group,
    Relation,
    build_tokenizer,
    caption,
    check_words,
    describe,
    divided_caption,
    group_objects,
    half_of_image_text,
    make_edit,
    open_caption,
    parse,
    position_caption,
    questions,
    related_caption,
    split_words,
    to_text,
)
from spar.worlds.shapes.edits import BY_ANYTHING, edit_kinds
from spar.worlds.shapes.forms import paraphrase
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS, CURRICULUM_KINDS, QUESTION_KINDS, cell_text
from spar.worlds.shapes.scene import (
    ALL_KINDS,
    HELD_OUT_POSITION_SHAPES,
    KINDS,
    RELATIONS,
    SHAPES,
    Object,
    Scene,
    holds,
    make_scene,
)

SCENES = [make_scene(seed, kind=kind, combinations="any") for seed in range(80) for kind in KINDS]
TEMPLATES = ("Generate an image: ", "Generate an image.", "Edit the image: ", "Edit the image.", DESCRIBE)
EXAMPLES = {
    "a large red circle and a small blue star on a gray background": Claim(
        "gray", (Group("circle", "red", "large", 1), Group("star", "blue", "small", 1))
    ),
    "three green squares": Claim(None, (Group("square", "green", None, 3),)),
    "a yellow star to the left of a blue ring": Claim(
        None, (Group("star", "yellow", None, 1), Group("ring", "blue", None, 1)), Relation("left", 0, 1)
    ),
    "a red circle, a blue star and a green ring": Claim(
        None, (Group("circle", "red", None, 1), Group("star", "blue", None, 1), Group("ring", "green", None, 1))
    ),
    "an orange ring above two crosses on a beige background": Claim(
        "beige", (Group("ring", "orange", None, 1), Group("cross", None, None, 2)), Relation("above", 0, 1)
    ),
}


def all_texts(number: int = 400) -> list[str]:
    rng = np.random.default_rng(0)
    texts = []
    for seed in range(number):
        scene = make_scene(seed)
        texts += [caption(scene, rng), describe(scene), make_edit(scene, rng).instruction]
        asked = questions(scene, rng, (*QUESTION_KINDS, *CURRICULUM_KINDS))
        texts += [text for question in asked for text in (question.text, question.answer)]
    return texts


@pytest.mark.parametrize("scene", SCENES[:5] + SCENES[-5:], ids=lambda scene: scene.kind)
@pytest.mark.parametrize("color", [True, False])
def test_a_caption_says_what_it_is_asked_to_say(scene: Scene, color: bool) -> None:
    rng = np.random.default_rng(1)
    for background in (True, False):
        for size in (True, False):
            claim = parse(caption(scene, rng, background=background, size=size, color=color))
            assert claim.background == (scene.background if background else None)
            assert Counter(claim.groups) == Counter(group_objects(scene.objects, color=color, size=size))


def test_every_caption_and_description_reads_back() -> None:
    rng = np.random.default_rng(2)
    for scene in SCENES:
        text = caption(scene, rng)
        claim = parse(text)
        assert to_text(claim) == text
        sized = claim.groups[0].size is not None
        assert Counter(claim.groups) == Counter(group_objects(scene.objects, size=sized))
        assert (claim.relation is not None) == (scene.kind == "position")
        full = parse(describe(scene))
        assert Counter(full.groups) == Counter(group_objects(scene.objects))
        assert full.background == scene.background and full.relation is None


def test_every_edited_scene_reads_back() -> None:
    rng = np.random.default_rng(3)
    for seed in range(200):
        target = make_edit(make_scene(seed), rng).target
        assert Counter(parse(describe(target)).groups) == Counter(group_objects(target.objects))
        assert to_text(parse(caption(target, rng))).split()


def test_the_named_relation_is_true_and_all_four_occur() -> None:
    rng = np.random.default_rng(4)
    counts: Counter[str] = Counter()
    for seed in range(200):
        scene = make_scene(seed, kind="position")
        claim = parse(caption(scene, rng))
        by_look = {(item.shape, item.color): item for item in scene.objects}
        subject, other = (by_look[group.shape, group.color] for group in claim.groups)
        assert claim.relation is not None and holds(claim.relation.name, subject, other)
        counts[claim.relation.name] += 1
    assert min(counts[name] for name in RELATIONS) > 30


CELL = r" (?:on|and) (column \w+ row \w+)"
HALF = r" (to the left|to the right|above|below)(?=,| on a |$)"
PART = r" (in the (?:middle|center)|in the \w+ (?:left|right)(?: corner)?|on the (?:left|right)(?: side)?|at the \w+)"


def is_part(text: str, item: Object) -> bool:
    """Whether an object lies where everyday words say."""
    sides = {
        "left": item.x < 32, "right": item.x > 32, "top": item.y < 32, "upper": item.y < 32, "bottom": item.y > 32,
        "lower": item.y > 32,
    }  # fmt: skip
    words = [word for word in text.split() if word in sides]
    if text.endswith("corner") and abs(item.x - 32) + abs(item.y - 32) < 32:
        return False
    if not words:
        return abs(item.x - 32) <= 9 and abs(item.y - 32) <= 9
    return all(sides[word] for word in words) and max(abs(item.x - 32), abs(item.y - 32)) > 9


def test_a_placed_caption_is_true_of_places_things_and_relations() -> None:
    rng = np.random.default_rng(8)
    counts, joined, halves, parts = Counter(), Counter(), Counter(), Counter()
    for scene in [make_scene(seed) for seed in range(1500)]:
        text = position_caption(scene, rng)
        check_words(text)
        claim = parse(re.sub(PART, "", re.sub(HALF, "", re.sub(CELL, "", text))))
        sized = claim.groups[0].size is not None
        assert Counter(claim.groups) == Counter(group_objects(scene.objects, size=sized))
        assert claim.background in (None, scene.background)
        for phrase in re.split(", | (?:to the left of|to the right of|above|below) (?=an? )", text):
            cells, half, part = (re.findall(pattern, phrase) for pattern in (CELL, HALF, PART))
            counts[bool(cells or half or part)] += 1
            (group,) = parse(re.sub(PART, "", re.sub(HALF, "", re.sub(CELL, "", phrase)))).groups
            alike = [o for o in scene.objects if o.pair == (group.color, group.shape) and group.size in (None, o.size)]
            if cells:  # all of the group's members, each in its own cell
                assert sorted(cells) == sorted(map(cell_text, alike)) and len(cells) == group.count
            if half:
                assert half == [half_of_image_text(item) for item in alike] and claim.relation is None and not cells
                halves[half[0]] += 1
            if part:
                assert len(part) == len(alike) == 1 and is_part(part[0], alike[0]), (text, scene)
                assert claim.relation is None and not cells and not half
                parts[part[0]] += 1
        if claim.relation is not None:
            by_look = {item.pair: item for item in scene.objects}
            subject, other = (by_look[group.color, group.shape] for group in claim.groups)
            assert holds(claim.relation.name, subject, other)
            assert {subject.shape, other.shape} != HELD_OUT_POSITION_SHAPES
            joined[claim.relation.name] += 1
    assert abs(counts[True] / counts.total() - 0.75) < 0.04 and min(joined[name] for name in RELATIONS) > 60
    assert min(halves.values()) > 50 and len(halves) == 4
    assert {"in the middle", "at the top", "at the bottom", "on the left", "in the upper right corner"} <= {*parts}


def test_a_caption_relates_groups_only_where_every_object_of_one_is_so_of_every_object_of_the_other() -> None:
    rng, relations, larger = np.random.default_rng(10), Counter(), 0
    for scene in [make_scene(seed, kind=kind) for seed in range(300) for kind in ("twins", "shared", "multi", "two")]:
        text = related_caption(scene, rng)
        if text is None:
            continue
        check_words(text)
        (name, phrase) = next(item for item in RELATIONS.items() if f" {item[1]} " in text)
        subjects, others = (parse(side) for side in text.split(f" {phrase} "))
        assert sorted(map(repr, (*subjects.groups, *others.groups))) == sorted(
            map(repr, group_objects(
                scene.objects, color=subjects.groups[0].color is not None, size=subjects.groups[0].size is not None
            ))
        )  # fmt: skip
        one, two = ([item for item in scene.objects if any(is_of(item, g) for g in side.groups)]
                    for side in (subjects, others))  # fmt: skip
        assert all(holds(name, a, b) for a in one for b in two) and len(one) + len(two) == len(scene.objects)
        assert not any({a.shape, b.shape} == HELD_OUT_POSITION_SHAPES for a in one for b in two)
        relations[name] += 1
        larger += len(scene.objects) > 2
    assert min(relations[name] for name in RELATIONS) > 100 and larger > 400
    alike = Scene("gray", tuple(Object("star", "red", "small", x, 30.0) for x in (10.0, 30.0)), "count")
    assert related_caption(alike, rng) is None  # one group


def is_of(item: Object, group: Group) -> bool:
    named = ((group.shape, item.shape), (group.color, item.color), (group.size, item.size))
    return all(wanted in (None, own) for wanted, own in named)


def test_a_caption_divides_objects_of_one_shape_by_what_tells_them_apart() -> None:
    red, blue, star = (
        Object("circle", "red", "small", 10.0, 10.0), Object("circle", "blue", "large", 40.0, 10.0),
        Object("star", "green", "small", 10.0, 40.0),
    )  # fmt: skip
    texts = {
        divided_caption(Scene("navy", objects, "shared"), np.random.default_rng(seed), order=range(len(objects)))
        for objects in ((red, blue, star), (red, star, blue), (red, star), (star, replace(star, size="large")))
        for seed in range(20)
    }
    first = {"two circles, one red and one blue, a green star", "two circles: one red, one blue, a green star"}
    last = {"two green stars, one small and one large", "two green stars: one small, one large"}
    assert texts == {None} | {text + ground for text in first | last for ground in ("", " on a navy background")}


def test_a_scene_that_has_no_such_difference_is_not_divided() -> None:
    rng = np.random.default_rng(11)
    one = Object("star", "green", "small", 10.0, 40.0)
    alike = (one, replace(one, x=40.0), Object("ring", "red", "small", 10.0, 10.0))
    assert divided_caption(Scene("gray", alike, "twins"), rng, order=range(3)) is None


def test_places_are_named_by_column_then_row_and_halves_on_the_farther_axis() -> None:
    assert half_of_image_text(Object("circle", "red", "small", x=40.0, y=10.0)) == "above"
    assert half_of_image_text(Object("circle", "red", "small", x=9.0, y=40.0)) == "to the left"
    assert cell_text(Object("circle", "red", "small", x=9.0, y=63.9)) == "column two row eight"


def test_size_and_background_are_each_said_in_half_independently() -> None:
    rng = np.random.default_rng(5)
    claims = [parse(caption(scene, rng)) for scene in SCENES * 5]
    mentioned = np.array([[claim.background is not None, claim.groups[0].size is not None] for claim in claims])
    assert np.abs(mentioned.mean(0) - 0.5).max() < 0.04
    assert abs(mentioned.all(1).mean() - 0.25) < 0.04


def test_order_is_shuffled_in_captions_and_fixed_in_descriptions() -> None:
    rng = np.random.default_rng(6)
    scene = make_scene(4, kind="multi")
    assert len({caption(scene, rng, size=False, background=False) for _ in range(60)}) > 4
    reversed_scene = Scene(scene.background, scene.objects[::-1], scene.kind)
    assert describe(reversed_scene) == describe(scene)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_mean_what_they_say(text: str) -> None:
    assert parse(text) == EXAMPLES[text]
    assert to_text(EXAMPLES[text]) == text
    assert parse(f"  {text.upper()} .\n") == EXAMPLES[text]


@pytest.mark.parametrize(
    "text",
    [
        "red",
        "the red circle",
        "a circle red",
        "zero red circles",
        "a red circle and",
        "on a gray background",
        "a red circle above",
        "a red circle on a red background",
        "remove the red circle",
        "a red circle above a blue star below a green ring",
    ],
)
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a caption such as"):
        parse(text)


def test_a_relation_needs_two_groups() -> None:
    with pytest.raises(ValueError, match="two groups"):
        to_text(Claim(None, (Group("ring", "red", None, 1),), Relation("left", 0, 1)))


# ---- words and tokenizer ---------------------------------------------------------------------------------------------


def test_the_vocabulary_is_exactly_what_training_says() -> None:
    rng = np.random.default_rng(1)
    used = {word for text in [*all_texts(2500), *TEMPLATES] for word in split_words(text)}
    for seed in range(1500):  # of version 2
        scene = make_scene(seed, kind=ALL_KINDS[seed % len(ALL_KINDS)])
        texts = [caption(scene, rng), open_caption(scene, rng), position_caption(scene, rng), DESCRIBE]
        kinds = edit_kinds(scene, naming=BY_ANYTHING)
        texts += [make_edit(scene, rng, kind, naming=BY_ANYTHING).instruction for kind in kinds]
        texts += [question.text for question in questions(scene, rng, (*QUESTION_KINDS, *BINDING_QUESTION_KINDS))]
        used |= {word for text in texts for word in split_words(paraphrase(text, rng))}
    assert used == set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


@pytest.mark.parametrize("folder", ["weights", "dualtoken"])
def test_words_of_trained_models_keep_their_numbers(folder: str) -> None:
    """A model trained on goes on with the rows of its words (`--init-from`); new words come after them."""
    stored = next((Path(spar.__file__).parent / "assets" / folder).rglob("tokenizer.json"))
    words = json.loads(stored.read_text(encoding="utf-8"))["model"]["vocab"]
    now = build_tokenizer().get_vocab()
    assert len(words) > 150 and {word: now[word] for word in words} == words


def test_unknown_words_are_named_and_known_ones_listed() -> None:
    with pytest.raises(InputError) as caught:
        check_words("a red dragon, a blue circle and a Dragon on a castle?")
    message = str(caught.value)
    assert "'dragon', 'castle';" in message and message.count("dragon") == 1
    assert all(shape in message for shape in SHAPES)


def test_at_most_ten_unknown_words_are_shown() -> None:
    with pytest.raises(InputError) as caught:
        check_words(" ".join(f"w{index}" for index in range(13)))
    assert "'w9' and 3 more;" in str(caught.value) and "w10" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "got none"), (" \n", "got none"), ("red " * 65, "at most 64 words, got 65"), (None, "got NoneType")],
)
def test_text_that_is_none_or_too_long_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_words(text)
    assert check_words("red " * 64) == ["red"] * 64


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_tokens_are_the_words_and_decode_to_the_text(tokenizer) -> None:
    for text in [*all_texts(100), "describe the image", "generate an image: a red circle, a star."]:
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == split_words(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_case_and_space_do_not_matter_and_strangers_are_unknown(tokenizer) -> None:
    assert tokenizer("A  Red\tCIRCLE , a star").input_ids == tokenizer("a red circle, a star").input_ids
    assert tokenizer("a dragon").input_ids[1] == tokenizer.unk_token_id


def test_the_chat_template_is_chatml_without_a_system_turn(tokenizer) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "is there an orange ring?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    question = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nis there an orange ring?<|im_end|>\n"
    assert text == question + "<|im_start|>assistant\nyes<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == question + "<|im_start|>assistant\n"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)
    assert tokens == (
        "<|im_start|> user \n <img> <IMG_CONTEXT> </img> \n is there an orange ring ? "
        "<|im_end|> \n <|im_start|> assistant \n"
    ).split(" ")


def test_special_tokens_are_their_own_and_leave_the_text(tokenizer) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|endoftext|>", "<|im_end|>", "<unk>")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<unk>"]
    assert set(tokenizer.all_special_tokens) == set(specials)
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(len(specials)))
    ids = tokenizer("a red circle, a star<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle, a star"
    assert not {"system", "user", "assistant"} & set(VOCABULARY)


def test_the_tokenizer_survives_saving(tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nwhat color is the ring?<|im_end|>\n"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded("a red circle, a star").input_ids) == "a red circle, a star"
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id


def test_articles_follow_the_sound() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("gray", (Object("ring", "orange", "small", 20, 20),), "single")
    assert caption(scene, rng, size=False, background=False) == "an orange ring"
    assert caption(scene, rng, size=True, background=False) == "a small orange ring"
