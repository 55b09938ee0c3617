from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_processor import SanaMultiscaleAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.normalization import RMSNorm

from spar.models import dcae_blocks
from spar.models.autoencoder import PixelDecoder, PixelEncoder, build_autoencoder
from spar.models.config import AutoencoderConfig

SMALL = AutoencoderConfig(
    latent_channels=4, head_dim=8, channels=(8, 8, 16), encoder_layers=(0, 1, 1), decoder_layers=(0, 1, 1),
    encoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_multiscales=((), (), (3,)),
    decoder_blocks=("ResBlock", "EfficientViTBlock", "ResBlock"), decoder_multiscales=((), (5,), ()),
)
WHOLE = AutoencoderConfig(
    latent_channels=4, head_dim=8, channels=(8, 8, 16), encoder_layers=(1, 1, 1), decoder_layers=(1, 1, 1),
    encoder_blocks=("ResBlock",) * 3, decoder_blocks=("ResBlock",) * 3, encoder_multiscales=((),) * 3,
    decoder_multiscales=((),) * 3, downsample="Conv", upsample="pixel_shuffle",
)


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [SMALL, WHOLE])
def test_both_halves_have_pixels_in_0_to_1_around_the_networks_own_range(config, randomize):
    library = randomize(build_autoencoder(config))
    encode, decode = PixelEncoder(library.encoder), PixelDecoder(library.decoder)
    with torch.no_grad():
        latent = library.encode(2 * pixels() - 1).latent
        torch.testing.assert_close(encode(pixels()), latent)
        torch.testing.assert_close(2 * decode(latent) - 1, library.decode(latent).sample)


@pytest.mark.parametrize("config", [SMALL, WHOLE])
def test_the_stride_is_how_much_an_image_shrinks_and_grows_back(config):
    library = build_autoencoder(config)
    with torch.no_grad():
        latent = PixelEncoder(library.encoder)(pixels())
        assert latent.shape == (2, 4, 16 // config.stride, 8 // config.stride)
        assert PixelDecoder(library.decoder)(latent).shape == (2, 3, 16, 8)


@pytest.mark.parametrize("config", [SMALL, WHOLE])
def test_features_are_the_encoders_own_maps(config, randomize):
    network = randomize(build_autoencoder(config)).encoder
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in network.down_blocks]
    with torch.no_grad():
        PixelEncoder(network)(pixels())
        for hook in hooks:
            hook.remove()
        features = PixelEncoder(network).features(pixels())
    assert len(features) == len(config.channels)
    for own, other in zip(features, seen, strict=True):
        torch.testing.assert_close(own, other)
    assert [map_.shape[-1] for map_ in features] == sorted((map_.shape[-1] for map_ in features), reverse=True)


def library_of(config: AutoencoderConfig, own: AutoencoderDC) -> AutoencoderDC:
    """diffusers' own class as it is, with the weights of ours."""
    given = own.config
    library = AutoencoderDC(**{name: value for name, value in given.items() if not name.startswith("_")})
    library.load_state_dict(own.state_dict())
    return library


# A channel of the shortcut above repeats four times at 8 to 8 channels, twice at 16 to 8; UNEVEN's three times.
ONCE = replace(SMALL, channels=(16, 4, 16), decoder_blocks=("ResBlock",) * 3, decoder_multiscales=((),) * 3)
UNEVEN = replace(SMALL, channels=(12, 12, 16), decoder_blocks=("ResBlock",) * 3, decoder_multiscales=((),) * 3)


@pytest.mark.parametrize("config", [SMALL, WHOLE, ONCE, UNEVEN])
@pytest.mark.parametrize("side", [8, 32])  # attention: quadratic where tokens are few, else linear
def test_channels_last_compute_the_library_s_function_and_gradients(config, side, randomize):
    own = randomize(build_autoencoder(config)).requires_grad_(True)
    library = library_of(config, own)
    assert type(library.decoder) is not type(own.decoder) and list(library.state_dict()) == list(own.state_dict())
    image = torch.randn(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(1))
    grads = []
    for model in (own, library):
        latent = model.encoder(image)
        decoded = model.decoder(latent)
        decoded.square().sum().backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item(), msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(own.encoder(image), library.encoder(image), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.decoder(latent), library.decoder(latent), rtol=1e-4, atol=1e-4)


def test_a_norm_in_chunks_is_the_norm_and_leaves_its_residual_alone(monkeypatch):
    monkeypatch.setattr(dcae_blocks, "NORM_CHUNK", 40)  # 5 rows of 8: the last chunk is shorter
    norm = RMSNorm(8, 1e-5, elementwise_affine=True, bias=True)
    with torch.inference_mode():
        norm.weight.normal_()
        norm.bias.normal_()
        image, residual = dcae_blocks.channels_last(torch.randn(2, 8, 3, 7)), torch.randn(2, 8, 3, 7)
        before = residual.clone()
        expected = norm(image.movedim(1, -1)).movedim(-1, 1) + residual
        torch.testing.assert_close(dcae_blocks.normalize(norm, image, residual), expected)
        assert torch.equal(residual, before)


def test_a_target_without_gradients_is_what_training_compares_with_it(randomize):
    own, image = randomize(build_autoencoder(SMALL)), pixels()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target = own.encoder(image)
        assert torch.equal(target, own.requires_grad_(True).encoder(image))


def test_in_inference_autocast_keeps_images_in_its_type(randomize):
    own = randomize(build_autoencoder(SMALL))
    library, latent = library_of(SMALL, own), torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        expected = library.decoder(latent)
        with torch.autocast("cpu", torch.bfloat16):
            inner = own.decoder.up_blocks[2](own.decoder.conv_in(latent))
            decoded = own.decoder(latent)
    assert inner.dtype == torch.bfloat16
    assert ((decoded - expected).abs().mean() / expected.abs().mean()).item() < 0.03


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_float16_has_sums_over_many_pixels(autocast):
    torch.manual_seed(0)  # rounding depends on the weights
    attention = build_autoencoder(SMALL).decoder.up_blocks[1][-1].attn
    attention.residual_connection = False
    library, image = deepcopy(attention), 64 * torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    library.processor = SanaMultiscaleAttnProcessor2_0()
    with torch.inference_mode():
        expected = library(image)
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            found = attention(image) if autocast else attention.half()(image.half())
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_parts_whose_weights_a_hook_brings_are_called(randomize):
    """As diffusers' pipelines offload each layer of an autoencoder."""
    decoder, latent = randomize(build_autoencoder(SMALL)).decoder, torch.randn(1, 4, 4, 4)
    with torch.inference_mode():
        expected = decoder(latent)
        cpu_offload(decoder, execution_device=torch.device("cpu"))
        assert all(weight.is_meta for weight in decoder.parameters())
        torch.testing.assert_close(decoder(latent), expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_with_a_hook_or_around_which_there_is_an_adapter_is_called(randomize):
    class Doubled(torch.nn.Conv2d):
        def forward(self, image):
            return 2 * super().forward(image)

    block, image, seen = randomize(build_autoencoder(SMALL)).decoder.up_blocks[1][0], torch.randn(1, 16, 4, 4), []
    block.shortcut = False
    with torch.inference_mode():
        expected = block(image)
        hook = block.conv.register_forward_hook(lambda _, __, out: seen.append(out))
        torch.testing.assert_close(block(image), expected)
        hook.remove()
        assert len(seen) == 1
        block.conv.__class__ = Doubled
        torch.testing.assert_close(block(image), 2 * expected)


def test_the_callers_default_type_changes_nothing():
    conv, image = torch.nn.Conv2d(3, 4, 3, padding=1), pixels()
    with torch.inference_mode():
        wanted = dcae_blocks.convolve_enlarged(conv, image)
        torch.set_default_dtype(torch.float64)
        try:
            found = dcae_blocks.convolve_enlarged(conv, image)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
