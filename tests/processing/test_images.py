import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from spar.common.errors import InputError
from spar.processing.images import (
    FORMATS,
    MAX_BYTES,
    nearest_size,
    open_image,
    open_training_image,
    to_pil,
    to_size,
    to_square,
    to_tensor,
)


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth image, different in every quarter, that lossy formats keep well."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rng = np.random.default_rng(seed)
    channels = [a * x + b * y + c * x * y for a, b, c in rng.uniform(0, 1 / 3, (3, 3))]
    return Image.fromarray((255 * np.stack(channels, axis=-1)).round().astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_comes_back_by_content_under_any_name(kind, tmp_path):
    path = tmp_path / "picture.txt"
    path.write_bytes(encode(picture(), kind))
    tolerance = 0 if kind in ("PNG", "BMP", "TIFF") else 3
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        opened = open_image(source)
        assert opened.mode == "RGB" and opened.size == (60, 40)
        assert np.abs(pixels(opened) - pixels(picture())).mean() <= tolerance


def test_a_pillow_image_comes_back_as_a_copy():
    image = picture()
    opened = open_image(image)
    opened.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(pixels(image), pixels(picture())) and opened.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_turned_camera_is_turned_back(kind, orientation):
    """The stored image is the inverse of what the orientation asks for, so every file must come out upright."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(inverse[orientation]) if orientation > 1 else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encode(stored, kind, exif=exif))
    assert opened.size == (60, 40)
    assert np.abs(pixels(opened) - pixels(picture())).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"MM\x00*\xff\xff\xff\xff", b"nonsense"])
def test_broken_exif_does_not_lose_the_image(exif):
    opened = open_image(encode(picture(), exif=b"Exif\x00\x00" + exif))
    assert np.array_equal(pixels(opened), pixels(picture()))


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    image = image.convert("LA").convert(mode) if mode.startswith("L") else image.convert(mode)
    assert pixels(open_image(image))[0].tolist() == [[0] * 3, [255] * 3, [204] * 3]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white_and_the_others_keep_their_colours(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    image.putdata([0, 1, 2])
    opened = open_image(encode(image, kind, transparency=1))
    assert pixels(opened)[0].tolist() == [[10, 20, 30], [255, 255, 255], [0, 200, 0]]


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32896, 65278, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        opened = pixels(open_image(encode(Image.fromarray(values), kind)))
        assert opened[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
        assert (opened[..., 0] == opened[..., 1]).all() and (opened[..., 0] == opened[..., 2]).all()


def test_sixteen_bit_transparency_is_white():
    values = np.array([[0, 1000, 65535]], dtype=np.uint16)
    opened = open_image(encode(Image.fromarray(values), transparency=1000))
    assert pixels(opened)[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_cmyk_keeps_its_colours(color):
    opened = open_image(encode(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels(opened) - np.array(color)).max() <= 3


def test_one_bit_and_grey_are_grey():
    assert pixels(open_image(encode(Image.new("1", (2, 2), 1)))).min() == 255
    assert (pixels(open_image(encode(Image.new("L", (2, 2), 77)))) == 77).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_image(encode(red, kind, save_all=True, append_images=[blue], **options))
    assert (pixels(opened) == [255, 0, 0]).all()


def test_a_claimed_size_is_refused_before_any_pixel_is_made(monkeypatch):
    with pytest.raises(InputError, match="cannot be decoded"):  # within the limit, it is its pixels that are missing
        open_image(png_header(40, 40))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were read"))
    for side in (8001, 30_000):  # beyond our limit, beyond Pillow's
        with pytest.raises(InputError, match="at most 64 megapixels"):
            open_image(png_header(side, side))
    assert Image.MAX_IMAGE_PIXELS == 89478485


def test_too_many_bytes_are_refused_unread(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match=r"at most 64 MiB, but '.*huge.png' has 64.0 MiB"):
        open_image(path)
    with pytest.raises(InputError, match="at most 64 MiB, but the given data has"):
        open_image(bytes(MAX_BYTES + 1))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    data = encode(noise, kind)
    with pytest.raises(InputError, match="expected an image as .* cannot be decoded: ."):
        open_image(data[: int(part * len(data))])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_file_whose_end_was_never_written_is_refused(kind, options, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind, **options)
    length = int(part * len(data))
    with pytest.raises(InputError, match="that is complete"):
        open_training_image(data[:length] + bytes(len(data) - length))
    if kind != "WEBP":  # zeros after the end are padding
        assert np.array_equal(pixels(open_training_image(data + bytes(500))), pixels(open_training_image(data)))


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "the given data is empty"),
        (b"hello", "the given data is of another type or damaged"),
        (b"%PDF-1.7 ...", "is a PDF"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00", "is a HEIC image"),
        (b"\x00\x00\x00\x18ftypheim\x00\x00\x00\x00mif1heim", "is a HEIC image"),
        (b"\x00\x00\x00\x18ftyphevc\x00\x00\x00\x00msf1hevc", "is a HEIC image"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic", "is a HEIC image"),
        (b"\x00\x00\x00\x18ftypmsf1\x00\x00\x00\x00msf1iso8", "is a HEIF image"),
        (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1avif", "is an AVIF image"),
        (b"\x00\x00\x00\x18ftypavis\x00\x00\x00\x00avismsf1", "is an AVIF image"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isommp42", "is a video"),
        (b"\xff\xff\xff\xffftypqt  ", "is a video"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "is a JPEG XL image"),
        ("https://example.org/a.png", "in a local file, got the URL 'https://example.org/a.png'"),
        (Path("https://example.org/a.png"), "in a local file, got the URL 'https:/example.org/a.png'"),
        (f"data:image/png;base64,{'A' * 5000}", f"got the URL 'data:image/png;base64,{'A' * 178}...'"),
        ("C:/pictures/a.png", "there is no file 'C:/pictures/a.png'"),
        ("/dev/null", "'/dev/null' is not a regular file"),
        ("a\x00b.png", "cannot be read: embedded null byte"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("", "there is no file ''"),
        (None, "got NoneType"),
        (3, "got int"),
        ([b""], "got list"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(source, message):
    with pytest.raises(InputError, match="expected an image as") as caught:
        open_image(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_images_are_refused_by_name(tmp_path):
    (tmp_path / "empty.png").touch()
    for path, message in (
        (tmp_path / "empty.png", "empty.png' is empty"),
        (tmp_path / "missing.png", "there is no file '.*missing.png'"),
        (tmp_path, "' is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            open_image(path)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_unknown_range_are_refused(mode):
    with pytest.raises(InputError, match=rf"expected 8 or 16 bits .* \(mode {mode}\)"):
        open_image(Image.new(mode, (2, 2)))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(InputError, match="is 0 x 4 pixels"):
        open_image(Image.new("RGB", (0, 4)))


def test_a_pillow_image_has_the_same_limit():
    image = Image.new("1", (9000, 9000))
    with pytest.raises(InputError, match="64 megapixels, but the given image is 9000 x 9000"):
        open_image(image)


VALID = {kind: encode(picture(12, 9), kind) for kind in FORMATS}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on its way to an error
@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(FORMATS), edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1))
def test_a_damaged_file_gives_an_image_or_an_input_error_and_nothing_else(kind, edits):
    data = bytearray(VALID[kind])
    for place, value in edits:
        data[int(place * len(data))] = value
    try:
        opened = open_image(data)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert opened.mode == "RGB" and min(opened.size) >= 1


def test_a_square_of_the_right_side_keeps_its_pixels():
    assert np.array_equal(pixels(to_square(picture(32, 32), 32)), pixels(picture(32, 32)))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (41, 40), (40, 40)])
def test_the_square_is_the_centre(size):
    image = picture(*size)
    left, top = (size[0] - 40) // 2, (size[1] - 40) // 2
    assert np.array_equal(pixels(to_square(image, 40)), pixels(image)[top : top + 40, left : left + 40])


def test_shrinking_averages_and_growing_keeps_flat_colours():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (64, 32, 3)))
    assert np.abs(pixels(to_square(stripes, 8)) - 127.5).max() <= 8
    flat = to_square(Image.new("RGB", (3, 1), (9, 80, 200)), 16)
    assert flat.size == (16, 16) and (pixels(flat) == [9, 80, 200]).all()


def test_a_square_without_a_side_is_refused():
    with pytest.raises(InputError, match="side of at least 1"):
        to_square(picture(), 0)


def test_every_8_bit_value_survives_the_tensor():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    images = [Image.fromarray(np.stack([values, values.T, 255 - values], axis=-1)), picture(16, 16)]
    tensor = to_tensor(images)
    assert tensor.dtype == torch.float32 and tensor.min() == 0 and tensor.max() == 1
    assert tensor[0, 1, 3, 2] == float(values[2, 3]) / 255  # [B, C, y, x]
    for image, back in zip(images, to_pil(tensor), strict=True):
        assert np.array_equal(pixels(image), pixels(back))
    assert torch.equal(to_tensor(images[1])[0], tensor[1])
    assert np.array_equal(pixels(to_pil(tensor[1])[0]), pixels(images[1]))


def test_pixels_are_clamped_and_rounded():
    values = torch.tensor([-3.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 7.0])
    assert pixels(to_pil(values.expand(3, 1, 4))[0])[0, :, 0].tolist() == [0, 0, 1, 255]


def test_tensors_that_are_no_images_raise():
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got"):
        to_pil(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="finite"):
        to_pil(torch.full((3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match="one size"):
        to_tensor([picture(4, 4), picture(5, 4)])
    with pytest.raises(ValueError, match="RGB images"):
        to_tensor(picture().convert("L"))
    with pytest.raises(ValueError, match="at least one image"):
        to_tensor([])


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((448, 448), (448, 448)), ((1920, 1080), (336, 588)), ((1080, 1920), (588, 336)), ((400, 100), (224, 896))],
)
def test_the_nearest_size_has_the_images_proportions_and_about_the_trained_pixels(size, wanted):
    height, width = nearest_size(Image.new("RGB", size), 448, 28)
    assert (height, width) == wanted and height % 28 == width % 28 == 0
    assert abs(height * width / 448**2 - 1) < 0.1


def test_an_image_of_the_right_proportions_is_only_scaled_and_another_loses_its_ends():
    image = picture(60, 40)
    assert np.array_equal(pixels(to_size(image, 60, 40)), pixels(image))
    assert np.array_equal(pixels(to_size(image, 50, 40)), pixels(image)[:, 5:55])


# Arrays


def test_arrays_of_any_layout_are_the_same_image():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    floats = (tensor / 255, (tensor / 255).double(), (tensor / 255).requires_grad_(), tensor / 255 + 1e-4)
    for source in (pixels, pixels / 255, (pixels / 255).astype(np.float32), pixels[:, ::-1][:, ::-1], tensor, *floats):
        if isinstance(source, torch.Tensor) and source.is_floating_point() and source.max() > 1:
            source = source.clamp(max=1)
        assert (np.asarray(open_image(source)) == pixels).all()
    halves = open_image((tensor / 255).bfloat16())
    assert np.abs(np.asarray(halves).astype(int) - pixels).max() <= 1


def test_grey_and_transparent_arrays_are_as_their_pillow_images():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for source in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert (np.asarray(open_image(source)) == grey[..., None]).all()
    clear = np.zeros((3, 4, 4), np.uint8)
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)  # laid on white
    clear[..., 3] = 255
    assert open_image(torch.from_numpy(clear).permute(2, 0, 1)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), r"an array \[H, W, C\] of 1, 3 or 4 channels .* got shape \(2, 4, 4, 3\)"),
        (np.zeros(3, np.uint8), "got shape"), (np.zeros((3, 8, 8)), "got shape"), (np.zeros(()), "got shape"),
        (torch.zeros(8, 8, 3), r"as a tensor \[C, H, W\] .* got shape \(8, 8, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "side of at least 1 pixel, got 4 x 0 pixels"),
        (np.full((4, 4, 3), 1.1), r"floats in \[0, 1\], got 1.1 to 1.1"), (np.full((4, 4, 3), -1.0), "got -1 to -1"),
        (np.full((4, 4, 3), np.nan), "got nan"), (np.full((4, 4, 3), np.inf), "got inf"),
        (np.zeros((4, 4, 3), np.int64), "of uint8 or of floats in .0, 1., got int64"),
        (np.zeros((4, 4, 3), bool), "got bool"), (np.zeros((4, 4, 3), complex), "got complex128"),
        (np.full((4, 4, 3), None), "got object"), (torch.zeros(3, 4, 4, dtype=torch.int32), "got int32"),
        (torch.zeros(3, 4, 4, device="meta"), "a dense tensor"), (torch.zeros(3, 4, 4).to_sparse(), "a dense tensor"),
        (np.broadcast_to(np.uint8(0), (10**5, 10**5, 3)), "at most 64 megapixels"),
    ],
    ids=str,
)
def test_arrays_that_are_no_images_are_refused(array, message):
    with pytest.raises(InputError, match=message):
        open_image(array)
