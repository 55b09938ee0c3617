"""Inference in less memory: weights of smaller types, and idle parts in the CPU's memory."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spar.common.errors import InputError, install_command
from spar.models.spar import SparModel

Weights = Literal["float32", "dtype", "packed", "int8"]
WEIGHTS = get_args(Weights)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear maps and convolutions to `dtype`, as autocast would at each use.

    Results therefore do not change at all. Norms, tables, embeddings and biases stay in float32.
    """
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.weight.data = part.weight.data.to(dtype)


def quantize(model: SparModel) -> None:
    """Round the linear maps of the repeated layers to 8 bits, one scale per row (torchao's weight-only int8).

    SANA's 1x1 convolutions, half of the DiT, stay as they are.

    Raises:
        InputError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise InputError(f"weights int8 needs torchao: {install_command('quantize')}") from None
    for part in (model.tokenizer.encoder, model.language, model.connector, model.denoiser):
        quantize_(part, Int8WeightOnlyConfig())


class Offload:
    """Keeps parts of a model in the CPU's memory, and copies them to the device while they compute.

    The weights do not change, so that unloading a part only frees the copy.
    """

    def __init__(self, model: SparModel, device: torch.device) -> None:
        self.device, self.loaded_parts = device, set[str]()
        tokenizer = model.tokenizer
        streams = [part for name, part in tokenizer.named_children() if name not in ("encoder", "decoder")]
        parts: dict[str, nn.Module] = {
            "encoder": tokenizer.encoder,
            "streams": nn.ModuleList(streams),
            "language": model.language,
            "router_and_connector": nn.ModuleList([model.router, model.connector]),
            "denoiser": model.denoiser,
            "decoder": tokenizer.decoder,
        }
        self.weights_by_part = {name: _weight_slots(part) for name, part in parts.items()}
        for _, _, weight in (slot for slots in self.weights_by_part.values() for slot in slots):
            if device.type == "cuda" and type(weight.data) is Tensor:  # pinned memory is copied at the bus's full speed
                weight.data = weight.data.pin_memory()
        for part in model.modules():
            for key, buffer in part.named_buffers(recurse=False):
                part._buffers[key] = buffer.to(device)

    def load_to_device(self, *names: str) -> None:
        """Load these parts to the device and unload all others; after a failure the next call completes the work."""
        wanted = set(names)
        if wanted == self.loaded_parts:
            return
        for name in self.weights_by_part.keys() - wanted:  # also partly loaded ones
            for module, key, weight in self.weights_by_part[name]:
                module._parameters[key] = weight
        self.loaded_parts &= wanted
        for name in wanted - self.loaded_parts:
            for module, key, weight in self.weights_by_part[name]:
                plain = type(weight.data) is Tensor  # torchao's tensors have no asynchronous copy
                loaded = weight.data.to(self.device, non_blocking=True) if plain else weight.data.to(self.device)
                module._parameters[key] = nn.Parameter(loaded, requires_grad=False)
            self.loaded_parts.add(name)


def _weight_slots(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Owner, name and tensor of each weight of a module."""
    return [(part, key, p) for part in module.modules() for key, p in part._parameters.items() if p is not None]
