"""Modules that no process ever holds whole: the weights of a seed, of which each process keeps its own rows.

A seed means the numbers that torch's one generator draws for all weights, in the order in which they are built. So
every process goes through the whole build; but a weight is whole there only while it is worked on. The weights that
were worked on longest ago give back their memory, but for this process's rows, and get it again, with those rows alone
in place, when an operation needs them: initialisers treat all rows alike. In the end the weights are outlines on
torch's meta device, for FSDP to shard, and rows to fill the shards with.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spar.training.distributed import DistributedContext, own_rows

RESIDENT = 2**28  # bytes of whole weights that stay in memory, beside those that an operation works on


@dataclass
class KeptRows:
    """A weight's memory: its bytes, which of them are this process's rows, and those alone while the others are gone.

    `reference` is weak: weights that the build drops go.
    """

    reference: StorageWeakRef
    size: int
    own: slice
    rows: Tensor | None = None

    def part(self) -> None:
        """Give back all but the own rows."""
        storage = UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        if storage is not None:
            self.rows = _bytes(storage)[self.own].clone()
            storage.resize_(0)

    def restore(self, storage: UntypedStorage) -> None:
        """Take the whole memory again, with the own rows in place."""
        storage.resize_(self.size)
        if self.rows is not None:
            _bytes(storage)[self.own].copy_(self.rows)
        self.rows = None


class RowKeeper(TorchDispatchMode):
    """While it is on, parameters that modules register, and clones of them, are whole for as long as needed alone.

    Args:
        rank: of this process, among `world`.
        resident: bytes of whole weights that may stay.
    """

    def __init__(self, rank: int, world: int, resident: int = RESIDENT) -> None:
        super().__init__()
        self.rank, self.world, self.resident = rank, world, resident
        self.whole: OrderedDict[StorageWeakRef, KeptRows] = OrderedDict()  # what was worked on longest ago comes first
        self.parted: dict[StorageWeakRef, KeptRows] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        used = sum(self._restore(one) for one in tensors)
        result = func(*args, **(kwargs or {}))
        if used and func is torch.ops.aten.clone.default:
            self.keep(result)
            used += 1
        if used:
            self._give_back(used)
        return result

    def keep(self, weight: Tensor) -> None:
        """Keep this process's rows of a weight, and of all views of it."""
        if not _plain(weight):
            return
        reference = StorageWeakRef(weight.untyped_storage())
        if reference in self.whole or reference in self.parted:
            return
        for gone in [one for one in self.parted if one.expired()]:
            del self.parted[gone]
        row = weight.numel() * weight.element_size() // len(weight)
        rows = own_rows(len(weight), self.rank, self.world)
        own = slice(rows.start * row, rows.stop * row)
        self.whole[reference] = KeptRows(reference, row * len(weight), own)

    def take(self, weight: Tensor) -> Tensor:
        """This process's rows of a weight that is not worked on any more; all of a scalar."""
        detached = weight.detach()
        if not weight.dim():
            return detached.clone()
        rows = own_rows(len(weight), self.rank, self.world)
        kept = self.parted.pop(StorageWeakRef(weight.untyped_storage()), None)
        if kept is None or kept.rows is None:
            return detached[rows].clone()
        return kept.rows.view(weight.dtype).view(rows.stop - rows.start, *weight.shape[1:])

    def _restore(self, tensor: Tensor) -> bool:
        """Whether a tensor is of a kept weight; that is whole then."""
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        kept = self.parted.pop(reference, None)
        if kept is not None:
            kept.restore(storage)
            self.whole[reference] = kept
        elif reference in self.whole:
            self.whole.move_to_end(reference)
        return reference in self.whole

    def _give_back(self, used: int) -> None:
        """Keep the rows alone of what was worked on longest ago, until the rest is few enough; `used` ones stay."""
        if sum(kept.size for kept in self.whole.values()) <= self.resident:
            return
        for gone in [one for one in self.whole if one.expired()]:
            del self.whole[gone]
        total = sum(kept.size for kept in self.whole.values())
        while total > self.resident and len(self.whole) > used:
            reference, kept = self.whole.popitem(last=False)
            kept.part()
            self.parted[reference] = kept
            total -= kept.size


def build_rows(
    build: Callable[[], nn.Module], parallel: DistributedContext, resident: int = RESIDENT
) -> tuple[nn.Module, dict[str, Tensor]]:
    """What `build` makes, its parameters on the meta device, and this process's rows of each by its name.

    Buffers are whole, on the CPU.
    """
    keeper = RowKeeper(parallel.rank, parallel.world, resident)
    with keeper, _at_registration(keeper.keep):
        modules = build()
    names = {id(parameter): name for name, parameter in modules.named_parameters()}
    rows: dict[str, Tensor] = {}
    outlines: dict[int, nn.Parameter] = {}
    for owner in modules.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in outlines:
                rows[names[id(parameter)]] = keeper.take(parameter)
                outline = torch.empty_like(parameter, device="meta")
                outlines[id(parameter)] = nn.Parameter(outline, parameter.requires_grad)
            owner._parameters[key] = outlines[id(parameter)]  # a tied one stays tied
    return modules, rows


@contextmanager
def _at_registration(function: Callable[[Tensor], None]) -> Iterator[None]:
    """Call a function with each parameter that a module registers."""

    def called(_module: nn.Module, _name: str, parameter: Tensor | None) -> None:
        if parameter is not None:
            function(parameter)

    hook = torch_module.register_module_parameter_registration_hook(called)
    try:
        yield
    finally:
        hook.remove()


def _plain(weight: Tensor) -> bool:
    """Whether a tensor fills its memory, row after row, and that can be given back."""
    if weight.device.type != "cpu" or not weight.dim() or not weight.numel() or not weight.is_contiguous():
        return False
    storage = weight.untyped_storage()
    return bool(storage.resizable()) and storage.nbytes() == weight.numel() * weight.element_size()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
