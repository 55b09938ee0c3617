"""Where DualToken's generation spends its loss: `python docs/code_losses.py [MODEL]`, by default the bundled model.

On scenes that training has not seen, with their own captions: for each vocabulary and depth the mean cross-entropy of
the codes (nats, teacher forcing) at patches of one colour and at all others, and the share of the whole that the former
take; then the PSNR of reconstructions from the first codes alone, which says what each depth is worth to the image.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spar.inference.dualtoken import DualTokenPipeline
from spar.inference.loading import load_pipeline
from spar.losses.reconstruction import psnr
from spar.training.objectives.dual_next_token import flat_patches, losses_by_depth
from spar.worlds.shapes.captions import caption
from spar.worlds.shapes.dataset import scene_at, seed_at
from spar.worlds.shapes.render import render

SCENES, BATCH = 512, 64


@dataclass(frozen=True)
class CodeLoss:
    """Mean cross-entropies of a depth's codes, at patches of one colour and at others, and the former's share."""

    name: str
    depth: int
    flat: float
    other: float
    share: float


@torch.inference_mode()
def losses(pipe: DualTokenPipeline, pixels: Tensor, texts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Which patches are of one colour `[B N]`, and each vocabulary's cross-entropies `[B N, D]`."""
    model, codes = pipe.model, pipe.model.tokenizer.encode(pixels)
    tokens = pipe.prompts.generation(texts)
    depths = {
        name: losses_by_depth(logits, getattr(codes, name).flatten(0, 2))
        for name, logits in model.image_logits(tokens.ids, tokens.mask, codes).items()
    }
    return flat_patches(pixels, model.config.token_stride).flatten(), depths


def code_losses(pipe: DualTokenPipeline, scenes: int = SCENES) -> tuple[list[CodeLoss], list[float]]:
    """The losses by vocabulary and depth, and the PSNR with the first 1, 2, ... pixel codes."""
    drawn = [scene_at("validation", index) for index in range(scenes)]
    texts = [caption(scene, np.random.default_rng((seed_at("validation", i), 1))) for i, scene in enumerate(drawn)]
    pixels = torch.from_numpy(np.stack([render(scene) for scene in drawn])).permute(0, 3, 1, 2) / 255
    parts = [
        losses(pipe, pixels[start : start + BATCH], texts[start : start + BATCH]) for start in range(0, scenes, BATCH)
    ]
    flat = torch.cat([one for one, _ in parts])
    found = []
    for name in parts[0][1]:
        values = torch.cat([depths[name] for _, depths in parts])
        for depth, column in enumerate(values.unbind(1), start=1):
            share = float(column[flat].sum() / column.sum())
            found.append(CodeLoss(name, depth, float(column[flat].mean()), float(column[~flat].mean()), share))
    tokenizer = pipe.model.tokenizer
    with torch.inference_mode():
        codes = torch.cat([tokenizer.encode(chunk).pixel for chunk in pixels.split(BATCH)])
        decibels = [
            float(torch.cat([
                psnr(tokenizer.decode(some[..., : depth + 1]).clamp(0, 1), own)
                for some, own in zip(codes.split(BATCH), pixels.split(BATCH), strict=True)
            ]).mean()) for depth in range(codes.shape[-1])
        ]  # fmt: skip
    return found, decibels


def main() -> None:
    pipe = load_pipeline(sys.argv[1] if len(sys.argv) > 1 else "dualtoken", device="cpu", dtype=torch.float32)
    if not isinstance(pipe, DualTokenPipeline):
        sys.exit(f"expected a model of DualToken, got one of {pipe.system}")
    found, decibels = code_losses(pipe)
    for one in found:
        print(
            f"{one.name} {one.depth}: {one.flat:.2f} nats at patches of one color, {one.other:.2f} at others; "
            f"{one.share:.0%} of the loss is at the former"
        )
    print("PSNR with the first codes:", ", ".join(f"{value:.1f}" for value in decibels), "dB")


if __name__ == "__main__":
    main()
