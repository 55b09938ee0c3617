"""Training data: images, captions, questions and edits dealt by (seed, stage, step); here of the shapes world.

Nothing is drawn from a running generator: the batch of a step is a function of the recipe's seed, the stage's name and
the step, so that a resumed run sees exactly what it would have seen.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spar.common.errors import InputError
from spar.data.batches import Captioned, Dialogues, Edits, Images, Tagged
from spar.processing.prompts import DESCRIBE, PromptEncoder, QuestionAnswer
from spar.training.config import DataConfig, StageConfig
from spar.training.distributed import DistributedContext
from spar.worlds.shapes.captions import caption, describe, position_caption
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.edits import Edit, make_edit
from spar.worlds.shapes.questions import questions
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import SIDE, Scene


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """The generator of one step's choices."""
    return np.random.default_rng((seed, zlib.crc32(stage.encode()), step))


class TrainingData(Protocol):
    """Where a stage's batches come from."""

    prompts: PromptEncoder

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The generator of one step's choices."""

    def batches(self, stage: StageConfig, start: int, parallel: DistributedContext) -> Iterator[Sequence[Images]]:
        """From step `start` of a stage on, this process's micro-batches of each step."""

    def cached_features(self, count: int) -> Tensor | None:
        """`f_v` `[n, N, D]` of up to `count` images that were computed before the run, or None."""

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """About `count` images to measure features on, in chunks, the same on every process."""


class ShapesTrainingData:
    """A fixed set of scenes, rendered once; the first `edits` of them also have an edited image."""

    def __init__(self, config: DataConfig, prompts: PromptEncoder, seed: int, cache: Path | None = None) -> None:
        self.config, self.prompts, self.seed = config, prompts, seed
        self.grid = math.isqrt(prompts.visual_tokens)
        self.scenes = [scene_at("train", i) for i in range(config.scenes)]
        self.edits: list[Edit] = [
            make_edit(self.scenes[i], np.random.default_rng((seed, 1, i))) for i in range(config.edits)
        ]
        self.kinds = np.array([scene.kind for scene in self.scenes])
        self.images = _rendered(cache, "scenes", self.scenes)
        self.edited = _rendered(cache, "edits", [edit.target for edit in self.edits])

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The generator of one step's choices."""
        return step_rng(self.seed, stage, step)

    def batches(self, stage: StageConfig, start: int, parallel: DistributedContext) -> Iterator[Sequence[Images]]:
        """From step `start` of a stage on, this process's micro-batches of each step."""
        for step in range(start, stage.steps):
            parts = [parallel.rows(stage.batch, number) for number in range(parallel.config.grad_accum_steps)]
            yield [self.get_batch(stage, step, rows) for rows in parts]

    def get_batch(self, stage: StageConfig, step: int, rows: slice) -> Images:
        """Rows of a step's whole batch; a unified step edits with the stage's share."""
        rng = self.rng(stage.name, step)
        editing = stage.step == "unified" and bool(rng.random() < stage.edit_share)
        drawn = self.draw(rng, stage.batch, edits=editing, kinds=stage.scene_kinds)
        indices = drawn[rows]
        pixels = resized(self.pixels(indices, edited=editing), stage.image_size)
        if editing:
            texts = tuple(self.instructions(drawn)[rows])
            references = resized(self.pixels(indices), stage.image_size)
            return Edits(keys=indices, pixels=pixels, texts=texts, references=references)
        if stage.step in ("dit", "unified"):
            texts = tuple(self.captions(rng, drawn, position_captions=stage.position_captions)[rows])
            return Captioned(keys=indices, pixels=pixels, texts=texts)
        if stage.step == "mllm":
            turns = tuple(map(tuple, self.turns(rng, drawn, stage.questions)[rows]))
            return Dialogues(keys=indices, pixels=pixels, turns=turns)
        if stage.step == "encoder":
            return Tagged(keys=indices, pixels=pixels, tags=self.dense(indices, self.grid))
        return Images(keys=indices, pixels=pixels)

    def cached_features(self, count: int) -> Tensor | None:
        """None: nothing is computed before the run."""

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

    def captions(self, rng: np.random.Generator, indices: np.ndarray, *, position_captions: float = 0.0) -> list[str]:
        """A caption of each scene; the share `position_captions` of them also says where things lie."""
        placed = rng.random(len(indices)) < position_captions if position_captions else np.zeros(len(indices), bool)
        return [
            position_caption(self.scenes[i], rng) if is_placed else caption(self.scenes[i], rng)
            for i, is_placed in zip(indices, placed, strict=True)
        ]

    def instructions(self, indices: np.ndarray) -> list[str]:
        return [self.edits[i].instruction for i in indices]

    def turns(
        self, rng: np.random.Generator, indices: np.ndarray, kinds: tuple[str, ...]
    ) -> list[list[QuestionAnswer]]:
        """Questions of the given kinds about each scene, none twice, and at last its description."""
        rows = []
        for i in indices:
            scene = self.scenes[i]
            asked = dict.fromkeys(questions(scene, rng, kinds))
            rows.append([*(QuestionAnswer(q.text, q.answer) for q in asked), QuestionAnswer(DESCRIBE, describe(scene))])
        return rows

    def dense(self, indices: np.ndarray, grid: int) -> dict[str, Tensor]:
        """Per-token targets `[B, grid * grid, ...]` for the encoder's pre-training."""
        columns = [dense_targets(self.scenes[i], grid) for i in indices]
        return {
            name: torch.from_numpy(np.stack([c[name] for c in columns])).flatten(1, 2) for name in columns[0]
        }


def _rendered(cache: Path | None, name: str, scenes: list[Scene]) -> np.ndarray:
    """The images of scenes as one array, kept as a `.npy` named by what it shows (never pickled)."""
    digest = zlib.crc32(repr(scenes).encode())
    path = cache / f"{name}-{len(scenes)}-{digest:08x}.npy" if cache else None
    if path and path.exists():
        return np.load(path, allow_pickle=False)
    stack = np.stack([render(scene) for scene in scenes]) if scenes else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part.npy")
        np.save(aside, stack)
        aside.rename(path)
    return stack


def resized(pixels: Tensor, side: int | None) -> Tensor:
    """Images `[B, 3, H, W]` at `side` x `side`, or as they are where that is None."""
    if side is None or pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


class InMemoryFeatureCache:
    """Frozen features of a fixed set of images, computed at the first use of each; rows are kept in bfloat16."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.tables: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, keys: np.ndarray, pixels: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The features of images `[B, 3, H, W]` by their `keys` `[B]`.

        Args:
            compute: turns images `[n, 3, H, W]` into named tensors `[n, ...]`.
        """
        missing = [index for index, key in enumerate(keys.tolist()) if key not in self.rows]
        if missing:
            new, first = np.unique(keys[missing], return_index=True)
            found = compute(pixels[torch.tensor(missing)[torch.from_numpy(first)].to(pixels.device)])
            for name, rows in found.items():
                self._append(name, rows)
            self.rows |= {key: len(self.rows) + index for index, key in enumerate(new.tolist())}
        where = torch.tensor([self.rows[key] for key in keys.tolist()])
        return {name: table[where.to(table.device)] for name, table in self.tables.items()}

    def _append(self, name: str, rows: Tensor) -> None:
        """Put rows after those that are kept; the table doubles when it is full."""
        used, table = len(self.rows), self.tables.get(name)
        if table is None or used + len(rows) > len(table):
            larger = torch.empty(
                (max(2 * used, used + len(rows)), *rows.shape[1:]), dtype=torch.bfloat16, device=rows.device
            )
            if table is not None:
                larger[:used] = table[:used]
            self.tables[name] = table = larger
        table[used : used + len(rows)] = rows.to(torch.bfloat16)
