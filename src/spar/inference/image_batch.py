"""Images on their way through the flow's sampler, which may join and leave between two steps.

B images, 2 B rows of the denoiser with guidance (the conditional branches, then the unconditional ones), M condition
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spar.flow.guidance import apply_guidance
from spar.flow.sampler import FlowSampler
from spar.inference.flow_sampling import FlowSampling
from spar.inference.outputs import Routing
from spar.inference.progress import Callback
from spar.models.spar import Condition, SparModel
from spar.processing.prompts import IMAGE_TOKEN


@dataclass(frozen=True)
class BatchRow:
    """One image: its `seed` and scale of `guidance`, what its metadata say of the request and `notes` after that, and
    the prompt as it was routed, token `ids` and `mask` `[T]`, `weights` `[M, K]`; `columns` is the M of the call that
    it joined by.
    """

    seed: int
    guidance: float
    metadata: dict[str, Any]
    notes: dict[str, Any]
    ids: Tensor
    mask: Tensor
    weights: Tensor
    columns: int

    def routing(self, tokenizer: Any, layers: tuple[int, ...]) -> Routing:
        """Weights over the layers of each real token of the prompt, the queries last."""
        real = self.mask.bool()
        pieces = tokenizer.convert_ids_to_tokens(self.ids[real].tolist())
        queries = len(self.weights) - len(real)
        kinds = ["image" if piece == IMAGE_TOKEN else "text" for piece in pieces] + ["query"] * queries
        kept = np.concatenate([real.numpy(), np.ones(queries, bool)])
        weights = self.weights.float().cpu().numpy()[kept]
        return Routing([*pieces, *(f"query {i}" for i in range(queries))], kinds, layers, weights)


class ImageBatch:
    """Images of one size, all with guidance or none, each at its own step of its own number of steps.

    An image is what it is alone, whichever others join and leave; with a step cache, which starts anew at each change,
    up to what the cache changes.

    Attributes:
        size: height and width in pixels.
        guided: whether there is guidance; without it, at a scale of 1, the conditional branch alone is computed.
        flow: guidance interval and step cache.
        sampler: the latents and steps of the images.
        rows: the images in the order of joining.
    """

    def __init__(self, size: tuple[int, int], guided: bool, flow: FlowSampling, sampler: FlowSampler) -> None:
        self.size, self.guided, self.flow, self.sampler = size, guided, flow, sampler
        self.rows: list[BatchRow] = []
        self._condition: Condition | None = None
        self._cache = flow.cache(0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def finished(self) -> list[int]:
        """The images whose latents are clean."""
        return self.sampler.finished

    def join(self, noise: Tensor, condition: Condition, rows: Sequence[BatchRow], steps: int | Sequence[int]) -> None:
        """Append images, all or, after an error, none.

        Args:
            noise: `[B, C, h, w]`.
            condition: with precomputed keys and values, of both branches with guidance.
            rows: of the images.
            steps: of each image, or of all.
        """
        joined = condition if self._condition is None else self._joined(self._condition, condition, len(rows))
        self.sampler.join(noise, steps)
        self._condition, self.rows = joined, [*self.rows, *rows]
        self._cache = self.flow.cache(len(self))

    def step(self, model: SparModel) -> Tensor:
        """Advance every image by one step; returns the estimates of the clean latents, `[B, C, h, w]`."""
        return self.sampler.step(partial(self._velocity, model))

    def run(self, model: SparModel, callback: Callback | None) -> None:
        """Step until all are finished, which joined at once; `callback` as in `SparPipeline.generate`."""
        self.sampler.run(partial(self._velocity, model), callback)

    def leave(self, rows: Sequence[int]) -> None:
        """Take images out, finished or not."""
        gone = set(rows)
        kept = [row for row in range(len(self)) if row not in gone]
        condition = self._kept(self._condition, kept) if self._condition is not None and kept else None
        self.sampler.keep(kept)
        self._condition, self.rows = condition, [self.rows[row] for row in kept]
        self._cache = self.flow.cache(len(self))

    def _velocity(self, model: SparModel, latent: Tensor, time: Tensor) -> Tensor:
        """The guided velocity, `[B, C, h, w]`."""
        if self._condition is None:
            raise ValueError("expected images in the batch, got none")
        count = len(latent)
        plain = [row for row, t in enumerate(self.sampler.times) if not (self.guided and self.flow.is_guided(t))]
        if len(plain) == count:
            return model.velocity(latent, time, self._condition.first(count), self._cache).velocity.float()
        latent, time = latent.repeat(2, 1, 1, 1), time.repeat(2)
        both = model.velocity(latent, time, self._condition, self._cache).velocity.float()
        conditional, unconditional = both.chunk(2)
        scales = conditional.new_tensor([row.guidance for row in self.rows])[:, None, None, None]
        velocity = apply_guidance(conditional, unconditional, scales)
        if plain:  # with an interval, images at different times
            velocity[plain] = conditional[plain]
        return velocity

    def _joined(self, old: Condition, new: Condition, count: int) -> Condition:
        """The condition of the images so far and of `count` more, branch by branch, padded on the left."""

        def join(tensors: Sequence[Tensor], tokens: int | None) -> Tensor:
            one, two = _aligned(tensors, tokens)
            return torch.cat([one[: len(self)], two[:count], one[len(self) :], two[count:]])

        return _each(join, _with_reference(old, new.reference), _with_reference(new, old.reference))

    def _kept(self, condition: Condition, rows: Sequence[int]) -> Condition:
        """The condition of these images, without the columns that none of them has."""
        columns = max(self.rows[row].columns for row in rows)
        both = [*rows, *(len(self) + row for row in rows)] if self.guided else [*rows]
        index = torch.tensor(both, device=condition.mask.device)

        def keep(tensors: Sequence[Tensor], tokens: int | None) -> Tensor:
            (one,) = tensors
            if tokens is not None:
                one = one.narrow(tokens, one.shape[tokens] - columns, columns)
            return one[index]

        return _each(keep, condition)


def both_branches(conditional: Condition, unconditional: Condition) -> Condition:
    """The condition of both branches of guidance, `[2 B, ...]`, padded on the left."""
    return _each(lambda tensors, tokens: torch.cat(_aligned(tensors, tokens)), conditional, unconditional)


def _each(change: Callable[[Sequence[Tensor], int | None], Tensor], *conditions: Condition) -> Condition:
    """A condition whose every tensor is `change(that tensor of all conditions, the dimension of its tokens if any)`."""
    key_values = [
        (change([key for key, _ in layer], 2), change([value for _, value in layer], 2))
        for layer in zip(*(one.key_values or () for one in conditions), strict=True)
    ]
    references = [one.reference for one in conditions if one.reference is not None]  # of all, or of none
    return replace(
        conditions[0],
        states=change([one.states for one in conditions], 1),
        mask=change([one.mask for one in conditions], 1),
        weights=change([one.weights for one in conditions], 1),
        reference=change(references, None) if references else None,
        key_values=key_values or None,
    )


def _aligned(tensors: Sequence[Tensor], tokens: int | None) -> list[Tensor]:
    """Tensors with as many tokens in a dimension as the longest of them, zero before their own."""
    if tokens is None:
        return [*tensors]
    most = max(one.shape[tokens] for one in tensors)
    return [F.pad(one, (*[0, 0] * (one.ndim - 1 - tokens), most - one.shape[tokens], 0)) for one in tensors]


def _with_reference(condition: Condition, like: Tensor | None) -> Condition:
    """The condition with a reference of zeros, as rows without an image have it, where others beside it have one."""
    if condition.reference is not None or like is None:
        return condition
    return replace(condition, reference=like.new_zeros(len(condition.mask), *like.shape[1:]))
