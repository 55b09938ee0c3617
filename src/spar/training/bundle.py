"""The model at the end of a stage, with all that a SPAR folder says of how it was made."""

import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spar.checkpoints.model_header import versions
from spar.checkpoints.spar_format import ModelBundle, SamplingConfig
from spar.common.config import read_json, to_dict
from spar.common.cpu import cpu_name
from spar.common.errors import InputError
from spar.processing.prompts import PromptEncoder
from spar.training.checkpoint import read_meta
from spar.training.config import Recipe
from spar.training.modules import TrainingModules
from spar.training.objectives.few_step import FewStepObjective
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.run_folder import ORIGIN

if TYPE_CHECKING:
    from spar.training.systems.spar import SparRecipe

log = logging.getLogger("spar.training")


def build_bundle(
    modules: TrainingModules, recipe: "SparRecipe", run: Path, prompts: PromptEncoder, last: str
) -> ModelBundle:
    """The model at the end of stage `last`, with what a folder needs beside it: words, sampling, how it was made.

    The semantic teacher comes along where this run, or the folder that it started from, has kept it.
    """
    manifest = run_manifest(recipe, run, last)
    origin = manifest.get("origin", {})
    tokenizers = any(isinstance(recipe.stage(name).objective, TokenizerObjective) for name in manifest["stages"])
    teacher = getattr(modules, "teacher", None) if origin.get("teacher") or tokenizers else None
    if teacher is not None:
        manifest["teacher"] = "the encoder before the tokenizer's training, in teacher/"
    sampling = sampling_config(recipe, last)
    return ModelBundle(modules.model.eval(), prompts.tokenizer, sampling, manifest, teacher=teacher)


def run_manifest(recipe: Recipe, run: Path, last: str) -> dict[str, Any]:
    """How the weights at the end of stage `last` of a run were made."""
    stages = {}
    for stage in recipe.stages[: recipe.stages.index(recipe.stage(last)) + 1]:
        folder = run / stage.name / "done"
        if folder.exists():
            try:
                meta = read_meta(folder)
            except InputError as error:  # of a stage that the others did not start from
                log.warning("the model's manifest leaves out stage %s: %s", stage.name, error)
                continue
            stages[stage.name] = {"steps": meta["step"], "seconds": round(meta["seconds"], 3)}
            stages[stage.name] |= {"dtype": meta["dtype"]} if "dtype" in meta else {}  # older runs do not say it
    manifest = {
        "recipe": recipe.name, "seed": recipe.seed, "commit": _commit(), "machine": hardware_info(),
        "versions": versions(), "stages": stages, "resolved_recipe": to_dict(recipe),
    }  # fmt: skip
    origin = read_json(run / ORIGIN) if (run / ORIGIN).exists() else {}
    return {**manifest, "origin": origin} if origin else manifest


def sampling_config(recipe: "SparRecipe", last: str | None = None) -> SamplingConfig:
    """How a recipe's model is sampled at the end of stage `last`, unless the caller says otherwise.

    It writes layouts, of images and of edits, where the last stage has drawn of them, and takes the steps to which one
    was distilled.
    """
    flow, stage = recipe.flow, recipe.stage(last or recipe.stages[-1].name)
    draws = isinstance(stage.objective, FewStepObjective | UnifiedObjective)
    sampling = SamplingConfig(
        shift=flow.sampling_shift, steps=flow.sampling_steps, guidance=flow.guidance,
        max_prompt_tokens=recipe.max_prompt_tokens, layout=draws and getattr(stage.data, "layouts", 0.0) > 0,
        edit_layout=draws and getattr(stage.data, "edit_layouts", 0.0) > 0, edit_guidance=flow.edit_guidance,
    )  # fmt: skip
    if isinstance(stage.objective, FewStepObjective):
        sampling = replace(sampling, steps=stage.objective.windows, guidance=1.0, edit_guidance=None, method="euler")
    return sampling


def hardware_info() -> dict[str, str | int]:
    """What a measured time depends on: processor, cores, accelerator."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": cpu_name(), "cores": os.cpu_count() or 1, "accelerator": accelerator}


def _commit() -> str:
    """The commit of the source tree, where this is one: a repository around an installation is another's."""
    own = Path(__file__)
    try:
        for words in (["ls-files", "--error-unmatch", own.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(
                ["git", "-C", str(own.parent), *words], capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
