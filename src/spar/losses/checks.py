"""Checks of a loss's inputs: a loss that broadcasts or lacks an input would fail silently."""

from torch import Tensor


def check_pair(first_name: str, first: Tensor | None, second_name: str, second: Tensor | None) -> None:
    """Raise ValueError if one of two tensors is missing or their shapes differ; the message names the tensor."""
    for name, tensor in ((first_name, first), (second_name, second)):
        if tensor is None:
            raise ValueError(f"expected {name} as a tensor, got None: this loss is on and lacks its input")
    if first.shape != second.shape:
        raise ValueError(
            f"expected {first_name} and {second_name} of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
