"""Folders of earlier format versions: what each version wrote and left out, said once, so that loading stays strict.

Nothing here takes today's defaults: a field that a version did not have gets the value that was fixed in its code.
"""

import copy
from typing import Any

FORMAT_VERSION = 2

# Version 2 names what version 1 had fixed.
_ADDED_2: dict[str, dict[str, Any]] = {
    "vision": {"norm_eps": 1e-6},
    "text": {"rope_factor": 1.0, "rms_norm_eps": 1e-6, "tied_head": True},
    "streams": {"block_norm_eps": 1e-5, "fusion": "mlp"},
    "router": {"scale": "unit", "norm": True},
    "connector": {"reference_scale": "unit", "image_start": False},
    "denoiser": {"norm_eps": 1e-6},
}
_SPLIT_2 = ("blocks", "multiscales")  # of the autoencoder: one list for both halves


def upgraded(model: Any, version: int) -> Any:
    """The sizes of a model as FORMAT_VERSION has them, from those of an older version; the given ones stay as they are.

    What is no such dictionary of sizes, or already has a field that its version did not know, passes unchanged: the
    strict reader behind this says what is wrong with it.
    """
    if version >= FORMAT_VERSION or not isinstance(model, dict):
        return model
    model = copy.deepcopy(model)
    for part, added in _ADDED_2.items():
        if isinstance(model.get(part), dict):
            model[part] = {**added, **model[part]}
    autoencoder = model.get("autoencoder")
    if isinstance(autoencoder, dict):
        for name in _SPLIT_2:
            if name in autoencoder:
                value = autoencoder.pop(name)
                autoencoder |= {f"encoder_{name}": value, f"decoder_{name}": value}
    return model
