"""Many images as one: a contact sheet, an animation, and HTML for notebooks."""

import base64
import html
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from spar.common.errors import InputError
from spar.common.files import atomic_file

GAP = 4  # pixels between the images of a sheet
MAX_SHEET = 16384  # pixels of a sheet's longer side, about; its images are made smaller to fit
FRAME_MS, LAST_FRAME_MS = 120, 1500
MAX_SHOWN = 64  # images in a notebook's cell
SHOWN_SIDE = 160  # pixels on the screen that an image in a cell has at least


def contact_sheet(images: Sequence[Image.Image], columns: int | None = None, *, gap: int = GAP) -> Image.Image:
    """Images row by row on white, each in the middle of its cell; by default in about as many rows as columns.

    Raises:
        InputError: no image, or fewer than one column.
    """
    if not images:
        raise InputError("expected at least one image, got none")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise InputError(f"columns: expected a whole number of at least 1, got {columns!r}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = (max(getattr(image, side) for image in images) for side in ("width", "height"))
    most = min((MAX_SHEET + gap) // columns, (MAX_SHEET + gap) // rows) - gap
    scale = min(1.0, most / max(width, height))
    width, height = (max(1, int(side * scale)) for side in (width, height))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        own = image if scale == 1 else image.resize((width, height), Image.Resampling.BOX)
        corner = (width - own.width) // 2, (height - own.height) // 2
        sheet.paste(own, (column * (width + gap) + corner[0], row * (height + gap) + corner[1]))
    return sheet


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as a GIF without end, the last one shown longer; as `atomic_file`.

    Raises:
        InputError: the file cannot be written.
    """
    times = [*[FRAME_MS] * (len(frames) - 1), LAST_FRAME_MS]
    try:
        with atomic_file(path) as temporary:
            frames[0].save(
                temporary, format="GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0
            )
    except OSError as error:
        raise InputError(f"output: {str(path)!r} cannot be written: {error.strerror or error}") from error


def images_html(images: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """HTML of images with their captions, small ones enlarged without smoothing; the first MAX_SHOWN of many."""
    figures = []
    for image, caption in zip(images[:MAX_SHOWN], captions[:MAX_SHOWN], strict=True):
        file = BytesIO()
        image.save(file, format="PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        width = image.width * max(1, math.ceil(SHOWN_SIDE / max(image.size)))
        figures.append(
            f'<figure style="display:inline-block;margin:4px;width:{width}px"><img width="{width}" '
            f'style="image-rendering:pixelated" src="{source}"'
            f' alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )
    more = f"<p>and {len(images) - MAX_SHOWN} more</p>" if len(images) > MAX_SHOWN else ""
    return f"<div>{''.join(figures)}{more}</div>"
