"""An image of a request as it comes, as OpenAI's events: partial images, then the completed one."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from PIL import Image

from spar.inference.image_files import encode_image
from spar.serving import limits
from spar.serving.errors import job_error
from spar.serving.image_body import image_object
from spar.serving.jobs import ImageJob
from spar.serving.schema import warnings_field
from spar.serving.streaming import next_piece


@dataclass(frozen=True)
class RunningImage:
    """An image's job, its previews (None is their end), the task and format, and what is said beside it."""

    job: ImageJob
    pieces: asyncio.Queue[Image.Image | None]
    task: Literal["image_generation", "image_edit"]
    kind: str
    warnings: list[str]


def add_preview(pieces: asyncio.Queue[Image.Image | None], preview: Image.Image | None) -> None:
    """Append a preview, or their end, of which at most MAX_UNREAD wait: a slow client sees the newest ones."""
    if preview is not None and pieces.qsize() >= limits.MAX_UNREAD:
        pieces.get_nowait()
    pieces.put_nowait(preview)


async def image_events(running: RunningImage, preview: Image.Image | None, deadline: float) -> AsyncIterator[bytes]:
    """Stream an image, whose first preview is given, as server-sent events, each in pieces."""
    created, index = int(time.time()), 0

    async def event(kind: str, image: Image.Image, metadata: dict[str, Any], **fields: Any) -> Iterator[bytes]:
        data = await asyncio.to_thread(encode_image, image, running.kind, metadata)
        kind = f"{running.task}.{kind}"
        values = {
            "type": kind, "created_at": created, "quality": "auto", "background": "opaque",
            "size": f"{image.width}x{image.height}", "output_format": running.kind, **fields,
        }  # fmt: skip
        return chain([f"event: {kind}\ndata: ".encode()], image_object(data, values), [b"\n\n"])

    try:
        while preview is not None:
            for piece in await event("partial_image", preview, {}, partial_image_index=index):
                yield piece
            preview, index = await next_piece(running.pieces, running.job, deadline), index + 1
        made = running.job.future.result()
        said = {**made.fields(), **warnings_field(running.warnings)}
        for piece in await event("completed", made.image, made.metadata, **said):
            yield piece
    except Exception as error:  # the status has been sent already
        yield f"event: error\ndata: {json.dumps(job_error(error).body())}\n\n".encode()
