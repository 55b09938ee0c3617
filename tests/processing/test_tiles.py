"""Tiles of an image: those of transformers' own processor of InternVL3."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from spar.processing.tiles import answer_images, split_tiles, stretch, tile_grid

SIZES = [(64, 64), (640, 480), (100, 900), (900, 100), (33, 97), (449, 448), (1, 1), (2000, 1000), (128, 128), (70, 64)]


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("most", [1, 2, 6, 12])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_library(size, most):
    image = picture(*size)
    processor = GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, do_normalize=False, do_rescale=False)
    given = processor(image, crop_to_patches=most > 1, min_patches=1, max_patches=most)
    wanted = np.stack(given["pixel_values"]).transpose(0, 2, 3, 1)
    own = np.stack([np.asarray(tile) for tile in split_tiles(image, 64, most)])
    assert own.shape == wanted.shape
    assert np.abs(own.astype(int) - wanted.astype(int)).max() <= 1  # the library rounds on the way
    columns, rows = tile_grid(*size, 64, most)
    assert columns * rows <= most and len(own) == columns * rows + (columns * rows > 1)


def test_a_square_is_the_middle_or_the_whole():
    image = picture(128, 64)
    (middle,) = answer_images(image, 64, "crop", 1)
    assert np.array_equal(np.asarray(middle), np.asarray(image)[:, 32:96])
    (whole,) = answer_images(image, 64, "stretch", 1)
    assert np.array_equal(np.asarray(whole), np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))
    assert len(answer_images(image, 64, "crop", 2)) == 3
    assert stretch(image, 128, 64) is image
