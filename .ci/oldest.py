"""Writes the constraints of `make test-oldest`: every direct dependency at the lower bound of its range.

The ranges are read from pyproject.toml, the extras' too, so that they stand in one place; torch is left out, whose one
build is pinned in constraints.txt. It runs before anything is installed, hence on the standard library alone.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PINNED_ELSEWHERE = "torch"


def ranges(pyproject: str) -> Iterator[str]:
    """The requirements of the text of a pyproject.toml: `name>=oldest,<end`, those of the extras behind the others."""
    project = tomllib.loads(pyproject)["project"]
    yield from project["dependencies"]
    for lines in project["optional-dependencies"].values():
        yield from lines


def oldest(requirements: Iterable[str]) -> dict[str, str]:
    """The lower bound of each; a library in several extras must have one bound, or no version would be the oldest."""
    bounds: dict[str, str] = {}
    for line in requirements:
        match = re.fullmatch(r"([\w-]+)>=([\w.]+),<[\w.]+", line)
        if match is None:
            raise SystemExit(f"expected a requirement like name>=1.2,<2, got {line}")
        name, bound = match.groups()
        if bounds.setdefault(name, bound) != bound:
            raise SystemExit(f"expected one lower bound of {name}, got {bounds[name]} and {bound}")
    return bounds


if __name__ == "__main__":
    for name, bound in oldest(ranges(PYPROJECT.read_text(encoding="utf-8"))).items():
        if name != PINNED_ELSEWHERE:
            print(f"{name}=={bound}")
