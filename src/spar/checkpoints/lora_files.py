"""LoRA on disk: written as peft and diffusers have it, read from either, and merged into a plain model.

A folder that we write has `adapter_config.json` and `adapter_model.safetensors`, which peft loads over our model, and
where the DiT is adapted `pytorch_lora_weights.safetensors`, which diffusers' `load_lora_weights` takes. We read such a
folder, the same of an LLM or a DiT alone, and a single file in diffusers' layout. Names are mapped to our modules by
HOMES. Merging needs no peft.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spar.checkpoints.lora import LoraConfig, adapter_tensors
from spar.checkpoints.safetensors_io import check_finite, read_tensors, write_tensors
from spar.common.config import read_json, write_json
from spar.common.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DENOISER, TRANSFORMER = "base_model.model.", "denoiser.network.", "transformer."
# Where modules of the libraries' own models are in ours: of diffusers' pipeline and transformer, of transformers' Qwen2
# and InternVL.
HOMES = (
    ("transformer.transformer_blocks.", "denoiser.network.transformer_blocks."),
    ("transformer_blocks.", "denoiser.network.transformer_blocks."),
    ("model.language_model.layers.", "language.network.layers."),
    ("language_model.model.layers.", "language.network.layers."),
    ("model.layers.", "language.network.layers."),
)
# kohya's names of whole modules and of their two sides.
KOHYA = re.compile(r"^lora_(unet|te\d?|transformer)_|\.lora_(down|up)\.")
SIDE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Fields of peft's configuration under which two matrices are not the whole addition.
UNREAD = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
)  # fmt: skip
# Ways to begin that leave the base weights as they are; the others (pissa, olora, corda, loftq, ...) take their first
# product out of them, so that it may not be added to the untouched weights.
BEGINNINGS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Addition:
    """What LoRA adds to the weight of one module: `scale` B A, A `[r, in]` and B `[out, r]` (or 1x1 convolutions)."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def delta(self) -> Tensor:
        """`[out, in]`, float32."""
        return self.scale * (self.b.float().flatten(1) @ self.a.float().flatten(1))


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the additions of an adapted model alone, with `manifest.json` beside them."""
    import peft

    named = {name.replace(".default.", "."): value for name, value in adapter_tensors(model).items()}
    write_tensors({f"{PEFT_PREFIX}{name}": value for name, value in named.items()}, folder / WEIGHTS)
    modules = sorted({name.partition(".lora_")[0] for name in named})
    settings = peft.LoraConfig(
        r=config.rank, target_modules=modules, lora_dropout=0.0, inference_mode=True,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # as in `add_lora`
    )  # fmt: skip
    settings.save_pretrained(str(folder))
    header = read_json(folder / CONFIG)
    write_json(folder / CONFIG, {**dict(sorted(header.items())), "target_modules": modules})  # sets have no order
    scale = config.alpha / config.rank  # diffusers' layout has no field for it
    blocks = {
        TRANSFORMER + name.removeprefix(DENOISER): value * scale if ".lora_B." in name else value
        for name, value in named.items() if name.startswith(DENOISER)
    }  # fmt: skip
    if blocks:
        write_tensors(blocks, folder / DIFFUSERS_WEIGHTS)
    write_json(folder / "manifest.json", manifest)


def merge_adapter(model: nn.Module, path: Path) -> None:
    """Add an adapter, a folder or a file in one of the layouts that are read, to a plain model's weights, in place.

    Raises:
        InputError: no adapter, one in a layout or with a method that is not read, or one of another model; then the
            model is as before.
    """
    additions, weights = read_adapter(path), dict[str, tuple[nn.Parameter, Addition]]()
    modules, misfits = dict(model.named_modules()), []
    for name, addition in additions.items():
        home = _home(name, modules)
        weight = None if home is None else getattr(modules[home], "weight", None)
        if home is None or not isinstance(weight, nn.Parameter):
            misfits.append(f"{name} (no such module)")
        elif home in weights:
            misfits.append(f"{name} (a second addition to {home})")
        elif weight.numel() != addition.a[0].numel() * len(addition.b) or len(weight) != len(addition.b):
            misfits.append(f"{name} (of {len(addition.b)} x {addition.a[0].numel()}, expected {_shape(weight)})")
        else:
            weights[home] = weight, addition
    if misfits:
        more = ", ..." if len(misfits) > 3 else ""
        raise InputError(
            f"{path} is no adapter of this model: {len(misfits)} of its {len(additions)} modules do not fit: "
            f"{', '.join(misfits[:3])}{more}"
        )
    merged = {}
    for name, (weight, addition) in weights.items():
        delta = addition.delta.view_as(weight).to(weight.device)
        merged[name] = (weight.detach().float() + delta).to(weight.dtype)
    check_finite(merged, path)
    for name, (weight, _) in weights.items():
        weight.data.copy_(merged[name])


def read_adapter(path: Path) -> dict[str, Addition]:
    """The additions of a folder or a file by the names of modules, as they are there but for peft's own prefix."""
    if path.is_dir():
        if (path / CONFIG).is_file():
            return _read_peft(path)
        if (path / DIFFUSERS_WEIGHTS).is_file():
            return _read_file(path / DIFFUSERS_WEIGHTS)
        raise InputError(
            f"{path}: expected an adapter: a folder with {CONFIG} and {WEIGHTS} (peft) or {DIFFUSERS_WEIGHTS} "
            "(diffusers), or a .safetensors file"
        )
    if path.suffix != ".safetensors":
        raise InputError(f"adapter: expected a folder or a .safetensors file, got {str(path)!r}")
    return _read_file(path)


def _read_peft(folder: Path) -> dict[str, Addition]:
    where, header = folder / CONFIG, read_json(folder / CONFIG)
    if header.get("peft_type") != "LORA":
        raise InputError(f"{where}: expected peft_type 'LORA', got {header.get('peft_type')!r}")
    used = [name for name in UNREAD if header.get(name)]
    used += ["bias"] if header.get("bias", "none") != "none" else []
    begun = header.get("init_lora_weights", True)
    used += [f"init_lora_weights {begun!r}"] if isinstance(begun, str) and begun not in BEGINNINGS else []
    if used:
        raise InputError(f"{where}: expected plain LoRA, which adds two matrices' product; it has {', '.join(used)}")
    ranks, alphas = _Pattern(header, where, "r", "rank_pattern"), _Pattern(header, where, "lora_alpha", "alpha_pattern")
    found = {}
    for name, (a, b) in _pairs(read_tensors(folder / WEIGHTS), folder / WEIGHTS).items():
        rank = ranks(name)
        if len(a) != rank:
            raise InputError(
                f"{folder}: expected weights of rank {rank:.0f} as its {CONFIG} says, got {len(a)} ({name})"
            )
        found[name] = Addition(a, b, alphas(name) / (math.sqrt(rank) if header.get("use_rslora") else rank))
    if unused := [*ranks.unused, *alphas.unused]:
        raise InputError(f"{where}: expected ends of modules' names in rank_pattern and alpha_pattern, got {unused}")
    return found


class _Pattern:
    """A number of peft's configuration by the name of a module: the first pattern that ends it, else the default.

    peft takes regular expressions; here a pattern is the end of a name, which is what it writes itself.
    """

    def __init__(self, header: Mapping[str, Any], where: Path, default: str, patterns: str) -> None:
        self.default, self.patterns = header.get(default), header.get(patterns) or {}
        given = [self.default, *(self.patterns.values() if isinstance(self.patterns, dict) else [None])]
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in given):
            raise InputError(f"{where}: expected numbers above 0 as {default} and in {patterns}, got {given}")
        self.unused = list(self.patterns)

    def __call__(self, name: str) -> float:
        for pattern, value in self.patterns.items():
            if f".{name}".endswith(f".{pattern.removeprefix('^')}"):
                self.unused = [one for one in self.unused if one != pattern]
                return float(value)
        return float(self.default or 0)


def _read_file(path: Path) -> dict[str, Addition]:
    """Diffusers' layout: A and B by module, and where a file has `MODULE.alpha`, that over the rank as scale."""
    tensors = read_tensors(path)
    alphas = {key.removesuffix(".alpha"): float(tensors.pop(key)) for key in list(tensors) if key.endswith(".alpha")}
    pairs = _pairs(tensors, path)
    return {name: Addition(a, b, alphas[name] / len(a) if name in alphas else 1.0) for name, (a, b) in pairs.items()}


def _pairs(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module; every tensor of the file is one of them."""
    kohya = next(filter(KOHYA.search, tensors), None)
    if kohya:
        raise InputError(f"{path}: kohya's layout is not read ({kohya}); convert it to diffusers' or peft's")
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        named = SIDE.fullmatch(key)
        if not named or value.dim() < 2 or not value.is_floating_point():
            raise InputError(f"{path}: expected matrices MODULE.lora_A.weight and MODULE.lora_B.weight, got {key}")
        found.setdefault(named["module"].removeprefix(PEFT_PREFIX), {})[named["side"]] = value
    if not found:
        raise InputError(f"{path}: expected matrices MODULE.lora_A.weight and MODULE.lora_B.weight, got none")
    check_finite(tensors, path)
    for name, sides in found.items():
        if sides.keys() != {"A", "B"} or not 0 < len(sides["A"]) == sides["B"].flatten(1).shape[1]:
            shapes = ", ".join(f"{side} {_shape(value)}" for side, value in sorted(sides.items()))
            raise InputError(f"{path}: expected A and B of one rank for {name}, got {shapes}")
    return {name: (sides["A"], sides["B"]) for name, sides in found.items()}


def _home(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module of ours that a name means: one of that name, or the place that a library's has by HOMES."""
    places = (ours + name.removeprefix(theirs) for theirs, ours in HOMES if name.startswith(theirs))
    return next((place for place in (name, *places) if place in modules), None)


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))
