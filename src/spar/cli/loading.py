"""The model that a verb uses, loaded by its arguments."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spar.cli.arguments import ModelArguments
from spar.cli.console import is_first_process, progress_bar

if TYPE_CHECKING:
    import torch

    from spar.inference.base import Pipeline


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable garbage collection: imports create a million permanent objects, and scanning them repeatedly takes a
    quarter of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


def load_pipeline(args: ModelArguments, device: "torch.device | None" = None) -> "Pipeline":
    """The pipeline of a verb's arguments, with a bar meanwhile; on `device`, that of one of several processes."""
    with progress_bar("loading the model"), gc_disabled():
        from spar.common.device import device_name
        from spar.inference import loading

        pipe = loading.load_pipeline(
            args.model, dtype=None if args.dtype == "auto" else args.dtype, device=device or args.device,
            adapter=args.adapter, decode_tile=args.decode_tile, weights=args.weights, offload=args.offload,
            compile=args.compile, progress=False,
        )
    if sys.stderr.isatty() and is_first_process():  # an error is one line where programs read it
        print(f"spar: on {device_name(pipe.device)} in {str(pipe.dtype).removeprefix('torch.')}", file=sys.stderr)
    return pipe
