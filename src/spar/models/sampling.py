"""How a token or a code is drawn from its logits: temperature, top-k, top-p, and noise of each row's own seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spar.common.errors import InputError
from spar.common.generators import cpu_generator
from spar.common.limits import MAX_TEMPERATURE, check_range


def gumbel_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard Gumbel noise `[B, *shape]`, each row from its own generator, which is on the CPU on every machine."""
    rows = [torch.rand(shape, generator=generator, dtype=torch.float32) for generator in generators]
    drawn = torch.stack(rows).to(device)
    return -(-drawn.clamp(1e-20, 1 - 2**-24).log()).log()


def filtered(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits `[B, K]` over the temperature, with minus infinity for the entries that top-k and top-p exclude.

    The likeliest entry always remains.
    """
    logits = (logits - logits.amax(1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        beyond = probabilities.cumsum(1) - probabilities >= top_p              # those before have enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def check_sampling(temperature: float, top_p: float) -> None:
    """Refuse a temperature or a top-p without meaning."""
    check_range("temperature", temperature, 0, MAX_TEMPERATURE)
    check_range("top_p", top_p, 0, 1)
    if not top_p > 0:
        raise InputError(f"top_p: expected above 0 and at most 1, got {top_p}")


@dataclass(frozen=True)
class TextSampling:
    """Attributes:
    temperature: of the logits of the next token; 0 takes the likeliest.
    top_p: the likeliest tokens that together have this probability remain; 1: all.
    seeds: of each row; a temperature of 0 needs none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)

    def chooser(self) -> Callable[[Tensor], Tensor]:
        """A function from logits `[B, K]` to a token each `[B]`, to be called once a step: it draws anew each time."""
        if not self.temperature:
            return lambda logits: logits.argmax(-1)
        generators = [cpu_generator(seed) for seed in self.seeds]

        def draw(logits: Tensor) -> Tensor:
            noise = gumbel_noise(generators, logits.shape[1:], logits.device)
            return (filtered(logits.float(), temperature=self.temperature, top_p=self.top_p) + noise).argmax(-1)

        return draw


GREEDY = TextSampling()
