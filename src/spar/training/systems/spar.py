"""SPAR under training: what its recipes say beyond their stages, and how its modules are built, begun and saved."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from spar.checkpoints.model_header import load_text_tokenizer
from spar.checkpoints.safetensors_io import JoinedTensors, TensorSource
from spar.checkpoints.spar_format import (
    TRAINING_PARTS,
    ModelBundle,
    has_part,
    open_model,
    open_training_part,
    read_config,
    read_latent_scale,
    save_model,
)
from spar.common.config import differences, read_json
from spar.common.errors import InputError
from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.config import SparConfig
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
    """Training times (logit-normal), both shifts (never taken from a scheduler's file), and the sampler's defaults;
    `edit_guidance` is that of edits, None as of generation.
    """

    time_mean: float = 0.0
    time_std: float = 1.0
    training_shift: float = 1.0
    sampling_shift: float = 1.0
    sampling_steps: int = 20
    guidance: float = 4.5
    edit_guidance: float | None = None
    unconditional_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("time_std", "training_shift", "sampling_shift", "sampling_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"flow.{name}: expected above 0, got {getattr(self, name)}")
        if not 0 <= self.unconditional_share <= 1:
            raise InputError(f"flow.unconditional_share: expected 0 to 1, got {self.unconditional_share}")
        check_at_least(0, "flow.", guidance=self.guidance, edit_guidance=self.edit_guidance or 0)

    def guidance_of(self, *, edits: bool) -> float:
        """The scale with which images of prompts are drawn, or edits."""
        return self.edit_guidance if edits and self.edit_guidance is not None else self.guidance


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

    def save_stored(self, modules: Any, weights: TensorSource, run: Path, prompts: PromptEncoder) -> None:
        if self.lora.rank:  # which is merged in memory
            super().save_stored(modules, weights, run, prompts)
        else:
            save_model(self.bundle(modules, run, prompts, self.stages[-1].name), run / "model", weights=weights)

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

    def open_model(self, folder: Path) -> JoinedTensors:
        for name, given, own in differences(read_config(folder), self.model, "model"):
            log.warning("%s was made with %s %r; this recipe has %r", folder, name, given, own)
        sources: dict[str, TensorSource] = {}
        for part, files in open_model(folder).items():
            sources[f"model.{part}."] = files
        for name in (name for name in TRAINING_PARTS if has_part(folder, name)):
            sources[f"{name}."] = open_training_part(folder, name)
        sources["model.language."] = GrownVocabulary(sources["model.language."], self.model.text.vocab_size)
        scale = torch.tensor(read_latent_scale(folder))
        return JoinedTensors(sources, {"model.tokenizer.latent_scale": scale})


class GrownVocabulary:
    """An LLM's stored weights whose word matrices get more rows, if `size` is larger, in float32; new words begin at
    the mean of those there are.
    """

    def __init__(self, stored: TensorSource, size: int) -> None:
        self._stored, self._means = stored, dict[str, Tensor]()
        self.shapes = dict(stored.shapes)
        for name in ("network.embed_tokens.weight", "head.weight"):
            table = stored.shapes.get(name)
            if table is not None and len(table) < size:
                self.shapes[name] = torch.empty(size, table.shape[1], device="meta")

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, a floating one in `dtype` if given."""
        if self.shapes[key] is self._stored.shapes[key]:
            return self._stored.read(key, dtype)
        return self.read_rows(key, slice(0, len(self.shapes[key]))).to(dtype)

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Read some rows of a tensor, new ones too."""
        there = len(self._stored.shapes[key])
        if rows.stop <= there:
            return self._stored.read_rows(key, rows)
        if key not in self._means:
            self._means[key] = self._stored.read(key, torch.float32).mean(0, keepdim=True)
        old = self._stored.read_rows(key, slice(rows.start, there)).float()
        return torch.cat([old, self._means[key].expand(rows.stop - max(rows.start, there), -1)])
