"""Everything that training holds: the model, and the teachers and heads that no finished model keeps."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spar.checkpoints.lora import add_lora
from spar.common.errors import InputError
from spar.losses.adversarial import LeCam, PatchDiscriminator
from spar.models.attention import sincos_pos_embed_2d
from spar.models.autoencoder import PixelEncoder, build_autoencoder
from spar.models.spar import SparModel
from spar.processing.prompts import PromptEncoder
from spar.training.config import Recipe

# What the encoder's dense pre-training reads off each token of `f_v`: classes for each named target.
TAGS = {"shape": 7, "color": 9, "size": 3, "background": 6}
CENTER_BINS = 16

ATTENTION_GAIN = 1.4  # size of the encoder's queries and keys at their random start
GATES = [2, 5]  # of a SANA block's table: shift, scale, gate of its attention, then of its feed-forward


class DenseHead(nn.Module):
    """Linear read-outs of `f_v`: tags, the owner's centre in bins a side, coverage, and the token's own pixels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.tags = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in TAGS.items()})
        self.center = nn.Linear(width, 2 * CENTER_BINS)
        self.coverage = nn.Linear(width, 1)
        self.pixels = nn.Linear(width, 3 * stride**2)


class AlignmentHead(nn.Module):
    """phi: two hidden layers with SiLU from the DiT's width to the teacher's (SPAR section 3.3)."""

    def __init__(self, width: int, hidden: int, teacher_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_width)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class TrainingModules(nn.Module):
    """The model under training with its teachers and heads; stage patterns name its parameters.

    `dense_head` and `teacher`, the copy of the encoder, are None where no stage of the recipe reads them.
    """

    def __init__(self, recipe: Recipe, *, teacher_width: int | None = None) -> None:
        super().__init__()
        self.config = config = recipe.model
        width = config.text.hidden_size
        self.model = SparModel(config)
        self.pixel_encoder = PixelEncoder(build_autoencoder(config.autoencoder).encoder)
        reads_tags = any(stage.step in ("encoder", "mllm") for stage in recipe.stages)
        self.dense_head = DenseHead(width, config.token_stride) if reads_tags else None
        self.alignment_head = AlignmentHead(config.denoiser.width, recipe.alignment.hidden, teacher_width or width)
        self.discriminator = PatchDiscriminator(recipe.discriminator)
        self.lecam = LeCam()
        taught = any(stage.losses.semantic for stage in recipe.stages)
        self.teacher = copy.deepcopy(self.model.tokenizer.encoder) if taught else None
        self.register_buffer("native_scale", torch.ones(()))
        self.register_buffer("teacher_mean", torch.zeros(teacher_width or width))

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
    for part in (modules.model, modules.dense_head, modules.alignment_head):
        if part is not None:
            _init_xavier(part)
    _init_vision(modules)
    _init_denoiser(modules)


def _init_xavier(module: nn.Module) -> None:
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
        layer.attention.q_proj.weight.mul_(ATTENTION_GAIN)
        layer.attention.k_proj.weight.copy_(layer.attention.q_proj.weight)


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


def build_modules(
    recipe: Recipe, device: torch.device, prompts: PromptEncoder, *, teacher_width: int | None = None
) -> TrainingModules:
    """The modules of a recipe with weights drawn from its seed, LoRA's additions among them.

    Raises:
        InputError: a text tokenizer of more words than the model has embeddings.
    """
    if len(prompts.tokenizer) > recipe.model.text.vocab_size:
        raise InputError(
            f"text.vocab_size: expected at least {len(prompts.tokenizer)} for this tokenizer, "
            f"got {recipe.model.text.vocab_size}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        modules = TrainingModules(recipe, teacher_width=teacher_width)
        init_weights(modules)
        if recipe.lora.rank:
            add_lora(modules.model, recipe.lora)
    return modules.to(device)
