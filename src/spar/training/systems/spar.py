"""SPAR under training: what its recipes say beyond their stages, and how its modules are built, begun and saved."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from spar.checkpoints.model_header import load_text_tokenizer
from spar.checkpoints.spar_format import (
    TRAINING_PARTS,
    ModelBundle,
    has_part,
    load_model,
    load_training_part,
    read_config,
    save_model,
)
from spar.common.config import differences, read_json
from spar.common.errors import InputError
from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.config import SparConfig
from spar.models.language import LanguageModel
from spar.processing.prompts import PromptEncoder, check_rows
from spar.training.bundle import build_bundle
from spar.training.config import StageConfig
from spar.training.modules import EXTERNAL_TEACHER, TrainingModules, build_modules
from spar.training.objectives.base import Networks, check_at_least
from spar.training.objectives.common import image_side
from spar.training.objectives.unified import UnifiedObjective
from spar.training.plan import InitFolder
from spar.training.systems.lora import LoraRecipe

log = logging.getLogger("spar.training")


@dataclass(frozen=True)
class AlignmentConfig:
    """The teacher of the denoiser: the tokenizer's own encoder, none, or an external image encoder.

    `center` compares with the teacher less its mean, which is what trains in the small setting (a large common mean
    makes the plain cosine of the paper start near 1); both are logged. `external` is a folder, a Hub id, or
    "dualtoken": the image tower of the bundled model.
    """

    teacher: Literal["self", "none", "external"] = "self"
    center: bool = True
    hidden: int = 256
    external: str | None = None

    def __post_init__(self) -> None:
        if (self.teacher == "external") != (self.external is not None):
            raise InputError("alignment: teacher 'external' and the field external (a folder or id) go together")


@dataclass(frozen=True)
class PerceptualConfig:
    """The frozen networks of L_perc and their weights in it; `losses.perceptual` weighs their sum.

    `autoencoder`: LPIPS' form on the features of the run's own E_p, which needs no download. `lpips`: LPIPS on VGG16,
    from the extra `gpu`. `convnext`: logits of the classifier in `classifier`, a folder or Hub id of transformers'
    ConvNeXt.
    """

    autoencoder: float = 1.0
    lpips: float = 0.0
    convnext: float = 0.0
    classifier: str = "facebook/convnext-small-224"

    def __post_init__(self) -> None:
        weights = (self.autoencoder, self.lpips, self.convnext)
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
            raise InputError(f"perceptual: expected weights of at least 0, one of them above it, got {weights}")


@dataclass(frozen=True)
class FlowConfig:
    """Training times (logit-normal), both shifts (never taken from a scheduler's file), and the sampler's defaults."""

    time_mean: float = 0.0
    time_std: float = 1.0
    training_shift: float = 1.0
    sampling_shift: float = 1.0
    sampling_steps: int = 20
    guidance: float = 4.5
    unconditional_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("time_std", "training_shift", "sampling_shift", "sampling_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"flow.{name}: expected above 0, got {getattr(self, name)}")
        if not 0 <= self.unconditional_share <= 1:
            raise InputError(f"flow.unconditional_share: expected 0 to 1, got {self.unconditional_share}")
        check_at_least(0, "flow.", guidance=self.guidance)


@dataclass(frozen=True, kw_only=True)
class SparRecipe(LoraRecipe):
    """A recipe of SPAR: the model, and what its stages share."""

    kind: ClassVar[str] = "spar"
    adapted: ClassVar[type[UnifiedObjective]] = UnifiedObjective
    adapted_stages: ClassVar[str] = "unified stages"

    model: SparConfig = field(default_factory=SparConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig(width=32, layers=2)

    def __post_init__(self) -> None:
        stride = self.model.token_stride
        for stage in self.stages:
            side = stage.image_size or stride
            if side % stride:
                raise InputError(f"stage {stage.name}: expected image_size as a multiple of {stride}, got {side}")
        super().__post_init__()

    @property
    def image_size(self) -> int:
        return self.model.image_size

    @property
    def max_sequence_tokens(self) -> int:
        return self.model.text.max_seq_len

    @property
    def token_stride(self) -> int:
        return self.model.token_stride

    @property
    def feature_width(self) -> int:
        return self.model.text.hidden_size

    def prompts(self, tokenizer: Any) -> PromptEncoder:
        check_rows(tokenizer, self.model.text.vocab_size, "text.vocab_size")
        return PromptEncoder(tokenizer, self.model.grid**2, image_start=self.model.connector.image_start)

    def load_tokenizer(self, folder: Path) -> Any:
        return load_text_tokenizer(folder, self.model.text)

    def build(self, networks: Networks) -> TrainingModules:
        return build_modules(self, networks)

    def stand_ins(self, saved: Mapping[str, Any]) -> Networks:
        """An external teacher's width."""
        if "teacher_mean" not in saved:
            return {}
        return {EXTERNAL_TEACHER: SimpleNamespace(width=saved["teacher_mean"].numel)}

    def bundle(self, modules: Any, run: Path, prompts: PromptEncoder, last: str) -> ModelBundle:
        return build_bundle(modules, self, run, prompts, last)

    def save(self, modules: Any, run: Path, prompts: PromptEncoder) -> None:
        """The model in `RUN/model`; with LoRA its additions in `RUN/adapter` too, and merged in the model."""
        bundle = self.bundle(modules, run, prompts, self.stages[-1].name)
        self.merge(bundle.model, run, bundle.manifest)
        save_model(bundle, run / "model")

    def try_sizes(self, modules: Any, stages: tuple[StageConfig, ...]) -> None:
        tokenizer = modules.model.tokenizer
        for side in {self.model.image_size, *(image_side(self, stage) for stage in stages)}:
            tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, side, side)).z_f)

    def read_model(self, folder: Path) -> InitFolder:
        manifest = folder / "manifest.json"
        parts: Any = read_json(manifest).get("parts") if manifest.is_file() else None
        parts = {str(part): str(origin) for part, origin in parts.items()} if isinstance(parts, dict) else {}
        holds = frozenset(name for name in TRAINING_PARTS if has_part(folder, name))
        return InitFolder(folder, True, parts=parts, holds=holds)

    def load_model(self, folder: Path) -> dict[str, Tensor]:
        for name, given, own in differences(read_config(folder), self.model, "model"):
            log.warning("%s was made with %s %r; this recipe has %r", folder, name, given, own)
        model = load_model(folder).model
        grow_vocabulary(model.language, self.model.text.vocab_size)
        parts: dict[str, nn.Module] = {"model": model}
        parts |= {name: load_training_part(folder, name) for name in TRAINING_PARTS if has_part(folder, name)}
        return {f"{part}.{name}": value for part in parts for name, value in parts[part].state_dict().items()}


@torch.no_grad()
def grow_vocabulary(language: LanguageModel, size: int) -> None:
    """Give the LLM's word matrices more rows, if `size` is larger: new words begin at the mean of those there are."""
    for name in ("network.embed_tokens", *([] if language.head is None else ["head"])):
        rows = language.get_parameter(f"{name}.weight")
        if len(rows) < size:
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            grown = nn.Parameter(torch.cat([rows, mean.expand(size - len(rows), -1)]))
            setattr(language.get_submodule(name), "weight", grown)  # noqa: B010  # a module's attributes are untyped
