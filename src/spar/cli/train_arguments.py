"""Arguments of the verbs whose first word is a recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from spar.cli.arguments import Flag
from spar.common.limits import MAX_IMAGES, check_range


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a recipe: spar train tiny --run runs/tiny

    Every field of the recipe is a flag, stages by their names: --seed 3 --model.denoiser.layers 4
    --stages.unified-2.steps 100. `spar train RECIPE --help` lists them all.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name (tiny, shapes, ...); it comes first, unless --config gives it."""
    config: Path | None = None
    """A recipe's file: recipe.json of a run, or YAML with `recipe: NAME` and what differs. Flags change it further."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Train only this stage; of several, each starts from the end of the previous one."""
    run: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    resume: str = "never"
    """never: refuse a folder that contains a run. auto: resume it from its last state. A folder: resume that run."""
    init_from: Path | None = None
    """Start the first stage from the weights of a finished stage (RUN/STAGE/done), of a SPAR folder, or of a bundled
    model by its name."""
    teacher: Path | None = None
    """SPAR folder whose encoder is the tokenizer's semantic teacher, where the starting weights keep none."""
    reinitialize: UseAppendAction[tuple[str, ...]] = ()
    """Parameters that start from random weights though --init-from has them: model.denoiser.* (repeatable)."""
    from_scratch: Flag = False
    """Use random weights for the parts that the recipe expects from published checkpoints."""
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""
    track: UseAppendAction[tuple[str, ...]] = ()
    """Also log to a tracker of Accelerate's: wandb, trackio, mlflow, ... (repeatable). Its own variables set it up."""
    dry_run: Flag = False
    """Print the plan of each stage (weights, data, what is prepared and removed, memory, time) and stop."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Estimate the cost of a recipe on given GPUs, before any training: spar plan spar-1b --gpus 64 --gpu h200

    It prints memory of one GPU, operations, images a second and days of each stage, and warns of what does not fit.
    Every field of the recipe is a flag, as in `spar train`: --stages.unified-2.batch 1024.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name (spar-1b, spar-3b); it comes first, unless --config gives it."""
    config: Path | None = None
    """A recipe's file, as in `spar train`."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Plan only this stage."""
    gpus: int = 8
    """Number of GPUs."""
    gpu: str = "h200"
    """Type of GPU: rtx4090, a100-40, a100, h100, h200 or b200."""
    mfu: float = 0.4
    """Assumed share of the GPU's peak."""
    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """fsdp shards weights, gradients and optimizer; ddp replicates them."""
    grad_accum_steps: int = 1
    """Micro-steps of a GPU's share of a batch."""
    activation_checkpointing: Flag = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    """Compute the frozen features of data sets once: spar cache RECIPE --init-from MODEL --data.source files ...

    Unified stages then read the folder instead of images: spar train RECIPE ... --data.cache FOLDER. Every field of the
    recipe is a flag, as in `spar train`. An interrupted cache resumes from its last state.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name; it comes first, unless --config gives it."""
    config: Path | None = None
    """A recipe's file, as in `spar train`."""
    init_from: Path
    """SPAR folder whose tokenizer computes the features."""
    output: Annotated[Path, arg(aliases=["-o"])] = Path("features")
    """Folder to write."""
    batch: int = 32
    """Images in one batch."""
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of matrix products, as in the training that will read the features."""

    def __post_init__(self) -> None:
        check_range("--batch", self.batch, 1, MAX_IMAGES)
