"""What a recipe costs on given hardware, before any training: operations, memory and time of each stage.

Each objective says what one image costs, in bfloat16 (spar.training.cost); the rest is arithmetic. Not counted: the
optimizer's operations, traffic between GPUs, the perceptual networks' activations, fragmentation and the CUDA context
(RESERVE covers the last two).
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from spar.common.device import measure_peak
from spar.common.errors import InputError, first_line
from spar.training.config import Recipe, StageConfig, freeze
from spar.training.cost import Cost
from spar.training.distributed import ParallelismConfig, apply_activation_checkpointing
from spar.training.teacher import FrozenNetworks

GIB = 2**30
BYTES = 4  # of a float32
RESERVE = 4 * GIB  # of a GPU
# Dense bfloat16 operations a second and bytes of memory, from the makers' data sheets.
GPUS = {
    "rtx4090": (165e12, 24 * GIB),
    "a100-40": (312e12, 40 * GIB),
    "a100": (312e12, 80 * GIB),
    "h100": (989e12, 80 * GIB),
    "h200": (989e12, 141 * 10**9),
    "b200": (2250e12, 180 * 10**9),
}
CPU_MFU = 0.35  # the median of what the stages of `shapes` reached of that peak on two cores (docs/log.md)


@dataclass(frozen=True)
class HardwareConfig:
    """Devices of one kind, and how a run uses them.

    Attributes:
        gpu: its kind in GPUS; with `peak` and `capacity` any name.
        mfu: the share of the peak that is reckoned with.
        peak: operations a second, and `capacity` the bytes of memory, where the kind is not in GPUS.
        reserve: bytes of it that no run can use.
    """

    gpus: int = 8
    gpu: str = "h200"
    mfu: float = 0.4
    sharded: bool = True
    grad_accum_steps: int = 1
    activation_checkpointing: bool = False
    peak: float | None = None
    capacity: int | None = None
    reserve: int = RESERVE

    def __post_init__(self) -> None:
        if self.gpu not in GPUS and not (self.peak and self.capacity):
            raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {self.gpu!r}")
        if self.gpus < 1 or self.grad_accum_steps < 1:
            raise InputError(
                f"expected gpus and grad_accum_steps of at least 1, got {self.gpus} and {self.grad_accum_steps}"
            )
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu: expected above 0 and at most 1, got {self.mfu}")

    @classmethod
    def of_this_machine(cls, device: str, parallelism: ParallelismConfig) -> "HardwareConfig":
        """The device of a run here, its peak measured by a product of matrices, and the processes of a launcher."""
        where, world = torch.device(device), int(os.environ.get("WORLD_SIZE", "1"))
        cuda = where.type == "cuda"
        if cuda:
            capacity = torch.cuda.get_device_properties(device).total_memory
        else:
            capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world
        return cls(
            gpus=world, gpu=device, mfu=0.4 if cuda else CPU_MFU, sharded=world > 1 and parallelism.strategy == "fsdp",
            grad_accum_steps=parallelism.grad_accum_steps,
            activation_checkpointing=parallelism.activation_checkpointing,
            peak=measure_peak(where, parallelism.dtype(where)), capacity=capacity, reserve=RESERVE if cuda else 0,
        )  # fmt: skip

    @property
    def limits(self) -> tuple[float, int]:
        """Operations a second and bytes of one device."""
        return (self.peak, self.capacity) if self.peak and self.capacity else GPUS[self.gpu]


@dataclass(frozen=True)
class StageEstimate:
    """One stage on a machine.

    Attributes:
        trainable: number of trainable parameters.
        frozen: number of frozen parameters.
        micro_batch: what a device computes at once.
        weights: bytes of the weights on one device.
        gradients: bytes of the gradients on one device.
        optimizer: bytes of the optimizer's state on one device.
        activations: bytes of the activations on one device.
        reserve: bytes of one device that no run can use.
        flops: operations of a step; 0, as are `activations` and `seconds`, where the objective does not say.
        images_per_second: of all devices.
        seconds: of the whole stage.
    """

    stage: StageConfig
    trainable: int
    frozen: int
    micro_batch: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    reserve: int
    flops: float
    images_per_second: float
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.reserve


def estimate(recipe: Recipe, machine: HardwareConfig, stages: tuple[str, ...] = ()) -> list[StageEstimate]:
    """The stages of a recipe on a machine, in order; all when `stages` is empty.

    Raises:
        InputError: as `check_sizes`.
    """
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    return [_estimate_stage(recipe, stage, machine) for stage in chosen]


@lru_cache(maxsize=1)
def _meta_modules(recipe: Recipe, recomputed: bool) -> nn.Module:
    """A recipe's modules on the meta device in bfloat16; kept, for they take longer to make than a stage to count."""
    modules = check_sizes(recipe, recipe.stages).to(torch.bfloat16).train()
    if recomputed:
        apply_activation_checkpointing(modules)
    return modules


@lru_cache(maxsize=128)
def _stage_cost(recipe: Recipe, stage: StageConfig, recomputed: bool) -> tuple[int, int, Cost]:
    """(trainable parameters, frozen ones, the cost of an image) of a stage, the same on every machine."""
    modules = _meta_modules(recipe, recomputed)
    freeze(modules, stage)
    trainable = sum(parameter.numel() for parameter in modules.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in modules.parameters()) - trainable
    return trainable, frozen, stage.objective.cost(modules, recipe, stage) or Cost()


def check_sizes(recipe: Recipe, stages: tuple[StageConfig, ...]) -> nn.Module:
    """The modules of a recipe on the meta device: what does not fit together is refused before a run's folder is made.

    Raises:
        InputError: a pattern without a parameter, sizes that do not fit, or a network from outside, that the modules
            are built for, which cannot be loaded.
    """
    networks = FrozenNetworks(recipe)
    try:
        with torch.device("meta"):
            modules = recipe.build(networks)
            recipe.try_sizes(modules, stages)
    except InputError:
        raise
    except Exception as error:  # whatever class of the libraries refuses its sizes, and however
        reason = first_line(error)
        raise InputError(f"recipe {recipe.name}: its sizes do not fit together: {reason}") from error
    for stage in stages:
        freeze(modules, stage)
    return modules


def _estimate_stage(recipe: Recipe, stage: StageConfig, machine: HardwareConfig) -> StageEstimate:
    trainable, frozen, cost = _stage_cost(recipe, stage, machine.activation_checkpointing)
    shards = machine.gpus if machine.sharded else 1
    images = max(1, stage.batch // (machine.gpus * machine.grad_accum_steps))
    speed = machine.gpus * machine.limits[0] * machine.mfu / cost.flops if cost.flops else 0.0
    found = StageEstimate(
        stage, trainable, frozen, micro_batch=images, weights=BYTES * (trainable + frozen) // shards,
        gradients=BYTES * trainable // shards, optimizer=BYTES * trainable * (3 if stage.ema else 2) // shards,
        activations=int(cost.held * images), reserve=machine.reserve, flops=cost.flops * stage.batch,
        images_per_second=speed, seconds=stage.steps * stage.batch / speed if speed else 0.0,
    )  # fmt: skip
    return replace(found, warnings=_warnings(found, machine, cost))


def _warnings(found: StageEstimate, machine: HardwareConfig, cost: Cost) -> tuple[str, ...]:
    """What would not work as it is."""
    stage, capacity, warnings = found.stage, machine.limits[1], list[str]()
    if stage.batch % (machine.gpus * machine.grad_accum_steps):
        warnings.append(
            f"a batch of {stage.batch} does not divide into {machine.gpus} x {machine.grad_accum_steps} micro-batches"
        )
    if found.memory > capacity:
        room = capacity - (found.memory - found.activations)
        most = int(room // cost.held) if cost.held else 0
        advice = f"at most {most} images at once fit" if most > 0 else "not even one image fits"
        warnings.append(
            f"{found.memory / GIB:.0f} GiB do not fit into {capacity / GIB:.0f}: {advice}; more "
            "grad_accum_steps, activation_checkpointing, fsdp or GPUs would help"
        )
    return tuple(warnings)
