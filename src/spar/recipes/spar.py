"""`spar-1b` and `spar-3b`: the published system, from InternVL3, DC-AE f32c32 and SANA (`spar build` joins them).

Sizes are those of the published components, stages and losses the paper's (SPAR sections 1 and 2). Where the paper is
silent the family's public scripts are followed; what neither says is our own choice and marked so below. L_perc is
1.1 times LPIPS and a tenth of the ConvNeXt-S distance. The images are the user's own (`data.sets`).
"""

from dataclasses import replace

from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.config import (
    AutoencoderConfig,
    ConnectorConfig,
    DenoiserConfig,
    RouterConfig,
    SparConfig,
    StreamConfig,
    TextConfig,
    UnderstandingConfig,
    VisionConfig,
)
from spar.recipes.shapes.recipe import DECODER, DENOISER, ENCODER, ROUTER_AND_CONNECTOR, STREAMS
from spar.training.config import StageConfig
from spar.training.data import ImageData, MixedData
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.objectives.unified import UnifiedObjective
from spar.training.systems.spar import AlignmentConfig, FlowConfig, PerceptualConfig, SparRecipe

GPUS, BATCH_PER_GPU = 64, 128  # of the unified stages; the batch is the family's, the number of GPUs our choice
RECONSTRUCTION = TokenizerObjective(mse=1.0, perceptual=1.1)
ADVERSARY = replace(RECONSTRUCTION, semantic=1.0, gan=0.1, lecam=1e-3)
PUBLISHED = ("model.tokenizer.encoder", "model.tokenizer.decoder", "model.language", "model.denoiser", "pixel_encoder")
EVERYTHING = (ENCODER, *STREAMS, DECODER, "discriminator.*")

_TOKENIZER_1 = StageConfig(
    "tokenizer-1", replace(RECONSTRUCTION, native=1.0), STREAMS, data=ImageData(image_size=224), steps=100_000,
    batch=2048, lr=3e-4, lr_end=1e-4, warmup=10_000, weight_decay=1e-4, betas=(0.9, 0.999), max_grad_norm=1.0,
    ema=0.999,
)
_TOKENIZER_3 = replace(
    _TOKENIZER_1, name="tokenizer-3", trainable=EVERYTHING, lr_multipliers=((ENCODER, 0.1),),
    objective=replace(ADVERSARY, gan_start=30_000),
)
TOKENIZER = (
    _TOKENIZER_1,
    replace(_TOKENIZER_1, name="tokenizer-2", trainable=(*STREAMS, DECODER), objective=RECONSTRUCTION),
    _TOKENIZER_3,
    replace(
        _TOKENIZER_3, name="tokenizer-448", data=ImageData(image_size=448), batch=256, lr_end=1e-5, objective=ADVERSARY
    ),
)

# Our choice: steps for about five passes over 36 M images, then five over the 240,000 of the fine-tuning; the share
# of edits from 1.5 M edits shown ten times among them, and from 46,000 shown three times.
_UNIFIED_1 = StageConfig(
    "unified-1", UnifiedObjective(), ROUTER_AND_CONNECTOR, data=MixedData(), steps=22_000, batch=GPUS * BATCH_PER_GPU,
    lr=1e-4, lr_end=1e-5, warmup=66, betas=(0.9, 0.999), max_grad_norm=1.0,
)
_UNIFIED_2 = replace(
    _UNIFIED_1, name="unified-2", trainable=(*ROUTER_AND_CONNECTOR, DENOISER, "alignment_head.*"),
    objective=UnifiedObjective(align=0.5), data=MixedData(edit_share=0.3),
)
UNIFIED = (
    _UNIFIED_1,
    _UNIFIED_2,
    replace(
        _UNIFIED_2, name="unified-3", steps=1200, batch=8 * BATCH_PER_GPU, warmup=4, data=MixedData(edit_share=0.57)
    ),
)

_BLOCKS = (*3 * ("ResBlock",), *3 * ("EfficientViTBlock",))  # DC-AE's encoder and decoder mirror each other
_MULTISCALES = (*3 * ((),), *3 * ((5,),))
SPAR_1B = SparConfig(
    vision=VisionConfig(
        hidden_size=1024, layers=24, heads=16, intermediate_size=4096, patch_size=14, image_size=448, layer_scale=0.1,
        norm_eps=1e-6,
    ),
    text=TextConfig(
        vocab_size=151674, hidden_size=896, layers=24, heads=14, kv_heads=2, intermediate_size=4864, rope_theta=1e6,
        rope_factor=2.0, max_positions=32768, rms_norm_eps=1e-6, tied_head=True, image_token_id=151667,
        eos_token_id=151645, pad_token_id=151643,
    ),
    autoencoder=AutoencoderConfig(
        latent_channels=32, head_dim=32, channels=(128, 256, 512, 512, 1024, 1024),
        encoder_layers=(2, 2, 2, 3, 3, 3), encoder_blocks=_BLOCKS, encoder_multiscales=_MULTISCALES,
        decoder_layers=(3, 3, 3, 3, 3, 3), decoder_blocks=_BLOCKS, decoder_multiscales=_MULTISCALES,
        downsample="Conv", upsample="interpolate",
    ),
    streams=StreamConfig(residual_blocks=3, pixel_layers=6, pixel_heads=16, mlp_ratio=4, block_norm_eps=1e-6),
    # The paper's equation mixes raw states (scale "none"), where the layer of the largest norm outweighs the softmax.
    router=RouterConfig(kind="dtr", count=4, temperature=1.0, scale="unit"),
    connector=ConnectorConfig(
        queries=256, layers=6, reference_positions=False, reference_scale="raw", image_start=True
    ),
    denoiser=DenoiserConfig(
        layers=28, heads=36, head_dim=32, cross_heads=16, cross_head_dim=72, caption_channels=2304, mlp_ratio=2.5,
        norm_eps=1e-6, interpolation_scale=None, position_gain=0.0, reference_latent=False, align_depth=6,
    ),
    understanding=UnderstandingConfig(geometry="stretch"),
)
SPAR_3B = replace(
    SPAR_1B,
    text=replace(SPAR_1B.text, hidden_size=1536, layers=28, heads=12, kv_heads=2, intermediate_size=8960),
    denoiser=replace(SPAR_1B.denoiser, layers=20, heads=70, head_dim=32, cross_heads=20, cross_head_dim=112),
)


def spar_1b() -> SparRecipe:
    """The published system with InternVL3-1B and SANA 0.6B."""
    return SparRecipe(
        name="spar-1b", model=SPAR_1B, stages=TOKENIZER + UNIFIED, published=PUBLISHED, max_prompt_tokens=300,
        # The family trains at shift 1 (its scheduler does not read SANA's `flow_shift`) and samples at SANA's 3.
        flow=FlowConfig(
            time_mean=0.0, time_std=1.0, training_shift=1.0, sampling_shift=3.0, sampling_steps=20, guidance=4.5,
            unconditional_share=0.1,
        ),
        alignment=AlignmentConfig(teacher="self", center=False, hidden=2048),
        discriminator=PatchDiscriminatorConfig(width=64, layers=3),
        perceptual=PerceptualConfig(autoencoder=0.0, lpips=1.0, convnext=0.1, classifier="facebook/convnext-small-224"),
    )


def spar_3b() -> SparRecipe:
    """`spar-1b` with the larger LLM and DiT."""
    return replace(spar_1b(), name="spar-3b", model=SPAR_3B)
