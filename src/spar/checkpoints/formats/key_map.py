"""Key maps from the tensors of foreign files to our weights, checked as a whole before anything is read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from spar.checkpoints.formats.torch_pickle import TorchPickleReader
from spar.checkpoints.safetensors_io import SafetensorsReader, check_finite, describe_mismatch
from spar.common.errors import InputError


@dataclass(frozen=True)
class TensorSlice:
    """Part `index` of `count` equal parts of a tensor's first dimension, under our name for it.

    `single`: the first dimension is a batch of one, which ours lacks.
    """

    name: str
    index: int = 0
    count: int = 1
    single: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        if self.single and tensor.shape[0] == 1:
            return tensor[0]
        if self.count == 1 or tensor.shape[0] % self.count:  # not divisible: `check` reports its shape
            return tensor
        return tensor.chunk(self.count)[self.index]


TensorReader = SafetensorsReader | TorchPickleReader

# A tensor's name in a file to our names for it: empty for an unused tensor, None for an unknown one.
Translate = Callable[[str], tuple[TensorSlice, ...] | None]


@dataclass
class KeyMap:
    """Our weights as tensors of foreign files. `add` every file, `check`, then `tensors` reads."""

    sources: dict[str, tuple[TensorReader, str, TensorSlice]] = field(default_factory=dict)

    def add(self, files: TensorReader, translate: Translate, keys: Iterable[str] | None = None) -> None:
        """Add a file's tensors (of `keys`, if given). Unknown ones keep their names, for the report."""
        for key in files.shapes if keys is None else keys:
            targets = translate(key)
            for rows in (TensorSlice(f"{key} (unknown)"),) if targets is None else targets:
                if rows.name in self.sources:
                    other = self.sources[rows.name][1]
                    raise InputError(f"{files.path.parent}: {key} and {other} are both {rows.name}")
                self.sources[rows.name] = (files, key, rows)

    def check(self, parts: dict[str, nn.Module], names: dict[str, str]) -> None:
        """Refuse missing, unexpected and misshapen tensors, in one report over all parts.

        Args:
            parts: our modules by the prefix of their names here.
            names: name of each in the report.
        """
        faults, shapes = [], self.outlines()
        for prefix, module in parts.items():
            own = {f"{prefix}.{key}": value for key, value in module.state_dict().items()}
            given = {key: value for key, value in shapes.items() if key.startswith(f"{prefix}.")}
            if fault := describe_mismatch(own, given):
                faults.append(f"{names[prefix]}: {fault}")
        strange = [key for key in self.sources if not key.startswith(tuple(f"{prefix}." for prefix in parts))]
        if strange:
            shown = ", ".join(sorted(strange)[:3]) + (", ..." if len(strange) > 3 else "")
            faults.append(f"{len(strange)} unexpected in no part of ours ({shown})")
        if faults:
            raise InputError("the checkpoints do not fit: " + "; ".join(faults))

    def outlines(self) -> dict[str, Tensor]:
        """Every tensor on the meta device, under our names."""
        return {name: rows.take(files.shapes[key]) for name, (files, key, rows) in self.sources.items()}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read the weights of a part one by one, in their stored types; InputError for numbers that are not finite."""
        start, found = f"{prefix}.", dict[str, Tensor]()
        for name, (files, key, rows) in self.sources.items():
            if name.startswith(start):
                value = files.read(key)
                check_finite({key: value}, files.path)
                found[name.removeprefix(start)] = rows.take(value).contiguous()
        return found
