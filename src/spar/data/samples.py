"""The sample that every reader returns, and the error of an unusable one.

Images stay encoded; `spar.data.bad_samples` decodes them and `spar.processing.images` checks them.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from spar.common.errors import InputError
from spar.common.limits import MAX_REASONS, one_reference

Kind = Literal["text_to_image", "edit", "dialogue"]
Format = Literal["auto", "webdataset", "folder", "images", "sharegpt", "gptedit", "llava", "parquet", "arrow"]


@dataclass(frozen=True)
class Sample:
    """An image and its caption, or an edited image, the instruction and the references in `input_images`, or an image
    and the questions and answers of a conversation about it in `turns`; all images encoded.

    `key` is the sample's name in its set, `origin` the file that contains it. `text` may be empty, as reconstruction
    reads the image alone; `label` is the class number of an ImageNet sample.
    """

    image: bytes
    text: str
    key: str
    origin: str
    label: int | None = None
    input_images: tuple[bytes, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def words(self) -> str:
        """All of the sample's text: the caption, or the conversation."""
        return self.text or "\n".join(text for turn in self.turns for text in turn)


class BadSample(InputError):
    """An unusable sample. It is counted, logged and replaced; only a share above the limit ends a run."""

    def __init__(self, key: str, origin: str, reason: str) -> None:
        super().__init__(f"sample {key!r} of {origin!r}: {reason}")
        self.key, self.origin, self.reason = key, origin, reason


def check_references(sample: Sample) -> None:
    """Refuse an edit of several reference images, which the model is not trained for, with BadSample."""
    if len(sample.input_images) > 1:
        raise BadSample(sample.key, sample.origin, one_reference(len(sample.input_images)))


def is_safe_path(name: str) -> bool:
    """Whether a relative path stays inside its root, by its text alone, and can be the name of a file."""
    try:
        name.encode("utf-8", "surrogateescape")  # as file systems do; half of a surrogate pair has no bytes
    except UnicodeEncodeError:
        return False
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def count_reason(reasons: dict[str, int], reason: str, count: int = 1) -> None:
    """Count a reason why something is not read; beyond MAX_REASONS kinds the new ones share one name."""
    if reason not in reasons and len(reasons) >= MAX_REASONS:
        reason = "of further kinds"
    reasons[reason] = reasons.get(reason, 0) + count
