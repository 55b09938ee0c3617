"""Start a run of `shapes` from a finished SPAR model of an earlier form: how version 2's bundled weights began.

`python docs/warm_start.py MODEL RUN` writes RUN/encoder/done: the model's weights in the recipe's own form (words that
are new get a row, parts that are new start as in training), with the encoder's read-outs fitted anew, since a folder of
a model keeps none. `spar train shapes --stage mllm-2 --init-from RUN/encoder/done` teaches the LLM from there.

`python docs/warm_start.py --unified RUN STAGE` writes RUN/unified-1/done: the end of that stage as if it were the one
before unified-2, which keeps the connector. `spar train shapes --stage unified-2 --init-from RUN/unified-1/done` goes
on. With `--router` in place of `--unified` the router, which had settled on one layer, has a fresh gate.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spar.common.config import to_dict
from spar.recipes import recipe
from spar.recipes.shapes.data import ShapesData, ShapesTrainingData
from spar.recipes.shapes.dense_tagging import TAGS, dense_head
from spar.training.checkpoint import load_group, save_folder
from spar.training.initial_weights import random_modules
from spar.training.modules import TrainingModules
from spar.training.systems.spar import SparRecipe

SCENES, BATCH, STEPS = 6144, 256, 1200


def in_todays_form(made: SparRecipe, folder: Path) -> TrainingModules:
    """The modules of a recipe with a model's weights; what a convolution reads in addition starts at zero."""
    modules: TrainingModules = random_modules(made, "cpu", {})  # type: ignore[assignment]
    stored = made.open_model(folder)  # with rows for words that are new
    given = {name: stored.read(name, torch.float32) for name in stored.shapes}
    own = modules.state_dict()
    for name, value in own.items():
        if name not in given:
            continue
        if given[name].shape == value.shape:
            own[name] = given[name]
        else:
            own[name] = torch.zeros_like(value)
            own[name][:, : given[name].shape[1]] = given[name]
    modules.load_state_dict(own)
    return modules


def fit_read_outs(made: SparRecipe, modules: TrainingModules, scenes: int = SCENES, steps: int = STEPS) -> Tensor:
    """Fit the linear read-outs of the tags to the frozen encoder; the share of objects' tokens that they name."""
    data = ShapesTrainingData(ShapesData(scenes=scenes, edits=1), made.model.grid, made.seed)
    chosen = np.arange(scenes)
    encoder, head = modules.model.tokenizer.encoder.eval(), dense_head(modules)
    with torch.no_grad():
        f_v = torch.cat([encoder(data.pixels(chosen[i : i + BATCH])) for i in range(0, len(chosen), BATCH)])
    tags = data.tags(chosen)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(f_v), (BATCH,))
        told = {name: head.tags[name](f_v[rows]).flatten(0, 1) for name in TAGS}
        optimizer.zero_grad()
        torch.stack([F.cross_entropy(told[name], tags[name][rows].flatten()) for name in TAGS]).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        own = tags["shape"] > 0
        return (head.tags["shape"](f_v).argmax(-1) == tags["shape"])[own].float().mean()


def with_fresh_gate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A router that weighs all layers about alike again."""
    generator = torch.Generator().manual_seed(0)
    first, second = (weights[f"model.router.gate.{layer}.weight"] for layer in (0, 2))
    return weights | {
        "model.router.gate.0.weight": torch.randn(first.shape, generator=generator) / first.shape[1] ** 0.5,
        "model.router.gate.2.weight": torch.randn(second.shape, generator=generator) * 0.02,
        "model.router.gate.2.bias": torch.zeros(len(second)),
        "model.router.alpha": torch.ones(len(second)),
    }


def write_end(run: Path, stage: str, made: SparRecipe, weights: dict[str, Tensor]) -> None:
    """Write weights as the end of a stage of no steps."""
    meta = {"stage": stage, "step": 0, "seconds": 0.0, "config": to_dict(made.stage(stage))}
    save_folder(run / stage / "done", {"modules": weights}, meta)


def main() -> None:
    made = recipe("shapes")
    if not isinstance(made, SparRecipe) or len(sys.argv) < 3:
        sys.exit(__doc__)
    if sys.argv[1] in ("--unified", "--router"):
        run, stage = Path(sys.argv[2]), sys.argv[3]
        weights = load_group(run / stage / "done", "modules")
        write_end(run, "unified-1", made, with_fresh_gate(weights) if sys.argv[1] == "--router" else weights)
        return
    modules = in_todays_form(made, Path(sys.argv[1]))
    print(f"shape read off {float(fit_read_outs(made, modules)):.3f} of the objects' tokens")
    write_end(Path(sys.argv[2]), "encoder", made, modules.state_dict())


if __name__ == "__main__":
    main()
