"""What the arguments of several verbs share: one frozen dataclass per verb. No heavy library is imported here.

Each family of verbs has its arguments in a module of its own: *_arguments.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

from spar.common.errors import InputError

Flag = FlagCreatePairsOff[bool]
OutputPath = Annotated[Path | None, arg(aliases=["-o"])]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Steps = Annotated[int | None, arg(name="steps", aliases=["--num-inference-steps"])]
Guidance = Annotated[float | None, arg(name="guidance", aliases=["--guidance-scale"])]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The weights, and how they run."""

    model: Path | None = None
    """Model folder, hf://OWNER/NAME[@REVISION], or a bundled model by name: spar, the default, or dualtoken."""
    adapter: Path | None = None
    """LoRA to merge into the model: a folder (RUN/adapter, or peft's or diffusers'), a .safetensors file, or
    hf://OWNER/NAME."""
    decode_tile: int | None = None
    """Visual tokens per side above which images are decoded in tiles: less memory, a slightly different image."""
    weights: Literal["float32", "dtype", "packed", "int8"] = "dtype"
    """Weights in memory: float32, dtype (that of --dtype, with the same results), packed (a CPU's own layout of them:
    faster, may round otherwise) or int8 (other results)."""
    offload: Flag = False
    """Keep idle parts in the CPU's memory: less of the device's memory, more time."""
    compile: Flag = False
    """Compile repeated layers with torch.compile: the first result takes a minute or so, later ones less time."""
    dtype: Dtype = "auto"
    """Type of matrix products; auto is bfloat16 if the device has it in hardware."""
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""


def check_nonempty(values: Sequence[object], what: str, usage: str) -> None:
    """Refuse a verb's words of which there is none, or one that is not text."""
    if not values:
        raise InputError(f"expected at least one {what} ({usage}), got none")
    for value in values:
        if isinstance(value, str):
            check_utf8(value, what)


def check_utf8(text: str | None, what: str) -> None:
    """Refuse a shell's bytes that are not text in its encoding: Python keeps them as lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"{what}: expected text in UTF-8, got {text!r}") from None
