"""Write the bundled weights from a run: python docs/bundle.py RUN [STAGE]; then --scores, once they are measured.

The weights are written to src/spar/assets/weights in bfloat16. `--scores` writes the main scores of docs/results into
the manifest, and then the model card.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from spar.checkpoints.spar_format import CARD, build_model_card, load_model, save_model
from spar.common.config import read_json, write_json
from spar.evaluation.results import read_result
from spar.evaluation.targets import main_scores, show_title
from spar.inference.pipeline import BUNDLED
from spar.recipes import REGISTRY
from spar.training.systems.spar import load_stage_model

RESULTS = Path(__file__).parent / "results"


def measured() -> dict[str, dict[str, float]]:
    """The main scores of every results file."""
    results = [read_result(path) for path in sorted(RESULTS.glob("*.json"))]
    return {show_title(r): {score.name: round(score.value, 4) for score in main_scores(r)} for r in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--scores", action="store_true")
    args = parser.parse_args()
    if args.scores:
        path = BUNDLED / "manifest.json"
        write_json(path, {**read_json(path), "license": "apache-2.0", "scores": measured()})
        (BUNDLED / CARD).write_text(build_model_card(load_model(BUNDLED)), encoding="utf-8")
    elif args.run:
        save_model(load_stage_model(args.run, REGISTRY, args.stage), BUNDLED, torch.bfloat16)
        shutil.copyfile(args.run / "metrics.jsonl", BUNDLED / "metrics.jsonl")
        size = sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file())
        sys.stdout.write(f"{BUNDLED}: {size / 1e6:.2f} MB\n")
    else:
        parser.error("give a run, or --scores")


if __name__ == "__main__":
    main()
