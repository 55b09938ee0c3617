"""Keywords of diffusers' `from_pretrained` where it opens a SPAR folder: each has an effect, or is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spar.checkpoints.hub import ADDRESS, hub_address
from spar.common.errors import InputError

# What a pipeline's loading says to each of its parts, and what has no effect on the loading of a SPAR folder.
WITHOUT_EFFECT = (
    "disable_mmap", "low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "use_flashpack",
    "use_safetensors",
)  # fmt: skip


def with_revision(path: str | Path, revision: str | None) -> str | Path:
    """A folder's name as `hub_address` has it, on the Hub with a revision that is given apart from it.

    Raises:
        InputError: a revision of a local folder, or two revisions.
    """
    name = hub_address(path)
    if revision is None:
        return name
    address = ADDRESS.fullmatch(str(name))
    if not address:
        raise InputError(f"revision: a local folder has none, got {revision!r} for {path}")
    if address[2] not in (None, revision):
        raise InputError(f"revision: expected that of {name}, or none, got {revision!r}")
    return f"hf://{address[1]}@{revision}"


def refuse_keywords(keywords: Mapping[str, Any], path: str | Path) -> None:
    """Refuse keywords other than those that change nothing in any case; InputError names them."""
    if given := [name for name, value in keywords.items() if value is not None and name not in WITHOUT_EFFECT]:
        raise InputError(f"{', '.join(given)}: expected none of them for a SPAR folder ({path})")
