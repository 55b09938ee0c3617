"""Other words for the world's captions, questions and edits: sentence forms, synonyms, polite forms, marks, capitals.

Captions, questions and instructions are made in canonical forms, which say what is true; `paraphrase` rewrites one of
them. Training and test forms are disjoint, and the words of the test forms all occur in training forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, RELATIONS, pick

SYNONYMS = {
    "large": ("big", "huge"),
    "small": ("little", "tiny"),
    "larger": ("bigger",),
    "gray": ("grey",),
    "purple": ("violet",),
    "circle": ("disc", "disk", "dot"),
    "circles": ("discs", "disks", "dots"),
    "square": ("box",),
    "squares": ("boxes",),
    "object": ("thing",),
    "objects": ("things",),
    "two": ("2",),
    "three": ("3",),
    "four": ("4",),
}
SYNONYM_SHARE = 0.25  # of the words that have synonyms
CANONICAL_SHARE = 0.3  # of training sentences that keep their form
POLITE_SHARE = 0.25  # of orders
_COLOR, _GROUND, _RELATION = "|".join(COLORS), "|".join(BACKGROUNDS), "|".join(RELATIONS.values())


@dataclass(frozen=True)
class Form:
    """A canonical sentence as a pattern, and others of the same meaning: those of training, and those of the tests."""

    kind: str
    pattern: str
    training: tuple[str, ...]
    test: tuple[str, ...]


EDIT_FORMS = (
    Form(
        "background", rf"(?:change the background to|make the background) (?P<c>{_GROUND})",
        ("paint the background {c}", "put it all on a {c} background", "the background should be {c}"),
        ("turn the background {c}", "change the color of the background to {c}", "i want a {c} background"),
    ),
    Form(
        "recolor",
        rf"(?:recolor (?P<o1>the .+) to|make (?P<o2>the .+)|change the color of (?P<o3>the .+) to) (?P<c>{_COLOR})",
        ("paint {o} {c}", "turn {o} {c}", "{o} should be {c}", "change {o} to {c}", "color {o} {c}", "recolor {o} {c}"),
        ("make the color of {o} {c}", "i want {o} to be {c}"),
    ),
    Form(
        "resize", r"make (?P<o>the .+) (?P<c>larger|smaller)",
        ("turn {o} into a {c} one", "{o} should be {c}", "change the size of {o}, make it {c}"),
        ("i want {o} to be {c}", "make the size of {o} {c}"),
    ),
    Form(
        "remove", r"(?:remove|delete) (?P<o>the .+)",
        ("take away {o}", "get rid of {o}", "i want {o} to go away", "erase {o}"),
        ("take {o} away", "{o} should go away"),
    ),
    Form(
        "replace", r"(?:replace (?P<o1>the .+?) with|change (?P<o2>the .+?) to) (?P<n>an? .+)",
        ("turn {o} into {n}", "swap {o} for {n}", "put {n} in the place of {o}"),
        ("swap {o} with {n}", "{o} should be {n}", "change {o} into {n}"),
    ),
    Form(
        "move", r"move (?P<o>the .+) (?P<p>to the left|to the right|up|down)",
        ("shift {o} {p}", "push {o} {p}", "{o} should go {p}", "push {o} more {p}"),
        ("i want {o} to go {p}", "shift {o} more {p}"),
    ),
    Form(
        "add", r"add (?P<n>an? .+)",
        ("draw {n}", "put {n} in the image", "there should be {n}", "insert {n}"),
        ("i want {n}", "add in {n}"),
    ),
)  # fmt: skip
QUESTION_FORMS = (
    Form(
        "background", r"what color is the background\?",
        ("which color is the background?", "what is the color of the background?", "tell me the background color"),
        ("which color does the background have?", "what is the background color?"),
    ),
    Form(
        "describe", r"describe the image",
        ("what is in the image?", "tell me what is in the picture", "what do you see?", "describe the picture"),
        ("tell me what is in the image", "what do you see in the image?", "what is in the picture?"),
    ),
    Form(
        "neighbor", rf"what is (?P<r>{_RELATION}) (?P<b>the .+)\?",
        ("which shape is {r} {b}?", "what shape do you see {r} {b}?", "what do you see {r} {b}?"),
        ("what shape is {r} {b}?", "tell me what is {r} {b}", "which object do you see {r} {b}?"),
    ),
    Form(
        "attribute", r"what (?P<c>color|shape|size) (?P<v>is|are) (?P<o>the .+)\?",
        ("which {c} {v} {o}?", "what is the {c} of {o}?", "what {c} do you see for {o}?", "which {c} {d} {o} have?"),
        ("tell me the {c} of {o}", "what {c} {d} {o} have?"),
    ),
    Form(
        "count", r"how many (?P<o>.+) are there\?",
        (
            "how many {o} do you see?", "how many {o} are in the image?", "count the {o}", "tell me the number of {o}",
            "how many {o}?",
        ),
        ("how many {o} can you see?", "what is the number of {o}?", "how many {o} does the image have?"),
    ),
    Form(
        "exists", r"is there (?P<n>an? .+)\?",
        ("do you see {n}?", "does the image have {n}?", "is {n} in the image?", "is there {n}, yes or no?"),
        ("can you see {n}?", "is there {n} in the image?"),
    ),
    Form(
        "position", rf"is (?P<o>the .+?) (?P<r>{_RELATION}) (?P<b>the .+)\?",
        ("do you see {o} {r} {b}?", "does the image have {o} {r} {b}?"),
        ("can you see {o} {r} {b}?", "{o} is {r} {b}, yes or no?"),
    ),
)  # fmt: skip
_CAPTIONS = (
    "an image of {x}", "a picture of {x}", "draw {x}", "show {x}", "show me {x}", "i want to see {x}",
)  # fmt: skip
# Of these the words come last in the vocabulary: models had been trained before, whose words keep their numbers.
_LATER_CAPTIONS = (
    "generate {x}", "create {x}", "generate an image of {x}", "create a picture of {x}", "make an image of {x}",
    "a photo of {x}", "a drawing of {x}", "i would like {x}", "only {x}", "just {x}",
)  # fmt: skip
_LATER_SINGLES = ("{c} {s}", "a {s} that is {c}", "draw a {s} that is {c}", "there is {x}")
_CAPTION_TESTS = ("draw an image of {x}", "a picture with {x}", "show me a picture of {x}", "i want {x}")
CAPTION_FORMS = (
    Form(
        "caption", rf"an? (?P<c>{_COLOR}) object",
        ("something {c}", "draw something {c}", "show me something {c}"),
        ("i want something {c}", "an image of something {c}"),
    ),
    Form(
        "caption", rf"(?P<x>an? (?P<c>{_COLOR}) (?P<s>\w+))",
        (*_CAPTIONS, *_LATER_CAPTIONS, *_LATER_SINGLES), _CAPTION_TESTS,
    ),
    Form(
        "caption", r"(?P<x>(?:an?|two|three|four|some|something) .+)", (*_CAPTIONS, *_LATER_CAPTIONS),
        _CAPTION_TESTS,
    ),
)  # fmt: skip
GROUND_FORMS = (("on {c}", "with a {c} background", "in front of a {c} background"), (", the background is {c}",))
RELATION_FORMS = {
    "to the left of": (("left of", "on the left of", "on the left side of"), ("to the left side of",)),
    "to the right of": (("right of", "on the right of", "on the right side of"), ("to the right side of",)),
    "above": (("over", "on top of", "somewhere above"), ("somewhere over",)),
    "below": (("under", "beneath", "somewhere below"), ("somewhere under",)),
}
POLITE = ("please {x}", "can you {x}?", "could you {x}?", "{x} please", "would you {x}?", "now {x}", "{x}, please")
POLITE_TEST = ("can you please {x}?", "could you {x} please?", "would you please {x}?", "please {x} now")
ORDERS = (
    "add", "change", "color", "count", "create", "delete", "draw", "erase", "generate", "get", "insert", "make", "move",
    "paint", "push", "put", "recolor", "remove", "replace", "shift", "show", "swap", "take", "tell", "turn",
)  # fmt: skip


def paraphrase(text: str, rng: np.random.Generator, *, test: bool = False) -> str:
    """The same caption, question or instruction in other words.

    A training sentence keeps its canonical form in CANONICAL_SHARE; a test sentence always gets a test form, if it is
    of a kind that has one. Both may get synonyms, capitals and final marks.

    Args:
        text: a canonical sentence: one of `captions.caption`, of `questions` or of `make_edit`.
        rng: source of the choices.
        test: whether to use the test forms in place of the training forms.
    """
    if test or rng.random() >= CANONICAL_SHARE:
        text = _recast_relation(_recast(text, rng, test=test), rng, test=test)
    if text.split()[0] in ORDERS and (test or rng.random() < POLITE_SHARE):
        text = pick(rng, POLITE_TEST if test else POLITE).format(x=text.removesuffix("?"))
    return _punctuate(_with_synonyms(text, rng), rng)


def _recast(text: str, rng: np.random.Generator, *, test: bool) -> str:
    """The sentence in a form of its kind; as it is if it is of none."""
    for form in (*QUESTION_FORMS, *EDIT_FORMS, *CAPTION_FORMS):
        found = re.fullmatch(form.pattern, text)
        if found:
            parts = {name[0]: value for name, value in found.groupdict().items() if value is not None}
            parts["d"] = "do" if parts.get("v") == "are" else "does"
            if "x" in parts:
                parts["x"] = _recast_ground(parts["x"], rng, test=test)
            return pick(rng, form.test if test else form.training).format(**parts)
    return text


def _recast_ground(text: str, rng: np.random.Generator, *, test: bool) -> str:
    """The caption with its background, if it names one, in other words in half of the cases."""
    found = re.fullmatch(rf"(?P<x>.+) on a (?P<c>{_GROUND}) background", text)
    if not found or rng.random() < 0.5:
        return text
    phrase = pick(rng, GROUND_FORMS[test]).format(c=found["c"])
    return found["x"] + (phrase if phrase.startswith(",") else f" {phrase}")


def _recast_relation(text: str, rng: np.random.Generator, *, test: bool) -> str:
    """The text with its relation, if it has one, in other words in half of the cases."""
    for canonical, forms in RELATION_FORMS.items():
        if f" {canonical} " in text and rng.random() < 0.5:
            return text.replace(f" {canonical} ", f" {pick(rng, forms[test])} ")
    return text


def _with_synonyms(text: str, rng: np.random.Generator) -> str:
    words = [
        pick(rng, SYNONYMS[word]) if word in SYNONYMS and rng.random() < SYNONYM_SHARE else word
        for word in re.findall(r"[^\s,.?:]+|[,.?:]|\s+", text)
    ]
    return re.sub(r"\ban? (\w)", _article, "".join(words))


def _article(found: re.Match[str]) -> str:
    return f"an {found[1]}" if found[1] in "aeiou" else f"a {found[1]}"


def _punctuate(text: str, rng: np.random.Generator) -> str:
    """Perhaps capitals, and perhaps a final mark more or less."""
    if text.endswith("?"):
        text = text[:-1] if rng.random() < 0.15 else text
    else:
        text += pick(rng, ("", "", "", ".", "!"))
    case = rng.random()
    return text.upper() if case < 0.05 else text[0].upper() + text[1:] if case < 0.4 else text


def form_words() -> tuple[str, ...]:
    """The words of all training forms and synonyms, each once, in an order in which those of later forms come last."""
    later = (*_LATER_CAPTIONS, *_LATER_SINGLES)
    templates = [t for form in (*QUESTION_FORMS, *EDIT_FORMS, *CAPTION_FORMS) for t in form.training if t not in later]
    templates += [*GROUND_FORMS[0], *POLITE, *(t for training, _ in RELATION_FORMS.values() for t in training)]
    templates += [word for words in SYNONYMS.values() for word in words]
    plain = re.sub(r"\{\w\}", " ", " ".join((*templates, *later)))
    return tuple(dict.fromkeys(re.findall(r"\w+", plain)))
