"""The repeated layers of all parts: what is sharded, recomputed or compiled one at a time."""

import torch
from torch import nn

from spar.models.denoiser import DenoiserBlock
from spar.models.tokenizer import ResidualBlock, TransformerBlock

# The libraries' own by name, so that none is imported for it.
BLOCKS = (
    "InternVLVisionLayer", "Qwen2DecoderLayer", "ResBlock", "EfficientViTBlock", "DCUpBlock2d", "DCDownBlock2d",
    TransformerBlock.__name__, ResidualBlock.__name__, DenoiserBlock.__name__,
)  # fmt: skip

# Compilations of one function before torch gives up and runs it as it is. Its own limit is 8; but all of transformers'
# layers share one function, and each has its forms: batches of one and of more, lengths, types, with keys behind it.
RECOMPILE_LIMIT = 64


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers in a module, in order."""
    return [part for part in module.modules() if any(base.__name__ in BLOCKS for base in type(part).__mro__)]


def compile_blocks(module: nn.Module) -> None:
    """Have torch.compile take each repeated layer when it is first called: all of a kind share what it compiles.

    A layer that was taken before is left as it is. What is recomputed is recomputed around the compiled layer, for
    which this comes before.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for block in repeated_blocks(module):
        if "forward" not in vars(block):
            block.forward = torch.compile(block.forward)
