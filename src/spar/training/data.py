"""Data sets on disk as training data: one batch of the loader a step (formats: spar.data.sources).

A batch is a function of (seed, stage, step), whoever asks for it: a run resumes at its step on the same data, and other
data under a run that has begun are refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spar.common.config import read_json, write_json
from spar.common.errors import InputError
from spar.data.batches import Captioned, Edits, Images
from spar.data.buckets import make_buckets
from spar.data.loader import Loader, LoaderBatch, to_pixels
from spar.data.mixture import Mixture
from spar.data.sources import DataSource, open_source
from spar.models.tokenizer import UnifiedTokenizer
from spar.processing.prompts import PromptEncoder
from spar.training.config import DataConfig, StageConfig, weighted_sets
from spar.training.distributed import DistributedContext
from spar.training.feature_cache import FeatureCache, cache_key, sample_id
from spar.training.shapes_data import step_rng

FINGERPRINTS = "data.json"  # in a run: what the order of each stage's samples depends on


def open_sources(config: DataConfig, cache: Path | None = None) -> list[DataSource]:
    """The readers of a recipe's data sets; `cache` keeps the indexes of their shards."""
    return [open_source(path, cache=cache, workers=max(1, config.workers)) for _, path in weighted_sets(config.sets)]


def sources_of_stage(
    stage: StageConfig, sources: list[DataSource], weights: list[float]
) -> tuple[list[DataSource], list[float]]:
    """The sets of a stage and their shares of its samples: a unified stage divides them by `edit_share`.

    Raises:
        InputError: a share for which there is no set.
    """
    if stage.step != "unified":
        return sources, weights
    wanted = {"text_to_image": 1 - stage.edit_share, "edit": stage.edit_share}
    pairs = [*zip(sources, weights, strict=True)]
    totals = {kind: sum(weight for source, weight in pairs if source.kind == kind) for kind in wanted}
    for kind, share in wanted.items():
        if share and not totals[kind]:
            raise InputError(
                f"stage {stage.name}: edit_share {stage.edit_share} wants sets of kind {kind}, found none among "
                f"{', '.join(source.name for source in sources)}"
            )
    chosen = [(source, weight * wanted[source.kind] / totals[source.kind]) for source, weight in pairs]
    chosen = [(source, weight) for source, weight in chosen if weight]
    return [source for source, _ in chosen], [weight for _, weight in chosen]


def epochs_per_source(stage: StageConfig, sources: list[DataSource], weights: list[float]) -> dict[str, float]:
    """How often a stage shows each sample of each set."""
    return Mixture(*sources_of_stage(stage, sources, weights), batch=stage.batch).epochs(stage.steps)


class FilesTrainingData:
    """The data sets of a recipe, dealt to this process.

    Generation and editing share a unified stage by its `edit_share`; the sets' own weights hold among sets of one
    kind. A tokenizer stage sees the images of all sets, of edits the edited one.
    """

    def __init__(
        self, config: DataConfig, prompts: PromptEncoder, seed: int, *, side: int, stride: int, max_prompt_tokens: int,
        run: Path, parallel: DistributedContext,
    ) -> None:  # fmt: skip
        self.config, self.prompts, self.seed = config, prompts, seed
        self.side, self.stride, self.max_prompt_tokens = side, stride, max_prompt_tokens
        self.run, self.parallel = run, parallel
        self.weights = [weight for weight, _ in weighted_sets(config.sets)]
        self.sources = open_sources(config, run / "cache")
        self._cache: FeatureCache | None = None

    def open_cache(self, tokenizer: UnifiedTokenizer) -> None:
        """Take features from the recipe's cache from now on; InputError where it was made by another tokenizer."""
        self._cache = FeatureCache(Path(self.config.cache), cache_key(tokenizer, self.side, self.sources))

    def cached_features(self, count: int) -> Tensor | None:
        """The cache's `f_v` `[n, N, D]` of the images that `sample` would decode, or None without a cache."""
        if self._cache is None:
            return None
        mixture = self._mixture(64, self.weights, self.sources, 1.0)
        loader = Loader(mixture, workers=0, captions=False, known=_Known(self._cache))
        ids = [sample_id(*place) for batch in loader.batches(0, -(-count // 64)) for place in batch.places]
        return self._cache.rows(ids)["f_v"]

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The generator of one step's choices."""
        return step_rng(self.seed, stage, step)

    def batches(self, stage: StageConfig, start: int, parallel: DistributedContext) -> Iterator[Sequence[Images]]:
        """From step `start` of a stage on, this process's micro-batches of each step."""
        for batch in self._open(stage, start):
            parts = [parallel.rows(stage.batch, number) for number in range(parallel.config.grad_accum_steps)]
            yield [self._micro_batch(stage, batch, slice(p.start // parallel.world, None, p.step // parallel.world))
                   for p in parts]

    def _micro_batch(self, stage: StageConfig, batch: LoaderBatch, rows: slice) -> Images:
        """Rows of a process's batch: of a unified stage with texts and, from a cache, with features."""
        numbers = np.arange(len(batch.images))[rows]
        keys, where = np.full(len(numbers), -1), torch.from_numpy(numbers)
        if stage.step != "unified":
            return Images(keys=keys, pixels=to_pixels(batch.images[where]))
        texts = tuple(self._fitted(text) for text in batch.texts[rows])
        kind: dict[str, Any] = {"keys": keys, "texts": texts}
        if self._cache is not None:
            features = self._cache.rows([sample_id(*batch.places[number]) for number in numbers.tolist()])
            kind |= {"features": features}
        else:
            kind |= {"pixels": to_pixels(batch.images[where])}
        if batch.kind != "edit":
            return Captioned(**kind)
        return Edits(**kind, references=None if self._cache is not None else to_pixels(batch.inputs[where]))

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """The images that a stage of one process would see first, `count` or a few more."""
        found: list[Tensor] = []
        mixture = self._mixture(64, self.weights, self.sources, 1.0)
        for batch in Loader(mixture, workers=0, captions=False).batches(0, -(-count // 64)):
            found.append(to_pixels(batch.images))
        return tuple(found)

    def _open(self, stage: StageConfig, step: int) -> Iterator[LoaderBatch]:
        sources, weights = sources_of_stage(stage, self.sources, self.weights)
        aspect = self.config.max_aspect if stage.step == "tokenizer" else 1.0
        mixture = self._mixture(stage.batch, weights, sources, aspect, stage)
        self._check_same(stage.name, step, mixture.fingerprint())
        loader = Loader(
            mixture, rank=self.parallel.rank, world=self.parallel.world, workers=self.config.workers,
            bad_share=self.config.bad_share, bad_samples=self.run / "bad_samples.jsonl",
            captions=stage.step == "unified", one_reference=stage.step == "unified",
            known=_Known(self._cache) if self._cache is not None and stage.step == "unified" else None,
        )  # fmt: skip
        return loader.batches(step, stage.steps)

    def _mixture(
        self, batch: int, weights: list[float], sources: list[DataSource], aspect: float,
        stage: StageConfig | None = None,
    ) -> Mixture:  # fmt: skip
        side = (stage.image_size if stage else None) or self.side
        seed = int(self.rng(f"order-{stage.name}" if stage else "order", 0).integers(0, 2**31))
        return Mixture(sources, weights, batch=batch, seed=seed, buckets=make_buckets(side, aspect, self.stride))

    def _check_same(self, stage: str, step: int, fingerprint: str) -> None:
        """Remember what a stage's order depends on, and refuse another in the middle of it."""
        path = self.run / FINGERPRINTS
        known = read_json(path) if path.exists() else {}
        if step and known.get(stage, fingerprint) != fingerprint:
            raise InputError(
                f"stage {stage}: expected the data, weights and batch that it began with (step {step}), got others; "
                f"train the stage anew (--stage {stage}) to change them"
            )
        if self.parallel.main:
            write_json(path, {**known, stage: fingerprint})

    def _fitted(self, text: str) -> str:
        """A caption without the model's control tokens, cut to the longest prompt."""
        tokenizer = self.prompts.tokenizer
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, " ")
        ids = tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= self.max_prompt_tokens else tokenizer.decode(ids[: self.max_prompt_tokens])


class _Known:
    """Whether the cache holds a sample; a class, so that worker processes can be given it."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def __call__(self, identity: str, number: int) -> bool:
        return sample_id(identity, number) in self.cache
