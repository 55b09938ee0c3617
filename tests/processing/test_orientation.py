"""One answer about an image's orientation, wherever it is written: the header's size is that of the upright pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from spar.data.index_cache import HEADER_BYTES, upright_size
from spar.processing.images import open_image, open_training_image, read_header
from spar.processing.orientation import TAIL_BYTES

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
EXIF = Image.Exif()
EXIF[0x0112] = 6
RAW = EXIF.tobytes()
TIFF = RAW.removeprefix(b"Exif\0\0")


def stored(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """An image whose left half is black; turned as orientation 6 says, its upper half is."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    pixels[:, : size[0] // 2] = 0
    return Image.fromarray(pixels)


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    stored().save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text(key: str, value: str, *, zipped: bool = False) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text(key, value, zip=True) if zipped else notes.add_itxt(key, value)
    return encoded("PNG", pnginfo=notes)


def after_pixels(*chunks: bytes, png: bytes | None = None) -> bytes:
    png = png or encoded("PNG")
    return png[:-12] + b"".join(chunks) + png[-12:]


RAW_PROFILE = f"\nexif\n{len(RAW):8d}\n{RAW.hex()}\n"
LATE_XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
CASES = {
    "JPEG, EXIF": encoded("JPEG", exif=EXIF),
    "PNG, EXIF": encoded("PNG", exif=EXIF),
    "WEBP, EXIF": encoded("WEBP", exif=EXIF),
    "JPEG, XMP": encoded("JPEG", xmp=XMP),
    "WEBP, XMP": encoded("WEBP", xmp=XMP),
    "PNG, XMP": text("XML:com.adobe.xmp", XMP.decode()),
    "PNG, raw profile": text("Raw profile type exif", RAW_PROFILE, zipped=True),
    "PNG, eXIf after the pixels": after_pixels(chunk(b"eXIf", TIFF)),
    "PNG, XMP after the pixels": after_pixels(chunk(b"iTXt", LATE_XMP)),
    "PNG, text before and eXIf after": after_pixels(chunk(b"eXIf", TIFF), png=text("Comment", "eXIf")),
    "PNG, eXIf between others": after_pixels(chunk(b"tIME", bytes(7)), chunk(b"eXIf", TIFF), chunk(b"prIv", b"?")),
}


@pytest.mark.parametrize("case", CASES)
def test_header_and_pixels_agree_and_are_upright(case):
    data = CASES[case]
    header = read_header(data)
    for opened in (open_training_image(data), open_image(data), open_image(Image.open(io.BytesIO(data)))):
        assert (header.width, header.height) == opened.size == (20, 40)
        pixels = np.asarray(opened).astype(int)
        assert pixels[:18].max() < 60 and pixels[22:].min() > 195  # the stored left half is above


@pytest.mark.parametrize("case", CASES)
def test_an_opened_image_is_not_turned_again(case):
    assert open_image(open_image(CASES[case])).size == (20, 40)


def test_a_large_png_is_sized_by_its_two_ends():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    data = after_pixels(chunk(b"eXIf", TIFF), png=buffer.getvalue())
    assert len(data) > HEADER_BYTES + TAIL_BYTES
    read = []

    def part(start: int, length: int) -> bytes:
        read.append(length)
        return data[start:][:length]

    assert upright_size(part) == (200, 300) == open_training_image(data).size
    assert sum(read) == HEADER_BYTES + TAIL_BYTES


@pytest.mark.parametrize(
    "late",
    [
        chunk(b"eXIf", b"nonsense"),
        chunk(b"eXIf", TIFF)[:-1] + b"?",  # another checksum
        b"\xff\xff\xff\xffeXIf",  # longer than the file
        b"".join(chunk(b"eXIf", b"") for _ in range(6000)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n4\nzz")),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_metadata_after_the_pixels_turn_nothing(late):
    data = after_pixels(late)
    assert read_header(data).width == 40
    assert open_training_image(CASES["PNG, EXIF"]).size == (20, 40)


def test_of_two_orientations_the_first_counts():
    upright = Image.Exif()
    upright[0x0112] = 1
    data = after_pixels(chunk(b"eXIf", TIFF), png=encoded("PNG", exif=upright))
    assert read_header(data).width == 40 == open_training_image(data).width
