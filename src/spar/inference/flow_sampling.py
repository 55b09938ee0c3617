"""How a call samples the flow beside steps and guidance: the method, and two approximations that save work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spar.common.errors import InputError
from spar.common.limits import check_range
from spar.flow.guidance import check_interval, is_guided
from spar.flow.sampler import METHODS
from spar.models.step_cache import StepCache

MAX_CHANGE = 1.0  # of the first block's part: as much as there was


@dataclass(frozen=True)
class FlowSampling:
    """`sampler`, `guidance_interval` and `step_cache` as `SparPipeline.generate` takes them.

    Raises:
        InputError: values that it does not take.
    """

    sampler: str | None = None
    guidance_interval: Sequence[float] | None = None
    step_cache: float = 0.0

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in METHODS:
            raise InputError(f"sampler: expected one of {', '.join(METHODS)}, got {self.sampler!r}")
        check_interval(self.guidance_interval)
        if self.step_cache is None:
            raise InputError(f"step_cache: expected 0 to {MAX_CHANGE}, got None")
        check_range("step_cache", self.step_cache, 0, MAX_CHANGE)

    def check_guidance(self, guidance: float) -> None:
        """Refuse an interval where there is no guidance to switch off."""
        if self.guidance_interval is not None and guidance == 1:
            raise InputError(
                f"guidance_interval: expected a guidance_scale other than 1 beside it, got {self.guidance_interval!r}"
            )

    def is_guided(self, time: float) -> bool:
        """Whether guidance applies at a time."""
        return is_guided(time, check_interval(self.guidance_interval))

    def cache(self, images: int) -> StepCache | None:
        """A new cache for a batch of so many images."""
        return StepCache(float(self.step_cache), images) if self.step_cache else None

    def metadata(self) -> dict[str, Any]:
        """What an image's metadata say: what was asked for, and nothing else."""
        interval = check_interval(self.guidance_interval)
        values = {
            "sampler": self.sampler, "step_cache": float(self.step_cache),
            "guidance_interval": None if interval is None else f"{interval[0]!r}:{interval[1]!r}",
        }  # fmt: skip
        return {name: value for name, value in values.items() if value}
