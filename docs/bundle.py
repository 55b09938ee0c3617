"""Write bundled weights: python docs/bundle.py NAME RUN/model RUN [...]; then NAME --scores, once they are measured.

NAME is spar or dualtoken. The weights are written to src/spar/assets in bfloat16 (DualToken's matrices in 8 bits), with
the stages and curves of the runs that made them, in order: a training may have been stopped and continued in several
folders; `--origin` is the model that the first of them began with. `--scores` writes the main scores of docs/results
(of DualToken: docs/results/dualtoken) into the manifest, and then the model card.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.checkpoints.dualtoken_format import build_dualtoken_card, load_dualtoken, save_dualtoken
from spar.checkpoints.eight_bits import EIGHT_BITS, rounded, takes_eight_bits
from spar.checkpoints.safetensors_io import read_tensors, write_tensors
from spar.checkpoints.spar_format import CARD, build_model_card, load_model, save_model
from spar.common.config import read_json, write_json
from spar.common.errors import InputError
from spar.evaluation.results import read_result
from spar.evaluation.targets import main_scores, show_title

RESULTS = {"spar": Path(__file__).parent / "results", "dualtoken": Path(__file__).parent / "results" / "dualtoken"}
# How a system's folder is read, written and described.
FORMATS = {
    "spar": (load_model, save_model, build_model_card),
    "dualtoken": (load_dualtoken, save_dualtoken, build_dualtoken_card),
}


# The bundled models together may have 40 MB.
IN_EIGHT_BITS = {"spar": (), "dualtoken": ("tokenizer", "language", "pixel_head", "semantic_head")}
STORAGE = {
    "spar": "bfloat16",
    "dualtoken": "bfloat16, the matrices of tokenizer, language, pixel_head and semantic_head in 8 bits (float8 e4m3)",
}


def check_tokenizer(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a tokenizer that was not trained to be stored in 8 bits: its codes would not be those that the LLM knows.

    Raises:
        InputError: the message has the first weight that 8 bits would change.
    """
    for name, value in tensors.items():
        if not torch.equal(rounded(name, value, 8), value):
            raise InputError(f"{name} is not rounded to 8 bits: expected a model trained with tokenizer_bits 8")


def store_in_eight_bits(folder: Path, part: str) -> None:
    """Store the matrices of a part in 8 bits."""
    path = folder / part / "model.safetensors"
    tensors = read_tensors(path)
    kept = {name: value for name, value in tensors.items() if not takes_eight_bits(name, value)}
    write_tensors({name: value.to(EIGHT_BITS) for name, value in tensors.items()} | kept, path)


def measured(name: str) -> dict[str, dict[str, float]]:
    """The main scores of every results file of a model."""
    results = [read_result(path) for path in sorted(RESULTS[name].glob("*.json"))]
    return {show_title(r): {score.name: round(score.value, 4) for score in main_scores(r)} for r in results}


def stages(runs: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Steps and seconds of the finished stages of several runs, in the recipe's order; those of one name add up."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        for stage in read_json(run / "recipe.json")["stages"]:
            meta = run / stage["name"] / "done" / "meta.json"
            values = read_json(meta) if meta.is_file() else {"step": 0}
            if values["step"]:
                before = found.get(stage["name"], {"steps": 0, "seconds": 0.0})
                seconds = round(before["seconds"] + values["seconds"], 3)
                found[stage["name"]] = {"steps": before["steps"] + values["step"], "seconds": seconds}
    return found


def curves(runs: Sequence[Path]) -> list[str]:
    """The lines of the runs' metrics that are of stages which they have finished; steps of one name are counted on."""
    lines = []
    for number, run in enumerate(runs):
        before, finished = stages(runs[:number]), stages([run])
        for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
            values = json.loads(line)
            if values["stage"] in finished:
                values["step"] += before.get(values["stage"], {"steps": 0})["steps"]
                lines.append(json.dumps(values) + "\n")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BUNDLED_MODELS)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--origin", type=Path, help="the model that the training began with, for the manifest")
    args = parser.parse_args()
    folder, (load, save, build_card) = BUNDLED_MODELS[args.name], FORMATS[args.name]
    if args.scores:
        path = folder / "manifest.json"
        write_json(path, {**read_json(path), "license": "apache-2.0", "scores": measured(args.name)})
        (folder / CARD).write_text(build_card(load(folder)), encoding="utf-8")
    elif args.model and args.runs:
        bundle = load(args.model)
        if "tokenizer" in IN_EIGHT_BITS[args.name]:
            check_tokenizer(bundle.model.tokenizer.state_dict())
        made: dict[str, Any] = {"stages": stages(args.runs), "storage": STORAGE[args.name]}
        if args.origin:
            made["origin"] = read_json(args.origin / "manifest.json")
        save(replace(bundle, manifest=bundle.manifest | made), folder, torch.bfloat16)
        for part in IN_EIGHT_BITS[args.name]:
            store_in_eight_bits(folder, part)
        (folder / "metrics.jsonl").write_text("".join(curves(args.runs)), "utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        sys.stdout.write(f"{folder}: {size / 1e6:.2f} MB\n")
    else:
        parser.error("give a model and its runs, or --scores")


if __name__ == "__main__":
    main()
