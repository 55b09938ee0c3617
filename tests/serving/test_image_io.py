"""`data:` URLs as clients write them (RFC 2397), and what is refused."""

import asyncio
import base64
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageCms

from spar.processing.images import open_image
from spar.serving import image_io
from spar.serving.errors import ApiError
from spar.serving.gate import Lease, MemoryBudget
from spar.serving.image_io import Decoders, decode_data_url, decode_image, read_messages
from spar.serving.schema import Message

DATA = bytes(range(256)) + b"\xfb\xff\xfe" + b"x"  # every letter of base64, and padding
CODED = base64.b64encode(DATA).decode()

GOOD = {
    "plain": f"data:image/png;base64,{CODED}",
    "a charset": f"data:image/png;charset=utf-8;base64,{CODED}",
    "a name": f"data:image/png;name=a.png;base64,{CODED}",
    "a quoted name": f'data:image/png;name="a b.png";base64,{CODED}',
    "several parameters": f"data:image/svg+xml;a=b;c=d;base64,{CODED}",
    "lines of 76": "data:image/png;base64," + base64.encodebytes(DATA).decode(),
    "lines of a mail": "data:image/png;base64,\r\n" + base64.encodebytes(DATA).decode().replace("\n", "\r\n\t"),
    "a last line break": f"data:image/png;base64,{CODED}\n",
    "no padding": "data:image/png;base64," + CODED.rstrip("="),
    "percent signs": "data:image/png;base64," + quote(CODED, safe=""),
    "percent signs for line breaks": "data:image/png;base64,%0A" + quote(base64.encodebytes(DATA).decode(), safe=""),
    "small percent signs": "data:image/png;base64,%0d%0a%20"
    + CODED.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d"),
    "capitals": f"DATA:IMAGE/PNG;BASE64,{CODED}",
    "spaces": f" data:image/png; base64, {CODED} ",
    "another type": f"data:image/vnd.microsoft.icon;base64,{CODED}",
}
BAD = {
    "http": "https://example.com/a.png",
    "file": "file:///etc/passwd",
    "a path": "/etc/passwd",
    "nothing": "",
    "text": "data:text/html;base64,PGI+",
    "no type": f"data:;base64,{CODED}",
    "no type at all": f"data:,{CODED}",
    "no base64": "data:image/png,hello",
    "base64 elsewhere": f"data:image/png;base64;name=a,{CODED}",
    "no comma": f"data:image/png;base64{CODED}",
    "a very long type": f"data:image/{'x' * 10_000};base64,{CODED}",
    "rubbish": "data:image/png;base64,%%%",
    "percent signs for letters": "data:image/png;base64,%41%41%41%41",
    "percent signs around percent signs": "data:image/png;base64,AAA%%0A2B",
    "other letters": "data:image/png;base64,####",
    "the letters of URLs": "data:image/png;base64,-_-_",
    "letters of another script": "data:image/png;base64,\u0410\u0410\u0410\u0410",
    "one letter too many": "data:image/png;base64,AAAAA",
    "padding within": "data:image/png;base64,AA==AAAA",
    "too much padding": "data:image/png;base64,AAAA====",
    "padding alone": "data:image/png;base64,=",
    "half of the padding": "data:image/png;base64,AA=",
    "another scheme before": f"xdata:image/png;base64,{CODED}",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_data_url_of_any_form_is_taken(name):
    assert decode_data_url(GOOD[name], "x") == DATA


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_as_base64_is_refused(name):
    with pytest.raises(ApiError, match="^x: expected .*data:image/...;base64,") as caught:
        decode_data_url(BAD[name], "x")
    assert caught.value.status == 400


def test_every_length_comes_back():
    for length, padded in itertools.product(range(8), (True, False)):
        coded = base64.b64encode(DATA[:length]).decode()
        url = "data:image/png;base64," + (coded if padded else coded.rstrip("="))
        assert decode_data_url(url, "x") == DATA[:length]


def test_a_url_of_percent_signs_is_refused_at_once():
    start = time.monotonic()
    for signs in ("%", "%%0A2B", "%2B="):
        with pytest.raises(ApiError, match="expected base64"):
            decode_data_url("data:image/png;base64," + signs * (2**20 // len(signs)), "x")
    assert time.monotonic() - start < 0.5


def test_urls_are_decoded_in_the_decoders_threads(monkeypatch):
    seen = []

    def record(url: str, param: str) -> bytes:
        seen.append(threading.current_thread())
        return decode_data_url(url, param)

    monkeypatch.setattr(image_io, "decode_data_url", record)
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODED}"}}]

    async def read() -> None:
        decoders = Decoders()
        try:
            await read_messages([Message(role="user", content=content)], Lease(MemoryBudget()), decoders)
        finally:
            decoders.stop()

    with pytest.raises(ApiError, match="expected a whole PNG"):
        asyncio.run(read())
    assert seen and threading.main_thread() not in seen


# ---- memory ----------------------------------------------------------------------------------------------------------

SIDE = 2000
EXIF = Image.Exif()
EXIF[0x0112] = 6  # on its side


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"-XYZ").replace(b"bXYZ", b"rXYZ").replace(b"-XYZ", b"bXYZ")  # red is blue


def encoded(mode: str, kind: str, side: int = SIDE, **options) -> bytes:
    file = BytesIO()
    Image.new(mode, (side, side), 3 if mode in ("1", "L", "P", "I;16") else tuple(range(1, 1 + len(mode)))).save(
        file, kind, **options
    )
    return file.getvalue()


def memory_kinds(side: int = SIDE) -> dict[str, bytes]:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # of no use: it is read and left
    return {
        "RGB, PNG": encoded("RGB", "PNG", side, icc_profile=lab),
        "RGB, JPEG": encoded("RGB", "JPEG", side),
        "turned JPEG": encoded("RGB", "JPEG", side, exif=EXIF, progressive=True, subsampling=0),
        "turned CMYK": encoded("CMYK", "JPEG", side, exif=EXIF, progressive=True, subsampling=0),
        "16 bits": encoded("I;16", "PNG", side),
        "TIFF": encoded("RGB", "TIFF", side, compression="tiff_lzw"),
        "grey with alpha": encoded("LA", "PNG", side),
        "RGBA": encoded("RGBA", "PNG", side),
        "GIF": encoded("P", "GIF", side, transparency=3),
        "RGB, WEBP": encoded("RGB", "WEBP", side, lossless=True),
        "RGBA, WEBP": encoded("RGBA", "WEBP", side, lossless=True, exif=EXIF),
        "tagged RGBA, WEBP": encoded("RGBA", "WEBP", side, lossless=True, exif=EXIF, icc_profile=SWAPPED),
    }


# Decodes each file in a process of its own, and prints what it counts and the most memory that it takes.
MEASURE = """
import json, os, sys
from pathlib import Path
from spar.processing.images import open_image
from spar.serving.gate import MemoryBudget
from spar.serving.image_io import decode_image

def size(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

class Recorded(MemoryBudget):
    most = 0

    def __setattr__(self, name, value):
        vars(self)[name] = value
        self.__dict__["most"] = max(self.most, self.held)

folder = Path(sys.argv[1])
for file in folder.glob("small-*"):
    with MemoryBudget().lease() as lease:
        decode_image(file.read_bytes(), open_image, lease)
found = {}
for file in folder.glob("large-*"):
    ours, theirs = os.pipe()
    if os.fork() == 0:
        data, budget = file.read_bytes(), Recorded()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = size("VmRSS")
        with budget.lease() as lease:
            decode_image(data, open_image, lease)
        os.write(theirs, json.dumps([budget.most, size("VmHWM") - before]).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        found[file.name] = json.loads(pipe.read())
    os.wait()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is Linux's")
def test_decoding_takes_no_more_memory_than_is_counted(tmp_path):
    for size, side in (("small", 8), ("large", SIDE)):
        for name, data in memory_kinds(side).items():
            (tmp_path / f"{size}-{name}").write_bytes(data)
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is free goes back to the system at once
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    found = json.loads(out.stdout)
    other = 4 * 2**20  # what a process takes beside
    shares = {name.removeprefix("large-"): (taken - other) / counted for name, (counted, taken) in found.items()}
    assert shares.keys() == memory_kinds(8).keys()
    assert {name: share for name, share in shares.items() if share > 1} == {}
    assert shares["turned CMYK"] > 0.85 and shares["tagged RGBA, WEBP"] > 0.9  # and not many times what is needed


@pytest.mark.parametrize(("name", "data"), memory_kinds(8).items())
def test_no_decoder_stays_with_a_decoded_image(name, data):
    """Those of WEBP hold two further copies of it."""
    with MemoryBudget().lease() as lease:
        image = decode_image(data, open_image, lease)
        assert type(image) is Image.Image and image.size == (8, 8) and lease.held == 64 * 4
    assert image.tobytes() == open_image(data).tobytes()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_image_with_alpha_is_not_copied_before_it_is_laid_on_white(mode, monkeypatch):
    """Its pixels are p a + 255 (1 - a), rounded; a second copy of it would be one of its own mode."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    color, alpha = np.meshgrid(levels, levels)
    values = np.stack([color, 255 - color, color // 2][: len(mode) - 1] + [alpha], axis=-1)
    image, copied = Image.fromarray(values), []
    copy = Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda one: [copied.append(one.mode), copy(one)][1])
    opened = np.asarray(open_image(image), dtype=int)
    assert image.mode == mode
    share = alpha[..., None] / 255
    assert np.abs(opened - (values[..., :-1] * share + 255 * (1 - share))).max() <= 0.51
    assert mode not in copied and np.array_equal(np.asarray(image), values)
