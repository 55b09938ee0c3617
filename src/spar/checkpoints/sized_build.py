"""A network as large as its files: what a configuration promises is compared with the safetensors headers first.

A few bytes of config.json can name a network of terabytes, or of so many layers that its construction never ends. So a
network is built twice: without memory, on the meta device, where it must fit the headers exactly; then with the values
of its buffers. The first build ends as soon as the network has clearly more tensors or numbers than its files.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from spar.checkpoints.safetensors_io import SafetensorsReader, check_fit
from spar.common.errors import InputError, first_line

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# A constructor may make more than it keeps: the half of an autoencoder that is dropped, a head that is tied later.
SLACK, MORE = 4, (1024, 2**20)
FRESH = (2**13, 2**32)  # of parts that no file holds and that get random weights


def outline(
    build: Callable[[], T], config: Any, stored: Collection[Tensor], where: object, more: tuple[int, int] = MORE
) -> T:
    """A network without memory, all on the meta device, of about as many tensors and numbers as are stored.

    Args:
        build: builds it, or several.
        config: the dataclass of its sizes.
        stored: the tensors of its files, or their outlines.
        where: the files' folder, for messages.
        more: tensors and numbers beyond SLACK times those stored.

    Raises:
        InputError: sizes of which no network can be built, or far more than is stored.
    """
    most = SLACK * len(stored) + more[0], SLACK * sum(value.numel() for value in stored) + more[1]
    _check_layers(config, most[0], f"{where}: config.json")
    try:
        with _no_more_than(*most), torch.device("meta"):
            return build()
    except InputError as error:
        raise InputError(f"{where} does not fit this model: {error}") from None
    except Exception as error:  # the libraries raise nearly anything on sizes of no use
        reason = first_line(error)
        raise InputError(f"{where}: no network can be built of the sizes in config.json: {reason}") from error


def skeleton(build: Callable[[], M], config: Any, files: Mapping[str, SafetensorsReader]) -> M:
    """A network without memory, as `outline`, that fits its files.

    Args:
        build: as in `outline`.
        config: as in `outline`.
        files: of each part of it the tensors, by the part's name; "" is the whole network.

    Raises:
        InputError: as `outline`, or other tensors than those of the files.
    """
    stored = [value for one in files.values() for value in one.shapes.values()]
    where = os.path.commonpath([one.path.parent for one in files.values()])
    model = outline(build, config, stored, where)
    for part, one in files.items():
        check_fit(model.get_submodule(part).state_dict(), one.shapes, one.path.parent)
    return model


def sized_build(build: Callable[[], M], config: Any, files: Mapping[str, SafetensorsReader]) -> M:
    """A network that fits its files, as `skeleton`, whose parameters alone are on the meta device."""
    skeleton(build, config, files)
    with init_empty_weights(include_buffers=False):
        return build()


def _check_layers(config: Any, most: int, where: str) -> None:
    """Refuse numbers of layers that no file bears out: the libraries make lists of that length before any layer."""
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{where}.{item.name}"
        if dataclasses.is_dataclass(value):
            _check_layers(value, most, name)
        counts = value if isinstance(value, tuple) else (value,)
        if "layers" in item.name and any(isinstance(count, int) and count > most for count in counts):
            raise InputError(f"{name}: expected layers for the weights that are stored, got {value}")


@contextmanager
def _no_more_than(tensors: int, numbers: int) -> Iterator[None]:
    """Refuse to build more than so many parameters and buffers, with so many numbers, with InputError."""
    left = [tensors, numbers]

    def count(_module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        left[0], left[1] = left[0] - 1, left[1] - value.numel()
        if min(left) < 0:
            shape = tuple(value.shape)
            raise InputError(f"its config.json gives sizes far beyond the stored weights, at {name} {shape}")

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
