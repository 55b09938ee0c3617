"""Decoding of clients' images, from an upload or a `data:` URL."""

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from PIL import Image

from spar.common.errors import InputError
from spar.processing.images import open_training_image, read_header
from spar.serving.errors import ApiError
from spar.serving.limits import MAX_CHAT_IMAGES, MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS
from spar.serving.schema import Message, TextPart

log = logging.getLogger(__name__)

EXPECTED = (
    f"expected a whole PNG, JPEG or WEBP of one frame, at most {MAX_UPLOAD_PIXELS / 1e6:g} million pixels and "
    f"{MAX_UPLOAD_BYTES >> 20} MiB"
)
_DATA = re.compile(r"data:image/[\w.+-]{1,32};base64,", re.ASCII | re.IGNORECASE)


async def read_image(data: bytes, param: str, reserve: Callable[[int], None], decoders: Executor) -> Image.Image:
    """Decode a client's bytes in `decoders` to an RGB image, after `reserve(bytes)` of its memory.

    Raises:
        ApiError: not such an image (one fixed message; the log has the reason).
    """
    try:
        if len(data) > MAX_UPLOAD_BYTES:
            raise InputError(f"{len(data)} bytes")
        loop = asyncio.get_running_loop()
        header = await loop.run_in_executor(decoders, read_header, data)  # a hostile one takes seconds
        if header.width * header.height > MAX_UPLOAD_PIXELS:
            raise InputError(f"{header.width} x {header.height} pixels")
        reserve(header.width * header.height * 3)
        return await loop.run_in_executor(decoders, open_training_image, data)
    except InputError as error:
        log.info("%s refused: %s", param, ascii(str(error))[:300])
        raise ApiError(400, f"{param}: {EXPECTED}", param=param) from None


def decode_data_url(url: str, param: str) -> bytes:
    """Decode the base64 `data:` URL of an image; its media type is ignored.

    Raises:
        ApiError: any other URL.
    """
    found = _DATA.match(url)
    if found is None:
        raise ApiError(
            400, f"{param}: expected an image as data:image/...;base64,...: this server fetches nothing", param=param
        )
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: expected base64 after data:image/...;base64,", param=param) from None


async def read_messages(
    messages: Sequence[Message], reserve: Callable[[int], None], decoders: Executor
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
            data = decode_data_url(part.image_url.url, where)
            content.append({"type": "image", "image": await read_image(data, where, reserve, decoders)})
        converted.append({"role": role, "content": content})
    return converted
