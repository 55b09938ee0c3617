"""`data:` URLs as clients write them (RFC 2397), and what is refused."""

import asyncio
import base64
import itertools
import threading
import time
from urllib.parse import quote

import pytest

from spar.serving import image_io
from spar.serving.errors import ApiError
from spar.serving.gate import Lease, MemoryBudget
from spar.serving.image_io import Decoders, decode_data_url, read_messages
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
