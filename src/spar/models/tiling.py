"""Tiled decoding of large images: the decoder has the activations of one tile at a time.

Tiles overlap and are blended with weights that fall linearly towards their edges. DC-AE's attention is limited to its
tile, so that the image differs a little from one decoded as a whole; with a decoder of single cells it is the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25  # of a tile's side, shared with each neighbour
MIN_TILE = 4  # tokens per side: a smaller tile consists of edges


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latent: Tensor, tile: int) -> Tensor:
    """`[B, D_p, h, w]` to float32 pixels `[B, 3, stride h, stride w]` by tiles of `tile` x `tile` latent cells."""
    height, width = latent.shape[-2:]
    rows, columns = min(tile, height), min(tile, width)
    overlap = max(1, round(OVERLAP * tile))
    pixels = weights = latent.new_empty(0)  # of the image's size from the first tile on
    for top in _starts(height, rows, overlap):
        for left in _starts(width, columns, overlap):
            piece = decode(latent[..., top : top + rows, left : left + columns]).float()
            stride = piece.shape[-1] // columns
            if not weights.numel():
                shape = (stride * height, stride * width)
                pixels, weights = piece.new_zeros(*piece.shape[:2], *shape), piece.new_zeros(shape)
            down, across = (_ramp(cells * stride, overlap * stride).to(piece) for cells in (rows, columns))
            window = down[:, None] * across
            area = (slice(top * stride, (top + rows) * stride), slice(left * stride, (left + columns) * stride))
            pixels[..., *area] += piece * window
            weights[area] += window
    return pixels / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of the tiles: each overlaps the one before it by at least `overlap` cells; the last ends at the end."""
    if length <= tile:  # the overlap is that of whole tiles, and may be wider than this one
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, edge: int) -> Tensor:
    """Weights above 0 that rise over `edge` pixels, stay at 1 and fall again."""
    rise = (torch.arange(length) + 0.5) / edge
    return torch.minimum(rise, rise.flip(0)).clamp(max=1)
