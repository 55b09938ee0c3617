"""What a recipe costs on given GPUs, before any training: operations, memory and time of each stage.

Every part is run once on torch's meta device, which computes nothing and holds nothing, in bfloat16 and for one
image. torch's own counter counts its operations, and what autograd would keep for the backward pass is summed: those
are the coefficients. The rest is arithmetic. Not counted: the optimizer's operations, traffic between GPUs, the
perceptual networks' activations, fragmentation and the CUDA context (RESERVE stands for the last two).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spar.checkpoints.lora import add_lora
from spar.common.errors import InputError
from spar.models.blocks import repeated_blocks
from spar.training.config import Recipe, StageConfig, freeze
from spar.training.distributed import apply_activation_checkpointing
from spar.training.modules import TrainingModules, init_weights
from spar.training.teacher import build_teacher

GIB = 2**30
BYTES = 4  # of a float32
RESERVE = 4 * GIB
PROMPT_TOKENS = 64  # of a caption with its template; a caption of 300 tokens costs the LLM alone
# Dense bfloat16 operations a second and bytes of memory, from the makers' data sheets.
GPUS = {
    "rtx4090": (165e12, 24 * GIB),
    "a100-40": (312e12, 40 * GIB),
    "a100": (312e12, 80 * GIB),
    "h100": (989e12, 80 * GIB),
    "h200": (989e12, 141 * 10**9),
    "b200": (2250e12, 180 * 10**9),
}
# Multiply-adds of the perceptual networks on 224 x 224 pixels, from torchvision's tables (VGG16 of LPIPS, ConvNeXt-S).
PERCEPTUAL_MACS = 15.47e9 + 8.68e9


@dataclass(frozen=True)
class Cost:
    """Of one image: floating-point operations of a step, and bytes.

    `kept` is what the forward pass keeps; `again` what the costliest recomputed block makes once more in the backward
    pass, one block at a time.
    """

    flops: float = 0.0
    kept: float = 0.0
    recomputed: float = 0.0

    @property
    def held(self) -> float:
        """Bytes of activations at their peak."""
        return self.kept + self.recomputed

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.kept + other.kept, max(self.recomputed, other.recomputed))

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.kept * times, self.recomputed * times)


@dataclass(frozen=True)
class HardwareConfig:
    """GPUs of one kind, and how a run uses them. `mfu` is the share of their peak that is reckoned with."""

    gpus: int = 8
    gpu: str = "h200"
    mfu: float = 0.4
    sharded: bool = True
    grad_accum_steps: int = 1
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise InputError(f"gpu: expected one of {', '.join(GPUS)}, got {self.gpu!r}")
        if self.gpus < 1 or self.grad_accum_steps < 1:
            raise InputError(
                f"expected gpus and grad_accum_steps of at least 1, got {self.gpus} and {self.grad_accum_steps}"
            )
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu: expected above 0 and at most 1, got {self.mfu}")


@dataclass(frozen=True)
class StageEstimate:
    """One stage on a machine. Bytes are of one GPU; `micro_batch` is what a GPU computes at once; `images` a second."""

    stage: StageConfig
    trainable: int
    frozen: int
    micro_batch: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops: float
    images_per_second: float
    days: float
    warnings: tuple[str, ...]

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + RESERVE


def estimate(recipe: Recipe, machine: HardwareConfig, stages: tuple[str, ...] = ()) -> list[StageEstimate]:
    """The stages of a recipe on a machine, in order.

    Raises:
        InputError: an unknown stage, or a step that is not counted (the foundations of the shapes world).
    """
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    strange = [stage.name for stage in chosen if stage.step not in ("tokenizer", "unified")]
    if strange:
        raise InputError(f"expected stages with a tokenizer or unified step, got {', '.join(strange)}")
    with torch.device("meta"):
        modules = TrainingModules(recipe)
        if recipe.lora.rank:
            add_lora(modules.model, recipe.lora)
        modules = modules.to(torch.bfloat16)
    modules.train()
    if machine.activation_checkpointing:
        apply_activation_checkpointing(modules)
    return [_estimate_stage(modules, recipe, stage, machine) for stage in chosen]


def _estimate_stage(
    modules: TrainingModules, recipe: Recipe, stage: StageConfig, machine: HardwareConfig
) -> StageEstimate:
    freeze(modules, stage)
    sizes = {True: 0, False: 0}
    for parameter in modules.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    cost = (_unified_cost if stage.step == "unified" else _tokenizer_cost)(modules, recipe, stage)
    shards = machine.gpus if machine.sharded else 1
    warnings = []
    if stage == recipe.stages[0] and recipe.published:
        warnings.append(f"starts {', '.join(recipe.published)} from random weights unless --init-from gives them")
    if stage.batch % (machine.gpus * machine.grad_accum_steps):
        warnings.append(
            f"a batch of {stage.batch} does not divide into {machine.gpus} x {machine.grad_accum_steps} micro-batches"
        )
    pictures = max(1, stage.batch // (machine.gpus * machine.grad_accum_steps))
    peak, capacity = GPUS[machine.gpu]
    images = machine.gpus * peak * machine.mfu / cost.flops
    found = StageEstimate(
        stage=stage,
        trainable=sizes[True],
        frozen=sizes[False],
        micro_batch=pictures,
        weights=4 * (sizes[True] + sizes[False]) // shards,
        gradients=4 * sizes[True] // shards,
        optimizer=4 * sizes[True] * (3 if stage.ema else 2) // shards,
        activations=int(cost.held * pictures),
        flops=cost.flops * stage.batch,
        images_per_second=images,
        days=stage.steps * stage.batch / images / 86400,
        warnings=(),
    )
    if found.memory > capacity:
        room = capacity - (found.memory - found.activations)
        most = int(room // cost.held) if cost.held else 0
        advice = f"at most {most} pictures at once fit" if most > 0 else "not even one picture fits"
        warnings.append(
            f"{found.memory / GIB:.0f} GiB do not fit into {capacity / GIB:.0f}: {advice}; more "
            "grad_accum_steps, activation_checkpointing, fsdp or GPUs would help"
        )
    return replace(found, warnings=tuple(warnings))


def _count_flops_and_bytes(function: Callable[[], Any], module: nn.Module, *, grad: bool) -> tuple[float, float]:
    """Forward operations of a call on the meta device, and the bytes, weights apart, that its backward pass keeps."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.device("meta"), torch.set_grad_enabled(grad), hooks, counter:
        held = function()  # alive until all is counted: a freed storage's address would come again
        total = float(counter.get_total_flops())
    del held
    return total, float(sum(kept.values()))


def _part_cost(function: Callable[[], Any], module: nn.Module, *, through: bool = True) -> Cost:
    """A part's cost: trained, twice its forward pass comes back; frozen on the way of a gradient, once; else nothing.
    What is recomputed runs forward once more.

    Args:
        module: the part that the function calls.
        through: whether a gradient passes the part where it is frozen.
    """
    trains = any(parameter.requires_grad for parameter in module.parameters())
    forward, kept = _count_flops_and_bytes(function, module, grad=trains or through)
    again = (
        [block for block in repeated_blocks(module) if hasattr(block.forward, "recomputed")]
        if trains or through
        else []
    )
    times = (3 if trains else 2 if through else 1) + bool(again)
    return Cost(forward * times, kept, _peak_recomputed_bytes(function, again))


def _peak_recomputed_bytes(function: Callable[[], Any], again: list[nn.Module]) -> float:
    """The bytes that a call's costliest block keeps where none is recomputed; `again` are the recomputed ones."""
    sizes, outer = [0.0], {block: block.forward for block in again}

    def counted(plain: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            made: list[Any] = []
            sizes.append(
                _count_flops_and_bytes(lambda: made.append(plain(*arguments, **keywords)), block, grad=True)[1]
            )
            return made[0]

        return forward

    try:
        for block, forward in outer.items():
            block.forward = counted(forward.recomputed, block)
        if again:
            _count_flops_and_bytes(function, nn.Identity(), grad=True)
    finally:
        for block, forward in outer.items():
            block.forward = forward
    return max(sizes)


def _input(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _tokenizer_cost(modules: TrainingModules, recipe: Recipe, stage: StageConfig) -> Cost:
    """A tokenizer step: encoder, streams and fusion, decoder, and the networks of the losses that are on."""
    tokenizer, weights, config = modules.model.tokenizer, stage.losses, recipe.model
    side = stage.image_size or config.image_size
    grid, width = side // config.token_stride, config.text.hidden_size
    picture, f_v = _input(1, 3, side, side), _input(1, grid * grid, width)
    cost = _part_cost(lambda: tokenizer.encoder(picture), tokenizer.encoder, through=False)
    cost += _part_cost(lambda: tokenizer.fuse(f_v, (side, side)), tokenizer.fusion)
    latent = _input(1, config.autoencoder.latent_channels, grid, grid)
    cost += _part_cost(lambda: tokenizer.decoder(latent), tokenizer.decoder)
    if weights.semantic:
        cost += _part_cost(lambda: modules.teacher(picture.detach()), modules.teacher, through=False)
    if weights.native or weights.native_fused:
        native = torch.zeros(1, 3, *2 * (grid * config.autoencoder.stride,), dtype=torch.bfloat16, device="meta")
        cost += _part_cost(lambda: modules.pixel_encoder(native), modules.pixel_encoder, through=False)
    if weights.perceptual:  # two images forward, one of them back again
        cost += Cost(3 * 2 * PERCEPTUAL_MACS * (side / 224) ** 2)
    if weights.gan:  # the generator's pass, then the discriminator's own on both kinds of images
        one = _part_cost(lambda: modules.discriminator(picture), modules.discriminator)
        cost += Cost(one.flops * 2 / 3, one.kept) + one * 2
    return cost


def _unified_cost(modules: TrainingModules, recipe: Recipe, stage: StageConfig) -> Cost:
    """A unified step: the target's features, the LLM, router and connector, and the DiT for each draw of noise."""
    model, config = modules.model, recipe.model
    side, width, queries = config.image_size, config.text.hidden_size, config.connector.queries
    picture, f_v = _input(1, 3, side, side), _input(1, config.grid**2, width)
    encode = _part_cost(lambda: model.tokenizer.encoder(picture.detach()), model.tokenizer.encoder, through=False)
    encode += _part_cost(lambda: model.tokenizer.fuse(f_v.detach()), model.tokenizer.fusion, through=False)
    if recipe.data.cache is not None:
        encode = Cost()

    def condition(words: int) -> Cost:
        tokens = words + queries
        layers = model.language.network.layers
        cost = _part_cost(lambda: _layers(model, layers, words), model.language, through=False)  # with LoRA it trains
        cost += _part_cost(lambda: _layers(model, layers, queries), model.language)
        states = [_input(1, tokens, width) for _ in range(config.router.count)]
        cost += _part_cost(lambda: model.router(torch.stack(states)), model.router)
        cost += _part_cost(lambda: _connector(model, tokens), model.connector)
        return cost + _part_cost(lambda: _velocity(model, tokens), model.denoiser) * stage.noise_samples

    drawn, edited = encode + condition(PROMPT_TOKENS), encode * 2 + condition(PROMPT_TOKENS + config.grid**2)
    kinds = [(share, one) for share, one in ((1 - stage.edit_share, drawn), (stage.edit_share, edited)) if share]
    kept, again = (max(getattr(one, name) for _, one in kinds) for name in ("kept", "recomputed"))
    cost = Cost(sum(share * one.flops for share, one in kinds), kept, again)
    if stage.losses.align:
        features = _input(1, config.grid**2, config.denoiser.width)
        cost += _part_cost(lambda: modules.alignment_head(features), modules.alignment_head) * stage.noise_samples
    return cost


def _layers(model: nn.Module, layers: nn.ModuleList, tokens: int) -> Tensor:
    """Layers of the LLM or the connector; their own rotary tables look at positions, which meta tensors do not have."""
    config = model.config.text
    x = _input(1, tokens, config.hidden_size)
    angles = torch.zeros(1, tokens, config.hidden_size // config.heads, dtype=x.dtype, device="meta")
    bias = torch.zeros(1, 1, tokens, tokens, dtype=x.dtype, device="meta")
    for layer in layers:
        x = layer(x, attention_mask=bias, position_embeddings=(angles, angles))
    return x


def _connector(model: nn.Module, tokens: int) -> Tensor:
    return model.connector.projection(model.connector.norm(_layers(model, model.connector.layers, tokens)))


def _velocity(model: nn.Module, tokens: int) -> Tensor:
    config = model.config
    latent = _input(1, config.autoencoder.latent_channels, config.grid, config.grid)
    time = torch.zeros(1, dtype=torch.bfloat16, device="meta")
    mask = torch.ones(1, tokens, dtype=torch.long, device="meta")
    return model.denoiser(latent, time, _input(1, tokens, config.denoiser.caption_channels), mask).velocity


# ---- what a run would train, by parameters alone ---------------------------------------------------------------------


@dataclass(frozen=True)
class StageSummary:
    """One stage: its settings, trainable and frozen parameters, and the bytes of its weights and optimizer state.

    `bytes` counts every weight, and for those that train the gradient, two moments and the average; activations,
    which depend on the batch, are not counted.
    """

    stage: StageConfig
    trainable: int
    frozen: int
    bytes: int


def summarize(recipe: Recipe, stages: tuple[str, ...] = ()) -> list[StageSummary]:
    """The stages that a run would train, in order; all when `stages` is empty. Nothing is allocated.

    A recipe whose sizes do not fit together is refused here, before a run's folder is made.

    Raises:
        InputError: an unknown stage, a pattern without a parameter, sizes that do not fit, or an external teacher
            that cannot be loaded.
    """
    chosen = tuple(recipe.stage(name) for name in stages) or recipe.stages
    teacher = build_teacher(recipe.alignment)
    try:
        with torch.device("meta"):
            modules = TrainingModules(recipe, teacher_width=teacher.width() if teacher else None)
            init_weights(modules)
            if recipe.lora.rank:
                add_lora(modules.model, recipe.lora)
            tokenizer = modules.model.tokenizer
            for side in {recipe.model.image_size, *(stage.image_size or recipe.model.image_size for stage in chosen)}:
                tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, side, side)).z_f)
    except InputError:
        raise
    except Exception as error:  # whatever class of the libraries refuses its sizes, and however
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"recipe {recipe.name}: its sizes do not fit together: {reason}") from error
    return [_summarize_stage(modules, stage) for stage in chosen]


def _summarize_stage(modules: TrainingModules, stage: StageConfig) -> StageSummary:
    freeze(modules, stage)
    sizes = {True: 0, False: 0}
    for parameter in modules.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    copies = 4 if stage.ema else 3
    return StageSummary(stage, sizes[True], sizes[False], BYTES * (sizes[False] + (1 + copies) * sizes[True]))
