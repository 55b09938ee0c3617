"""Step caching: a sampler's step takes most of the denoiser from the step before, where that would hardly change.

The first block always runs. Where what it adds differs little from what it added when all blocks last ran, what the
others added then is added again (first-block caching; the idea of TeaCache, arXiv 2411.19108, with the block's own
residual in place of a fitted polynomial). Every image decides for itself, so that a batch equals its images alone.

B rows, N tokens, D the denoiser's width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StepCache:
    """What one call of a sampler keeps.

    Attributes:
        threshold: of the relative change of the first block's residual, its mean over tokens and channels; 0 runs all
            blocks at every step.
        images: rows i, i + images, ... are the branches of image i, and decide together.
        ran: rows for which all blocks ran; `asked`: all rows.
    """

    threshold: float
    images: int
    ran: int = 0
    asked: int = 0
    _first: Tensor | None = None
    _others: Tensor | None = None

    def run(
        self, x: Tensor, first: Callable[[Tensor], Tensor], others: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """The output `[B, N, D]` of all blocks for `x` `[B, N, D]`.

        Args:
            first: runs the first block.
            others: runs the others on the rows of an index, or on all rows.
        """
        after = first(x)
        added = after - x
        rows = self._changed(added)
        self.asked += len(x)
        self.ran += len(x) if rows is None else len(rows)
        if rows is None or self._first is None or self._others is None:
            result = others(after, None)
            self._first, self._others = added, result - after
            return result
        result = after + self._others
        if len(rows):
            result[rows] = others(after[rows], rows)
            self._first[rows], self._others[rows] = added[rows], result[rows] - after[rows]
        return result

    def _changed(self, added: Tensor) -> Tensor | None:
        """The rows for which all blocks must run; None for all rows."""
        if self._first is None or self._first.shape != added.shape or not self.threshold:
            return None
        before = self._first.float()
        size = before.abs().mean((1, 2)).clamp_min(1e-12)
        change = (added.float() - before).abs().mean((1, 2)) / size                          # [B]
        images = change.view(-1, self.images).amax(0) > self.threshold                       # [images]
        if images.all():
            return None
        return torch.nonzero(images.repeat(len(added) // self.images)).flatten()
