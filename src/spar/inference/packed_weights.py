"""Weights of linear maps in the layout of a CPU's matrix unit, for inference in bfloat16.

oneDNN, which computes torch's linear maps on a CPU, brings weights into a layout of its own at every call, a tenth to a
third of a map's time at SANA's sizes. Here they are brought there once; no second copy is kept.
"""

import torch
from torch import Tensor, nn

from spar.common.errors import InputError
from spar.models.spar import SparModel


class PackedLinear(nn.Module):
    """The linear map of a weight `[N, K]` and a bias `[N]` on `[..., K]`, in bfloat16 and without a gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Plain attributes: `Module.to` and `state_dict` can do nothing with this layout.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = None if bias is None else bias.detach().to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16)  # as autocast would
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return found


def check_packing(device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> None:
    """Refuse packed weights where there is no such layout, or none that torch.compile takes.

    Raises:
        InputError: a device other than a CPU, a type other than bfloat16, no products of oneDNN's, or compiled layers.
    """
    if compiled:
        raise InputError("compile: expected none beside packed weights, whose layout torch.compile cannot read")
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise InputError(f"weights packed: expected the CPU and bfloat16, got {device} and {dtype}")
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise InputError("weights packed: expected a CPU with bfloat16 and a torch with oneDNN, got another")


@torch.no_grad()
def pack_weights(model: SparModel) -> None:
    """Pack the linear maps of encoder, connector and DiT, whose weights are in bfloat16, and the DiT's 1x1
    convolutions. The LLM's stay: layouts are written in float32.
    """
    for part in (model.tokenizer.encoder, model.connector, model.denoiser):
        # Not the maps themselves: a list of all would keep their weights until the last one is packed.
        for owner in [one for one in part.modules() if type(one) is not nn.Linear]:
            for name, layer in list(owner.named_children()):
                if type(layer) is nn.Linear:
                    owner._modules[name] = PackedLinear(layer.weight, layer.bias)
    for block in model.denoiser.network.transformer_blocks:
        for name in ("conv_inverted", "conv_point"):
            layer = block.ff._modules[name]
            block.ff._modules[name] = PackedLinear(layer.weight.flatten(1), layer.bias)
