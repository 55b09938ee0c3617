"""Decoding of clients' images, from an upload or a `data:` URL."""

import asyncio
import base64
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from string import whitespace as ascii_whitespace
from typing import Any, TypeVar

from PIL import Image, ImageFile

from spar.common.errors import InputError
from spar.processing.images import FORMATS, MAX_PIXELS, open_training_image, read_header
from spar.serving import limits
from spar.serving.errors import ApiError
from spar.serving.gate import Lease
from spar.serving.limits import DECODE_THREADS, MAX_CHAT_IMAGES, MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS
from spar.serving.schema import Message, TextPart

T = TypeVar("T")
log = logging.getLogger(__name__)

EXPECTED = (
    f"expected a whole PNG, JPEG or WEBP of one frame, at most {MAX_UPLOAD_PIXELS / 1e6:g} million pixels and "
    f"{MAX_UPLOAD_BYTES >> 20} MiB"
)
_MAX_TYPE = 1024  # characters of a data URL before its data
_TYPE = re.compile(r"image/[\w.+-]+", re.ASCII | re.IGNORECASE)
_SPACES = b" \t\n\f\r"
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*")
# All that percent-encoding has to escape in base64, whose letters no encoder escapes.
_ESCAPES = {
    b"%2B": b"+", b"%2b": b"+", b"%2F": b"/", b"%2f": b"/", b"%3D": b"=", b"%3d": b"=", b"%0A": b"", b"%0a": b"",
    b"%0D": b"", b"%0d": b"", b"%20": b"",
}  # fmt: skip


class Decoders:
    """Threads for images, DECODE_THREADS at once; a client that leaves while it waits leaves nothing in their queue."""

    def __init__(self) -> None:
        self._threads, self._free = ThreadPoolExecutor(DECODE_THREADS), asyncio.Semaphore(DECODE_THREADS)

    async def run(self, function: Callable[..., T], *values: Any) -> T:
        """The result of a function of the values, which goes on to its end even if nobody waits for it any more."""
        await self._free.acquire()
        loop, future = asyncio.get_running_loop(), self._threads.submit(function, *values)
        future.add_done_callback(lambda _: _call_soon(loop, self._free.release))
        try:
            return await asyncio.wrap_future(future)
        finally:
            del future  # its exception refers to this frame: the values would stay until garbage is collected

    def stop(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(function)


async def read_image(data: bytes, param: str, lease: Lease, decoders: Decoders) -> Image.Image:
    """Decode a client's bytes to an RGB image, whose memory is on the request's `lease`.

    Raises:
        ApiError: not such an image (one fixed message; the log has the reason), or one that `decode_image` refuses.
    """
    try:
        if len(data) > MAX_UPLOAD_BYTES:
            raise InputError(f"{len(data)} bytes")
        return await decoders.run(_decode, data, lease)
    except InputError as error:
        log.info("%s refused: %s", param, ascii(str(error))[:300])
        raise ApiError(400, f"{param}: {EXPECTED}", param=param) from None


def _decode(data: bytes, lease: Lease) -> Image.Image:
    header = read_header(data)
    if header.width * header.height > MAX_UPLOAD_PIXELS:
        raise InputError(f"{header.width} x {header.height} pixels")
    return decode_image(data, open_training_image, lease)


def decode_image(data: bytes, read: Callable[[bytes], Image.Image], lease: Lease) -> Image.Image:
    """The image that `read` decodes, whose memory is on the request's `lease`.

    What decoding takes beside it has a lease of its own: this thread may go on after the request has ended.

    Raises:
        ApiError: 413 for an image that with the rest of its request takes more memory than all requests may, 429 where
            there is too little now.
        InputError: of `read`.
    """
    pixels, most = _memory(data)
    lease.check(most)
    image_bytes = limits.PIXEL_BYTES * pixels
    lease.reserve(image_bytes)
    with lease.budget.lease() as working:
        working.reserve(most - image_bytes)
        image = read(data)
        # With the image that a file's decoder fills stay the decoder's buffers, two of a WEBP's own size.
        return image.copy() if isinstance(image, ImageFile.ImageFile) else image


def _memory(data: bytes) -> tuple[int, int]:
    """The pixels of an image, by its header, and the bytes that its decoding takes; none of what `read` refuses."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            opaque = image.format != "WEBP" and not image.has_transparency_data
    except Exception:  # a hostile header makes Pillow raise nearly anything
        return 0, 0
    if pixels > MAX_PIXELS:
        return 0, 0
    return pixels, pixels * (limits.OPAQUE_BYTES if opaque else limits.TRANSPARENT_BYTES) + len(data)


def decode_data_url(url: str, param: str) -> bytes:
    """Decode the base64 `data:` URL of an image (RFC 2397); its media type and parameters are ignored.

    The base64 may have its signs percent-encoded, have line breaks and spaces, and lack its padding, as browsers take
    it (the forgiving base64 of the WHATWG).

    Raises:
        ApiError: any other URL.
    """
    scheme, _, rest = url.lstrip(ascii_whitespace)[:_MAX_TYPE].partition(":")
    kind, comma, _ = rest.partition(",")
    media, *parameters = [part.strip(ascii_whitespace) for part in kind.split(";")]
    last = parameters[-1].lower() if parameters else ""
    if scheme.lower() != "data" or not comma or last != "base64" or not _TYPE.fullmatch(media):
        raise ApiError(
            400, f"{param}: expected an image as data:image/...;base64,...: this server fetches nothing", param=param
        )
    wrong = ApiError(400, f"{param}: expected base64 after data:image/...;base64,", param=param)
    if not url.isascii():  # of which each copy may take four times as much
        raise wrong
    data = url[url.index(",") + 1 :].encode()
    if b"%" in data:
        for escape, letter in _ESCAPES.items():
            data = data.replace(escape, letter)
    data = data.translate(None, _SPACES)
    if len(data) % 4 == 0:
        data = data.removesuffix(b"=").removesuffix(b"=")
    if len(data) % 4 == 1 or not _BASE64.fullmatch(data):
        raise wrong
    return base64.b64decode(data + b"=" * (-len(data) % 4))


async def read_messages(
    messages: Sequence[Message], lease: Lease, decoders: Decoders
) -> list[dict[str, Any]]:
    """Convert a chat's messages to those of `Pipeline.chat`, with decoded images.

    Raises:
        ApiError: too many images, or an image that `read_image` or `decode_data_url` refuses.
    """
    converted: list[dict[str, Any]] = []
    count = 0
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            converted.append({"role": role, "content": message.content})
            continue
        content: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            count += 1
            if count > MAX_CHAT_IMAGES:
                raise ApiError(400, f"messages: expected at most {MAX_CHAT_IMAGES} images", param="messages")
            where = f"messages.{index}.content"
            data = await decoders.run(decode_data_url, part.image_url.url, where)
            content.append({"type": "image", "image": await read_image(data, where, lease, decoders)})
        converted.append({"role": role, "content": content})
    return converted
