"""`spar-1b` and `spar-3b`: the published sizes (COMPONENTS), the paper's stages with their numbers, the geometry."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spar.common.errors import InputError
from spar.models.router import routed_layers
from spar.models.spar import SparModel
from spar.models.tokenizer import UnifiedTokenizer
from spar.recipes import recipe
from spar.training.data import ImageData
from spar.training.estimate import HardwareConfig, estimate
from spar.training.modules import TrainingModules
from spar.training.objectives.unified import UnifiedObjective
from spar.training.trainer import train

NAMES = ("spar-1b", "spar-3b")

# Parameters of each part: those of the published components where one brings them, else by the formulas of SPAR.
COUNTS = {
    "spar-1b": {
        "vision tower": 304_012_288, "projector": 4_482_816, "language": 493_798_016, "denoiser": 591_747_872,
        "decoder": 159_223_171, "semantic stream": 4_859_200, "pixel stream": 62_731_840, "fusion": 3_264,
        "router": 1_209_160, "connector": 91_771_264, "pixel encoder": 153_027_104, "alignment head": 8_393_600,
    },
    "spar-3b": {
        "vision tower": 304_012_288, "projector": 8_662_016, "language": 1_543_311_872, "denoiser": 1_604_462_752,
        "decoder": 159_223_171, "semantic stream": 14_227_520, "pixel stream": 184_216_640, "fusion": 3_264,
        "router": 3_547_400, "connector": 284_722_944, "pixel encoder": 153_027_104, "alignment head": 11_933_184,
    },
}  # fmt: skip
MILLIONS = {"spar-1b": {"mllm": 802.3, "denoiser": 591.7}, "spar-3b": {"mllm": 1856.0, "denoiser": 1604.5}}


@pytest.fixture(scope="module", params=NAMES)
def modules(request) -> TrainingModules:
    with torch.device("meta"):
        return TrainingModules(recipe(request.param), {})


def parts(modules: TrainingModules) -> dict[str, nn.Module]:
    model, tokenizer = modules.model, modules.model.tokenizer
    return {
        "vision tower": tokenizer.encoder.vision_tower, "projector": tokenizer.encoder.multi_modal_projector,
        "language": model.language, "denoiser": model.denoiser, "decoder": tokenizer.decoder,
        "semantic stream": tokenizer.semantic_stream, "pixel stream": tokenizer.pixel_stream,
        "fusion": tokenizer.fusion, "router": model.router, "connector": model.connector,
        "pixel encoder": modules.pixel_encoder, "alignment head": modules.alignment_head,
    }  # fmt: skip


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def name_of(modules: TrainingModules) -> str:
    return NAMES[modules.config.text.hidden_size == 1536]


def test_every_part_has_the_published_number_of_parameters(modules):
    name = name_of(modules)
    counts = {part: size(module) for part, module in parts(modules).items()}
    assert counts == COUNTS[name]
    assert sum(counts.values()) - counts["pixel encoder"] - counts["alignment head"] == size(modules.model)
    mllm = counts["vision tower"] + counts["projector"] + counts["language"]
    assert {"mllm": round(mllm / 1e6, 1), "denoiser": round(counts["denoiser"] / 1e6, 1)} == MILLIONS[name]


def test_what_only_the_small_setting_needs_is_not_there(modules):
    assert not hasattr(modules, "dense_head") and modules.teacher is not None


def test_a_recipe_without_semantic_loss_holds_no_copy_of_the_encoder():
    base = recipe("spar-1b")
    later = replace(base, stages=tuple(stage for stage in base.stages if isinstance(stage.objective, UnifiedObjective)))
    with torch.device("meta"):
        assert not hasattr(TrainingModules(later, {}), "teacher")


def test_the_larger_one_differs_in_llm_and_dit_alone():
    one, three = (recipe(name) for name in NAMES)
    assert replace(three, name=one.name, model=one.model) == one
    assert replace(three.model, text=one.model.text, denoiser=one.model.denoiser) == one.model


def test_the_tokenizer_stages_have_the_papers_numbers():
    stages = recipe("spar-1b").stages[:4]
    assert [s.name for s in stages] == ["tokenizer-1", "tokenizer-2", "tokenizer-3", "tokenizer-448"]
    for stage in stages:
        assert (stage.optimizer, stage.lr, stage.betas, stage.weight_decay) == ("adamw", 3e-4, (0.9, 0.999), 1e-4)
        assert (stage.steps, stage.warmup, stage.max_grad_norm) == (100_000, 10_000, 1.0) and stage.ema > 0
    assert [(s.data.image_size, s.batch, s.lr_end) for s in stages] == [(224, 2048, 1e-4)] * 3 + [(448, 256, 1e-5)]
    assert [dict(s.lr_multipliers).get("model.tokenizer.encoder.*") for s in stages] == [None, None, 0.1, 0.1]
    terms = [{name: value for name, value in vars(s.objective).items() if value} for s in stages]
    reconstruction = {"mse": 1.0, "perceptual": 1.1}
    adversary = {**reconstruction, "semantic": 1.0, "gan": 0.1, "lecam": 0.001}
    assert terms == [{**reconstruction, "native": 1.0}, reconstruction, {**adversary, "gan_start": 30_000}, adversary]


def test_the_unified_stages_have_the_papers_numbers():
    stages = recipe("spar-1b").stages[4:]
    assert [s.name for s in stages] == ["unified-1", "unified-2", "unified-3"]
    for stage in stages:
        assert (stage.optimizer, stage.lr, stage.lr_end, stage.weight_decay) == ("adamw", 1e-4, 1e-5, 0.0)
        assert stage.warmup == round(0.003 * stage.steps) and stage.batch % 128 == 0
    assert [s.objective for s in stages] == [UnifiedObjective(), *2 * [UnifiedObjective(align=0.5)]]
    assert [s.data.edit_share > 0 for s in stages] == [False, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_of_the_paper_and_of_the_published_components(name):
    config = recipe(name)
    model = config.model
    assert (config.flow.training_shift, config.flow.sampling_shift) == (1.0, 3.0)
    assert (config.alignment.teacher, config.alignment.center, config.alignment.hidden) == ("self", False, 2048)
    assert (model.connector.queries, model.connector.layers, model.grid) == (256, 6, 16)
    assert (model.denoiser.caption_channels, model.denoiser.align_depth) == (2304, 6)
    # No departure of the small setting: SANA without positions, references as the encoder gives them and no more.
    assert (model.denoiser.position_gain, model.denoiser.interpolation_scale) == (0.0, None)
    assert not (model.denoiser.reference_latent or model.connector.reference_positions)
    assert (model.streams.pixel_layers, model.streams.pixel_heads, model.streams.residual_blocks) == (6, 16, 3)
    assert (model.token_stride, model.autoencoder.stride, model.image_size) == (28, 32, 448)
    assert routed_layers(model.text.layers, 4) == {"spar-1b": (6, 12, 18, 24), "spar-3b": (7, 14, 21, 28)}[name]


def test_training_without_data_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(InputError, match=r"no data source given \(--data.source\); .* --dry-run"):
        train(recipe("spar-1b"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_whose_pictures_do_not_fit_the_tokens_is_refused():
    base = recipe("spar-1b")
    stages = (replace(base.stages[0], data=ImageData(image_size=256)), *base.stages[1:])
    with pytest.raises(InputError, match="stage tokenizer-1: expected image_size as a multiple of 28, got 256"):
        replace(base, stages=stages)


@pytest.mark.slow
def test_planning_counts_each_part_once():
    stages = ("unified-1", "unified-2", "unified-3")
    planned = {p.stage.name: p for p in estimate(recipe("spar-1b"), HardwareConfig(), stages)}
    counts = COUNTS["spar-1b"]
    assert planned["unified-1"].trainable == counts["router"] + counts["connector"]
    joint = counts["router"] + counts["connector"] + counts["denoiser"] + counts["alignment head"]
    assert planned["unified-2"].trainable == planned["unified-3"].trainable == joint


# ---- geometry: tokens of stride 28 before a decoder of stride 32 -----------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(448, 448), (224, 224), (28, 28), (336, 588), (896, 196), (56, 1120)])
def test_at_full_size_grids_agree_and_the_size_is_honoured(modules, height, width):
    """On no memory: any multiple of 28, whatever its proportions."""
    with torch.device("meta"):
        pixels = torch.zeros(1, 3, height, width)
        latents = modules.model.tokenizer.encode(pixels)
        assert latents.z_f.shape == (1, 32, height // 28, width // 28)
        assert modules.native_latents(pixels).shape == latents.z_f.shape
        assert modules.model.tokenizer.decode(latents.z_f).shape == pixels.shape


@pytest.fixture(scope="module")
def thin():
    """`spar-1b`'s geometry and depth of strides, all widths cut down; real weights."""
    base = recipe("spar-1b").model
    config = replace(
        base,
        vision=replace(base.vision, hidden_size=16, layers=1, heads=2, intermediate_size=16),
        text=replace(
            base.text, vocab_size=16, hidden_size=16, layers=4, heads=2, kv_heads=1, intermediate_size=16,
            image_token_id=5, eos_token_id=2, pad_token_id=0,
        ),
        autoencoder=replace(
            base.autoencoder, latent_channels=4, head_dim=8, channels=(8,) * 6, encoder_layers=(1,) * 6,
            decoder_layers=(1,) * 6, decoder_blocks=("ResBlock",) * 6,  # no attention: a cell shows where it lies
        ),
        streams=replace(base.streams, residual_blocks=1, pixel_layers=1, pixel_heads=2),
        connector=replace(base.connector, queries=3, layers=1),
        denoiser=replace(
            base.denoiser, layers=2, heads=2, head_dim=8, cross_heads=2, cross_head_dim=8, caption_channels=16,
            align_depth=1,
        ),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SparModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (5, 2)])
def test_a_cell_of_the_latent_is_a_square_of_28_pixels_of_the_picture(thin, rows, columns):
    """Cell (r, c) of z_f comes from, and goes back to, the pixels from (28 r, 28 c) on."""
    tokenizer: UnifiedTokenizer = thin.tokenizer
    z = torch.randn(16, 4, rows, columns, generator=torch.Generator().manual_seed(0))
    other = z.clone()
    other[:, :, rows - 1, 0] *= -1
    moved = (tokenizer.decode(z) - tokenizer.decode(other)).abs().sum((0, 1))
    cells = moved.unfold(0, 28, 28).unfold(1, 28, 28).sum((-1, -2))
    assert cells.shape == (rows, columns) and divmod(int(cells.argmax()), columns) == (rows - 1, 0)
    pixels = torch.rand(1, 3, 28 * rows, 28 * columns, generator=torch.Generator().manual_seed(1))
    assert tokenizer.decode(tokenizer.encode(pixels).z_f).shape == pixels.shape


def test_an_oblong_reference_conditions_an_oblong_picture(thin):
    pixels = torch.rand(1, 3, 56, 112, generator=torch.Generator().manual_seed(1))
    f_v = thin.tokenizer.encoder(pixels)
    ids = torch.tensor([[3, *[5] * 8, 4]])
    condition = thin.condition(ids, torch.ones_like(ids), f_v, (56, 112))
    latent = torch.randn(1, 4, 2, 4, generator=torch.Generator().manual_seed(2))
    velocity = thin.velocity(latent, torch.tensor([0.5]), condition).velocity
    assert thin.decode(velocity).shape == pixels.shape
