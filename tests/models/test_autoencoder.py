import pytest
import torch

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
def test_both_halves_equal_the_library_on_its_own_range(config, randomize):
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
