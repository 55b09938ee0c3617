"""DualToken under training: what its recipes say beyond their stages, and how its modules are built and saved."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from spar.checkpoints.dualtoken_format import DualTokenBundle, open_dualtoken, read_config, save_dualtoken
from spar.checkpoints.lora import LoraConfig, add_lora
from spar.checkpoints.model_header import load_text_tokenizer, read_manifest
from spar.checkpoints.safetensors_io import JoinedTensors, TensorSource
from spar.common.config import differences
from spar.common.errors import InputError
from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.attention import sincos_pos_embed_2d
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.model import DualTokenModel
from spar.models.dualtoken.sampling import CodeSampling
from spar.models.dualtoken.towers import VisionTower
from spar.processing.prompts import PromptEncoder, check_rows
from spar.training.bundle import run_manifest
from spar.training.config import StageConfig
from spar.training.modules import ATTENTION_GAIN, init_xavier
from spar.training.objectives.base import Networks
from spar.training.objectives.contrastive import ContrastiveObjective
from spar.training.objectives.dual_next_token import DualNextTokenObjective
from spar.training.plan import InitFolder
from spar.training.systems.lora import LoraRecipe

log = logging.getLogger("spar.training")

POSITION_SCALE = 0.14  # of sines and cosines: about the size of a word's embedding


@dataclass(frozen=True)
class DualPerceptualConfig:
    """The frozen networks of the perceptual term and their weights in it.

    `teacher`: LPIPS' form on the two shallow layers of the run's own teacher, which needs no download. `lpips` and
    `convnext` as in SPAR's.
    """

    teacher: float = 1.0
    lpips: float = 0.0
    convnext: float = 0.0
    classifier: str = "facebook/convnext-small-224"

    def __post_init__(self) -> None:
        weights = (self.teacher, self.lpips, self.convnext)
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
            raise InputError(f"perceptual: expected weights of at least 0, one of them above it, got {weights}")


@dataclass(frozen=True, kw_only=True)
class DualTokenRecipe(LoraRecipe):
    """A recipe of DualToken: the model, how its images are drawn, and what its stages share."""

    kind: ClassVar[str] = "dualtoken"
    adapted: ClassVar[type[DualNextTokenObjective]] = DualNextTokenObjective
    adapted_stages: ClassVar[str] = "stages of the LLM"

    model: DualTokenConfig = field(default_factory=DualTokenConfig)
    sampling: CodeSampling = CodeSampling()
    perceptual: DualPerceptualConfig = DualPerceptualConfig()
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig(width=32, layers=2)
    lora: LoraConfig = LoraConfig(parts=("language",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora.parts != ("language",):
            raise InputError(f"lora.parts: expected language alone of DualToken, got {', '.join(self.lora.parts)}")

    @property
    def image_size(self) -> int:
        return self.model.image_size

    @property
    def max_sequence_tokens(self) -> int:
        return self.model.text.max_seq_len

    @property
    def token_stride(self) -> int:
        return self.model.vision.patch_size

    @property
    def size_multiple(self) -> int:
        return self.image_size  # the only one

    @property
    def feature_width(self) -> int:
        return self.model.vision.hidden_size

    def prompts(self, tokenizer: Any) -> PromptEncoder:
        check_rows(tokenizer, self.model.text.vocab_size, "text.vocab_size")
        paired = any(isinstance(stage.objective, ContrastiveObjective) for stage in self.stages)
        if paired:
            check_rows(tokenizer, self.model.text_tower.vocab_size, "text_tower.vocab_size")
        return PromptEncoder(tokenizer, self.model.grid**2, image_start=True)

    def load_tokenizer(self, folder: Path) -> Any:
        return load_text_tokenizer(folder, self.model.text)

    def read_model(self, folder: Path) -> InitFolder:
        parts = read_manifest(folder).get("parts")
        parts = {str(part): str(origin) for part, origin in parts.items()} if isinstance(parts, dict) else {}
        return InitFolder(folder, True, parts=parts)

    def open_model(self, folder: Path) -> JoinedTensors:
        for name, given, own in differences(read_config(folder), self.model, "model"):
            log.warning("%s was made with %s %r; this recipe has %r", folder, name, given, own)
        return JoinedTensors({f"model.{part}.": one for part, one in open_dualtoken(folder).items()}, {})

    def build(self, networks: Networks) -> "DualTrainingModules":
        modules = DualTrainingModules(self, networks)
        init_dual_weights(modules)
        if self.lora.rank:
            add_lora(modules.model, self.lora)
        return modules

    def bundle(self, modules: Any, run: Path, prompts: PromptEncoder, last: str) -> DualTokenBundle:
        manifest = run_manifest(self, run, last)
        return DualTokenBundle(
            modules.model.eval(), prompts.tokenizer, self.sampling, self.max_prompt_tokens, manifest
        )

    def save(self, modules: Any, run: Path, prompts: PromptEncoder) -> None:
        """The model in `RUN/model`; with LoRA its additions in `RUN/adapter` too, and merged in the model."""
        bundle = self.bundle(modules, run, prompts, self.stages[-1].name)
        self.merge(bundle.model, run, bundle.manifest)
        save_dualtoken(bundle, run / "model")

    def save_stored(self, modules: Any, weights: TensorSource, run: Path, prompts: PromptEncoder) -> None:
        if self.lora.rank:  # which is merged in memory
            super().save_stored(modules, weights, run, prompts)
        else:
            save_dualtoken(self.bundle(modules, run, prompts, self.stages[-1].name), run / "model", weights=weights)

    def try_sizes(self, modules: Any, stages: tuple[StageConfig, ...]) -> None:
        tokenizer = modules.model.tokenizer
        tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, self.image_size, self.image_size)).pixel)


class DualTrainingModules(nn.Module):
    """DualToken under training, with the heads and teachers of its recipe's objectives."""

    def __init__(self, recipe: DualTokenRecipe, networks: Networks) -> None:
        super().__init__()
        self.config = recipe.model
        self.model = DualTokenModel(recipe.model)
        heads: dict[str, Callable[[Any], nn.Module]] = {}
        for stage in recipe.stages:
            heads = {**stage.objective.build(recipe, networks), **heads}
        for name in sorted(heads):
            self.add_module(name, heads[name](self))


@torch.no_grad()
def init_dual_weights(modules: DualTrainingModules) -> None:
    """Random weights that learn from nothing, as SPAR's: Xavier, and an image tower that first looks at neighbours."""
    init_xavier(modules.model)
    for part in modules.children():
        if isinstance(part, VisionTower):
            _init_vision_tower(part)
    _init_vision_tower(modules.model.tokenizer.encoder)
    embedder, grid = modules.model.embedder, modules.config.grid
    if embedder.positions is not None:
        embedder.positions.copy_(POSITION_SCALE * sincos_pos_embed_2d(embedder.positions.shape[1], grid, grid))


def _init_vision_tower(tower: VisionTower) -> None:
    network, grid = tower.network, tower.config.grid
    network.embeddings.position_embedding.weight.copy_(
        sincos_pos_embed_2d(tower.config.hidden_size, grid, grid)
    )
    weight = network.embeddings.patch_embedding.weight
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    for layer in network.encoder.layers:
        query, key = (layer.get_parameter(f"self_attn.{name}.weight") for name in ("q_proj", "k_proj"))
        query.mul_(ATTENTION_GAIN)
        key.copy_(query)
