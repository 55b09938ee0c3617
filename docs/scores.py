"""Write the README's tables of scores from the results files in docs/results: python docs/scores.py

There are two tables, each between its own marks: the bundled weights, and the recipe's own before further training.
"""

from pathlib import Path

from spar.evaluation.results import read_result
from spar.evaluation.targets import RECIPE_TARGETS, TARGETS, Target, scores_table

ROOT = Path(__file__).parents[1]
TABLES = (("scores", "docs/results", TARGETS), ("scores of the recipe", "docs/results/recipe", RECIPE_TARGETS))


def table(folder: str, targets: tuple[Target, ...]) -> str:
    """The scores in the results files of a folder."""
    return scores_table([read_result(path) for path in sorted((ROOT / folder).glob("*.json"))], targets)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    for mark, folder, targets in TABLES:
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        before, behind = text.split(begin)[0], text.split(end)[1]
        text = before + begin + table(folder, targets) + end + behind
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
