"""Write the README's table of scores from the results files in docs/results: python docs/scores.py"""

import re
from pathlib import Path

from spar.evaluation.results import read_result
from spar.evaluation.table import scores_table

ROOT = Path(__file__).parents[1]


def main() -> None:
    results = [read_result(path) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]
    readme = ROOT / "README.md"
    marks = r"(<!-- scores -->\n).*?(<!-- end of scores -->)"
    text = re.sub(marks, lambda m: m[1] + scores_table(results) + m[2], readme.read_text("utf-8"), flags=re.S)
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
