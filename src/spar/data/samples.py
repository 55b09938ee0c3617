"""The two canonical samples that every reader returns, and the error of an unusable sample.

Images stay encoded; `spar.processing.images` checks and decodes them.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from spar.common.errors import InputError
from spar.common.limits import one_reference

Kind = Literal["text_to_image", "edit"]
Format = Literal["auto", "webdataset", "folder", "sharegpt", "gptedit", "parquet"]


@dataclass(frozen=True)
class TextToImageSample:
    """An image and its caption; reconstruction reads the image alone.

    `key` is the sample's name in its set, `origin` the file that contains it. `text` may be empty; `label` is the class
    number of an ImageNet sample.
    """

    image: bytes
    text: str
    key: str
    origin: str
    label: int | None = None


@dataclass(frozen=True)
class EditSample:
    """References (one or more), the edited image, and the instruction."""

    input_images: tuple[bytes, ...]
    image: bytes
    text: str
    key: str
    origin: str


Sample = TextToImageSample | EditSample


class BadSample(InputError):
    """An unusable sample. It is counted, logged and replaced; only a share above the limit ends a run."""

    def __init__(self, key: str, origin: str, reason: str) -> None:
        super().__init__(f"sample {key!r} of {origin!r}: {reason}")
        self.key, self.origin, self.reason = key, origin, reason


def check_references(sample: Sample) -> None:
    """Refuse an edit of several reference images, which the model is not trained for, with BadSample."""
    if isinstance(sample, EditSample) and len(sample.input_images) != 1:
        raise BadSample(sample.key, sample.origin, one_reference(len(sample.input_images)))


def is_safe_path(name: str) -> bool:
    """Whether a relative path stays inside its root, by its text alone (links may point anywhere)."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
