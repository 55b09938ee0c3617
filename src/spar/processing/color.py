"""Colours of tagged images: from the profile that an image brings to sRGB, by LittleCMS."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20  # a printer's have one or two MiB

ProfileUse = Literal["none", "sRGB", "converted", "unusable"]

_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of Pillow, by a profile's colour space
_NEAR = 2  # of 255: a profile that changes no colour by more is sRGB, and the pixels stay as they are


@dataclass(frozen=True)
class _Conversion:
    """From a mode of Pillow to sRGB; `transform` is None where values are those of sRGB already."""

    mode: str
    transform: ImageCms.ImageCmsTransform | None


def profile_use(image: Image.Image) -> ProfileUse:
    """What `to_rgb` does with an opened image's profile. One that is unusable leaves its values as sRGB."""
    profile = profile_bytes(image)
    if not profile:
        return "none"
    grey, cmyk = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16"), image.mode == "CMYK"
    found = _conversion(profile, "L" if grey else "CMYK" if cmyk else "RGB")
    return "unusable" if found is None else "converted" if found.transform else "sRGB"


def profile_bytes(image: Image.Image) -> bytes:
    """The ICC profile of an image, empty if it has none."""
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else b""


def to_rgb(image: Image.Image, profile: bytes = b"") -> Image.Image:
    """An image without transparency as RGB, with colours of sRGB; the same object if there is nothing to convert."""
    mode = image.mode if image.mode in ("L", "CMYK") else "L" if image.mode == "1" else "RGB"
    found = _conversion(profile, mode) if profile else None
    if found is None or found.transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    given = image if image.mode == found.mode else image.convert(found.mode)
    return _applied(given, found.transform)


@lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> _Conversion | None:
    """The conversion of an image of mode L, RGB or CMYK; None for a profile that is broken or of another space.

    A grey image with an RGB profile is converted as an RGB image.
    """
    if len(profile) > MAX_PROFILE_BYTES:
        return None
    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        wanted = _MODES.get(given.profile.xcolor_space.strip(), "")
        if mode != wanted and (mode, wanted) != ("L", "RGB"):
            return None
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), wanted, "RGB")
        if wanted != "CMYK":
            colors = _probe(wanted)
            change = np.asarray(_applied(colors, transform), int) - np.asarray(colors.convert("RGB"), int)
            return _Conversion(wanted, transform if np.abs(change).max() > _NEAR else None)
        return _Conversion(wanted, transform)
    except Exception:  # a hostile profile makes LittleCMS raise nearly anything
        return None


def _probe(mode: str) -> Image.Image:
    """Colours all over a space."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(9, 81, 3))


def _applied(image: Image.Image, transform: Any) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:  # only where it converts in place
        raise ValueError("expected a converted image, got none")
    return converted
