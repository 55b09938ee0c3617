from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spar.common.errors import InputError
from spar.models.config import AutoencoderConfig, StreamConfig
from spar.models.tokenizer import ResidualBlock, TransformerBlock, UnifiedTokenizer


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer(config, randomize) -> UnifiedTokenizer:
    return randomize(UnifiedTokenizer(config))


def test_a_residual_block_is_its_formula(randomize):
    block = randomize(ResidualBlock(8, norm_eps=1e-5))
    x = draw(2, 3, 8)
    normed = F.layer_norm(x, (8,), block.norm.weight, block.norm.bias)
    hidden = F.gelu(normed @ block.linear_1.weight.T + block.linear_1.bias)
    torch.testing.assert_close(block(x), x + hidden @ block.linear_2.weight.T + block.linear_2.bias)


def test_a_pixel_layer_is_torchs_prenorm_transformer_encoder_layer(randomize):
    layer = randomize(TransformerBlock(8, heads=2, mlp_ratio=3))
    reference = nn.TransformerEncoderLayer(
        8, 2, dim_feedforward=24, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
    )
    names = {
        "norm_1": "norm1", "norm_2": "norm2", "linear_1": "linear1", "linear_2": "linear2",
        "qkv.": "self_attn.in_proj_", "out": "self_attn.out_proj",
    }
    state = {}
    for key, value in layer.state_dict().items():
        old = next(name for name in names if key.startswith(name))
        state[names[old] + key[len(old) :]] = value
    reference.load_state_dict(state)
    x = draw(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(x), rtol=1e-4, atol=1e-5)


def test_the_latent_is_the_fusion_of_both_streams_semantic_first(tokenizer):
    latents = tokenizer.encode(draw(2, 3, 32, 32))
    both = torch.cat([latents.z_s, latents.z_p], dim=-1)                                # [B, N, 2 D_p]
    norm, first, _, second = tokenizer.fusion
    z = F.gelu(F.layer_norm(both, norm.normalized_shape, norm.weight, norm.bias) @ first.weight.T + first.bias)
    z = z @ second.weight.T + second.bias
    torch.testing.assert_close(latents.z_f, z.permute(0, 2, 1).reshape(2, -1, 4, 4))
    torch.testing.assert_close(latents.f_v, tokenizer.encoder(draw(2, 3, 32, 32)))


def test_the_semantic_stream_is_local_and_a_token_keeps_its_place(config, randomize):
    config = replace(config, streams=StreamConfig(residual_blocks=1, pixel_stream=False))
    tokenizer = randomize(UnifiedTokenizer(config))
    f_v = draw(1, 6, config.text.hidden_size)
    changed = f_v.clone()
    changed[0, 4, 0] += 3.0                                                             # row 1, column 1 of 2 x 3
    before, after = (tokenizer.fuse(f, size=(16, 24)) for f in (f_v, changed))
    assert before.z_p is None
    moved = (before.z_f - after.z_f).abs().amax(1)[0] > 1e-6
    assert moved.tolist() == [[False, False, False], [False, True, False]]


def test_with_layers_the_semantic_stream_is_no_longer_local(config, randomize):
    streams = StreamConfig(residual_blocks=1, pixel_stream=False, semantic_layers=2, pixel_heads=2)
    tokenizer = randomize(UnifiedTokenizer(replace(config, streams=streams)))
    assert [type(layer) for layer in tokenizer.semantic_stream.layers] == [TransformerBlock] * 2
    f_v = draw(1, config.grid**2, config.text.hidden_size)
    changed = f_v.clone()
    changed[:, 0] += 1
    moved = (tokenizer.fuse(f_v).z_s - tokenizer.fuse(changed).z_s).abs().amax(-1)[0]
    assert (moved > 0).all()


def test_the_pixel_stream_lets_every_token_see_every_other(tokenizer, config):
    f_v = draw(1, 16, config.text.hidden_size)
    changed = f_v.clone()
    changed[0, 15, 0] += 3.0
    before, after = tokenizer.fuse(f_v), tokenizer.fuse(changed)
    assert ((before.z_p - after.z_p).abs().amax(-1) > 1e-6).all()
    assert torch.equal(before.z_s[:, :15], after.z_s[:, :15])


@pytest.mark.parametrize("off", ["semantic_stream", "pixel_stream"])
def test_a_stream_that_is_off_holds_no_weights_and_gives_none(config, off):
    config = replace(config, streams=replace(config.streams, **{off: False}))
    tokenizer = UnifiedTokenizer(config)
    latents = tokenizer.encode(torch.rand(1, 3, 32, 32))
    assert (latents.z_s is None) == (off == "semantic_stream") and (latents.z_p is None) == (off == "pixel_stream")
    assert not any(name.startswith(off) for name in tokenizer.state_dict())


def test_a_tokenizer_without_any_stream_is_refused():
    with pytest.raises(InputError, match="at least one of semantic_stream and pixel_stream"):
        StreamConfig(semantic_stream=False, pixel_stream=False)


def test_decoding_gives_the_images_size_when_the_strides_differ(config, randomize):
    channels = (8,) * 6  # DC-AE f32 behind tokens of stride 28, as at full size
    config = replace(
        config,
        vision=replace(config.vision, image_size=56, patch_size=14),
        autoencoder=AutoencoderConfig(
            latent_channels=8, head_dim=8, channels=channels, encoder_layers=(0, 1, 1, 1, 1, 1),
            decoder_layers=(0, 1, 1, 1, 1, 1), encoder_blocks=("ResBlock",) * 6,
            decoder_blocks=("ResBlock",) * 6, encoder_multiscales=((),) * 6, decoder_multiscales=((),) * 6,
        ),
    )
    assert (config.autoencoder.stride, config.token_stride) == (32, 28)
    tokenizer = randomize(UnifiedTokenizer(config))
    z_f = tokenizer.encode(draw(1, 3, 56, 56)).z_f
    with torch.no_grad():
        full, resized = tokenizer.decoder(z_f), tokenizer.decode(z_f)
    assert full.shape == (1, 3, 64, 64) and resized.shape == (1, 3, 56, 56)
    wanted = F.interpolate(full, size=(56, 56), mode="bilinear")
    torch.testing.assert_close(resized, wanted)
    assert tokenizer.decode(draw(1, 8, 2, 3)).shape == (1, 3, 56, 84)


def test_a_residual_fusion_adds_to_the_semantic_stream(config, randomize):
    config = replace(config, streams=replace(config.streams, fusion="residual"))
    tokenizer, f_v = randomize(UnifiedTokenizer(config)), draw(2, 16, config.text.hidden_size)
    latents = tokenizer.fuse(f_v)
    learned = tokenizer.fusion(torch.cat([latents.z_s, latents.z_p], dim=-1))
    torch.testing.assert_close(latents.z_f.flatten(2).transpose(1, 2), latents.z_s + learned)
    with pytest.raises(InputError, match="residual adds to the semantic stream"):
        replace(config.streams, semantic_stream=False)


def test_the_norms_of_the_residual_blocks_have_the_configured_epsilon(config):
    tokenizer = UnifiedTokenizer(replace(config, streams=replace(config.streams, block_norm_eps=0.5)))
    assert {block.norm.eps for block in tokenizer.semantic_stream.blocks} == {0.5}


def test_decoding_at_equal_strides_is_the_decoder_alone(tokenizer):
    z_f = draw(1, 8, 4, 4)
    assert torch.equal(tokenizer.decode(z_f), tokenizer.decoder(z_f))


def test_the_measured_scale_brings_the_latent_to_unit_size_and_back(config):
    tokenizer = UnifiedTokenizer(config)
    z_f = 4.0 * draw(8, 8, 4, 4)
    tokenizer.latent_scale.fill_(float(1 / z_f.std()))
    assert tokenizer.normalize(z_f).std().item() == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(tokenizer.denormalize(tokenizer.normalize(z_f)), z_f)
