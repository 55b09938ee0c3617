"""LoRA (arXiv 2106.09685) with peft: small trainable additions to frozen linear maps, merged at the end.

It adapts the linear maps inside the repeated layers of a part: attention and feed-forward of the LLM and the connector,
attention of the DiT (whose feed-forward consists of convolutions, which stay as they are).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from spar.common.errors import InputError, install_command

LAYERS = {"denoiser": "network.transformer_blocks.", "connector": "layers.", "language": "network.layers."}
LORA_PREFIX = "lora_"  # in the name of every tensor that an adapter adds


@dataclass(frozen=True)
class LoraConfig:
    """`rank` of the additions (0: no LoRA), `alpha` (their factor is alpha / rank), and the adapted parts."""

    rank: int = 0
    alpha: float = 16.0
    parts: tuple[str, ...] = ("denoiser", "connector")

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0:
            raise InputError(f"lora: expected rank at least 0 and alpha above 0, got {self.rank} and {self.alpha}")
        if not self.parts or not set(self.parts) <= set(LAYERS):
            raise InputError(f"lora.parts: expected some of {', '.join(LAYERS)}, got {', '.join(self.parts) or 'none'}")


def is_lora_key(name: str) -> bool:
    """Whether a parameter was added by LoRA."""
    return f".{LORA_PREFIX}" in name


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Add zero-initialised LoRA to a model in place, which keeps its output. It uses torch's global generator.

    Raises:
        InputError: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError(f"LoRA needs peft: {install_command('lora')}") from None
    for part in config.parts:
        module = getattr(model, part)
        linear = (name for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
        names = [name for name in linear if name.startswith(LAYERS[part])]
        settings = peft.LoraConfig(
            r=config.rank, target_modules=names, lora_dropout=0.0,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft says int, but only divides it by the rank
        )  # fmt: skip
        peft.inject_adapter_in_model(settings, module)


def rename_for_lora(own: Collection[str], given: Iterable[str]) -> dict[str, str | None]:
    """The names in an adapted model of a plain one's weights, each with the plain name; None for missing additions."""
    renamed: dict[str, str | None] = {}
    for name in given:
        stem, _, last = name.rpartition(".")
        base = f"{stem}.base_layer.{last}"
        renamed[base if base in own else name] = name
    return {**{name: None for name in own if is_lora_key(name)}, **renamed}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of LoRA, by name."""
    return {name: value for name, value in model.state_dict().items() if is_lora_key(name)}


def merge_lora(model: nn.Module) -> None:
    """Merge every addition into its linear map, in place: a plain model with the same output."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
