"""What each kind of word reads in the arms of a finished study of routing: python docs/routing_by_word.py FOLDER

Of every arm the mean weight of each routed layer, by kind of word, and the mean entropy of a token's weights in nats,
over 200 captions of unseen scenes and the study's seeds; no image is drawn. Written to
docs/results/studies/NAME-words.json, which docs/evidence.py reads.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from spar.common.config import read_json, write_json
from spar.evaluation.shapes_loss import loss_scenes
from spar.evaluation.study import arm_pipeline
from spar.inference.pipeline import SparPipeline
from spar.recipes import REGISTRY
from spar.reporting.routing_summary import token_class

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "studies"
CAPTIONS = 200


@torch.inference_mode()
def weights_by_word(pipe: SparPipeline, texts: list[str]) -> dict[str, list[np.ndarray]]:
    """The routing weights [K] of all tokens, by the class of token; "query" are the learnable queries."""
    tokens = pipe.prompts.generation(texts)
    condition = pipe.model.condition(tokens.ids, tokens.mask)
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    words = tokens.ids.shape[1]
    for row, real in enumerate(condition.mask.bool()):
        for at in real.nonzero().flatten().tolist():
            name = "query"
            if at < words:
                name = token_class(pipe.bundle.text_tokenizer.convert_ids_to_tokens(int(tokens.ids[row, at])), "text")
            found[name].append(condition.weights[row, at].double().numpy())
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    study = read_json(folder / "study.json")
    texts, arms = [text for _, text in loss_scenes(CAPTIONS)], {}
    for arm in (study["order"][0], "again", *study["order"][1:]):
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for seed in study["seeds"]:
            run = folder / arm / f"seed-{seed}"
            for name, rows in weights_by_word(arm_pipeline(run, study["stages"][-1], REGISTRY, "cpu"), texts).items():
                found[name] += rows
        every = np.concatenate([np.stack(rows) for rows in found.values()])
        logs = np.log(np.where(every > 0, every, 1))
        arms[arm] = {
            "entropy": float(-(every * logs).sum(1).mean()),
            "weights": {name: np.mean(rows, axis=0).round(4).tolist() for name, rows in sorted(found.items())},
        }
        print(arm, arms[arm]["entropy"])
    write_json(RESULTS / f"{study['name']}-words.json", {"captions": CAPTIONS, "seeds": study["seeds"], "arms": arms})


if __name__ == "__main__":
    main()
