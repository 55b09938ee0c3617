"""Colours of tagged images come out as sRGB; what no profile can say stays as it is."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from spar.processing.color import MAX_PROFILE_BYTES
from spar.processing.images import open_image, open_training_image, profile_of


def wide_profile(space: bytes = b"RGB ") -> bytes:
    """A profile with the primaries of Adobe RGB and its gamma, 563 / 256; of grey, with the gamma alone."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    points = {b"wtpt": (0.9505, 1, 1.0891)}
    if space == b"RGB ":
        points |= {b"rXYZ": (0.60974, 0.31111, 0.01947), b"gXYZ": (0.20528, 0.62567, 0.06087)}
        points |= {b"bXYZ": (0.14919, 0.06322, 0.74457)}
    tags = {name: b"XYZ \0\0\0\0" + b"".join(map(number, xyz)) for name, xyz in points.items()}
    gamma = 563 if space == b"RGB " else 256  # of grey 1: values are light
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, gamma) + b"\0\0"
    tags |= {name: curve for name in ((b"rTRC", b"gTRC", b"bTRC") if space == b"RGB " else (b"kTRC",))}
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12)
    head = (head + b"acsp").ljust(68, b"\0") + number(0.9642) + number(1) + number(0.8249) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


WIDE, SRGB = wide_profile(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = Image.fromarray(np.random.default_rng(0).integers(30, 226, (16, 16, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(image, int) - np.asarray(other, int)).max())


def in_srgb(image: Image.Image) -> Image.Image:
    return ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(WIDE)), ImageCms.createProfile("sRGB"))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_a_wide_gamut_becomes_srgb(kind, options):
    data = encoded(NOISE, kind, icc_profile=WIDE, **options)
    right = in_srgb(NOISE)
    assert difference(NOISE, right) > 50  # what ignoring the profile would cost
    assert difference(open_image(data), right) <= 1
    assert difference(open_image(Image.open(io.BytesIO(data))), right) <= 1
    assert difference(open_image(data, profiles=False), NOISE) == 0
    if kind != "TIFF":
        assert profile_of(data) == "converted" and difference(open_training_image(data), right) <= 1
        assert difference(open_training_image(data, profiles=False), NOISE) == 0


def test_an_opened_image_is_not_converted_again():
    once = open_image(encoded(NOISE, icc_profile=WIDE))
    assert difference(open_image(once), once) == 0 and "icc_profile" not in once.info


def test_a_profile_of_srgb_changes_no_pixel():
    data = encoded(NOISE, icc_profile=SRGB)
    assert profile_of(data) == "sRGB" and difference(open_image(data), NOISE) == 0
    assert profile_of(encoded(NOISE)) == "none"


def test_transparency_is_blended_after_the_conversion():
    image = NOISE.convert("RGBA")
    image.putpixel((0, 0), (10, 200, 30, 0))
    opened, right = open_image(encoded(image, icc_profile=WIDE)), in_srgb(NOISE)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert difference(opened.crop((1, 0, 16, 16)), right.crop((1, 0, 16, 16))) <= 1


def test_a_palette_is_converted_by_its_colours():
    image = NOISE.quantize(16)
    assert difference(open_image(encoded(image, icc_profile=WIDE)), in_srgb(image.convert("RGB"))) <= 1


@pytest.mark.parametrize("profile", [wide_profile(b"GRAY"), WIDE])
def test_grey_is_converted_by_a_profile_of_grey_or_of_colours(profile):
    values = np.arange(256, dtype=np.uint8)[None]
    for image in (Image.fromarray(values), Image.fromarray(values).convert("LA")):
        opened = np.asarray(open_image(encoded(image, icc_profile=profile)), int)[0]
        assert np.ptp(opened, axis=1).max() <= 1 and (np.diff(opened[:, 0]) >= 0).all()
        assert opened[0, 0] == 0 and opened[255, 0] >= 254
        if profile is not WIDE:  # half of the light has the value 188 in sRGB
            assert abs(opened[128, 0] - 188) <= 1
    assert profile_of(encoded(Image.fromarray(values), icc_profile=profile)) == "converted"


@pytest.mark.parametrize(
    "profile", [b"nonsense", WIDE[:200], wide_profile(b"GRAY"), WIDE + bytes(MAX_PROFILE_BYTES), WIDE[:16] + bytes(200)]
)
def test_an_unusable_profile_leaves_the_values_and_is_counted(profile):
    data = encoded(NOISE, "WEBP", lossless=True, icc_profile=profile)
    assert profile_of(data) == "unusable" and difference(open_training_image(data), NOISE) == 0
