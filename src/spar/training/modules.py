"""Everything that training holds: the model, and the teachers and heads that no finished model keeps."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar.checkpoints.lora import add_lora
from spar.losses.adversarial import LeCam, PatchDiscriminator
from spar.models.attention import sincos_pos_embed_2d
from spar.models.autoencoder import PixelEncoder, build_autoencoder
from spar.models.encoder import SemanticEncoder
from spar.models.spar import SparModel
from spar.training.objectives.base import Networks

if TYPE_CHECKING:
    from spar.training.systems.spar import SparRecipe

EXTERNAL_TEACHER = "external_teacher"  # the name of the alignment's teacher among the networks from outside

ATTENTION_GAIN = 1.4  # size of the encoder's queries and keys at their random start
GATES = [2, 5]  # of a SANA block's table: shift, scale, gate of its attention, then of its feed-forward


class Head(nn.Module):
    """A head of an objective; its linear layers begin as the model's do."""


class AlignmentHead(Head):
    """phi: two hidden layers with SiLU from the DiT's width to the teacher's (SPAR section 3.3)."""

    def __init__(self, width: int, hidden: int, teacher_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_width)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class TrainingModules(nn.Module):
    """SPAR under training, with the heads and teachers of its recipe's objectives; stage patterns name its parameters.

    E_p and two measures are here in every recipe: the scale of E_p's latents, and the mean of the alignment teacher.
    The others are here where an objective builds them.
    """

    native_scale: Tensor
    teacher_mean: Tensor
    alignment_head: AlignmentHead
    discriminator: PatchDiscriminator
    lecam: LeCam
    teacher: SemanticEncoder
    flow_teacher: nn.Module
    self_flow_head: AlignmentHead
    denoiser_average: nn.Module

    def __init__(self, recipe: "SparRecipe", networks: Networks) -> None:
        super().__init__()
        self.config = config = recipe.model
        self.model = SparModel(config)
        self.pixel_encoder = PixelEncoder(build_autoencoder(config.autoencoder).encoder)
        self.register_buffer("native_scale", torch.ones(()))
        width = networks[EXTERNAL_TEACHER].width() if EXTERNAL_TEACHER in networks else config.text.hidden_size
        self.register_buffer("teacher_mean", torch.zeros(width))
        heads: dict[str, Callable[[Any], nn.Module]] = {}
        for stage in recipe.stages:
            heads = {**stage.objective.build(recipe, networks), **heads}
        # The order in which random weights are drawn is part of what a seed means. An adversary is drawn also where no
        # stage has one: an ablation without it starts from the same weights.
        drawn = {"discriminator": lambda _: PatchDiscriminator(recipe.discriminator), **heads}
        for name in sorted(drawn):
            part = drawn[name](self)
            if name in heads:
                self.add_module(name, part)

    def native_latents(self, pixels: Tensor) -> Tensor:
        """E_p's latents on the token grid: `[B, 3, S, S]` to `[B, D_p, h, w]`, cell by cell those of the tokens.

        The autoencoder's stride may differ from the tokens' (32 against 28): the image is then resized by their
        ratio (SPAR section 1, "Grid").
        """
        stride = self.config.autoencoder.stride
        size = tuple(side // self.config.token_stride * stride for side in pixels.shape[-2:])
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.pixel_encoder(pixels)


def init_weights(modules: TrainingModules) -> None:
    """Random weights that learn from nothing: Xavier for Transformers, zeroed outputs for the denoiser.

    Drawn from torch's global generator, which the caller seeds. transformers' own initialisation (a standard deviation
    of 0.02, zero position embeddings) is made for widths of a thousand; at these widths the encoder stays at the prior.
    """
    heads = sorted((name for name, part in modules.named_children() if isinstance(part, Head)), reverse=True)
    for part in (modules.model, *map(modules.get_submodule, heads)):
        init_xavier(part)
    _init_vision(modules)
    _init_denoiser(modules)


def init_xavier(module: nn.Module) -> None:
    """Xavier for the linear layers of a module, small embeddings, no biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.1)


@torch.no_grad()
def _init_vision(modules: TrainingModules) -> None:
    """Sine-cosine position embeddings and keys equal to queries: each patch first looks at patches near and alike it.

    A ViT from random weights spends most of a short training on finding its neighbours (mimetic initialisation,
    Trockman and Kolter 2023).
    """
    encoder = modules.model.tokenizer.encoder
    embeddings = encoder.vision_tower.embeddings
    side = embeddings.patch_embeddings.patch_shape[0]
    embeddings.position_embeddings[0, 1:] = sincos_pos_embed_2d(embeddings.position_embeddings.shape[-1], side, side)
    weight = embeddings.patch_embeddings.projection.weight
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    for layer in encoder.vision_tower.encoder.layer:
        query, key = (layer.get_parameter(f"attention.{name}.weight") for name in ("q_proj", "k_proj"))
        query.mul_(ATTENTION_GAIN)
        key.copy_(query)


@torch.no_grad()
def _init_denoiser(modules: TrainingModules) -> None:
    """The output starts at zero, the time embedding small, and the gates of the branches open.

    SANA's own start leaves the gates near zero, for depths of 28 blocks and long training.
    """
    network = modules.model.denoiser.network
    weight = network.patch_embed.proj.weight
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    nn.init.normal_(network.time_embed.linear.weight, std=0.02)
    embedder = network.time_embed.emb.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    for block in network.transformer_blocks:
        block.scale_shift_table.zero_()
        block.scale_shift_table[GATES] = 1.0


def build_modules(recipe: "SparRecipe", networks: Networks) -> TrainingModules:
    """The modules of a recipe with weights drawn from torch's global generator, LoRA's additions among them."""
    modules = TrainingModules(recipe, networks)
    init_weights(modules)
    if recipe.lora.rank:
        add_lora(modules.model, recipe.lora)
    return modules
