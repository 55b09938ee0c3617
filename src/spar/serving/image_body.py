"""Bodies of answers with images: what they take until they are sent, and their JSON, in pieces.

Only the files of an answer are held whole: their base64, and the JSON around it, are made as they are sent.
"""

import base64
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse

from spar.inference.image_files import encode_image
from spar.serving import limits
from spar.serving.batching import GeneratedImage
from spar.serving.gate import Lease
from spar.serving.schema import warnings_field

PIECE_BYTES = 3 * 2**16  # of a file whose base64 is sent at once; a multiple of 3


def made_bytes(count: int, size: tuple[int, int], kind: str) -> int:
    """The memory of `count` images of a height and width from their making until they are sent as files of a `kind`."""
    encoding = limits.WEBP_BYTES if kind == "webp" else 0  # one image after the other
    return size[0] * size[1] * (count * (limits.PIXEL_BYTES + limits.FILE_BYTES[kind]) + encoding)


def reserve_images(lease: Lease, count: int, size: tuple[int, int], kind: str) -> None:
    """Count `made_bytes` on a request's lease, before anything is made.

    Raises:
        ApiError: 413 where they are with the rest of the request more than all requests may hold, 429 where there is
            too little now.
    """
    most = made_bytes(count, size, kind)
    lease.check(most)
    lease.reserve(most)


def image_object(data: bytes, fields: Mapping[str, Any]) -> Iterator[bytes]:
    """A JSON object of fields and, as its `b64_json`, a file, in pieces."""
    yield b'{"b64_json": "'
    for start in range(0, len(data), PIECE_BYTES):
        yield base64.b64encode(data[start : start + PIECE_BYTES])
    rest = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    yield f'"{rest}}}'.encode()


def images_response(
    generated: Sequence[GeneratedImage], kind: str, warnings: list[str], headers: Mapping[str, str]
) -> Response:
    """Encode images as OpenAI's answer; PNGs carry their metadata."""
    files = [encode_image(one.image, kind, one.metadata) for one in generated]
    objects = [image_object(data, one.fields()) for data, one in zip(files, generated, strict=True)]
    size = f"{generated[0].image.width}x{generated[0].image.height}"
    fields = {"created": int(time.time()), "output_format": kind, "size": size, **warnings_field(warnings)}

    async def body() -> AsyncIterator[bytes]:
        yield json.dumps(fields)[:-1].encode() + b', "data": ['
        for index, pieces in enumerate(objects):
            if index:
                yield b", "
            for piece in pieces:
                yield piece
        yield b"]}"

    return StreamingResponse(body(), media_type="application/json", headers=headers)
