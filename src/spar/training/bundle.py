"""The model at the end of a stage, with all that a SPAR folder says of how it was made."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from spar.checkpoints.lora import merge_lora
from spar.checkpoints.safetensors_io import load_weights
from spar.checkpoints.spar_format import (
    ModelBundle,
    SamplingConfig,
    versions,
)
from spar.common.config import read_json, to_dict
from spar.processing.prompts import PromptEncoder
from spar.training.checkpoint import load_group
from spar.training.config import Recipe
from spar.training.modules import TrainingModules, build_modules
from spar.training.run_folder import ORIGIN, find_text_tokenizer, prompt_encoder, read_recipe


def build_bundle(
    modules: TrainingModules, recipe: Recipe, run: Path, prompts: PromptEncoder, last: str
) -> ModelBundle:
    """The model at the end of stage `last`, with what a folder needs beside it: words, sampling, how it was made.

    The semantic teacher comes along where this run, or the folder that it started from, has kept it.
    """
    stages = {}
    names = [stage.name for stage in recipe.stages]
    for stage in recipe.stages[: names.index(last) + 1]:
        path = run / stage.name / "done" / "meta.json"
        if path.exists():
            meta = read_json(path)
            stages[stage.name] = {"steps": meta["step"], "seconds": round(meta["seconds"], 3)}
    manifest = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "commit": _commit(),
        "machine": hardware_info(),
        "versions": versions(),
        "stages": stages,
        "resolved_recipe": to_dict(recipe),
    }
    origin = read_json(run / ORIGIN) if (run / ORIGIN).exists() else {}
    if origin:
        manifest["origin"] = origin
    teacher = modules.teacher
    if teacher is not None and (origin.get("teacher") or any(recipe.stage(s).step == "tokenizer" for s in stages)):
        manifest["teacher"] = "the encoder before the tokenizer's training, in teacher/"
    else:
        teacher = None
    return ModelBundle(modules.model.eval(), prompts.tokenizer, sampling_config(recipe), manifest, teacher=teacher)


def sampling_config(recipe: Recipe) -> SamplingConfig:
    """How a recipe's model is sampled unless the caller says otherwise."""
    flow = recipe.flow
    return SamplingConfig(
        shift=flow.sampling_shift, steps=flow.sampling_steps, guidance=flow.guidance,
        max_prompt_tokens=recipe.max_prompt_tokens,
    )


def load_stage_model(run: Path, stage: str | None = None) -> ModelBundle:
    """The model as it stands at the end of a stage of a run, by default the recipe's last.

    Raises:
        InputError: a folder that is no run, or a stage that has not ended.
    """
    recipe = read_recipe(run / "recipe.json")
    last = stage or recipe.stages[-1].name
    folder = run / recipe.stage(last).name / "done"
    prompts = prompt_encoder(find_text_tokenizer(recipe, run, None), recipe.model)
    saved = load_group(folder, "modules")
    width = saved["teacher_mean"].numel() if "teacher_mean" in saved else None
    modules = build_modules(recipe, torch.device("cpu"), prompts, teacher_width=width)
    load_weights(modules, saved, str(folder))
    if recipe.lora.rank:
        merge_lora(modules.model)
    return build_bundle(modules, recipe, run, prompts, last)


def hardware_info() -> dict[str, str | int]:
    """What a measured time depends on: processor, cores, accelerator."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": model, "cores": os.cpu_count() or 1, "accelerator": accelerator}


def _commit() -> str:
    """The commit of the source tree, where this is one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
