"""Checks of pairs of tensors: a loss that broadcasts or lacks an input would fail silently."""

from torch import Tensor


def check_pair(first_name: str, first: Tensor | None, second_name: str, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two tensors; ValueError, which names the tensor, if one is missing or their shapes differ."""
    if first is None or second is None:
        name = first_name if first is None else second_name
        raise ValueError(f"expected {name} as a tensor, got None: this loss is on and lacks its input")
    if first.shape != second.shape:
        raise ValueError(
            f"expected {first_name} and {second_name} of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first, second
