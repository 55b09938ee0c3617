"""How an image becomes squares for the encoder that answers: one, or as InternVL does, several tiles and the whole.

transformers' `GotOcr2ImageProcessorPil` with `crop_to_patches` cuts the same tiles.
"""

from typing import Literal

from PIL import Image

from spar.processing.images import to_square

Geometry = Literal["crop", "stretch"]


def tile_grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Columns and rows, at most `most` tiles of side x side pixels, with the proportions nearest to an image's.

    Of several with the same proportions the larger counts, as long as the image has half of its pixels.
    """
    shapes = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        difference = abs(width / height - columns / rows)
        if difference < least or (difference == least and width * height > 0.5 * side**2 * columns * rows):
            best, least = (columns, rows), difference
    return best


def split_tiles(image: Image.Image, side: int, most: int) -> list[Image.Image]:
    """The tiles of an RGB image, row by row, and if there are several, the whole image as the last one."""
    columns, rows = tile_grid(image.width, image.height, side, most)
    whole = stretch(image, side, side)
    if columns * rows == 1:
        return [whole]
    canvas = stretch(image, columns * side, rows * side)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    return [*(canvas.crop((left, top, left + side, top + side)) for left, top in corners), whole]


def answer_images(image: Image.Image, side: int, geometry: Geometry, most: int) -> list[Image.Image]:
    """The squares that a model reads of an image for an answer; of one square, its middle or the whole stretched."""
    if most > 1:
        return split_tiles(image, side, most)
    return [to_square(image, side) if geometry == "crop" else stretch(image, side, side)]


def stretch(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image to width x height pixels, whatever its proportions; an image of that size keeps its pixels."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
