"""The bundled pipeline, which the page uses."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def pipe() -> Any:
    from spar.inference.pipeline import SparPipeline

    return SparPipeline.from_pretrained()
