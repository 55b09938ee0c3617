"""A run: the stages of a recipe one behind the other, in one folder, resumable at any step."""

import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spar.checkpoints.lora import adapt, merge, save_adapter
from spar.checkpoints.migration import upgraded
from spar.checkpoints.safetensors_io import load_weights
from spar.checkpoints.spar_format import Loaded, Sampling, load_text_tokenizer, save_model, versions
from spar.common.config import from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.models.config import SparConfig
from spar.models.spar import SparModel
from spar.processing.prompts import PromptEncoder
from spar.training.checkpoint import load_group, read_progress
from spar.training.config import Recipe, Stage, freeze, freezing_table
from spar.training.data import FilesMaterial
from spar.training.distributed import ALONE, Ranks, Scale
from spar.training.loop import (
    Report,
    initial_weights,
    is_model,
    measure_teacher,
    previous_weights,
    run_stage,
    tune_allocator,
)
from spar.training.modules import Workshop, initialize
from spar.training.shapes_data import Material, ShapesMaterial
from spar.training.steps import Context, alignment_weight
from spar.training.teacher import perceptual_of, teacher_of
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from spar.worlds.shapes.tokenizer import PLURALS, build_tokenizer

log = logging.getLogger("spar.training")

ORIGIN = "origin.json"  # in a run that started from a SPAR folder: that folder's manifest

TAG_NAMES = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}

Announce = Callable[[Stage, list[tuple[str, int, int]]], None]


def open_run(run: Path, recipe: Recipe, *, fresh: bool, main: bool = True) -> None:
    """Make or check the run's folder: it holds one recipe, and another recipe never writes over it.

    Of several processes the main one makes it and the others check.
    """
    path = run / "recipe.json"
    if fresh and path.exists():
        raise InputError(f"{run} already holds a run; resume it (--resume auto) or give another folder")
    if path.exists() and read_recipe(path) != recipe:
        raise InputError(f"{run} holds a run of another recipe; give its own flags, or another folder")
    if not main:
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, to_dict(recipe))
    except OSError as error:
        raise InputError(f"cannot write the run folder {run}: {error.strerror}") from error


def prompt_encoder(tokenizer: Any, config: SparConfig) -> PromptEncoder:
    """The prompt forms of a model."""
    return PromptEncoder(tokenizer, config.grid**2, image_start=config.connector.image_start)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run's `recipe.json`; one that was written before format version 2 gets what it had fixed."""
    values = read_json(path)
    autoencoder = values.get("model", {}).get("autoencoder", {})
    if "blocks" in autoencoder:  # version 1 had one list for both halves
        lora = {"rank": 0, "alpha": 16.0, "parts": ["denoiser", "connector"]}
        networks = {"autoencoder": 1.0, "lpips": 0.0, "convnext": 0.0, "classifier": "facebook/convnext-small-224"}
        critic = {"channels": 3, "width": 32, "layers": 2, "groups": 8}
        added = {"discriminator": critic, "max_prompt_tokens": 64, "lora": lora, "published": []}
        added["perceptual"] = networks
        stages = [{"image_size": None, **stage} for stage in values["stages"]]
        files = {"sets": [], "workers": 4, "bad_share": 0.01, "max_aspect": 1.0, "cache": None}
        data = {"source": "shapes", **files, **values["data"]}
        values = {**added, **values, "model": upgraded(values["model"], 1), "stages": stages, "data": data}
    return from_dict(Recipe, values, complete=True)


def build_workshop(
    recipe: Recipe, device: torch.device, prompts: PromptEncoder, *, teacher_width: int | None = None
) -> Workshop:
    if len(prompts.tokenizer) > recipe.model.text.vocab_size:
        raise InputError(
            f"text.vocab_size: expected at least {len(prompts.tokenizer)} for this tokenizer, "
            f"got {recipe.model.text.vocab_size}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        workshop = Workshop(recipe, teacher_width=teacher_width)
        initialize(workshop)
        if recipe.lora.rank:
            adapt(workshop.model, recipe.lora)
    return workshop.to(device)


def train(
    recipe: Recipe,
    run: Path,
    *,
    stages: tuple[str, ...] = (),
    resume: bool = False,
    init_from: Path | None = None,
    device: str = "cpu",
    scale: Scale = Scale(),  # noqa: B008 (frozen)
    from_scratch: bool = False,
    report: Report | None = None,
    announce: Announce | None = None,
) -> SparModel | None:
    """Train the stages of a recipe, in order; under a launcher every process calls this alike.

    Args:
        run: the folder of the run.
        stages: names of the stages to run, each but the first from the end of the one named before it; all when empty.
            A stage that trains anew makes its own end, all later ones and the run's model void: they are removed.
        resume: skip stages that are done and continue the one that is not.
        init_from: a stage's folder (`RUN/STAGE/done`) or a SPAR folder whose weights the first stage starts from; no
            matter to a run that has begun and is resumed.
        from_scratch: start from random weights what the recipe expects from published checkpoints.
        device, scale: where, and how several processes share the work; a run may be resumed at another scale.
        report: called at every logged step; announce: called before each stage with its freezing table; both by the
            main process alone.

    Returns:
        The trained model, or None when a signal stopped the run (its state is saved). Behind the recipe's last stage
        the model is written to `RUN/model`; with LoRA its additions alone to `RUN/adapter`, and merged to `RUN/model`.
    """
    first = stages[0] if stages else recipe.stages[0].name
    begun = any(read_progress(run / first / part) for part in ("state", "done"))
    if resume and begun:
        init_from = None  # that was where it began
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    check_data(recipe, chosen)
    if not (init_from or from_scratch or (resume and begun)):
        check_start(recipe, chosen)
    teacher, ranks = teacher_of(recipe.alignment), Ranks.join(scale, device)
    check_scale(chosen, ranks)
    check_lora(recipe, chosen)
    asked = any(stage.losses.perceptual for stage in chosen)
    perceptual = perceptual_of(recipe.perceptual) if asked else ()
    with ranks.main_first():
        open_run(run, recipe, fresh=not (resume or stages) and ranks.main, main=ranks.main)
    tune_allocator()
    prompts = prompt_encoder(words_of(recipe, run, init_from, ranks), recipe.model)
    width = teacher.width() if teacher else None
    workshop = build_workshop(recipe, ranks.device, prompts, teacher_width=width)
    teacher = teacher.to(ranks.device) if teacher else None
    perceptual = tuple((weight, loss.to(ranks.device)) for weight, loss in perceptual)
    with ranks.main_first():
        material = material_of(recipe, prompts, run, ranks)
    for stage in chosen:
        if resume and read_progress(run / stage.name / "done"):
            log.info("stage %s is done", stage.name)
            load_weights(workshop, load_group(run / stage.name / "done", "workshop"), stage.name)
            continue
        if ranks.pieces > 1 and stage != chosen[0]:  # the stage before may have sharded and wrapped this one
            workshop = build_workshop(recipe, ranks.device, prompts, teacher_width=width)
        if resume and read_progress(run / stage.name / "state"):
            load_weights(workshop, load_group(run / stage.name / "state", "workshop"), stage.name)
        elif stage is chosen[0]:
            _start_from(workshop, run, recipe, stage, init_from, ranks)
        else:  # from the one before it that was asked for: stages between them are left out
            previous_weights(workshop, run, stage, chosen)
        ranks.wait()
        if ranks.main:
            undo(run, recipe, stage, resume=resume)
        ranks.wait()
        ctx = Context(
            workshop, material, recipe, stage, ranks.device, external_teacher=teacher, perceptual=perceptual,
            ranks=ranks,
        )  # fmt: skip
        if recipe.data.cache is not None and stage.step == "unified":
            material.open_cache(workshop.model.tokenizer)
        prepare(ctx)
        freeze(workshop, stage)
        if announce and ranks.main:
            announce(stage, freezing_table(workshop))
        if not run_stage(ctx, run, resume=resume, report=report if ranks.main else None):
            return None
        if ranks.main:
            _remove(run / stage.name, "state", "state.old")
    if ranks.sharded:
        workshop = build_workshop(recipe, torch.device("cpu"), prompts, teacher_width=width)
        load_weights(workshop, load_group(run / chosen[-1].name / "done", "workshop"), chosen[-1].name)
    if chosen[-1] == recipe.stages[-1] and ranks.main:
        loaded = finished(workshop.model, recipe, run, prompts, chosen[-1].name)
        if recipe.lora.rank:
            save_adapter(loaded.model, recipe.lora, run / "adapter", loaded.manifest)
            merge(loaded.model)
        save_model(loaded, run / "model")
    ranks.wait()
    return workshop.model


def check_start(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Refuse to start from random weights, unasked, what the recipe has from published checkpoints."""
    if recipe.published and stages[0] == recipe.stages[0]:
        raise InputError(
            f"recipe {recipe.name}: {', '.join(recipe.published)} would start from random weights; expected "
            "--init-from a folder that holds the published ones (spar build makes it), or --from-scratch"
        )


def check_data(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Refuse stages that the recipe's source has nothing for."""
    if recipe.data.source == "none":
        raise InputError(f"recipe {recipe.name}: no data source given (data.source); it can be planned with --dry-run")
    strange = [stage.name for stage in stages if stage.step in ("encoder", "mllm", "dit")]
    if recipe.data.source == "files" and strange:
        raise InputError(f"data sets train tokenizer and unified stages, expected no {', '.join(strange)} (--stage)")


def check_lora(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Refuse LoRA in stages that have nothing to adapt: it adds to a connector and a DiT that are trained already."""
    first = next((stage for stage in recipe.stages if stage.step == "unified"), None)
    wrong = [stage.name for stage in stages if stage.step != "unified" or stage == first]
    if recipe.lora.rank and wrong:
        raise InputError(
            f"lora: expected unified stages behind {first.name if first else 'the first'} alone (as in --stage "
            f"{recipe.stages[-1].name} --init-from MODEL), got {', '.join(wrong)}"
        )


def check_scale(stages: tuple[Stage, ...], ranks: Ranks) -> None:
    """Refuse stages that cannot be shared as asked, before anything is written.

    Raises:
        InputError: a batch that does not divide, a step whose loss is a mean over its own batch's tokens, or Muon on
            sharded matrices.
    """
    for stage in stages:
        try:
            ranks.rows(stage.batch, 0)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from None
        if ranks.pieces > 1 and stage.step in ("encoder", "mllm"):
            raise InputError(
                f"stage {stage.name}: a step of kind {stage.step} weighs its whole batch's tokens against each other; "
                f"expected one process and scale.accumulate 1, got {ranks.world} and {ranks.scale.accumulate}"
            )
        if ranks.sharded and stage.optimizer == "muon":
            raise InputError(
                f"stage {stage.name}: Muon wants whole matrices, which scale.strategy fsdp shards; expected --stages."
                f"{stage.name}.optimizer adamw, or ddp"
            )


def words_of(recipe: Recipe, run: Path, init_from: Path | None, ranks: Ranks = ALONE) -> Any:
    """The text tokenizer of a run: the shapes world's own, or the one that came with the model which it started from.

    Raises:
        InputError: data sets of free words, and no tokenizer that knows them.
    """
    if recipe.data.source == "shapes":
        return build_tokenizer()
    kept = run / "text_tokenizer"
    if init_from is not None and ranks.main:
        home = init_from.absolute().parents[:2][-1]  # of RUN/STAGE/done
        given = [init_from / kept.name, home / kept.name, home / "model" / kept.name]
        found = next((path for path in given if path.is_dir()), None)
        if found and not (kept.is_dir() and found.samefile(kept)):
            aside = kept.with_name(kept.name + ".part")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(found, aside)
            shutil.rmtree(kept, ignore_errors=True)
            aside.rename(kept)
    ranks.wait()
    if not kept.is_dir():
        raise InputError(
            f"recipe {recipe.name}: its words want the text tokenizer of a SPAR folder; expected --init-from such a "
            f"folder, or a stage of a run that began with one, got {init_from}"
        )
    return load_text_tokenizer(kept, recipe.model.text)


def material_of(recipe: Recipe, prompts: PromptEncoder, run: Path, ranks: Ranks) -> Material:
    """The pictures and words that a recipe names."""
    if recipe.data.source == "shapes":
        return ShapesMaterial(recipe.data, prompts, recipe.seed, run / "cache")
    model = recipe.model
    return FilesMaterial(
        recipe.data, prompts, recipe.seed, side=model.image_size, stride=model.token_stride,
        longest=recipe.max_prompt_tokens, run=run, ranks=ranks,
    )


def _start_from(
    workshop: Workshop, run: Path, recipe: Recipe, stage: Stage, init_from: Path | None, ranks: Ranks
) -> None:
    """Load what a stage starts from: `init_from`, whose manifest is then the run's origin, or the stage before it."""
    if init_from is None:
        previous_weights(workshop, run, stage, recipe.stages)
    else:
        initial_weights(workshop, init_from, stage, recipe.stages, recipe.published)
    if not ranks.main:
        return
    if init_from is not None or stage == recipe.stages[0]:
        (run / ORIGIN).unlink(missing_ok=True)
    if init_from is not None and is_model(init_from) and (init_from / "manifest.json").exists():
        shutil.copyfile(init_from / "manifest.json", run / ORIGIN)


def undo(run: Path, recipe: Recipe, stage: Stage, *, resume: bool) -> None:
    """Remove what the training of `stage` makes void: its own end, and all that was made from it.

    Its own state stays when it is resumed.
    """
    index = recipe.stages.index(stage)
    void = [later.name for later in recipe.stages[index:] if read_progress(run / later.name / "done")]
    if void:
        log.warning("stage %s is trained anew: the ends of %s are void and removed", stage.name, ", ".join(void))
    _remove(run / stage.name, "done", "done.old", *(() if resume else ("state", "state.old")))
    for later in recipe.stages[index + 1 :]:
        _remove(run / later.name, "done", "done.old", "state", "state.old")
    _remove(run, "model", "adapter")


def _remove(parent: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(parent / name, ignore_errors=True)


def finished(model: SparModel, recipe: Recipe, run: Path, prompts: PromptEncoder, last: str) -> Loaded:
    """The model at the end of stage `last`, with what a folder needs beside it: words, sampling, how it was made."""
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
        "machine": machine(),
        "versions": versions(),
        "stages": stages,
        "resolved_recipe": to_dict(recipe),
    }
    if (run / ORIGIN).exists():
        manifest["origin"] = read_json(run / ORIGIN)
    return Loaded(model.eval(), prompts.tokenizer, sampling_of(recipe), manifest)


def sampling_of(recipe: Recipe) -> Sampling:
    """How a recipe's model is sampled unless the caller says otherwise."""
    flow = recipe.flow
    return Sampling(
        shift=flow.sampling_shift, steps=flow.sampling_steps, guidance=flow.guidance,
        max_prompt_tokens=recipe.max_prompt_tokens,
    )


def model_of(run: Path, stage: str | None = None) -> Loaded:
    """The model as it stands at the end of a stage of a run, by default the recipe's last.

    Raises:
        InputError: a folder that is no run, or a stage that has not ended.
    """
    recipe = read_recipe(run / "recipe.json")
    last = stage or recipe.stages[-1].name
    folder = run / recipe.stage(last).name / "done"
    prompts = prompt_encoder(words_of(recipe, run, None), recipe.model)
    saved = load_group(folder, "workshop")
    width = saved["teacher_mean"].numel() if "teacher_mean" in saved else None
    workshop = build_workshop(recipe, torch.device("cpu"), prompts, teacher_width=width)
    load_weights(workshop, saved, str(folder))
    if recipe.lora.rank:
        merge(workshop.model)
    return finished(workshop.model, recipe, run, prompts, last)


def machine() -> dict[str, str | int]:
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


def prepare(ctx: Context) -> None:
    """What a stage takes over from the ones before it, beyond their weights."""
    workshop, stage, recipe = ctx.workshop, ctx.stage, ctx.recipe
    first = {s.step: s.name for s in reversed(recipe.stages)}
    if stage.step == "tokenizer" and stage.losses.semantic:
        workshop.teacher.load_state_dict(workshop.model.tokenizer.encoder.state_dict())
    if stage.step == "mllm" and stage.name == first["mllm"] and recipe.word_embeddings == "tags":
        name_tags(workshop, ctx.material.prompts)
    if stage.step == "unified" and stage.name == first["unified"]:
        workshop.model.connector.initialize_from(workshop.model.language)
    if stage.step == "unified" and alignment_weight(ctx):
        measure_teacher(ctx)


@torch.no_grad()
def name_tags(workshop: Workshop, prompts: PromptEncoder) -> None:
    """Start each tag's word (and a shape's plural) at the tag's read-out vector, at the usual size of a word."""
    table = workshop.model.language.network.embed_tokens.weight
    size = table.norm(dim=-1).mean()
    for tag, names in TAG_NAMES.items():
        rows = workshop.dense_head.tags[tag].weight[-len(names) :]  # the first row of most tags is "none"
        for name, row in zip(names, rows - rows.mean(0), strict=True):
            for word in (name, PLURALS.get(name, name)):
                (token,) = prompts.encode(word)
                table[token] = row / row.norm() * size
