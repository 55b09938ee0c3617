"""DC-AE (arXiv 2410.10733) as an encoder and a decoder, from diffusers' `AutoencoderDC`.

The autoencoder's own range is [-1, 1]; everywhere else in this package pixels are in [0, 1].
"""

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, Decoder, Encoder
from torch import Tensor, nn

from spar.models.config import AutoencoderConfig
from spar.models.dcae_blocks import keep_channels_last


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderDC:
    """Build the library's class, encoder and decoder, with random weights; its blocks keep channels last in memory."""
    built = AutoencoderDC(
        latent_channels=config.latent_channels,
        attention_head_dim=config.head_dim,
        encoder_block_types=config.encoder_blocks,
        decoder_block_types=config.decoder_blocks,
        encoder_block_out_channels=config.channels,
        decoder_block_out_channels=config.channels,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_qkv_multiscales=config.encoder_multiscales,
        decoder_qkv_multiscales=config.decoder_multiscales,
        downsample_block_type=config.downsample,
        upsample_block_type=config.upsample,
    )
    keep_channels_last(built)
    return built


class PixelEncoder(nn.Module):
    """E_p, the encoder half: the teacher of tokenizer stage I; not part of the finished model."""

    def __init__(self, network: Encoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] to native latents `[B, D_p, H / stride, W / stride]`."""
        return self.network(pixels * 2 - 1)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps after each resolution, finest first: the frozen network of the small perceptual loss."""
        maps, x = [], self.network.conv_in(pixels * 2 - 1)
        for block in self.network.down_blocks:
            x = block(x)
            maps.append(x)
        return maps


class PixelDecoder(nn.Module):
    """D_p, the decoder half."""

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor) -> Tensor:
        """`[B, D_p, h, w]` to pixels `[B, 3, stride h, stride w]`, about [0, 1], not clamped."""
        return (self.network(latent) + 1) / 2
