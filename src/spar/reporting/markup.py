"""Construction of HTML: elements whose text and attributes are always escaped, and inline images."""

from __future__ import annotations

import base64
import html
from io import BytesIO

from PIL import Image

UPSCALE = 3


class Markup(str):
    """Text that is HTML already; any other text is escaped when it enters an element."""


Child = str | Markup | None
VOID = frozenset(("img", "meta", "br", "hr"))


def join(*children: Child) -> Markup:
    """Concatenate the children; those that are not Markup are escaped, None is dropped."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children if c is not None))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. `class_` is class, other underscores become hyphens; attributes that are None are dropped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(*children)}</{name}>")


def inline_image(image: Image.Image, alt: str, *, scale: int = UPSCALE, class_: str | None = None) -> Markup:
    """An <img> with its data inline, enlarged by whole pixels."""
    width, height = image.width * scale, image.height * scale
    stream = BytesIO()
    image.convert("RGB").resize((width, height), Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    return tag("img", src=source, alt=alt, width=width, height=height, class_=class_, loading="lazy")
