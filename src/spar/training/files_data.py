"""Data sets on disk as training data: one batch of the loader a step (formats: spar.data.sources).

A batch is a function of (seed, stage, step) on any process: a run resumes at its step on the same data, and other
data under a run that has begun are refused.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from spar.common.config import changes_no_result, read_json, write_json
from spar.common.errors import InputError
from spar.data.batches import Captioned, Dialogues, Edits, Images
from spar.data.buckets import STRIDE, Size, make_buckets
from spar.data.loader import Loader, LoaderBatch, to_pixels
from spar.data.mixture import Mixture
from spar.data.samples import BadSample, Sample
from spar.data.sources import DataSource, open_source
from spar.models.tokenizer import UnifiedTokenizer
from spar.processing.prompts import PromptEncoder, QuestionAnswer
from spar.training.caption_words import check_words
from spar.training.config import Recipe, StageConfig
from spar.training.data import (
    CaptionData,
    CaptionDialogueData,
    DataConfig,
    DialogueData,
    ImageData,
    MixedData,
    StageData,
    TrainingData,
)
from spar.training.distributed import DistributedContext
from spar.training.feature_cache import FeatureCache, cache_key, sample_id
from spar.training.objectives.base import check_at_least

FINGERPRINTS = "data.json"  # in a run: what the order of each stage's samples depends on


@dataclass(frozen=True)
class FilesData(DataConfig):
    """Data sets on disk.

    `sets` are paths, "PATH" or "WEIGHT=PATH" (spar.data.sources says which formats), decoded by `workers` processes of
    each training process; a share of bad samples above `bad_share` ends the run, and a share of words above
    `unknown_share` that the text tokenizer lacks lets none begin; `max_aspect` cuts images without captions to several
    proportions; `color_profiles` converts images to sRGB by their own profiles; `cache` is a folder of features (spar
    cache) that unified stages read in place of images. `dialogue_tokens` is the longest conversation, with its image:
    turns that do not fit are left out, and the answer of a first one is cut.
    """

    kind: ClassVar[str] = "files"
    serves: ClassVar[tuple[type[StageData], ...]] = (
        ImageData, CaptionData, MixedData, DialogueData, CaptionDialogueData,
    )  # fmt: skip
    sets: tuple[str, ...] = changes_no_result(but=lambda sets: [weight for weight, _ in weighted_sets(sets)])
    workers: int = changes_no_result(4)
    bad_share: float = changes_no_result(0.01)
    unknown_share: float = changes_no_result(0.01)
    max_aspect: float = 1.0
    color_profiles: bool = True
    dialogue_tokens: int = 2048
    cache: str | None = None

    def __post_init__(self) -> None:
        if not self.sets:
            raise InputError("data.sets: expected paths of data sets, got none")
        check_at_least(0, "data.", workers=self.workers)
        check_at_least(1, "data.", max_aspect=self.max_aspect, dialogue_tokens=self.dialogue_tokens)
        for name in ("bad_share", "unknown_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.{name}: expected 0 to 1, got {getattr(self, name)}")
        make_buckets(STRIDE, self.max_aspect)
        weighted_sets(self.sets)

    @property
    def has_cache(self) -> bool:
        return self.cache is not None

    def open(
        self, recipe: Recipe, prompts: PromptEncoder, run: Path, parallel: DistributedContext
    ) -> "FilesTrainingData":
        return FilesTrainingData(self, recipe, prompts, run, parallel)

    def check(self, stages: Sequence[StageConfig]) -> None:
        super().check(stages)
        for stage in stages:
            if self.has_cache and stage.data.shares and not stage.objective.reads_features:
                raise InputError(
                    f"stage {stage.name}: the objective {stage.objective.kind} reads images; a cache (data.cache) "
                    "holds no latents of the autoencoder alone"
                )

    def sizes(self, recipe: Recipe, stage: StageConfig) -> tuple[Size, ...]:
        side, aspect = stage.image_size or recipe.image_size, 1.0 if stage.data.shares else self.max_aspect
        return make_buckets(side, aspect, recipe.size_multiple)

    def describe(self, stage: StageConfig) -> str:
        cached = " from a cache" if self.has_cache and stage.objective.reads_features else ""
        return f"{len(self.sets)} data sets{cached}: {stage.data}"


def weighted_sets(sets: tuple[str, ...]) -> list[tuple[float, str]]:
    """(weight, path) of data sets written "PATH" or "WEIGHT=PATH"; InputError for an invalid weight."""
    found = []
    for one in sets:
        weight, sign, path = one.partition("=")
        if not sign or not re.fullmatch(r"[\d.eE+-]+", weight):  # a path may hold the sign too
            weight, path = "1", one
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf") or not path:
            raise InputError(f"data.sets: expected PATH or WEIGHT=PATH with a weight above 0, got {one!r}")
        found.append((value, path))
    return found


def open_sources(config: FilesData, cache: Path | None = None) -> list[DataSource]:
    """The readers of a recipe's data sets; `cache` keeps the indexes of their shards."""
    return [open_source(path, cache=cache, workers=max(1, config.workers)) for _, path in weighted_sets(config.sets)]


def sources_of_stage(
    stage: StageConfig, sources: list[DataSource], weights: list[float]
) -> tuple[list[DataSource], list[float]]:
    """The sets of a stage and their shares of its samples: kinds are divided by the stage's own shares.

    Raises:
        InputError: a share for which there is no set.
    """
    wanted = stage.data.shares
    if not wanted:
        return sources, weights
    pairs = [*zip(sources, weights, strict=True)]
    totals = {kind: sum(weight for source, weight in pairs if source.kind == kind) for kind in wanted}
    for kind, part in wanted.items():
        if part and not totals[kind]:
            raise InputError(
                f"stage {stage.name}: {part:g} of its samples are to be of kind {kind} ({stage.data}), but no set is: "
                f"{', '.join(source.name for source in sources)}"
            )
    chosen = [
        (source, weight * wanted[source.kind] / totals[source.kind])
        for source, weight in pairs if wanted.get(source.kind)
    ]  # fmt: skip
    return [source for source, _ in chosen], [weight for _, weight in chosen]


def check_captions(
    config: FilesData, stages: Sequence[StageConfig], sources: list[DataSource], prompts: PromptEncoder
) -> None:
    """Refuse sets whose captions some stage would read and that have none, or that the text tokenizer cannot read.

    Raises:
        InputError: a set of images alone, and as `check_words`.
    """
    weights = [weight for weight, _ in weighted_sets(config.sets)]
    read = [one for one in stages if one.data.shares]
    used = {id(source): one.name for one in read for source in sources_of_stage(one, sources, weights)[0]}
    texts = [source for source in sources if id(source) in used]
    for source in texts:
        if not source.captioned:
            raise InputError(f"stage {used[id(source)]}: expected captions in {source.name}, found images alone")
    check_words(texts, prompts, config.unknown_share)


def epochs_per_source(stage: StageConfig, sources: list[DataSource], weights: list[float]) -> dict[str, float]:
    """How often a stage shows each sample of each set."""
    return Mixture(*sources_of_stage(stage, sources, weights), batch=stage.batch).epochs(stage.steps)


class FilesTrainingData(TrainingData):
    """The data sets of a recipe, dealt to this process.

    Captions, edits and conversations share a stage by its own shares; the sets' weights hold among sets of one kind. A
    stage of images alone sees those of all sets, of edits the edited one.
    """

    def __init__(
        self, config: FilesData, recipe: Recipe, prompts: PromptEncoder, run: Path, parallel: DistributedContext
    ) -> None:
        super().__init__(recipe.seed)
        self.config, self.recipe, self.prompts, self.run, self.parallel = config, recipe, prompts, run, parallel
        self.weights = [weight for weight, _ in weighted_sets(config.sets)]
        self.sources = open_sources(config, run / "cache")
        self._cache: FeatureCache | None = None

    def check_captions(self, stages: Sequence[StageConfig]) -> None:
        check_captions(self.config, stages, self.sources, self.prompts)

    def open_cache(self, tokenizer: UnifiedTokenizer) -> None:
        if self.config.cache is None:
            return
        key = cache_key(tokenizer, self.recipe.image_size, self.sources, profiles=self.config.color_profiles)
        self._cache = FeatureCache(Path(self.config.cache), key)

    def cached_features(self, count: int) -> Tensor | None:
        """The cache's `f_v` `[n, N, D]` of the images that `sample` would decode."""
        if self._cache is None:
            return None
        ids = [sample_id(*place) for batch in self._first(count, self._cache.holds) for place in batch.places]
        return self._cache.rows(ids)["f_v"]

    def batches(self, stage: StageConfig, start: int, parallel: DistributedContext) -> Iterator[Sequence[Images]]:
        """From step `start` of a stage on, this process's micro-batches of each step."""
        for batch in self._open(stage, start):
            parts = [parallel.rows(stage.batch, number) for number in range(parallel.config.grad_accum_steps)]
            yield [self._micro_batch(stage, batch, slice(p.start // parallel.world, None, p.step // parallel.world))
                   for p in parts]

    def get_batch(self, stage: StageConfig, step: int, rows: slice) -> Images:
        """Rows of a step's whole batch; `batches`, which reads ahead and decodes this process's rows alone, is what a
        run uses.

        Raises:
            ValueError: in one of several processes, which never has the whole batch.
        """
        if self.parallel.world > 1:
            raise ValueError("one of several processes has its own rows alone; use batches")
        return self._micro_batch(stage, next(iter(self._open(stage, step))), rows)

    def _micro_batch(self, stage: StageConfig, batch: LoaderBatch, rows: slice) -> Images:
        """Rows of a process's batch: with captions texts and, from a cache, features."""
        numbers = np.arange(len(batch.images))[rows]
        keys, where = np.full(len(numbers), -1), torch.from_numpy(numbers)
        names = tuple(batch.keys[rows])
        if not stage.data.shares:
            return Images(keys=keys, names=names, pixels=to_pixels(batch.images[where]))
        if batch.kind == "dialogue":
            turns = tuple(self._dialogue(row) for row in batch.turns[rows])
            return Dialogues(keys=keys, names=names, pixels=to_pixels(batch.images[where]), turns=turns)
        texts = tuple(self._fitted(text) for text in batch.texts[rows])
        if self._cache is not None:
            features = self._cache.rows([sample_id(*batch.places[number]) for number in numbers.tolist()])
            kind = Edits if batch.kind == "edit" else Captioned
            return kind(keys=keys, names=names, texts=texts, features=features)
        pixels = to_pixels(batch.images[where])
        if batch.kind != "edit":
            return Captioned(keys=keys, names=names, texts=texts, pixels=pixels)
        return Edits(keys=keys, names=names, texts=texts, pixels=pixels, references=to_pixels(batch.inputs[where]))

    def sample(self, count: int) -> tuple[Tensor, ...]:
        """The images that a stage of one process would see first, `count` or a few more."""
        return tuple(to_pixels(batch.images) for batch in self._first(count))

    def _first(self, count: int, known: Callable[[str, int], bool] | None = None) -> Iterator[LoaderBatch]:
        mixture = self._mixture(64, self.weights, self.sources)
        loader = Loader(
            mixture, workers=0, bad_share=self.config.bad_share, captions=False, known=known,
            profiles=self.config.color_profiles,
        )  # fmt: skip
        return loader.batches(0, -(-count // 64))

    def _open(self, stage: StageConfig, step: int) -> Iterator[LoaderBatch]:
        sources, weights = sources_of_stage(stage, self.sources, self.weights)
        captions = bool(stage.data.shares)
        mixture = self._mixture(stage.batch, weights, sources, stage)
        self._check_same(stage.name, step, mixture.fingerprint())
        loader = Loader(
            mixture, rank=self.parallel.rank, world=self.parallel.world, workers=self.config.workers,
            bad_share=self.config.bad_share, bad_samples=self.run / "bad_samples.jsonl",
            captions=captions, one_reference=captions, profiles=self.config.color_profiles,
            known=self._cache.holds if self._cache is not None and captions else None,
            check=self._check_dialogue if "dialogue" in stage.data.shares else None,
        )  # fmt: skip
        return loader.batches(step, stage.steps)

    def _mixture(
        self, batch: int, weights: list[float], sources: list[DataSource], stage: StageConfig | None = None
    ) -> Mixture:
        square = make_buckets(self.recipe.image_size, 1.0, self.recipe.size_multiple)
        buckets = self.config.sizes(self.recipe, stage) if stage else square
        seed = int(self.rng(f"order-{stage.name}" if stage else "order", 0).integers(0, 2**31))
        return Mixture(sources, weights, batch=batch, seed=seed, buckets=buckets)

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

    def _dialogue(self, turns: Sequence[tuple[str, str]]) -> tuple[QuestionAnswer, ...]:
        """The turns of a conversation that fit beside their image, without control tokens; the first one always, if
        need be with its answer cut, which `_check_dialogue` has found to be possible.
        """
        limit, tokenizer = self._dialogue_limit, self.prompts.tokenizer
        found: list[QuestionAnswer] = []
        for question, answer in turns:
            own = QuestionAnswer(self.prompts.plain(question), self.prompts.plain(answer), follows=bool(found))
            if self.prompts.packed_length([*found, own]) > limit:
                if found:
                    break
                ids = tokenizer.encode(own.answer, add_special_tokens=False)
                while self.prompts.packed_length([own]) > limit:  # decoded and encoded again, a part may be longer
                    ids = ids[: len(ids) - (self.prompts.packed_length([own]) - limit)]
                    own = replace(own, answer=tokenizer.decode(ids), cut=True)
            found.append(own)
        return tuple(found)

    @property
    def _dialogue_limit(self) -> int:
        """Tokens of the longest conversation, with its image."""
        return min(self.config.dialogue_tokens, self.recipe.max_sequence_tokens)

    def _check_dialogue(self, sample: Sample) -> None:
        """Refuse a conversation whose first question leaves no room for an answer, or that control tokens alone make.

        Raises:
            BadSample: with the limit and what came.
        """
        if not sample.turns:
            return
        texts = [[self.prompts.plain(text).strip() for text in turn] for turn in sample.turns]
        if not all(map(all, texts)):
            raise BadSample(sample.key, sample.origin, "expected words in each turn, got control tokens alone")
        least = self.prompts.packed_length([QuestionAnswer(texts[0][0], "", cut=True)]) + 1
        if least > self._dialogue_limit:
            raise BadSample(
                sample.key, sample.origin,
                f"expected a first question and its image of fewer than {self._dialogue_limit} tokens "
                f"(data.dialogue_tokens {self.config.dialogue_tokens}, the model's {self.recipe.max_sequence_tokens}), "
                f"got {least - 1}",
            )

    def _fitted(self, text: str) -> str:
        """A caption without the model's control tokens, cut to the longest prompt."""
        tokenizer, text = self.prompts.tokenizer, self.prompts.plain(text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        longest = self.recipe.max_prompt_tokens
        return text if len(ids) <= longest else tokenizer.decode(ids[:longest])
