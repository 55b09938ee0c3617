"""Bad samples: found at the latest by decoding, counted and logged; too large a share of them ends the run."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from spar.common.errors import InputError
from spar.data.samples import BadSample, Sample
from spar.processing.images import open_training_image

MIN_SAMPLES = 1000  # samples before the share is checked
CHANCE = 3.0  # standard deviations of the number of bad ones that a set within the budget may show


@dataclass(frozen=True)
class BadSampleRecord:
    """One bad sample: the source's name, the file in it, the sample's key, and the reason."""

    source: str
    origin: str
    key: str
    reason: str


def decode_images(sample: Sample, *, profiles: bool = True) -> list[Image.Image]:
    """The sample's image, then its references, as RGB images; `profiles` as in `open_training_image`.

    Raises:
        BadSample: one of them is damaged, or not of a format for training.
    """
    try:
        return [open_training_image(data, profiles=profiles) for data in (sample.image, *sample.input_images)]
    except InputError as error:
        raise BadSample(sample.key, sample.origin, str(error)) from error


class BadSampleTracker:
    """Counts bad samples and logs each once, as lines of JSON.

    Args:
        limit: share of bad samples above which `count` raises, checked from MIN_SAMPLES samples on.
        path: file to append to; None keeps the records only in memory.
    """

    def __init__(self, limit: float = 0.01, path: Path | None = None) -> None:
        if not 0 <= limit <= 1:
            raise InputError(f"share of bad samples: expected 0 to 1, got {limit}")
        self.limit, self.path = limit, path
        self.seen = self.bad = 0
        self.named: dict[BadSampleRecord, None] = dict.fromkeys(_read(path))

    def count(self, seen: int, bad: tuple[BadSampleRecord, ...], replaced: int | None = None) -> None:
        """Add a number of samples, and the bad ones among them.

        Args:
            seen: samples.
            bad: those that were found bad.
            replaced: how many of the samples were bad, where more were tried in their place; by default all of `bad`.

        Raises:
            InputError: the share is above the limit by more than chance explains; the message has the last reason and
                the file of all.
        """
        self.seen += seen
        self.bad += len(bad) if replaced is None else replaced
        self.write(bad)
        admitted = self.limit * self.seen
        if self.seen >= MIN_SAMPLES and self.bad > admitted + CHANCE * math.sqrt(admitted):
            where = f"; all are named in {str(self.path)!r}" if self.path else ""
            last = next(reversed(self.named))
            raise InputError(
                f"expected at most {self.limit:.1%} bad samples, got {self.bad} of {self.seen}, the last one "
                f"{last.key!r} of {last.source!r}: {last.reason}{where}"
            )

    def write(self, bad: tuple[BadSampleRecord, ...]) -> None:
        """Log the new records, without counting."""
        new = [one for one in bad if one not in self.named]
        self.named.update(dict.fromkeys(new))
        if self.path and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in new)


def _read(path: Path | None) -> list[BadSampleRecord]:
    """Read the records of an earlier part of the run; an incomplete line is skipped."""
    found: list[BadSampleRecord] = []
    if path is not None and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError, TypeError):
                found.append(BadSampleRecord(**json.loads(line)))
    return found
