"""What lies outside the shapes world although its words are known, or contradicts itself: notes to a user, who gets a
guess there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from spar.worlds.shapes.detector import UNKNOWN, detect
from spar.worlds.shapes.forms import SYNONYMS
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, MAX_OBJECTS, SHAPES, SIDE, SIZES
from spar.worlds.shapes.tokenizer import ORDINALS, SINGULARS, split_words

TRUE_OVERLAP = 0.7  # least mean overlap of an image's objects with the world's shapes; reconstructions have 0.9
_CANONICAL = {other: word for word, others in SYNONYMS.items() for other in others}
_COUNTS = {"a": 1, "an": 1, "the": 1, "some": 2, **{word: number for number, word in enumerate(ORDINALS, start=1)}}
_UNSAID = {".", ",", "?", "!", ":", "please", "can", "could", "would", "you", "now"}
_THINGS = {*SHAPES, *SINGULARS, "object", "objects"}
_NAMED = {*_THINGS, "background", "it", "something"}
_UNTAUGHT = {"no": "to leave things out", "zero": "to leave things out", "or": "to choose"}
# Between two things: half of an image, as in "a star above, a ring below", is none.
_RELATIONS = re.compile(
    rf"\b(?:to the (?:left|right) of|above|below|over|under|beneath) (?:a|an|the|some|{'|'.join(ORDINALS)})\b"
)
_ON_BACKGROUND = re.compile(r"\bon (?:a|an|the) (?:\w+ )?background\b")
_LOOK = "|".join((*COLORS, *BACKGROUNDS, *SIZES))
# "a ring that is red": a red ring.
_THAT_IS = re.compile(rf"\b({'|'.join(sorted(_THINGS))}) that (?:is|are) ({_LOOK})\b")
_ALIKE = ((*COLORS, *BACKGROUNDS), tuple(SIZES), ORDINALS)  # of each, one thing has one


def is_of_this_world(words: Iterable[str]) -> bool:
    """Whether a vocabulary is that of the shapes world, of either version."""
    return {*SHAPES, *COLORS, *BACKGROUNDS, *SIZES} <= {*words}


def prompt_notes(text: str) -> list[str]:
    """What a prompt or instruction asks for that no scene has: too many objects, colours of the wrong thing, two
    colours of one thing, and what no caption or instruction of the training says.
    """
    plain = " ".join(_CANONICAL.get(word, word) for word in split_words(text))
    words, notes = _THAT_IS.sub(r"\2 \1", plain).split(), list[str]()
    counted = sum(_COUNTS.get(word, 0) for word, thing in _noun_phrases(words) if thing != "background")
    if counted > MAX_OBJECTS:
        notes.append(f"{counted} objects are asked for; the model has seen scenes of up to {MAX_OBJECTS}")
    said = " ".join(word for word in words if word not in _UNSAID)
    sizes, things = "|".join(SIZES), "|".join(sorted(_THINGS))
    to = "(?:to |should be |to be |into an? )?"
    for color in (name for name in BACKGROUNDS if name not in COLORS):
        has = rf"\b{color} (?:(?:{sizes}) )?(?:{things})\b|\bsomething {color}\b"
        has += rf"|\bone (?:(?:{sizes}) )?{color}\b(?! background)"
        gets = rf"\bthe (?:\w+ )*(?:{things})(?: (?:on|at) the \w+)? {to}{color}(?: one)?$"
        if re.search(has, said) or re.search(gets, said):
            notes.append(f"no object of the model's world is {color}; their colours are {', '.join(COLORS)}")
    for color in COLORS:
        if re.search(rf"\b{color} background\b|\bthe background (?:is )?{to}{color}$|\bon {color}$", said):
            notes.append(f"no background of the model's world is {color}; they are {', '.join(BACKGROUNDS)}")
    for one, other, thing in _contradictions(words):
        notes.append(f"{one} and {other} are both said of one {SINGULARS.get(thing, thing)}: expect a guess")
    for word in dict.fromkeys(word for word in words if word in _UNTAUGHT):
        notes.append(f"the model was not taught {_UNTAUGHT[word]} ({word!r}): it draws what is named")
    if (related := len(_RELATIONS.findall(" ".join(words)))) > 1:
        notes.append(f"{related} relations are asked for; the model has seen one in a prompt")
    if len(_ON_BACKGROUND.findall(" ".join(words))) > 1:
        notes.append("an image has one background: expect a guess")
    if not _NAMED & {*words}:
        notes.append("no object and no background is named: expect a guess")
    return notes


def _contradictions(words: list[str]) -> list[tuple[str, str, str]]:
    """Pairs of different colours, sizes or numbers that stand together before one thing, and the thing."""
    found, before = [], list[str]()
    for word in words:
        if word in _THINGS or word == "background":
            for names in _ALIKE:
                said = list(dict.fromkeys(one for one in before if one in names))
                found += [(said[0], said[1], word)] if len(said) > 1 else []
        before = [*before, word] if any(word in names for names in _ALIKE) else []
    return found


def _noun_phrases(words: list[str]) -> list[tuple[str, str]]:
    """(article or number, thing) of each phrase such as "two small red stars"."""
    phrases, opened = [], ""
    for word in words:
        if word in _COUNTS:
            opened = word
        elif word in _THINGS or word == "background":
            phrases.append((opened, word))
            opened = ""
        elif word not in COLORS and word not in SIZES and word not in BACKGROUNDS:
            opened = ""
    return phrases


def image_notes(image: np.ndarray, size: tuple[int, int]) -> list[str]:
    """Whether an image, as the model sees it, is no scene of the world.

    Args:
        image: uint8 [64, 64, 3], RGB.
        size: width and height of what the user gave.
    """
    seen = detect(image)
    overlaps = [item.overlap for item in seen.objects]
    strange = any(UNKNOWN in (item.shape, item.color) for item in seen.objects)
    true = overlaps and len(overlaps) <= MAX_OBJECTS and float(np.mean(overlaps)) >= TRUE_OVERLAP
    if seen.background != UNKNOWN and true and not strange:
        return []
    cut = "" if size[0] == size[1] else "cut to a square and "
    changed = "" if size == (SIDE, SIDE) else f" (it was {cut}resized from {size[0]} x {size[1]} pixels)"
    return [f"the image{changed} is outside the model's world of one to {MAX_OBJECTS} plain shapes: expect a guess"]
