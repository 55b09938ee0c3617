from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipModel

from spar.common.errors import InputError
from spar.models.config import TextConfig
from spar.models.dualtoken.config import (
    DualTokenConfig,
    PixelDecoderConfig,
    QuantizerConfig,
    TextTowerConfig,
    VisionTowerConfig,
)
from spar.models.dualtoken.tokenizer import DualTokenizer
from spar.models.dualtoken.towers import text_tower_config, vision_tower_config


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer(dual_model) -> DualTokenizer:
    return dual_model.tokenizer


@pytest.fixture(scope="module")
def siglip(dual_config, tokenizer) -> SiglipModel:
    """transformers' SigLIP with the same weights."""
    library = SiglipConfig(
        vision_config=vision_tower_config(dual_config.vision).to_dict(),
        text_config=text_tower_config(dual_config.text_tower, dual_config.vision.hidden_size).to_dict(),
    )
    model = SiglipModel(library).eval()
    for ours, theirs in ((tokenizer.encoder.network, "vision_model"), (tokenizer.text_tower.network, "text_model")):
        model.get_submodule(theirs).load_state_dict(ours.state_dict())
    return model


def test_the_released_taps_are_the_4th_6th_and_26th_of_27_layers_and_keep_their_shares_elsewhere():
    assert VisionTowerConfig(hidden_size=1152, heads=16, layers=27).taps == (4, 6, 26)
    assert VisionTowerConfig(layers=8).taps == (1, 2, 7)
    assert VisionTowerConfig(layers=24).taps == (4, 5, 23)
    assert VisionTowerConfig(layers=8, pixel_layer=4).taps == (1, 4, 7)


@pytest.mark.parametrize("wrong", [{"semantic_layer": 8}, {"shortcut_layer": 7}, {"pixel_layer": 1}])
def test_taps_out_of_order_are_refused(wrong):
    with pytest.raises(InputError, match="expected 1 <= shortcut_layer < pixel_layer <= semantic_layer < layers 8,"):
        VisionTowerConfig(layers=8, **wrong)


def test_features_are_the_projected_hidden_states_of_siglip(tokenizer, siglip):
    pixels = images(2)
    with torch.no_grad():
        hidden = siglip.vision_model(pixels * 2 - 1, output_hidden_states=True).hidden_states
    features = tokenizer.features(pixels)
    shallow = tokenizer.reduce_pixel(hidden[3]) + 0.6 * tokenizer.reduce_shortcut(hidden[1])
    torch.testing.assert_close(features.inputs["pixel"], shallow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.inputs["semantic"], tokenizer.reduce_semantic(hidden[5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.deep, hidden[5], rtol=1e-4, atol=1e-5)


def test_both_towers_are_siglips(tokenizer, siglip):
    pixels, tokens = images(2), torch.randint(0, 32, (3, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = siglip(input_ids=tokens, pixel_values=pixels * 2 - 1)
    deep, pooled = tokenizer.encoder(pixels)
    torch.testing.assert_close(F.normalize(pooled, dim=1), both.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.normalize(tokenizer.text_tower(tokens), dim=1), both.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deep, tokenizer.features(pixels).deep)


def test_a_text_of_another_length_is_refused(tokenizer):
    with pytest.raises(ValueError, match="expected texts padded to 6 tokens, got 5"):
        tokenizer.text_tower(torch.zeros(1, 5, dtype=torch.long))


def test_quantised_features_take_the_place_of_the_semantic_layers_output(tokenizer, siglip):
    out = tokenizer(images(2))
    wanted = tokenizer.expand_semantic(tokenizer.semantic_quantizer.decode(out.quantized["semantic"].codes))
    torch.testing.assert_close(out.features, wanted)
    with torch.no_grad():
        last = siglip.vision_model.encoder.layers[5](wanted, None)
        pooled = siglip.vision_model.head(siglip.vision_model.post_layernorm(last))
    torch.testing.assert_close(out.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokenizer.pooled(tokenizer.encode(images(2)).semantic), out.pooled)


def test_codes_are_int64_on_the_grid_and_those_of_the_forward_pass(tokenizer):
    codes, out = tokenizer.encode(images(2)), tokenizer(images(2))
    assert codes.pixel.dtype == codes.semantic.dtype == torch.int64
    assert codes.pixel.shape == (2, 4, 4, 3) and codes.semantic.shape == (2, 4, 4, 2)
    assert torch.equal(codes.pixel.flatten(1, 2), out.quantized["pixel"].codes)
    assert torch.equal(codes.semantic.flatten(1, 2), out.quantized["semantic"].codes)


def test_an_image_is_decoded_from_pixel_codes_alone(tokenizer):
    codes = tokenizer.encode(images(2))
    decoded = tokenizer.decode(codes.pixel)
    assert decoded.shape == (2, 3, 32, 32)
    torch.testing.assert_close(decoded, tokenizer.decoder(tokenizer(images(2)).image_vectors, 4))
    assert not torch.allclose(decoded, tokenizer.decode(codes.pixel[..., :2]))  # the last depth matters


def test_each_vocabulary_learns_its_own_part_of_the_encoder(dual_config, randomize):
    tokenizer = randomize(DualTokenizer(dual_config)).requires_grad_(True)
    pixel_loss = tokenizer(images(1)).quantized["pixel"].commitment
    pixel_loss.backward()
    reached = {name for name, parameter in tokenizer.named_parameters() if parameter.grad is not None}
    layers = {int(name.split(".")[4]) for name in reached if "encoder.layers" in name}
    assert layers == {0, 1, 2}                                                 # no deeper than the pixel layer
    assert not any("semantic" in name or "text_tower" in name or "head" in name for name in reached)
    assert any("reduce_shortcut" in name for name in reached)


def test_without_the_shortcut_only_the_pixel_layer_counts(dual_config, randomize):
    tokenizer = randomize(DualTokenizer(replace(dual_config, shortcut=0.0)))
    before = tokenizer.features(images(1)).inputs["pixel"]
    with torch.no_grad():
        for parameter in tokenizer.reduce_shortcut.parameters():
            parameter.add_(1.0)
    assert torch.equal(tokenizer.features(images(1)).inputs["pixel"], before)


def test_the_decoders_grid_may_differ_from_the_codes(dual_config, randomize):
    with pytest.raises(InputError, match="expected an image of vision.image_size 48 pixels, got 32"):
        replace(dual_config, vision=replace(dual_config.vision, image_size=48, patch_size=12))
    resized = replace(
        dual_config,
        vision=replace(dual_config.vision, image_size=48, patch_size=12),
        decoder=replace(dual_config.decoder, grid=6),
    )
    tokenizer = randomize(DualTokenizer(resized))
    codes = tokenizer.encode(torch.rand(1, 3, 48, 48))
    assert codes.pixel.shape == (1, 4, 4, 3) and tokenizer.decode(codes.pixel).shape == (1, 3, 48, 48)


def test_the_full_size_has_the_released_shapes():
    codes = QuantizerConfig(depth=8, entries=16384, width=32, codebook="shared")
    config = DualTokenConfig(
        vision=VisionTowerConfig(
            hidden_size=1152, layers=27, heads=16, intermediate_size=4304, patch_size=14, image_size=384
        ),
        text_tower=TextTowerConfig(
            vocab_size=256000, hidden_size=1152, layers=27, heads=16, intermediate_size=4304, positions=64
        ),
        pixel=codes, semantic=codes,
        decoder=PixelDecoderConfig(channels=(128, 128, 512, 512, 1024), layers=2, groups=32, grid=24),
        text=TextConfig(hidden_size=64, heads=4, kv_heads=4),
    )  # fmt: skip
    with torch.device("meta"):
        tokenizer = DualTokenizer(config)
        codes = tokenizer.encode(torch.zeros(1, 3, 384, 384))
        decoded = tokenizer.decode(codes.pixel)
    assert codes.pixel.shape == codes.semantic.shape == (1, 27, 27, 8)
    assert decoded.shape == (1, 3, 384, 384)
    assert tokenizer.pixel_quantizer.codebook.shape == (1, 16384, 32)
