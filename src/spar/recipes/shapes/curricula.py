"""What stages of the shapes world are taught: lessons on where things are, and kinds of questions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from spar.common.errors import InputError
from spar.data.batches import Captioned, Descriptions, Dialogues, Edits, Images, Layouts
from spar.data.samples import Kind
from spar.training.data import CaptionData, CaptionDialogueData, DialogueData, MixedData, StageData
from spar.worlds.shapes.questions import BINDING_QUESTION_KINDS, CURRICULUM_KINDS, QUESTION_KINDS
from spar.worlds.shapes.scene import ALL_KINDS


def _check_scene_kinds(kinds: tuple[str, ...]) -> None:
    if not set(kinds) <= set(ALL_KINDS):
        raise InputError(f"scene_kinds: expected {', '.join(ALL_KINDS)}, got {', '.join(kinds)}")


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"{name}: expected 0 to 1, got {share}")


@dataclass(frozen=True)
class Lessons:
    """Captions that are lessons.

    `position_captions` is the share of captions that say where things are ("a red circle on column two row three to
    the left of a star"), `scene_kinds` the kinds of scenes that are drawn, one named twice twice as often (all alike
    when empty).
    """

    position_captions: float = 0.0
    scene_kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_share("position_captions", self.position_captions)
        _check_scene_kinds(self.scene_kinds)


@dataclass(frozen=True)
class CaptionLessons(Lessons, CaptionData):
    """Captions, some of them lessons."""

    kind: ClassVar[str] = "caption_lessons"


@dataclass(frozen=True)
class MixedLessons(Lessons, MixedData):
    """Captions, some of them lessons, and edits; in the share `layouts` of the steps without edits, images are drawn of
    layouts in place of captions, and in the share `edit_layouts` of those with edits each instruction has its layout.
    The share `layout_errors` of these has a wrong cell for the object that goes or changes, as the LLM's own have: the
    DiT then looks for it in the image.
    """

    kind: ClassVar[str] = "lessons"
    gives: ClassVar[tuple[type[Images], ...]] = (Captioned, Layouts, Edits)
    layouts: float = 0.0
    edit_layouts: float = 0.0
    layout_errors: float = 0.0

    def __post_init__(self) -> None:
        Lessons.__post_init__(self)
        MixedData.__post_init__(self)
        for name in ("layouts", "edit_layouts", "layout_errors"):
            _check_share(name, getattr(self, name))

    def __str__(self) -> str:
        words = MixedData.__str__(self)
        words += f", {self.layouts:.0%} of the rest layouts" if self.layouts else ""
        return words + (f", {self.edit_layouts:.0%} of the edits with layouts" if self.edit_layouts else "")


@dataclass(frozen=True)
class QuestionData(StageData):
    """Images with questions of the kinds named, and at last the description of each.

    An image is asked `per_image` of the questions, drawn anew each time (0: all, in the order named): what a row costs
    grows faster than its length. In the share `prompt_share` of the steps the LLM reads prompts for images in place of
    questions, edits in the share `edit_prompts` of them, else captions, and says what the image will show: it learns
    what its states have to tell the DiT, which a published LLM brings along. With `layouts` it answers captions with
    layouts, and says what each place of a blank canvas after one will show; with `edit_layouts` instructions, in the
    same way. `scene_kinds` as in `Lessons`.
    """

    kind: ClassVar[str] = "questions"
    gives: ClassVar[tuple[type[Images], ...]] = (Dialogues, Descriptions)
    questions: tuple[str, ...] = ()
    per_image: int = 0
    prompt_share: float = 0.0
    edit_prompts: float = 0.5
    layouts: bool = False
    edit_layouts: bool = False
    scene_kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.per_image < 0:
            raise InputError(f"per_image: expected at least 0, got {self.per_image}")
        for name in ("prompt_share", "edit_prompts"):
            _check_share(name, getattr(self, name))
        _check_scene_kinds(self.scene_kinds)
        known = (*QUESTION_KINDS, *CURRICULUM_KINDS, *BINDING_QUESTION_KINDS)
        unknown = sorted(set(self.questions) - set(known))
        if unknown:
            raise InputError(f"questions: expected {', '.join(known)}, got {', '.join(unknown)}")


@dataclass(frozen=True)
class UnifiedLessons(QuestionData):
    """Questions, and for the share `caption_share` of the steps images with captions, of which the share
    `position_captions` says where things are. With `layouts` the share `layout_captions` of these steps has layouts in
    place of captions.
    """

    kind: ClassVar[str] = "captions_and_questions"
    gives: ClassVar[tuple[type[Images], ...]] = (Captioned, Dialogues, Descriptions)
    caption_share: float = 0.5
    position_captions: float = 0.0
    layout_captions: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("caption_share", "position_captions", "layout_captions"):
            _check_share(name, getattr(self, name))
        if self.layout_captions and not self.layouts:
            raise InputError("layout_captions: expected layouts true, so that the LLM learns to write them, got false")

    @property
    def plain(self) -> StageData:
        return CaptionDialogueData(dialogue_share=1 - self.caption_share) if self.caption_share else DialogueData()

    @property
    def shares(self) -> Mapping[Kind, float]:
        return self.plain.shares
