"""What each kind of word reads in the arms of a finished study of routing: python docs/routing_by_word.py FOLDER

Of every arm the mean weight of each routed layer, by kind of word, and the mean entropy of a token's weights in nats,
over 200 captions of unseen scenes and the study's seeds; no image is drawn. Written to
docs/results/studies/words/NAME.json, of which docs/evidence.py makes a table.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from spar.common.config import read_json, write_json
from spar.evaluation.shapes_loss import loss_scenes
from spar.evaluation.study_results import finished_stages
from spar.evaluation.study_run import arm_pipeline
from spar.inference.pipeline import SparPipeline
from spar.recipes import REGISTRY
from spar.reporting.routing_summary import token_class

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "studies" / "words"
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
    values = read_json(folder / "results.json")
    study, layers = values["study"], {}
    texts, arms = [text for _, text in loss_scenes(CAPTIONS)], {}
    for arm in values["scores"]:
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for seed in study["seeds"]:
            run = folder / arm / f"seed-{seed}"
            pipe = arm_pipeline(run, finished_stages(run)[-1], REGISTRY, "cpu")
            layers[arm] = list(pipe.model.layers)
            for name, rows in weights_by_word(pipe, texts).items():
                found[name] += rows
        every = np.concatenate([np.stack(rows) for rows in found.values()])
        logs = np.log(np.where(every > 0, every, 1))
        arms[arm] = {
            "layers": layers[arm], "entropy": float(-(every * logs).sum(1).mean()),
            "weights": {name: np.mean(rows, axis=0).round(4).tolist() for name, rows in sorted(found.items())},
        }
        print(arm, arms[arm]["entropy"])
    path = RESULTS / f"{study['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"captions": CAPTIONS, "seeds": study["seeds"], "arms": arms})


if __name__ == "__main__":
    main()
