"""Tiny data sets in every format, written by the tests that read them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLORS = 251  # images of different numbers below this differ


class Sets:
    """Writes data sets into one folder. Image n is of one colour that no other n has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (40, 30), **options) -> bytes:
        color = (number % COLORS, (number * 7) % COLORS, (number * 31 + number // COLORS) % COLORS)
        buffer = io.BytesIO()
        Image.new("RGB", size, color).save(buffer, kind, **options)
        return buffer.getvalue()

    @staticmethod
    def noise(seed: int, size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    def tar(self, name: str, members: Mapping[str, bytes | str], **options) -> Path:
        """A tar of these members, in their order."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", **options) as file:
            for member, data in members.items():
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return path

    def pairs(self, name: str, numbers: range, **options) -> Path:
        """A shard of captioned images: key %08d, caption `picture n`."""
        members: dict[str, bytes | str] = {}
        for number in numbers:
            members |= {f"{number:08d}.png": self.picture(number, **options), f"{number:08d}.txt": f"picture {number}"}
        return self.tar(name, members)

    def edits(self, name: str, numbers: range) -> Path:
        """A shard of edits from image n to image n + 100."""
        members: dict[str, bytes | str] = {}
        for number in numbers:
            members[f"{number:08d}.input.jpg"] = self.picture(number, "JPEG")
            members[f"{number:08d}.output.jpg"] = self.picture(number + 100, "JPEG")
            members[f"{number:08d}.txt"] = f"edit {number}"
        return self.tar(name, members)

    def file(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def json(self, name: str, values: object) -> Path:
        return self.file(name, json.dumps(values))


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    return Sets(tmp_path)
