"""How a code is drawn from its logits: guidance, temperature, top-k, top-p, and noise of each image's own seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spar.common.errors import InputError
from spar.common.limits import MAX_GUIDANCE, MAX_TEMPERATURE, MAX_TOP_K, check_int_range, check_range


@dataclass(frozen=True)
class CodeSampling:
    """Attributes:
    temperature: of the guided logits; 0 takes the likeliest code.
    top_k: codes that remain, or 0: all.
    top_p: the likeliest codes that together have this probability remain; 1: all.
    guidance: scale of classifier-free guidance; 1 is the conditional branch alone.
    depth_decay: each depth has this times the temperature of the one before it. The first code of a position says
        whether and what begins there, which should vary; the deeper ones are its details, which should be right.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    depth_decay: float = 1.0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_int_range("top_k", self.top_k, 0, MAX_TOP_K)
        check_range("top_p", self.top_p, 0, 1)
        check_range("guidance", self.guidance, 0, MAX_GUIDANCE)
        check_range("depth_decay", self.depth_decay, 0, 1)
        if not self.top_p > 0:
            raise InputError(f"top_p: expected above 0 and at most 1, got {self.top_p}")

    def at_depth(self, depth: int) -> "CodeSampling":
        """The sampling of a depth, from 0."""
        return replace(self, temperature=self.temperature * self.depth_decay**depth)

    def __str__(self) -> str:
        decay = f" (times {self.depth_decay:g} for each depth after the first)" if self.depth_decay != 1 else ""
        return (
            f"guidance {self.guidance:g}, temperature {self.temperature:g}{decay}, top-k {self.top_k or 'off'}, "
            f"top-p {self.top_p:g}"
        )


def gumbel_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard Gumbel noise `[B, *shape]`, each row from its own generator, which is on the CPU on every machine."""
    drawn = torch.stack([torch.rand(shape, generator=generator) for generator in generators]).to(device)
    return -(-drawn.clamp(1e-20, 1 - 2**-24).log()).log()


def filtered(logits: Tensor, sampling: CodeSampling) -> Tensor:
    """Logits `[B, K]` over the temperature, with minus infinity for the codes that top-k and top-p exclude.

    The likeliest code always remains.
    """
    logits = (logits - logits.amax(1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        beyond = probabilities.cumsum(1) - probabilities >= sampling.top_p     # those before have enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def choose(logits: Tensor, noise: Tensor, sampling: CodeSampling) -> Tensor:
    """One code `[B]` from logits `[B, K]`, or `[2 B, K]` with the unconditional branch after the conditional one.

    With Gumbel `noise` `[B, K]` the largest sum is a draw from the softmax of the filtered logits.
    """
    if len(logits) > len(noise):
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + sampling.guidance * (conditional - unconditional)
    if sampling.temperature == 0:
        return logits.argmax(1)
    return (filtered(logits, sampling) + noise).argmax(1)
