"""Words of captions that a closed vocabulary lacks, counted before a training begins.

The text tokenizer makes one and the same token of them all, so a model trained on such captions learns nothing by them,
and the finished model refuses the words in a prompt.
"""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from spar.common.errors import InputError
from spar.data.loader import read_again
from spar.data.samples import BadSample
from spar.data.sources import DataSource
from spar.processing.prompts import PromptEncoder, known_words

log = logging.getLogger("spar.training")

CAPTIONS = 1000  # of each set, evenly spread
SHOWN = 10


def check_words(sources: Sequence[DataSource], prompts: PromptEncoder, limit: float) -> None:
    """Refuse data sets whose captions have too many unknown words; a smaller share is logged as a warning.

    Up to CAPTIONS captions of each set are read. A caption that cannot be read is the loader's to count.

    Raises:
        InputError: more than the share `limit` of the words of one set; it has the share and the commonest words.
    """
    for source in sources:
        words, unknown = 0, Counter[str]()
        for number in np.unique(np.linspace(0, len(source) - 1, min(CAPTIONS, len(source))).astype(int)):
            try:
                text = read_again(source, int(number)).words
            except BadSample:
                continue
            found, lacking = prompts.count_words(text)
            words += found
            unknown.update(word.lower() for word in lacking)
        if not unknown:
            continue
        share = unknown.total() / words
        said = f"{share:.3g} of the words of {source.name} are unknown to the text tokenizer ({_shown(unknown)})"
        if share > limit:
            known = ", ".join(known_words(prompts.tokenizer))
            raise InputError(
                f"{said}; expected at most data.unknown_share {limit:g}, since all of them are one token. It knows "
                f"only {known}"
            )
        log.warning("%s", said)


def _shown(unknown: Counter[str]) -> str:
    """The commonest words with their numbers."""
    found = [f"{_printable(word)} {times}" for word, times in unknown.most_common(SHOWN)]
    return ", ".join([*found, *(["..."] if len(unknown) > SHOWN else [])])


def _printable(word: str) -> str:
    return word[:40] if word.isprintable() else ascii(word[:40])
