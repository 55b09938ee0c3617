"""How to go on with a training that ended early: what it has left in its folder, and the command that takes that up."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spar.cli.console import is_one_of_several
from spar.common.errors import InputError

if TYPE_CHECKING:
    from spar.cli.console import Announce
    from spar.training.config import StageConfig
    from spar.training.plan import RunPlan


class Continuation:
    """How to go on with one command's training; as a string, the end of a sentence that says why it has stopped.

    Args:
        argv: the words of the command after `spar train`.
        resume: whether they ask for a resumed run.
    """

    def __init__(self, plan: "RunPlan", argv: Sequence[str], *, resume: bool) -> None:
        self.plan, self.argv, self.resume = plan, argv, resume
        self.begun: StageConfig | None = None  # the stage that was announced last, which has removed what it makes void

    def noted(self, announce: "Announce") -> "Announce":
        """An `announce` that also notes which stage has begun."""

        def note(stage: "StageConfig", parts: list[tuple[str, int, int]]) -> None:
            self.begun = stage
            announce(stage, parts)

        return note

    @property
    def command(self) -> str:
        """The same command, with --resume auto where without it the folder would be refused or a stage trained anew."""
        begun = self.begun is not None or (self.plan.fresh and self._written)
        return shlex.join(["spar", "train", *self.argv, *(["--resume", "auto"] if begun and not self.resume else [])])

    def __str__(self) -> str:
        how = " under the same launcher" if is_one_of_several() else ""  # alone, a strategy of several is refused
        if self.begun is None and not self._written:
            return f"the run has not begun; begin again{how} with: {self.command}"
        return f"{self._left()}; go on{how} with: {self.command}"

    @property
    def _written(self) -> bool:
        return (self.plan.run / "recipe.json").is_file()

    def _left(self) -> str:
        """What of the stage that was trained, or was to be trained next, is in the run's folder."""
        if self.begun is not None:
            return f"stage {self.begun.name} {self._saved(self.begun)}"
        first = next((one for one in self.plan.stages if not one.skipped), None)
        if first is None:
            return "its stages were done already"
        if first.start.source == "state":
            return f"stage {first.config.name} is saved after {first.start.step} of {first.config.steps} steps"
        kept = ", and nothing was removed" if first.invalidates and self._nothing_removed() else ""
        return f"stage {first.config.name} has not begun{kept}"

    def _saved(self, stage: "StageConfig") -> str:
        from spar.training.checkpoint import newest_state, read_train_state

        try:
            if read_train_state(self.plan.run / stage.name / "done"):
                return "is done"
            state = newest_state(self.plan.run / stage.name / "state")
        except InputError:  # the command below says so, and what to do
            return "has left a damaged folder"
        if state is None:
            return "has no saved state yet and will begin again"
        return f"is saved after {state.step} of {stage.steps} steps"

    def _nothing_removed(self) -> bool:
        """Whether what was there when the run was planned is there; none of it can have been made anew."""
        from spar.training.checkpoint import existing_checkpoint

        status = self.plan.status
        folders = [existing_checkpoint(status.run / name / "done") for name in status.done]
        folders += [existing_checkpoint(status.run / name / "state") for name in status.states]
        return all(path.is_dir() for path in (*folders, *(status.run / part for part in status.model_parts)))
