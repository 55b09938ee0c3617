"""The model that a verb uses, loaded by its arguments."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spar.cli.arguments import ModelArguments
from spar.cli.console import progress_bar

if TYPE_CHECKING:
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


def load_pipeline(args: ModelArguments) -> "Pipeline":
    """The pipeline of a verb's arguments, with a bar meanwhile."""
    with progress_bar("loading the model"), gc_disabled():
        import torch

        from spar.inference import loading

        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        return loading.load_pipeline(
            args.model, dtype=dtype, device=args.device, adapter=args.adapter, decode_tile=args.decode_tile,
            weights=args.weights, offload=args.offload, compile=args.compile,
        )
