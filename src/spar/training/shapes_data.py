"""Training data: pictures, captions, questions and edits dealt by (seed, stage, step); here of the shapes world.

Nothing is drawn from a running generator: the batch of a step is a function of the recipe's seed, the stage's name and
the step, so that a resumed run sees exactly what it would have seen.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spar.common.errors import InputError
from spar.processing.prompts import DESCRIBE, PromptEncoder, QuestionAnswer
from spar.training.config import DataConfig, StageConfig
from spar.worlds.shapes.captions import caption, describe, position_caption
from spar.worlds.shapes.dataset import dense_targets, scene_at
from spar.worlds.shapes.edits import Edit, make_edit
from spar.worlds.shapes.questions import questions
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import SIDE, Scene


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step that one process computes: which pictures, whether they are edits, and the words of each."""

    indices: np.ndarray
    editing: bool = False
    words: tuple[str, ...] = ()


def step_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """The generator of one step's choices."""
    return np.random.default_rng((seed, zlib.crc32(stage.encode()), step))


class TrainingData(Protocol):
    """Where a step's pictures and words come from.

    `fixed`: whether an index always names the same picture. `sized`: whether pictures come at the stage's own size.
    """

    prompts: PromptEncoder
    fixed: bool
    sized: bool

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The generator of one step's choices."""

    def get_batch(self, stage: StageConfig, step: int, rows: slice) -> StepBatch:
        """Rows of a step's whole batch."""

    def pixels(self, indices: np.ndarray, *, edited: bool = False) -> Tensor:
        """`[B, 3, H, W]` in [0, 1]: of an edit the picture before it, or the one behind it."""

    def features(self, name: str, indices: np.ndarray) -> dict[str, Tensor] | None:
        """Features of a picture set (`scenes`, or `edited`) that were computed before the run, or None."""

    def cached_features(self, count: int) -> Tensor | None:
        """`f_v` `[n, N, D]` of up to `count` images that were computed before the run, or None."""

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """About `count` pictures to measure features on, in chunks, the same on every process."""


class ShapesTrainingData:
    """A fixed set of scenes, rendered once; the first `edits` of them also have an edited picture."""

    fixed = True
    sized = False

    def __init__(self, config: DataConfig, prompts: PromptEncoder, seed: int, cache: Path | None = None) -> None:
        self.config, self.prompts, self.seed = config, prompts, seed
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

    def get_batch(self, stage: StageConfig, step: int, rows: slice) -> StepBatch:
        """Rows of a step's whole batch; a unified step edits with the stage's share."""
        rng, captioned = self.rng(stage.name, step), stage.step in ("dit", "unified")
        editing = stage.step == "unified" and bool(rng.random() < stage.edit_share)
        indices = self.draw(rng, stage.batch, edits=editing, kinds=stage.scene_kinds)
        words: list[str] = []
        if captioned:
            words = (
                self.instructions(indices)
                if editing
                else self.captions(rng, indices, position_captions=stage.position_captions)
            )
        return StepBatch(indices[rows], editing, tuple(words[rows]))

    def features(self, name: str, indices: np.ndarray) -> dict[str, Tensor] | None:
        """None: these pictures are kept by the step itself."""

    def cached_features(self, count: int) -> Tensor | None:
        """None: nothing is computed before the run."""

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """The first pictures, in chunks of 64."""
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
        """A caption of each scene; the share `places` of them also says where things lie."""
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
    """The pictures of scenes as one array, kept as a `.npy` named by what it shows (never pickled)."""
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


class InMemoryFeatureCache:
    """Frozen features of a fixed set of pictures, computed the first time each is asked for.

    `compute` turns indices into named tensors `[n, ...]`; rows are kept in bfloat16.
    """

    def __init__(self, count: int, compute: Callable[[np.ndarray], dict[str, Tensor]]) -> None:
        self.compute = compute
        self.known = np.zeros(count, bool)
        self.tables: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, indices: np.ndarray) -> dict[str, Tensor]:
        missing = np.unique(indices[~self.known[indices]])
        if len(missing):
            for name, rows in self.compute(missing).items():
                if name not in self.tables:
                    self.tables[name] = torch.empty(
                        (len(self.known), *rows.shape[1:]), dtype=torch.bfloat16, device=rows.device
                    )
                self.tables[name][torch.from_numpy(missing)] = rows.to(torch.bfloat16)
            self.known[missing] = True
        where = torch.from_numpy(indices)
        return {name: table[where] for name, table in self.tables.items()}
