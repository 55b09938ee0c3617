"""What a part of a step costs, counted on torch's meta device, which computes nothing and holds nothing.

torch's own counter counts the operations, and what autograd would keep for the backward pass is summed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spar.models.blocks import repeated_blocks
from spar.training.distributed import RecomputedForward

_COUNTS: WeakKeyDictionary[nn.Module, dict[Any, tuple[float, float]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Cost:
    """Of one image: floating-point operations of a step, and bytes.

    `kept` is what the forward pass keeps; `recomputed` what the costliest recomputed block makes once more in the
    backward pass, one block at a time.
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


def _shapes(value: Any) -> Any:
    """What a count depends on of a value that a call uses: of tensors their shapes."""
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _counted(function: Callable[[], Any], module: nn.Module, *, grad: bool) -> tuple[float, float]:
    """As `_count_flops_and_bytes`, once for each call that is alike: stages share most of theirs."""
    values = tuple(_shapes(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ())
    trained = tuple(parameter.requires_grad for parameter in module.parameters())
    key = (function.__code__, values, trained, grad)
    known = _COUNTS.setdefault(module, {})
    if key not in known:
        known[key] = _count_flops_and_bytes(function, module, grad=grad)
    return known[key]


def part_cost(function: Callable[[], Any], module: nn.Module, *, through: bool = True) -> Cost:
    """A part's cost: trained, twice its forward pass comes back; frozen on the way of a gradient, once; else nothing.
    What is recomputed runs forward once more.

    Args:
        module: the part that the function calls.
        through: whether a gradient passes the part where it is frozen.
    """
    trains = any(parameter.requires_grad for parameter in module.parameters())
    forward, kept = _counted(function, module, grad=trains or through)
    blocks = repeated_blocks(module) if trains or through else ()
    again = {block: block.forward for block in blocks if isinstance(block.forward, RecomputedForward)}
    times = (3 if trains else 2 if through else 1) + bool(again)
    return Cost(forward * times, kept, _peak_recomputed_bytes(function, again))


def _peak_recomputed_bytes(function: Callable[[], Any], again: dict[nn.Module, RecomputedForward]) -> float:
    """The bytes that a call's costliest block keeps where none is recomputed; `again` are the recomputed ones."""
    sizes = [0.0]

    def counted(plain: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            made: list[Any] = []
            _, kept = _count_flops_and_bytes(lambda: made.append(plain(*arguments, **keywords)), block, grad=True)
            sizes.append(kept)
            return made[0]

        return forward

    try:
        for block, recomputed in again.items():
            block.forward = counted(recomputed.plain, block)  # put back below
        if again:
            _count_flops_and_bytes(function, nn.Identity(), grad=True)
    finally:
        for block, recomputed in again.items():
            block.forward = recomputed
    return max(sizes)


def meta_input(*shape: int) -> Tensor:
    """A tensor of zeros on the meta device that a gradient reaches."""
    return torch.zeros(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
