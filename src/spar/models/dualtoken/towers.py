"""SigLIP's two towers (arXiv 2303.15343), whose features are returned layer by layer and never hooked.

B batch, S image side, N = (S / patch)^2 positions, W the image tower's width, T the tokens of a text.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel

from spar.models.attention import ATTENTION
from spar.models.config import library_fields
from spar.models.dualtoken.config import TextTowerConfig, VisionTowerConfig

TOWER_FIELDS = {
    "hidden_size": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size", "norm_eps": "layer_norm_eps",
}  # fmt: skip


def vision_tower_config(config: VisionTowerConfig) -> SiglipVisionConfig:
    """The image tower's configuration, as transformers has it."""
    return SiglipVisionConfig(
        **library_fields(config, TOWER_FIELDS), image_size=config.image_size, patch_size=config.patch_size
    )


def text_tower_config(config: TextTowerConfig, projection: int) -> SiglipTextConfig:
    """The text tower's configuration; `projection` is the width of its feature, that of the image tower."""
    return SiglipTextConfig(
        **library_fields(config, TOWER_FIELDS), vocab_size=config.vocab_size, projection_size=projection,
        max_position_embeddings=config.positions, pad_token_id=config.pad_token_id,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


class VisionTower(nn.Module):
    """SigLIP's image tower; `network` has transformers' own parameter names."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        library = vision_tower_config(config)
        library._attn_implementation = ATTENTION
        self.config = config
        self.network = SiglipVisionModel(library)

    def embed(self, pixels: Tensor) -> Tensor:
        """`[B, 3, S, S]` in [0, 1] to patch embeddings with their positions, `[B, N, W]`."""
        # The layers would keep a convolution's order in memory, channels first, and copy at every product.
        return self.network.embeddings(pixels * 2 - 1).contiguous()

    def run(self, x: Tensor, layers: range, keep: Sequence[int] = ()) -> list[Tensor]:
        """Run some layers, counted from 1, on `[B, N, W]`; the outputs of the layers in `keep`, in their order."""
        kept: dict[int, Tensor] = {}
        for number in layers:
            x = self.network.encoder.layers[number - 1](x, None)
            if number in keep:
                kept[number] = x
        return [kept[number] for number in keep]

    def pool(self, x: Tensor, after: int) -> Tensor:
        """The pooled feature `[B, W]` from the output `[B, N, W]` of layer `after`: the layers that are left, the last
        norm, the attention-pool head.
        """
        last = self.config.layers
        if after < last:
            (x,) = self.run(x, range(after + 1, last + 1), (last,))
        return self.network.head(self.network.post_layernorm(x))

    def shallow_maps(self, pixels: Tensor) -> list[Tensor]:
        """`[B, 3, S, S]` in [0, 1] to the features of the two shallow layers as maps `[B, W, h, w]`."""
        taps, grid = self.config.shallow_layers, self.config.grid
        found = self.run(self.embed(pixels), range(1, taps[1] + 1), taps)
        return [x.transpose(1, 2).unflatten(2, (grid, grid)) for x in found]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 3, S, S]` in [0, 1] to the features of the semantic layer `[B, N, W]` and the pooled one `[B, W]`."""
        tap = self.config.taps[2]
        (x,) = self.run(self.embed(pixels), range(1, tap + 1), (tap,))
        return x, self.pool(x, tap)


class TextTower(nn.Module):
    """SigLIP's text tower; `network` has transformers' own parameter names."""

    def __init__(self, config: TextTowerConfig, projection: int) -> None:
        super().__init__()
        library = text_tower_config(config, projection)
        library._attn_implementation = ATTENTION
        self.config = config
        self.network = SiglipTextModel(library)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids `[B, positions]`, padded to the full length as SigLIP was trained, to features `[B, W]`."""
        if tokens.shape[1] != self.config.positions:
            raise ValueError(f"expected texts padded to {self.config.positions} tokens, got {tokens.shape[1]}")
        return self.network(input_ids=tokens).pooler_output
