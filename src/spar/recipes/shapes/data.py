"""The shapes world as training data: scenes, rendered once, dealt by (seed, stage, step)."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spar.common.errors import InputError
from spar.common.files import atomic_file
from spar.data.batches import Captioned, Descriptions, Dialogues, Edits, Images, Layouts
from spar.processing.prompts import DESCRIBE, PromptEncoder, QuestionAnswer, with_layout
from spar.recipes.shapes.curricula import CaptionLessons, Lessons, MixedLessons, QuestionData, UnifiedLessons
from spar.recipes.shapes.dense_tagging import (
    TagData,
    Tagged,
    TaggedCaptionData,
    TaggedCaptions,
    TaggedEdits,
    TaggedLayouts,
)
from spar.training.config import Recipe, StageConfig
from spar.training.data import CaptionData, DataConfig, ImageData, MixedData, StageData, TrainingData, resized
from spar.training.distributed import DistributedContext
from spar.worlds.shapes.captions import (
    caption,
    describe,
    divided_caption,
    edit_layout,
    layout,
    open_caption,
    position_caption,
    related_caption,
)
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.edits import BY_ANYTHING, Edit, edit_kinds, make_edit
from spar.worlds.shapes.forms import paraphrase
from spar.worlds.shapes.questions import questions
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import KINDS, SIDE, Scene, pick
from spar.worlds.shapes.tokenizer import ORDINALS, build_tokenizer

# Kinds of scenes by frequency: of those with several objects 38 % need binding.
KIND_WEIGHTS = {**dict.fromkeys(KINDS, 1.0), "shared": 1.5, "twins": 1.0}
OPEN_CAPTIONS = 0.15
RELATED_CAPTIONS, DIVIDED_CAPTIONS = 0.2, 0.15  # where the scene has such a caption
FOLLOWING, TURNS = 0.5, 3
EMPTY_TOKENS = 0.15  # of the tokens without an object, that count among the tags of a prompt
POSITION_PROMPTS = 0.2  # of the captions that are answered with a layout, those that say where things are


def draw_edit(scene: Scene, rng: np.random.Generator) -> Edit:
    """An edit of any kind that a scene allows, which names objects by anything that singles them out."""
    return make_edit(scene, rng, pick(rng, edit_kinds(scene, naming=BY_ANYTHING)), naming=BY_ANYTHING)


@dataclass(frozen=True)
class ShapesData(DataConfig):
    """Scenes of the shapes world: `scenes` train, and `edits` of them carry an edit."""

    kind: ClassVar[str] = "shapes"
    serves: ClassVar[tuple[type[StageData], ...]] = (
        ImageData, CaptionData, MixedData, CaptionLessons, MixedLessons, QuestionData, TagData, TaggedCaptionData,
        UnifiedLessons,
    )  # fmt: skip
    scenes: int = 32768
    edits: int = 16384

    def __post_init__(self) -> None:
        for name in ("scenes", "edits"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name}: expected at least 1, got {getattr(self, name)}")
        if self.edits > self.scenes:
            raise InputError(f"data.edits: expected at most one for each of {self.scenes} scenes, got {self.edits}")

    def open(
        self, recipe: Recipe, prompts: PromptEncoder, run: Path, parallel: DistributedContext
    ) -> "ShapesTrainingData":
        return ShapesTrainingData(
            self, recipe.image_size // recipe.token_stride, recipe.seed, run / "cache"
        )

    def text_tokenizer(self) -> Any:
        return build_tokenizer()

    def describe(self, stage: StageConfig) -> str:
        return f"{self.scenes:,} scenes: {stage.data}"


class ShapesTrainingData(TrainingData):
    """A fixed set of scenes, rendered once; the first `edits` of them also have an edited image.

    Args:
        grid: visual tokens a side, for the tags of each.
        cache: a folder that keeps the rendered images.
    """

    def __init__(self, config: ShapesData, grid: int, seed: int, cache: Path | None = None) -> None:
        super().__init__(seed)
        self.config, self.grid = config, grid
        self.scenes = [scene_at("train", i, KIND_WEIGHTS) for i in range(config.scenes)]
        self.edits = [draw_edit(self.scenes[i], np.random.default_rng((seed, 1, i))) for i in range(config.edits)]
        self.kinds = np.array([scene.kind for scene in self.scenes])
        self.images = _rendered(cache, "scenes", self.scenes)
        self.edited = _rendered(cache, "edits", [edit.target for edit in self.edits])

    def get_batch(self, stage: StageConfig, step: int, rows: slice) -> Images:
        """Rows of a step's whole batch; one of captions and edits is of edits with the stage's share."""
        rng, data = self.rng(stage.name, step), stage.data
        editing = isinstance(data, MixedData) and bool(rng.random() < data.edit_share)
        placed = data.position_captions if isinstance(data, Lessons | UnifiedLessons) else 0.0
        kinds = data.scene_kinds if isinstance(data, Lessons | QuestionData) else ()
        captioned = isinstance(data, CaptionData | TaggedCaptionData)
        if isinstance(data, UnifiedLessons):
            captioned = bool(rng.random() < data.caption_share)
        if isinstance(data, QuestionData) and not captioned and rng.random() < data.prompt_share:
            return self.described(rng, data, stage.batch, rows)
        drawn = self.draw(rng, stage.batch, edits=editing, kinds=kinds)
        indices = drawn[rows]
        pixels = self.pixels(indices, edited=editing)
        if editing:
            texts = tuple(self.instructions(rng, drawn)[rows])
            if isinstance(data, MixedLessons) and data.edit_layouts and rng.random() < data.edit_layouts:
                layouts = self.edit_layouts(drawn, rng, data.layout_errors)[rows]
                texts = tuple(map(with_layout, texts, layouts))
            return Edits(keys=indices, pixels=pixels, texts=texts, references=self.pixels(indices))
        if isinstance(data, MixedLessons) and data.layouts and rng.random() < data.layouts:
            return Layouts(keys=indices, pixels=pixels, texts=self.layouts(rng, drawn)[rows])
        laid_out = data.layout_captions if isinstance(data, UnifiedLessons) and captioned else 0.0
        if laid_out and rng.random() < laid_out:
            return Captioned(keys=indices, pixels=pixels, texts=self.layouts(rng, drawn)[rows])
        if captioned:
            texts = tuple(self.captions(rng, drawn, position_captions=placed)[rows])
            if isinstance(data, TaggedCaptionData):
                return TaggedCaptions(keys=indices, pixels=pixels, texts=texts, tags=self.tags(indices))
            return Captioned(keys=indices, pixels=pixels, texts=texts)
        if isinstance(data, QuestionData):
            turns = tuple(map(tuple, self.turns(rng, drawn, data)[rows]))
            return Dialogues(keys=indices, pixels=pixels, turns=turns)
        if isinstance(data, TagData):
            return Tagged(keys=indices, pixels=pixels, tags=self.tags(indices))
        side = data.image_size if isinstance(data, ImageData) else None
        return Images(keys=indices, pixels=resized(pixels, side))

    def tags(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The tags of each visual token of some scenes."""
        return dense_tags([self.scenes[i] for i in indices], self.grid)

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """The first images, in chunks of 64."""
        return self.pixels(np.arange(min(count, len(self.images)))).split(64)

    def draw(
        self, rng: np.random.Generator, count: int, *, edits: bool = False, kinds: tuple[str, ...] = ()
    ) -> np.ndarray:
        """Indices of `count` scenes, with an edit if asked; of the kinds named, each as often as it is named."""
        known = self.kinds[: len(self.edits)] if edits else self.kinds
        if not kinds:
            return rng.integers(0, len(known), count)
        pools = [pool for pool in (np.flatnonzero(known == kind) for kind in kinds) if len(pool)]
        if not pools:
            raise InputError(f"expected scenes of the kinds {', '.join(kinds)} among those of the recipe, found none")
        return np.array([rng.choice(pools[i]) for i in rng.integers(0, len(pools), count)])

    def pixels(self, indices: np.ndarray, *, edited: bool = False) -> Tensor:
        """`[B, 3, 64, 64]` float in [0, 1]."""
        source = self.edited if edited else self.images
        return torch.from_numpy(source[indices]).permute(0, 3, 1, 2).float().div_(255)

    def layouts(self, rng: np.random.Generator, indices: np.ndarray) -> tuple[str, ...]:
        """The layout of each scene."""
        return tuple(layout(self.scenes[i], layout_order(self.scenes[i], rng)) for i in indices)

    def edit_layouts(
        self, indices: np.ndarray, rng: np.random.Generator | None = None, errors: float = 0.0
    ) -> tuple[str, ...]:
        """The layout of each edit; the share `errors` of them has the object that goes or changes in a wrong cell."""
        layouts = []
        for i in indices:
            scene, target = self.scenes[i], self.edits[i].target
            if rng is not None and errors and rng.random() < errors:
                scene, target = misplaced(scene, target, rng)
            layouts.append(edit_layout(scene, target))
        return tuple(layouts)

    def captions(self, rng: np.random.Generator, indices: np.ndarray, *, position_captions: float = 0.0) -> list[str]:
        """A caption of each scene; the share `position_captions` of them also says where things lie."""
        placed = rng.random(len(indices)) < position_captions if position_captions else np.zeros(len(indices), bool)
        return [
            position_caption(self.scenes[i], rng) if is_placed else self.caption(rng, self.scenes[i])
            for i, is_placed in zip(indices, placed, strict=True)
        ]

    def caption(self, rng: np.random.Generator, scene: Scene, order: Sequence[int] | None = None) -> str:
        """A caption in training forms; in OPEN_CAPTIONS one that leaves something open, in others one that relates
        groups of objects or says what tells objects of one shape apart.
        """
        drawn, said = rng.random(), None
        if drawn < OPEN_CAPTIONS:
            said = open_caption(scene, rng, order=order)
        elif drawn < OPEN_CAPTIONS + RELATED_CAPTIONS:
            said = related_caption(scene, rng, order=order)
        elif drawn < OPEN_CAPTIONS + RELATED_CAPTIONS + DIVIDED_CAPTIONS:
            said = divided_caption(scene, rng, order=order)
        return paraphrase(said or caption(scene, rng, order=order), rng)

    def instructions(self, rng: np.random.Generator, indices: np.ndarray) -> list[str]:
        """The instruction of each edit, in training forms."""
        return [paraphrase(self.edits[i].instruction, rng) for i in indices]

    def described(self, rng: np.random.Generator, data: QuestionData, count: int, rows: slice) -> Descriptions:
        """Prompts for images, of captions or of edits, with the description of what is to be seen."""
        editing = bool(rng.random() < data.edit_prompts)
        drawn = self.draw(rng, count, edits=editing, kinds=data.scene_kinds)
        if data.layouts and not editing:
            return self.laid_out(rng, drawn, rows)
        if editing:
            prompts, scenes = self.instructions(rng, drawn), [self.edits[i].target for i in drawn]
        else:
            scenes = [self.scenes[i] for i in drawn]
            prompts = [paraphrase(caption(scene, rng, background=True, size=True), rng) for scene in scenes]
        indices = drawn[rows]
        pixels, laid_out = self.pixels(indices), editing and data.edit_layouts
        texts = self.edit_layouts(indices) if laid_out else tuple(describe(scene) for scene in scenes[rows])
        if not editing:
            return Descriptions(keys=indices, pixels=pixels, prompts=tuple(prompts[rows]), texts=texts, edits=False)
        tags, before = dense_tags(scenes[rows], self.grid), dense_tags([self.scenes[i] for i in indices], self.grid)
        empty = torch.from_numpy(rng.random((count, self.grid**2)) < EMPTY_TOKENS)[rows]
        return (TaggedLayouts if laid_out else TaggedEdits)(
            keys=indices, pixels=pixels, prompts=tuple(prompts[rows]), texts=texts, edits=True, tags=tags,
            counted=(tags["shape"] > 0) | (before["shape"] > 0) | empty,
        )  # fmt: skip

    def laid_out(self, rng: np.random.Generator, drawn: np.ndarray, rows: slice) -> TaggedLayouts:
        """Captions with layouts of the same scenes in the same order, and what each visual token will show."""
        scenes, prompts, texts = [self.scenes[i] for i in drawn], [], []
        placed = rng.random(len(scenes)) < POSITION_PROMPTS
        for scene, is_placed in zip(scenes, placed, strict=True):
            order = layout_order(scene, rng)
            said = position_caption(scene, rng, order=order) if is_placed else self.caption(rng, scene, order)
            prompts.append(said)
            texts.append(layout(scene, order))
        tags = dense_tags(scenes[rows], self.grid)
        empty = torch.from_numpy(rng.random((len(scenes), self.grid**2)) < EMPTY_TOKENS)[rows]
        return TaggedLayouts(
            keys=drawn[rows], pixels=self.pixels(drawn[rows]), prompts=tuple(prompts[rows]), texts=tuple(texts[rows]),
            edits=False, tags=tags, counted=(tags["shape"] > 0) | empty,
        )  # fmt: skip

    def turns(
        self, rng: np.random.Generator, indices: np.ndarray, data: QuestionData
    ) -> list[list[QuestionAnswer]]:
        """Questions about each scene in training forms, none twice, and at last its description.

        A turn goes on with the conversation of the one before it in FOLLOWING of the cases, to TURNS turns at most.
        """
        rows, kinds = [], data.questions
        for i in indices:
            scene, row = self.scenes[i], []
            if data.per_image:
                kinds = tuple(rng.permutation(data.questions)[: data.per_image].tolist())
            asked = [(q.text, q.answer) for q in dict.fromkeys(questions(scene, rng, kinds))]
            length = 0  # of the conversation so far
            for text, answer in (*asked, (DESCRIBE, describe(scene))):
                follows = 0 < length < TURNS and bool(rng.random() < FOLLOWING)
                length = length + 1 if follows else 1
                row.append(QuestionAnswer(paraphrase(text, rng), answer, follows=follows))
            rows.append(row)
        return rows


def misplaced(scene: Scene, target: Scene, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """An edit whose object that goes or changes lies elsewhere, one time of two in a cell nearby, else anywhere; one
    that moves has its new place all the same.
    """
    cell = SIDE / len(ORDINALS)
    gone = [item for item in scene.objects if item not in target.objects]
    moved = {}
    for item in gone:
        if rng.random() < 0.5:
            x, y = (float(np.clip(at + cell * rng.integers(-1, 2), 0, SIDE - 1)) for at in (item.x, item.y))
        else:
            x, y = (float(at) for at in rng.uniform(0, SIDE - 1, 2))
        moved[item.x, item.y] = x, y

    def placed(one: Scene) -> Scene:
        places = [moved.get((item.x, item.y), (item.x, item.y)) for item in one.objects]
        items = (replace(item, x=x, y=y) for item, (x, y) in zip(one.objects, places, strict=True))
        return replace(one, objects=tuple(items))

    return placed(scene), placed(target)


def layout_order(scene: Scene, rng: np.random.Generator) -> list[int]:
    """A random order of a scene's objects in which those of one color and shape, which most captions name together,
    follow each other; of these, those of one size, from left to right.

    Of objects that one group of a caption names, any order would be right. With a single one the LLM has less to guess,
    and each object's place depends on those to its left.
    """
    order: list[int] = rng.permutation(len(scene.objects)).tolist()
    pairs: dict[tuple[str, str], int] = {}
    looks: dict[tuple[str, str, str], int] = {}
    for place, index in enumerate(order):
        item = scene.objects[index]
        pairs.setdefault(item.pair, place)
        looks.setdefault((*item.pair, item.size), place)

    def rank(index: int) -> tuple[float, ...]:
        item = scene.objects[index]
        return (pairs[item.pair], looks[*item.pair, item.size], item.x, item.y)

    return sorted(order, key=rank)


def dense_tags(scenes: list[Scene], grid: int) -> dict[str, Tensor]:
    """Tags of each of `grid * grid` visual tokens, `[B, grid * grid, ...]` by name."""
    columns = [dense_targets(scene, grid) for scene in scenes]
    return {name: torch.from_numpy(np.stack([c[name] for c in columns])).flatten(1, 2) for name in columns[0]}


def _rendered(cache: Path | None, name: str, scenes: list[Scene]) -> np.ndarray:
    """The images of scenes as one array, kept as a `.npy` named by what it shows (never pickled)."""
    digest = zlib.crc32(repr(scenes).encode())
    path = cache / f"{name}-{len(scenes)}-{digest:08x}.npy" if cache else None
    if path and path.exists():
        return np.load(path, allow_pickle=False)
    stack = np.stack([render(scene) for scene in scenes]) if scenes else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    if path:
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, stack)
    return stack
