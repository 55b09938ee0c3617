"""What every loss checks: its inputs are there and agree, for a loss that broadcasts or goes missing fails silently."""

from torch import Tensor


def check_pair(first_name: str, first: Tensor | None, second_name: str, second: Tensor | None) -> None:
    """Raises ValueError, naming the culprit, where one of two tensors is missing or their shapes differ."""
    for name, tensor in ((first_name, first), (second_name, second)):
        if tensor is None:
            raise ValueError(f"expected {name} as a tensor, got None: this loss is on and lacks its input")
    if first.shape != second.shape:
        raise ValueError(
            f"expected {first_name} and {second_name} of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
