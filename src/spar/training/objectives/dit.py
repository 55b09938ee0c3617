"""The DiT's own pre-training: text to image on the autoencoder's latents, which replaces SANA in a small setting."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from spar.common.errors import InputError
from spar.data.batches import Captioned, Images
from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.router import normalize_hidden_states
from spar.models.spar import Condition
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.objectives.base import Objective, StepContext, Terms, check_at_least
from spar.training.objectives.common import refuse_model_folder
from spar.training.objectives.flow import PROMPT_TOKENS, draw_noise, flow_matching, meta_layers, meta_velocity

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.plan import InitFolder
    from spar.training.systems.spar import SparRecipe


@dataclass(frozen=True)
class DitObjective(Objective["SparRecipe"]):
    """L_fm on the native latents, conditioned on the frozen LLM's last states; `noise_samples` draws an image."""

    kind: ClassVar[str] = "dit"
    takes: ClassVar[tuple[type[Images], ...]] = (Captioned,)
    noise_samples: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, noise_samples=self.noise_samples)

    @property
    def draws(self) -> int:
        return self.noise_samples

    def check(self, recipe: "SparRecipe", stage: "StageConfig") -> None:
        captions, width = recipe.model.denoiser.caption_channels, recipe.model.text.hidden_size
        if captions != width:
            raise InputError(
                f"stage {stage.name}: a dit objective reads the LLM directly, expected model.denoiser.caption_channels "
                f"{width} (text.hidden_size), got {captions}"
            )

    def check_folder(self, stage: "StageConfig", init: "InitFolder") -> None:
        refuse_model_folder(stage, init)

    def __call__(self, ctx: StepContext, batch: Captioned) -> Terms:
        modules, model = ctx.modules, ctx.modules.model
        texts = ctx.unconditional(batch.texts, ctx.recipe.flow.unconditional_share)
        tokens = ctx.prompts.generation(texts).to(ctx.device)
        with torch.no_grad():
            embeddings = model.language.embed(tokens.ids)
            bias = attention_bias(tokens.mask, embeddings, causal=True)
            final, _ = model.language(embeddings, bias, position_ids_from_mask(tokens.mask))
            condition = Condition(normalize_hidden_states([final])[0], tokens.mask, final.new_ones(*final.shape[:2], 1))
        native = ctx.frozen_features("native", batch, lambda x: {"latent": modules.native_latents(x)})
        latent = native["latent"].float() * modules.native_scale
        error, _ = flow_matching(ctx, draw_noise(ctx, latent, self.noise_samples), condition)
        return {"loss": error, "flow": error.detach()}

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        model, config = modules.model, recipe.model
        native = meta_input(1, 3, *2 * (config.grid * config.autoencoder.stride,)).detach()
        cost = part_cost(lambda: modules.pixel_encoder(native), modules.pixel_encoder, through=False)
        layers = model.language.network.layers
        cost += part_cost(lambda: meta_layers(model, layers, PROMPT_TOKENS), model.language, through=False)
        return cost + part_cost(lambda: meta_velocity(model, PROMPT_TOKENS), model.denoiser) * self.noise_samples
