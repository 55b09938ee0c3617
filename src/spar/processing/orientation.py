"""The orientation of a camera's image, from its metadata: one answer for the header and for the pixels.

It is the EXIF tag, or its copy in XMP, wherever Pillow finds either: in its own segment, in a raw profile of
ImageMagick, or in chunks that follow a PNG's pixels.
"""

import re
import zlib
from io import BytesIO

from PIL import ExifTags, Image

TAIL_BYTES = 2**16  # of a PNG's end: metadata after the pixels are read in it alone, so that no image is read in whole

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_METADATA = re.compile(rb"eXIf|iTXt|zTXt|tEXt")
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def is_sideways(orientation: int | None) -> bool:
    """Whether the upright image is as wide as the stored one is high."""
    return orientation in _SIDEWAYS


def turn_upright(image: Image.Image, orientation: int | None) -> Image.Image:
    """The upright image of a stored one; the same object if it is upright, or the orientation is none of EXIF's."""
    method = _TRANSPOSES.get(orientation) if orientation is not None else None
    return image if method is None else image.transpose(method)


def orientation_of(image: Image.Image, end: bytes = b"") -> int | None:
    """EXIF orientation of an opened image, 1 to 8 if it is valid; None if it has none or its metadata are broken.

    Args:
        image: as opened; its pixels are not decoded.
        end: the last TAIL_BYTES bytes, or more, of a PNG file.
    """
    found = _tagged(image)
    if found is None and image.format == "PNG" and (late := _late_chunks(end[-TAIL_BYTES:])):
        try:
            with Image.open(BytesIO(_SIGNATURE + _EMPTY_HEADER + late + _EMPTY_END), formats=("PNG",)) as carrier:
                found = _tagged(carrier)
        except Exception:  # broken metadata make Pillow raise nearly anything
            return None
    return found


def _tagged(image: Image.Image) -> int | None:
    try:
        # The method of the base class: PNG's own decodes the pixels to find what follows them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # the same
        return None


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


_EMPTY_HEADER = _chunk(b"IHDR", bytes((0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0)))
_EMPTY_END = _chunk(b"IDAT") + _chunk(b"IEND")


def _late_chunks(end: bytes) -> bytes:
    """The chunks of metadata in a PNG's end; none where no chain of chunks leads to the file's last one."""
    dead: set[int] = set()  # places from which no chain of chunks leads to the end; each is tried once
    for match in _METADATA.finditer(end):
        place = match.start() - 4
        chain: list[int] = []
        metadata: list[bytes] = []
        while place >= 0 and place not in dead and place + 12 <= len(end):
            chain.append(place)
            following = place + 12 + int.from_bytes(end[place : place + 4], "big")
            checked, checksum = end[place + 4 : following - 4], end[following - 4 : following]
            if following > len(end) or zlib.crc32(checked).to_bytes(4, "big") != checksum:
                break
            if checked[:4] == b"IEND":
                return b"".join(metadata)
            if _METADATA.fullmatch(checked[:4]):
                metadata.append(end[place:following])
            place = following
        dead.update(chain)
    return b""
