"""What fails of the machine and not of the input, in one line that names the way out."""

import re

from spar.common.errors import PeerFailure, first_line

MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
COMPILERS = ("torch._dynamo", "torch._inductor")
NOT_FINITE = "expected finite pixel values"  # of `processing.images.to_pil`

# What takes less memory, by verb.
_MODEL = "--decode-tile 16, --weights int8 or --offload"
LESS_MEMORY = {
    "generate": f"a smaller --batch, {_MODEL}",
    "edit": f"a smaller --batch, {_MODEL}",
    "reconstruct": f"fewer images at a time, {_MODEL}",
    "understand": "fewer questions at a time, --weights int8 or --offload",
    "eval": f"a smaller --batch, {_MODEL}",
    "serve": f"a smaller --max-batch, {_MODEL}",
    "demo": _MODEL,
    "ui": _MODEL,
    "cache": "a smaller --batch",
    "train": (
        "--parallelism.grad-accum-steps 2 or more, --parallelism.activation-checkpointing True, or in a new run a "
        "smaller --stages.STAGE.batch"
    ),
}


class Failure(Exception):
    """A failure of the machine; the command line prints its message, which is one line, and exits with status 1."""


def explain(error: BaseException, verb: str) -> str | None:
    """The line of a failure that is known: too little memory, no compiler, images that are not finite, what the system
    refuses, another process that has ended; else None.
    """
    if isinstance(error, Failure | PeerFailure):
        return str(error)
    if isinstance(error, OSError):  # the disk is full, a folder has vanished
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text.lower() for sign in MEMORY_SIGNS)
    ):
        size = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
        less = LESS_MEMORY.get(verb)
        return (
            f"out of memory{f' ({size[0].lower()})' if size else ''}: "
            + (f"try {less}" if less else "end other programs, or take a machine with more")
        )
    if any(base.__module__.startswith(COMPILERS) for base in type(error).__mro__):
        flag = "--parallelism.compile" if verb == "train" else "--compile"
        return f"torch.compile fails here ({first_line(error)}): go on without {flag}"
    if isinstance(error, ValueError) and text.startswith(NOT_FINITE):
        return "the model's image has numbers that are not finite: try --dtype float32"
    return None
