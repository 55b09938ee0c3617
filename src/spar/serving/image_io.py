"""Pictures of clients: from the bytes of an upload or a `data:` address to a checked picture, and back."""

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


async def read_image(data: bytes, param: str, hold: Callable[[int], None], decoders: Executor) -> Image.Image:
    """An RGB picture from a client's bytes, decoded in `decoders`; `hold` hears how many bytes it takes.

    Raises:
        ApiError: what is no such picture (one fixed text; the log has the reason).
    """
    try:
        if len(data) > MAX_UPLOAD_BYTES:
            raise InputError(f"{len(data)} bytes")
        loop = asyncio.get_running_loop()
        header = await loop.run_in_executor(decoders, read_header, data)  # a hostile one takes seconds
        if header.width * header.height > MAX_UPLOAD_PIXELS:
            raise InputError(f"{header.width} x {header.height} pixels")
        hold(header.width * header.height * 3)
        return await loop.run_in_executor(decoders, open_training_image, data)
    except InputError as error:
        log.info("%s refused: %s", param, ascii(str(error))[:300])
        raise ApiError(400, f"{param}: {EXPECTED}", param=param) from None


def decode_data_url(url: str, param: str) -> bytes:
    """The bytes of a base64 `data:` address of a picture; its type is not believed.

    Raises:
        ApiError: any other address.
    """
    found = _DATA.match(url)
    if found is None:
        raise ApiError(
            400, f"{param}: expected a picture as data:image/...;base64,...: this server fetches nothing", param=param
        )
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: expected base64 behind data:image/...;base64,", param=param) from None


async def read_messages(
    messages: Sequence[Message], hold: Callable[[int], None], decoders: Executor
) -> list[dict[str, Any]]:
    """A chat's messages as `SparPipeline.chat` takes them, pictures decoded.

    Raises:
        ApiError: too many pictures, or what `read_image` and `decode_data_url` refuse.
    """
    read, pictures = [], 0
    for index, message in enumerate(messages):
        content: Any = message.content
        if not isinstance(content, str):
            content = []
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                    continue
                pictures += 1
                if pictures > MAX_CHAT_IMAGES:
                    raise ApiError(400, f"messages: expected at most {MAX_CHAT_IMAGES} pictures", param="messages")
                where = f"messages.{index}.content"
                data = decode_data_url(part.image_url.url, where)
                content.append({"type": "image", "image": await read_image(data, where, hold, decoders)})
        read.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return read
