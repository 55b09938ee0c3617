"""Write the figures of docs/reliability.md from the last lines of the scripts that `make chaos` runs.

    python docs/reliability.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT, MARKS = "docs/reliability.md", ("<!-- figures -->\n", "<!-- end of figures -->")
UNITS = {"mb": "MB", "handles": "open files", "threads": "threads"}


def read(name: str) -> dict[str, Any]:
    """The result of a script."""
    return json.loads((ROOT / "docs" / "reliability" / f"{name}.json").read_text("utf-8"))


def where(result: dict[str, Any]) -> str:
    """The circumstances of a result."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{result['date']}, {machine['cores']} cores of {machine['cpu']}, spar {versions['spar']}, "
        f"torch {versions['torch']}"
    )


def figures() -> str:
    """Both results as Markdown."""
    kills, soak = read("kills"), read("soak")
    lines = [f"Kills ({where(kills)}):", "", "| processes | kills | of them inside a save | files that differ |"]
    lines.append("| ---: | ---: | ---: | ---: |")
    for one in kills["rounds"]:
        lines.append(f"| {one['processes']} | {one['kills']} | {one['inside_a_save']} | {len(one['differing'])} |")
    head = f"Soak, {soak['cycles']} cycles in {soak['minutes']:g} minutes ({where(soak)}):"
    lines += ["", head, "", "| what | second quarter | last quarter | flat |", "| --- | ---: | ---: | --- |"]
    for name, size in soak["sizes"].items():
        what, unit = name.rsplit("_", 1)
        values = f"{size['second_quarter']:g} | {size['last_quarter']:g} | {'yes' if size['flat'] else 'no'}"
        lines.append(f"| {what}, {UNITS[unit]} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = ROOT / DOCUMENT
    before, rest = path.read_text("utf-8").split(MARKS[0])
    path.write_text(before + MARKS[0] + figures() + MARKS[1] + rest.split(MARKS[1])[1], "utf-8")


if __name__ == "__main__":
    main()
