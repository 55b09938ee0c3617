"""A DualToken model of 16 positions with random weights and codebooks, for the tests of its parts."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def dual_config() -> Any:
    """Far smaller than `dualtoken-tiny`: 16 positions, 3 depths of 8 entries, 6 encoder and 2 LLM layers."""
    from spar.models.config import TextConfig
    from spar.models.dualtoken.config import (
        DepthHeadConfig,
        DualTokenConfig,
        PixelDecoderConfig,
        QuantizerConfig,
        TextTowerConfig,
        VisionTowerConfig,
    )

    codes = QuantizerConfig(depth=3, entries=8, width=8)
    head = DepthHeadConfig(layers=2, width=16, heads=2)
    return DualTokenConfig(
        vision=VisionTowerConfig(
            hidden_size=16, layers=6, heads=2, intermediate_size=32, image_size=32, shortcut_layer=1, pixel_layer=3,
            semantic_layer=5,
        ),
        text_tower=TextTowerConfig(vocab_size=32, hidden_size=16, layers=2, heads=2, intermediate_size=32, positions=6),
        pixel=codes,
        semantic=QuantizerConfig(depth=2, entries=12, width=4, codebook="shared"),
        decoder=PixelDecoderConfig(channels=(8, 8, 16, 16), layers=1, groups=4),
        text=TextConfig(vocab_size=32, hidden_size=16, layers=2, heads=2, kv_heads=1, intermediate_size=32),
        pixel_head=head,
        semantic_head=head,
    )


@pytest.fixture(scope="session")
def dual_model(dual_config: Any, randomize: Any) -> Any:
    """Random weights, and codebooks of random vectors."""
    from spar.models.dualtoken.model import DualTokenModel

    model = randomize(DualTokenModel(dual_config))
    generator = torch.Generator().manual_seed(1)
    for quantizer in (model.tokenizer.pixel_quantizer, model.tokenizer.semantic_quantizer):
        quantizer.codebook.copy_(torch.randn(quantizer.codebook.shape, generator=generator))
    return model
