"""What the layers alone do not say: the library that trains knows no world and no recipe, and worlds know no torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "spar"


def imported(text: str) -> Iterator[str]:
    """The modules that a file's import statements name, those inside functions and for annotations included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def crossings(text: str, closed: tuple[str, ...]) -> list[str]:
    """The imports of closed packages, or of anything in them."""
    return [name for name in imported(text) if any(f"{name}.".startswith(f"{package}.") for package in closed)]


@pytest.mark.parametrize(
    ("package", "closed"), [("training", ("spar.worlds", "spar.recipes")), ("worlds", ("torch",))]
)
def test_a_package_imports_nothing_that_is_closed_to_it(package, closed):
    paths = sorted((SOURCE / package).rglob("*.py"))
    assert len(paths) > 5
    assert [
        f"{path.relative_to(SOURCE)}: {name}" for path in paths for name in crossings(path.read_text("utf-8"), closed)
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "import spar.worlds.shapes.scene",
        "from spar import worlds",
        "from spar.worlds import shapes",
        "def late():\n    from spar.worlds.shapes.scene import SIDE",
        "if TYPE_CHECKING:\n    import numpy, spar.worlds",
    ],
)
def test_an_import_of_a_closed_package_would_be_found(line):
    assert crossings(line, ("spar.worlds",))
    assert not crossings(line.replace("worlds", "worldsend"), ("spar.worlds",))
