"""The autoencoder on images alone: DC-AE, encoder and decoder, with latents held near unit size."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from spar.data.batches import Images
from spar.losses.reconstruction import mse, psnr
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.data import TrainingData
from spar.training.objectives.base import Objective, StepContext, Terms, check_at_least
from spar.training.objectives.common import add_latent_noise, image_side, measure_scale, refuse_model_folder

if TYPE_CHECKING:
    from spar.training.config import StageConfig
    from spar.training.modules import TrainingModules
    from spar.training.plan import InitFolder
    from spar.training.systems.spar import SparRecipe


@dataclass(frozen=True)
class AutoencoderObjective(Objective["SparRecipe"]):
    """Reconstruction by E_p and the decoder.

    `latent_penalty` weighs the square of the latent; `latent_noise` is the standard deviation of noise on the latent
    before decoding, relative to the latent's own.
    """

    kind: ClassVar[str] = "autoencoder"
    takes: ClassVar[tuple[type[Images], ...]] = (Images,)
    measures: ClassVar[str] = "native scale"
    mse: float = 1.0
    latent_penalty: float = 0.0
    latent_noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, **vars(self))

    def check_folder(self, stage: "StageConfig", init: "InitFolder") -> None:
        refuse_model_folder(stage, init)

    def __call__(self, ctx: StepContext, batch: Images) -> Terms:
        pixels = batch.require_pixels().to(memory_format=torch.channels_last)
        latent = ctx.modules.native_latents(pixels)
        decoded = ctx.modules.model.tokenizer.decode(add_latent_noise(ctx, latent, self.latent_noise))
        terms = {"mse": mse(decoded, pixels), "latent_square": latent.float().square().mean()}
        loss = self.mse * terms["mse"] + self.latent_penalty * terms["latent_square"]
        return {"loss": loss, **terms, "psnr": psnr(decoded.detach().clamp(0, 1), pixels).mean()}

    def finish(self, ctx: StepContext, data: TrainingData) -> None:
        """Store the scale of the native latents."""
        ctx.modules.native_scale.copy_(measure_scale(ctx, data, ctx.modules.native_latents))

    def cost(self, modules: "TrainingModules", recipe: "SparRecipe", stage: "StageConfig") -> Cost:
        config = recipe.model
        grid = image_side(recipe, stage) // config.token_stride
        native = torch.zeros(1, 3, *2 * (grid * config.autoencoder.stride,), dtype=torch.bfloat16, device="meta")
        cost = part_cost(lambda: modules.pixel_encoder(native), modules.pixel_encoder, through=False)
        decoder = modules.model.tokenizer.decoder
        latent = meta_input(1, config.autoencoder.latent_channels, grid, grid)
        return cost + part_cost(lambda: decoder(latent), decoder)
