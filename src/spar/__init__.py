"""SPAR (arXiv 2606.23041): one model that understands, generates, edits and reconstructs images.

    import spar
    pipe = spar.SparPipeline.from_pretrained()  # the bundled weights

The names below are imported at their first use, so that `import spar` alone needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spar.common.errors import Cancelled, InputError
    from spar.inference.diffusers_autoencoder import AutoencoderSpar
    from spar.inference.diffusers_pipeline import SparDiffusionPipeline
    from spar.inference.dualtoken import DualTokenPipeline
    from spar.inference.loading import load_pipeline
    from spar.inference.pipeline import SparPipeline

__version__ = "0.1.0"
DISTRIBUTION = "spar-unified"  # the name on PyPI, where "spar" is another project
__all__ = [
    "AutoencoderSpar", "Cancelled", "DualTokenPipeline", "InputError", "SparDiffusionPipeline", "SparPipeline",
    "__version__", "load_pipeline",
]  # fmt: skip

_MODULES = {
    "AutoencoderSpar": "spar.inference.diffusers_autoencoder",
    "Cancelled": "spar.common.errors",
    "DualTokenPipeline": "spar.inference.dualtoken",
    "InputError": "spar.common.errors",
    "SparDiffusionPipeline": "spar.inference.diffusers_pipeline",
    "SparPipeline": "spar.inference.pipeline",
    "load_pipeline": "spar.inference.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
