"""HTML from the Jinja templates in `templates/`: every value is escaped, and images are inline."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image


def png_uri(image: Image.Image, scale: int) -> str:
    """A data URI of an image, enlarged by whole pixels."""
    stream = BytesIO()
    size = (image.width * scale, image.height * scale)
    image.convert("RGB").resize(size, Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def fact(value: object) -> str:
    """A value in words; nested dictionaries become "name value" pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {fact(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(fact, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("spar.reporting"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_ENVIRONMENT.filters |= {"fact": fact, "png_uri": png_uri}


def render_template(name: str, /, **values: Any) -> Markup:
    """Fill a template of `templates/`; the result enters other templates as it is."""
    return Markup(_ENVIRONMENT.get_template(name).render(values))


def template_text(name: str) -> str:
    """The text of a template that has no values."""
    return _ENVIRONMENT.get_template(name).render()
