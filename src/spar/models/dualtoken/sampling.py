"""How a code is drawn from its logits: guidance, and a temperature for each depth, then as any token."""

from dataclasses import dataclass, replace

from torch import Tensor

from spar.common.limits import MAX_GUIDANCE, MAX_TOP_K, check_int_range, check_range
from spar.models.sampling import check_sampling, filtered


@dataclass(frozen=True)
class CodeSampling:
    """Attributes:
    temperature: of the guided logits; 0 takes the likeliest code.
    top_k: codes that remain, or 0: all.
    top_p: the likeliest codes that together have this probability remain; 1: all.
    guidance: scale of classifier-free guidance; 1 is the conditional branch alone.
    depth_decay: each depth has this times the temperature of the one before it. The first code of a position says
        whether and what begins there, which should vary; the deeper ones are its details, which should be right.
    layout: whether the LLM first writes where everything lies, in words, and the image is drawn of that.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    depth_decay: float = 1.0
    layout: bool = False

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)
        check_int_range("top_k", self.top_k, 0, MAX_TOP_K)
        check_range("guidance", self.guidance, 0, MAX_GUIDANCE)
        check_range("depth_decay", self.depth_decay, 0, 1)

    def at_depth(self, depth: int) -> "CodeSampling":
        """The sampling of a depth, from 0."""
        return replace(self, temperature=self.temperature * self.depth_decay**depth)

    def __str__(self) -> str:
        decay = f" (times {self.depth_decay:g} for each depth after the first)" if self.depth_decay != 1 else ""
        return (
            f"guidance {self.guidance:g}, temperature {self.temperature:g}{decay}, top-k {self.top_k or 'off'}, "
            f"top-p {self.top_p:g}"
        )


def choose(logits: Tensor, noise: Tensor, sampling: CodeSampling) -> Tensor:
    """One code `[B]` from logits `[B, K]`, or `[2 B, K]` with the unconditional branch after the conditional one.

    With Gumbel `noise` `[B, K]` the largest sum is a draw from the softmax of the filtered logits.
    """
    if len(logits) > len(noise):
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + sampling.guidance * (conditional - unconditional)
    if sampling.temperature == 0:
        return logits.argmax(1)
    left = filtered(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return (left + noise).argmax(1)
