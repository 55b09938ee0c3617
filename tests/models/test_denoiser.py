import copy
from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from spar.models.attention import sincos_pos_embed_2d
from spar.models.denoiser import Denoiser, linear_attention

CHANNELS, GRID, LENGTH = 8, 4, 6
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
FULL = torch.ones_like(MASK)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(config, samples: int = 1, *, height: int = GRID, width: int = GRID):
    """Latents, times and conditions of two images with `noise_samples` samples each."""
    latent = draw(2 * samples, CHANNELS, height, width, seed=1)
    time = torch.linspace(0.05, 0.95, 2 * samples)
    return latent, time, 2 * draw(2, LENGTH, config.denoiser.caption_channels, seed=2)


@pytest.fixture(scope="module")
def denoiser(config, randomize) -> Denoiser:
    return randomize(Denoiser(replace(config.denoiser, position_gain=0.0), CHANNELS, GRID))


def library(denoiser: Denoiser) -> SanaTransformer2DModel:
    """diffusers' class, configured by hand as the published 512 px models are, with the denoiser's weights."""
    config = denoiser.config
    built = SanaTransformer2DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=config.heads,
        attention_head_dim=config.head_dim, num_layers=config.layers, num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=config.cross_head_dim, cross_attention_dim=config.heads * config.head_dim,
        caption_channels=config.caption_channels, mlp_ratio=config.mlp_ratio, attention_bias=False, sample_size=GRID,
        patch_size=1, norm_elementwise_affine=False, norm_eps=1e-6, interpolation_scale=config.interpolation_scale,
    )
    built.load_state_dict(denoiser.network.state_dict())
    return built.eval()


def reference(network: SanaTransformer2DModel, latent, time, condition, mask) -> torch.Tensor:
    """The library's own forward pass; its time runs to 1000."""
    return network(
        latent, encoder_hidden_states=condition, timestep=1000 * time, encoder_attention_mask=mask
    ).sample


@pytest.mark.parametrize("gradients", [False, True])  # the two ways of attention
@pytest.mark.parametrize("mask", [FULL, MASK], ids=["full", "padded"])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0])
def test_velocity_equals_diffusers_sana(config, randomize, scale, mask, gradients):
    given = replace(config.denoiser, interpolation_scale=scale, position_gain=0.0)
    built = randomize(Denoiser(given, CHANNELS, GRID))
    latent, time, condition = inputs(config)
    with torch.set_grad_enabled(gradients):
        built.requires_grad_(gradients)
        own = built(latent, time, condition, mask).velocity
    with torch.no_grad():
        wanted = reference(library(built), latent, time, condition, mask)
    torch.testing.assert_close(own.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_softmax_attention_equals_diffusers_own_with_the_same_weights(config, randomize, gradients):
    given = replace(config.denoiser, self_attention="softmax", position_gain=0.0)
    built = randomize(Denoiser(given, CHANNELS, GRID))
    sana = library(built)
    for block in sana.transformer_blocks:
        block.attn1.set_processor(AttnProcessor2_0())
    latent, time, condition = inputs(config)
    with torch.set_grad_enabled(gradients):
        built.requires_grad_(gradients)
        own = built(latent, time, condition, MASK).velocity
    with torch.no_grad():
        wanted, linear = (reference(one, latent, time, condition, MASK) for one in (sana, library(built)))
    torch.testing.assert_close(own.detach(), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - linear).abs().max() > 1e-3


def test_the_blocks_read_tokens_whose_channels_lie_together(denoiser, config):
    """Else every product would copy them, and some their weights for each image too."""
    seen: list[bool] = []
    blocks = denoiser.network.transformer_blocks
    hooks = [block.register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous())) for block in blocks]
    denoiser(*inputs(config), FULL)
    for hook in hooks:
        hook.remove()
    assert seen == [True] * len(blocks)


@pytest.mark.parametrize(("height", "width"), [(GRID, GRID), (2, 6)])
def test_positions_are_the_grid_embedding_on_the_embedded_latent(config, randomize, height, width):
    built = randomize(Denoiser(replace(config.denoiser, position_gain=1.7), CHANNELS, GRID))
    latent, time, condition = inputs(config, height=height, width=width)
    table = 1.7 * sincos_pos_embed_2d(config.denoiser.width, height, width, base=10.0)
    sana = library(built)
    sana.patch_embed.register_forward_hook(lambda module, given, out: out + table)
    with torch.no_grad():
        own, wanted = built(latent, time, condition, MASK).velocity, reference(sana, latent, time, condition, MASK)
        without = reference(library(built), latent, time, condition, MASK)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    assert (own - without).abs().max() > 1e-2


def test_velocity_equals_diffusers_sana_on_a_grid_of_another_shape(config, denoiser):
    latent, time, condition = inputs(config, height=2, width=6)
    with torch.no_grad():
        own = denoiser(latent, time, condition, MASK).velocity
        wanted = reference(library(denoiser), latent, time, condition, MASK)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2])
def test_keys_made_once_give_the_very_velocity_of_their_condition(config, denoiser, samples):
    latent, time, condition = inputs(config, samples=samples)
    with torch.no_grad():
        keys = denoiser.key_values(condition)
        for moment in (time, time / 2):
            plain, again = denoiser(latent, moment, condition, MASK), denoiser(latent, moment, keys, MASK)
            assert torch.equal(plain.velocity, again.velocity) and torch.equal(plain.features, again.features)


def test_gradients_equal_those_of_diffusers_sana(config, randomize):
    built = randomize(Denoiser(replace(config.denoiser, position_gain=0.0), CHANNELS, GRID)).requires_grad_(True)
    latent, time, condition = inputs(config)
    condition.requires_grad_()
    network = library(built)
    own = built(latent, time, condition, MASK).velocity
    own = torch.autograd.grad(own.square().mean(), [condition, *built.network.parameters()])
    other = reference(network, latent, time, condition, MASK)
    other = torch.autograd.grad(other.square().mean(), [condition, *network.parameters()])
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tap", [1, 2, 3])
def test_features_are_the_hidden_state_behind_the_tapped_block(config, randomize, tap):
    built = randomize(Denoiser(replace(config.denoiser, align_depth=tap, position_gain=0.0), CHANNELS, GRID))
    latent, time, condition = inputs(config)
    network, seen = library(built), []
    network.transformer_blocks[tap - 1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        reference(network, latent, time, condition, MASK)
        features = built(latent, time, condition, MASK).features
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-5)


def test_a_reference_is_added_to_its_own_cells_of_all_its_draws(config, denoiser):
    latent, time, condition = inputs(config, samples=2)
    known = draw(2, CHANNELS, GRID, GRID, seed=4)
    with torch.no_grad():
        both = denoiser(latent, time, condition, MASK, known).velocity
        nothing = denoiser(latent, time, condition, MASK, torch.zeros_like(known)).velocity
        swapped = denoiser(latent, time, condition, MASK, known[[1, 0]]).velocity
    torch.testing.assert_close(nothing, denoiser(latent, time, condition, MASK).velocity)
    assert (both - nothing).abs().amax((1, 2, 3)).min() > 1e-3 and (both - swapped).abs().amax((1, 2, 3)).min() > 1e-3
    with torch.no_grad():
        for row in range(4):
            one, image = slice(row, row + 1), slice(row // 2, row // 2 + 1)
            alone = denoiser(latent[one], time[one], condition[image], MASK[image], known[image]).velocity
            torch.testing.assert_close(both[one], alone, rtol=1e-4, atol=1e-5)


def test_a_reference_starts_without_effect_and_can_be_left_out(config):
    new = Denoiser(config.denoiser, CHANNELS, GRID)
    assert new.reference_embed.weight.abs().max() == 0
    assert not hasattr(Denoiser(replace(config.denoiser, reference_latent=False), CHANNELS, GRID), "reference_embed")


@pytest.mark.parametrize("gradients", [False, True])
def test_draws_that_share_a_condition_equal_separate_calls(config, denoiser, gradients):
    latent, time, condition = inputs(config, samples=3)
    with torch.set_grad_enabled(gradients):
        condition.requires_grad_(gradients)
        shared = denoiser(latent, time, condition, MASK)
        for row in range(6):  # samples of one image stand side by side
            one, image = slice(row, row + 1), slice(row // 3, row // 3 + 1)
            alone = denoiser(latent[one], time[one], condition[image], MASK[image])
            torch.testing.assert_close(shared.velocity[one], alone.velocity, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(shared.features[one], alone.features, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_sana_fits_by_name(denoiser):
    """Nothing is renamed, and nothing added but what reads the reference of an edit."""
    assert {f"network.{name}" for name in library(denoiser).state_dict()} == set(denoiser.state_dict()) - {
        "reference_embed.weight"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sums_of_linear_attention_pass_the_range_of_half_precision(denoiser, dtype):
    block = copy.deepcopy(denoiser.network.transformer_blocks[0])
    for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0]):
        linear.weight.copy_(torch.eye(len(linear.weight)))
    x = 100 + 10 * draw(1, 16, denoiser.config.width)          # a sum over 16 tokens of k v is 160,000
    exact = linear_attention(block, x)
    with torch.autocast("cpu", dtype):
        half = linear_attention(block, x)
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.5)
