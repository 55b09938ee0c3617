"""An image of a request as it comes, as OpenAI's events: partial images, then the completed one."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from spar.inference.image_files import encode_image
from spar.serving.errors import job_error
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


async def image_events(running: RunningImage, preview: Image.Image | None, deadline: float) -> AsyncIterator[str]:
    """Stream an image, whose first preview is given, as server-sent events."""
    created, index = int(time.time()), 0

    async def event(kind: str, image: Image.Image, metadata: dict[str, Any], **fields: Any) -> str:
        coded = await asyncio.to_thread(encode_image, image, running.kind, metadata)
        kind = f"{running.task}.{kind}"
        data = {
            "type": kind, "b64_json": base64.b64encode(coded).decode(), "created_at": created, "quality": "auto",
            "background": "opaque", "size": f"{image.width}x{image.height}", "output_format": running.kind, **fields,
        }  # fmt: skip
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    try:
        while preview is not None:
            yield await event("partial_image", preview, {}, partial_image_index=index)
            preview, index = await next_piece(running.pieces, running.job, deadline), index + 1
        made = running.job.future.result()
        yield await event("completed", made.image, made.metadata, **made.fields(), **warnings_field(running.warnings))
    except Exception as error:  # the status has been sent already
        yield f"event: error\ndata: {json.dumps(job_error(error).body())}\n\n"
