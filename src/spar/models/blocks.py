"""The repeated layers of all parts: the units of sharding, activation checkpointing and compilation."""

import torch
import torch._functorch.config
from torch import nn

from spar.models.denoiser import DenoiserBlock
from spar.models.tokenizer import ResidualBlock, TransformerBlock

# The libraries' own by name, which needs no import.
BLOCKS = (
    "InternVLVisionLayer", "SiglipEncoderLayer", "Qwen2DecoderLayer", "ResBlock", "EfficientViTBlock", "DCUpBlock2d",
    "DCDownBlock2d", "ResnetBlock2D",
    TransformerBlock.__name__, ResidualBlock.__name__, DenoiserBlock.__name__,
)  # fmt: skip

# Compilations of one function before torch falls back to eager mode. Its own limit is 8; but all of transformers'
# layers share one function, with variants: batches of one and of more, lengths, types, with and without a KV cache.
RECOMPILE_LIMIT = 64


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers in a module, in order."""
    return [part for part in module.modules() if any(base.__name__ in BLOCKS for base in type(part).__mro__)]


def compile_blocks(module: nn.Module) -> None:
    """Compile each repeated layer with torch.compile at its first call; layers of one class share the compiled code.

    Layers that are compiled already are skipped. Activation checkpointing must wrap the compiled layer, so call this
    first.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Compiled code may not give away what it saved for the backward pass: an adversary's weight walks a graph twice.
    torch._functorch.config.donated_buffer = False
    for block in repeated_blocks(module):
        if "forward" not in vars(block):
            block.forward = torch.compile(block.forward)
