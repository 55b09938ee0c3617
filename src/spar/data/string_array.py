"""Millions of strings in two arrays: Python objects would need ten times the memory, copied into every worker."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StringArray:
    """Concatenated strings: `blob`, their bytes, uint8; `ends`, the end of each, uint64 [N].

    Bytes that are not UTF-8 (old file names) are preserved as lone surrogates.
    """

    blob: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> "StringArray":
        blob, ends = bytearray(), []
        for text in texts:
            blob += text.encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        return cls(np.frombuffer(bytes(blob), np.uint8), np.array(ends, np.uint64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")
