"""Loading of untrusted images: a file to a checked RGB image, to a square, to a tensor and back.

The format is that of the content, never of the name. Sizes are checked before decoding, and an image that Pillow cannot
read to its end is refused. Colours are converted to sRGB by an image's own profile.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from spar.common.errors import InputError, first_line
from spar.processing.color import ProfileUse, profile_bytes, profile_use, to_rgb
from spar.processing.orientation import is_sideways, orientation_of, turn_upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
TRAINING_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 10**6
MAX_BYTES = 64 * 2**20
_HOLE = 64  # bytes: no encoder ends a file on so many zeros
MAX_SCANS = 100  # of a JPEG: an encoder writes about ten, and each decodes every pixel
MIN_SIDE = 1
MAX_ASPECT = 4  # the longer side is then twice the trained one

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor

_EXPECTED = f"expected an image as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
_EXPECTED_TRAINING = f"expected an image as {', '.join(TRAINING_FORMATS[:-1])} or {TRAINING_FORMATS[-1]}"
_EXPECTED_PIXELS = f"expected an image of at most {MAX_PIXELS // 10**6} megapixels"
# File types that share their beginning with video, by their brands.
_BRANDS = {
    "an AVIF image": {b"avif", b"avis"},
    "a HEIC image": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"},
    "a HEIF image": {b"mif1", b"mif2", b"msf1", b"miaf"},
    "a camera's raw image": {b"crx "},
}
_MAX_BRANDS = 256
_MAX_NAME = 200  # characters of a name in a message: a data: URL has the whole image
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/|data:")  # a Path has one slash left of two
# (offset, bytes there, name): file types often mistaken for supported ones
_OTHER_KINDS = (
    (4, b"JXL \r\n", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "XML text"),
    (0, b"<", "a web page"),
)


def open_image(source: ImageSource, *, profiles: bool = True) -> Image.Image:
    """Open a new RGB image, 8 bits a channel, upright, from a file's path, its bytes, a Pillow image or an array.

    An array is [H, W] or [H, W, C] of numpy or [C, H, W] of torch, C being 1, 3 or 4, of uint8 or of floats in [0, 1].
    A file may have any of FORMATS, up to MAX_BYTES and MAX_PIXELS; of an animation the first frame is used (of a Pillow
    image its current frame). EXIF orientation is applied, transparency blended onto white, 16 bits scaled to 8, and
    colours converted to sRGB by the image's profile; without `profiles` all values are taken as sRGB.
    Raises InputError, in one sentence, for anything else.
    """
    if isinstance(source, Image.Image):
        return _convert(source, "the given image", profiles=profiles)
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "the given data"
    elif isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        data, name = _read(path), repr(path)
    elif isinstance(source, np.ndarray | Tensor):
        return _convert(_from_array(source), "the given array", profiles=False)
    else:
        expected = "expected an image as a path, bytes, a Pillow image or an array"
        raise InputError(f"{expected}, got {type(source).__name__}")
    with _identify(data, name, FORMATS, _EXPECTED) as image:
        return _convert(image, name, data, profiles=profiles)


@dataclass(frozen=True)
class ImageHeader:
    """An image file's true format, and its upright size in pixels."""

    format: str
    width: int
    height: int


def read_header(data: bytes, end: bytes | None = None) -> ImageHeader:
    """Read the header of a training image without decoding it.

    Args:
        data: the image, or as much from its beginning as contains the header.
        end: at least the last TAIL_BYTES bytes of the image, where `data` are only its beginning.

    Raises:
        InputError: not a PNG, JPEG or WEBP, or a size that `open_training_image` would refuse.
    """
    with _identify(data, "it", TRAINING_FORMATS, _EXPECTED_TRAINING) as image:
        _check_pixels(image, "it")
        width, height = image.size
        turned = is_sideways(orientation_of(image, data if end is None else end))
        return ImageHeader(_true_format(image), *((height, width) if turned else (width, height)))


def open_training_image(data: bytes, *, profiles: bool = True) -> Image.Image:
    """Open a new RGB image as `open_image` does, from the bytes of a PNG, JPEG or WEBP of one frame.

    Raises:
        InputError: another format (by content), an animation, or an image that `open_image` refuses.
    """
    with _identify(data, "it", TRAINING_FORMATS, _EXPECTED_TRAINING) as image:
        # The further frames of a JPEG are a camera's depth or gain maps, and the first is the image.
        if _true_format(image) != "JPEG" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise InputError(f"{_EXPECTED_TRAINING} of one frame, but it has {frames}")
        return _convert(image, "it", data, profiles=profiles)


def profile_of(data: bytes) -> ProfileUse:
    """What `open_training_image` does with the colour profile of an image; InputError as `read_header`."""
    with _identify(data, "it", TRAINING_FORMATS, _EXPECTED_TRAINING) as image:
        return profile_use(image)


def to_square(image: Image.Image, side: int) -> Image.Image:
    """Crop the largest centred square of an RGB image and resize it to side x side pixels; as `to_size`."""
    return to_size(image, side, side)


def to_size(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop the largest centred part of an RGB image with these proportions and resize it to width x height pixels.

    Shapes keep their proportions and the ends of one side are lost. The resize is bicubic with antialiasing; an image
    of the right size keeps its pixels.
    """
    if min(width, height) < 1:
        raise InputError(f"expected a side of at least 1 pixel, got {min(width, height)}")
    wide, high = image.size
    if wide * height >= high * width:
        part = (max(1, round(high * width / height)), high)
    else:
        part = (wide, max(1, round(wide * height / width)))
    left, top = (wide - part[0]) // 2, (high - part[1]) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + part[0], top + part[1]))


def nearest_size(image: Image.Image, side: int, stride: int) -> tuple[int, int]:
    """Height and width nearest to an image's proportions, in multiples of `stride`, of about side x side pixels.

    Raises InputError for an image that is more than MAX_ASPECT times as long as wide.
    """
    aspect = image.height / image.width
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise InputError(f"expected an image at most {MAX_ASPECT} times as long as wide, got {_size(image)}")
    cells = side / stride
    rows, columns = (max(1, round(cells * ratio)) for ratio in (aspect**0.5, aspect**-0.5))
    return rows * stride, columns * stride


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Convert RGB images of one size to float32 [B, 3, H, W] in [0, 1]; one image is a batch of one."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images:
        raise ValueError("expected at least one image, got none")
    for image in images:
        if image.mode != "RGB" or image.size != images[0].size:
            raise ValueError(
                f"expected RGB images of one size, got {image.mode} of {_size(image)} beside {_size(images[0])}"
            )
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div(255).contiguous()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert tensors [B, 3, H, W] (or [3, H, W]) to RGB images: clamped to [0, 1], then rounded to 8 bits.

    The inverse of `to_tensor` on its outputs. Raises ValueError for other shapes and for values that are not finite.
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [B, 3, H, W], got {tuple(images.shape)}")
    images = images.detach().float().cpu()
    if not images.isfinite().all():
        raise ValueError("expected finite pixel values, got NaN or infinity")
    pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(image) for image in pixels]


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """A Pillow image of an array, whose shape, type and values are checked first."""
    own, place, shape = ("a tensor [C, H, W]", 0, tuple(array.shape))
    if isinstance(array, np.ndarray):
        own, place = "an array [H, W, C]", -1
    channels = 1 if len(shape) == 2 else shape[place] if len(shape) == 3 else 0
    if channels not in (1, 3, 4):
        raise InputError(f"expected an image as {own} of 1, 3 or 4 channels or as [H, W], got shape {shape}")
    height, width = shape if len(shape) == 2 else np.delete(shape, place)
    if min(height, width) < MIN_SIDE or height * width > MAX_PIXELS:
        raise InputError(f"{_EXPECTED_PIXELS} and a side of at least {MIN_SIDE} pixel, got {width} x {height} pixels")
    if isinstance(array, Tensor):
        if array.is_meta or array.layout != torch.strided:
            raise InputError("expected an image as a dense tensor, got one without values or a sparse one")
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    values = np.moveaxis(array, place, -1) if array.ndim == 3 else array
    if values.dtype != np.uint8:
        values = _to_bytes(values)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.ndim == 3 and channels == 1 else values))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Round floats in [0, 1] to 8 bits; InputError for other types, and for values that no byte is nearest to."""
    if not np.issubdtype(values.dtype, np.floating):
        raise InputError(f"expected an image of uint8 or of floats in [0, 1], got {values.dtype}")
    scaled = np.round(values.astype(np.float32) * 255)
    if not (scaled.min() >= 0 and scaled.max() <= 255):  # NaN is in no range
        raise InputError(f"expected an image of floats in [0, 1], got {values.min():g} to {values.max():g}")
    return scaled.astype(np.uint8)


def _read(path: str) -> bytes:
    """Read a regular file of at most MAX_BYTES."""
    name = repr(path if len(path) <= _MAX_NAME else f"{path[:_MAX_NAME]}...")
    if _ADDRESS.match(path) and not os.path.exists(path):
        raise InputError(f"{_EXPECTED} in a local file, got the URL {name}")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise InputError(f"{_EXPECTED}, but {name} is {kind}")
        if status.st_size > MAX_BYTES:
            raise InputError(_too_many_bytes(name, status.st_size))
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{_EXPECTED}, but there is no file {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InputError(f"{_EXPECTED}, but {name} cannot be read: {_reason(error)}") from error


def _identify(data: bytes, name: str, formats: tuple[str, ...], expected: str) -> Image.Image:
    """Open bytes as a Pillow image of one of the formats, by content, reading only the header."""
    if not data:
        raise InputError(f"{expected}, but {name} is empty")
    if len(data) > MAX_BYTES:
        raise InputError(_too_many_bytes(name, len(data)))
    try:
        image = Image.open(BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise InputError(f"{expected}, but {name} is {_kind(data)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own, far larger limit
        raise InputError(f"{_EXPECTED_PIXELS}, but {name} has far more") from None
    except Exception as error:  # a hostile header makes Pillow raise nearly anything
        raise InputError(f"{expected}, but {name} cannot be decoded: {_reason(error)}") from error
    # A scan's header: never part of a JPEG's pixels, where 0 follows every 0xff.
    if _true_format(image) == "JPEG" and data.count(b"\xff\xda\x00") > MAX_SCANS:
        raise InputError(f"{expected} of at most {MAX_SCANS} scans, but {name} has more")
    return image


def _true_format(image: Image.Image) -> str:
    """The format of an image that was read; MPO is a JPEG with further images after its end."""
    return "JPEG" if image.format == "MPO" else image.format or ""  # only an image made in memory has none


def _check_pixels(image: Image.Image, name: str) -> None:
    """Refuse an image by the size and the mode of its pixels, before they are read."""
    if min(image.size) < MIN_SIDE:
        raise InputError(f"expected an image with sides of at least {MIN_SIDE} pixel, but {name} is {_size(image)}")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{_EXPECTED_PIXELS}, but {name} is {_size(image)}")
    if image.mode in ("I", "F"):
        raise InputError(f"expected 8 or 16 bits a channel, but {name} has 32 (mode {image.mode}) of unknown range")


def _convert(image: Image.Image, name: str, data: bytes | None = None, *, profiles: bool) -> Image.Image:
    """Convert an image of any mode to a new upright RGB image; size and mode are checked before pixels are read.

    The image that was opened from `data` has no other references: it is not copied if there is nothing to convert.
    """
    _check_pixels(image, name)
    if data is not None and _ends_in_a_hole(data, image):
        raise InputError(f"{_EXPECTED} that is complete, but {name} has zeros in place of its end")
    try:
        late = data is None or image.format == "TIFF"  # Pillow turns a TIFF as it loads, and takes the tag away
        orientation = None if late else orientation_of(image, data or b"")
        image.load()
        if late:
            orientation = orientation_of(image)
        converted = _to_rgb(image, profile_bytes(image) if profiles else b"")
        if data is None and converted is image:
            converted = image.copy()
    except Exception as error:  # a truncated or hostile file makes Pillow raise nearly anything
        raise InputError(f"{_EXPECTED} that is complete, but {name} cannot be decoded: {_reason(error)}") from error
    upright = turn_upright(converted, orientation)
    upright.info = {}  # its orientation and its profile are applied, and would be again
    return upright


def _ends_in_a_hole(data: bytes, image: Image.Image) -> bool:
    """Whether the end of a file was never written, as of a download broken off: decoders take zeros for grey pixels."""
    if any(data[-_HOLE:]):
        return False
    match _true_format(image):
        case "JPEG":
            return b"\xff\xd9" not in data[data.rfind(b"\xff\xda") :]
        case "PNG":
            return b"IEND\xaeB`\x82" not in data
        case "WEBP":
            return b"EXIF" not in data  # whose zeros may be its end
    return False


def _to_rgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image of any mode as RGB, laid on white where it is transparent; the same object if it is that already."""
    if image.mode.startswith("I;16"):
        return to_rgb(_sixteen_to_grey(image), profile)
    if not image.has_transparency_data:
        return to_rgb(image, profile)
    own = "LA" if image.mode in ("L", "La", "LA") else "RGBA"
    image = image if image.mode == own else image.convert(own)  # which would copy one of that mode
    opaque = image.getchannel("L") if own == "LA" else image.convert("RGB")
    background = Image.new("RGB", image.size, "white")
    background.paste(to_rgb(opaque, profile), mask=image.getchannel("A"))
    return background


def _sixteen_to_grey(image: Image.Image) -> Image.Image:
    """Round 16-bit grey, 0 to 65535, to 8 bits (65535 = 255 * 257); Pillow's own conversion clips it."""
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _kind(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        # The brands of an ISO file: its own one, 4 bytes of version, those that it is compatible with.
        size = min(int.from_bytes(data[:4], "big"), _MAX_BRANDS)
        brands = {data[place : place + 4] for place in (8, *range(16, size - 3, 4))}
        return next((kind for kind, names in _BRANDS.items() if brands & names), "a video")
    for offset, magic, kind in _OTHER_KINDS:
        if data[offset : offset + len(magic)].lower() == magic.lower():
            return kind
    return "of another type or damaged"


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"


def _too_many_bytes(name: str, size: int) -> str:
    return f"expected an image of at most {MAX_BYTES >> 20} MiB, but {name} has {size / 2**20:.1f} MiB"


def _reason(error: Exception) -> str:
    """What the system says of a failure, else the first line of the error."""
    return first_line(error, getattr(error, "strerror", None))
