"""Decoding in tiles: the same for a decoder of single cells, near for the real one, and less held at once."""

import pytest
import torch

from spar.common.errors import InputError
from spar.inference.pipeline import SparPipeline
from spar.models.tiling import _ramp, _starts, decode_in_tiles


@pytest.mark.parametrize(("length", "tile", "overlap"), [(8, 4, 1), (9, 4, 1), (16, 5, 2), (4, 4, 1), (100, 32, 8)])
def test_tiles_cover_everything_and_overlap(length, tile, overlap):
    starts = _starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == length and starts == sorted(set(starts))
    assert all(before + tile - after >= overlap for before, after in zip(starts, starts[1:], strict=False))


def test_weights_are_positive_rise_and_fall():
    ramp = _ramp(12, 4)
    assert ramp.tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]


@pytest.mark.parametrize(
    ("tile", "size"),
    [
        *((4, size) for size in ((8, 8), (9, 13), (3, 16), (4, 4), (1, 8))),
        (8, (2, 16)), (16, (4, 32)), (30, (8, 32)), (31, (8, 32)),
    ],
)  # fmt: skip
def test_a_decoder_of_single_cells_gives_the_same_image(tile, size):
    latent = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    seen = []

    def decode(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[-2:]))
        return torch.nn.functional.interpolate(x * 2 + 1, scale_factor=4, mode="nearest")

    whole = decode(latent)
    assert torch.allclose(decode_in_tiles(decode, latent, tile), whole, atol=1e-6)
    assert max(max(shape) for shape in seen[1:]) <= tile


def test_the_pipeline_decodes_in_tiles_where_an_image_is_larger_and_nearly_the_same(monkeypatch):
    plain, tiled = SparPipeline.from_pretrained(), SparPipeline.from_pretrained(decode_tile=8)
    decoded = []
    forward = tiled.model.tokenizer.decoder.forward
    monkeypatch.setattr(
        tiled.model.tokenizer.decoder, "forward", lambda x: decoded.append(tuple(x.shape[-2:])) or forward(x)
    )
    asked = {"prompt": "a red circle on a beige background", "seed": 0, "num_inference_steps": 4}
    small = [pipe.generate(**asked).images[0] for pipe in (plain, tiled)]
    assert small[0].tobytes() == small[1].tobytes() and decoded == [(8, 8)]
    large = [pipe.generate(**asked, height=128, width=128).images[0] for pipe in (plain, tiled)]
    assert set(decoded[1:]) == {(8, 8)} and len(decoded) > 4
    a, b = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in large)
    assert 0 < float((a - b).abs().mean()) < 24  # of 255; what it draws at twice its side is like no image of training
    again = plain.reconstruct(large[0]).images[0]
    assert tiled.reconstruct(large[0]).images[0].size == again.size
    with pytest.raises(InputError, match="decode_tile: expected 4 to 1024, got 2"):
        SparPipeline.from_pretrained(decode_tile=2)
