"""The optimizers: what an orthogonalised step is, which parameter goes where, and that both learn."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from spar.recipes import RECIPES, recipe
from spar.training.config import StageConfig, freeze
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.optimizer import ADAMW_RMS, MOMENTUM, Muon, build_optimizers, orthogonalize

EVERYTHING = StageConfig(
    "s", AutoencoderObjective(), ("*",), steps=1, warmup=0, optimizer="muon", weight_decay=0.1
)  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (48, 48)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape, scale):
    values = torch.linalg.svdvals(orthogonalize(scale * draw(3, *shape)))
    assert float(values[:, : min(shape) * 3 // 4].min()) > 0.65 and float(values.max()) < 1.25
    assert shape[0] == shape[1] or float(values.min()) > 0.65  # a square one may be as good as singular


@pytest.mark.parametrize("shape", [(24, 80), (80, 24)], ids=["wide", "tall"])
def test_it_keeps_the_singular_vectors_and_their_signs(shape):
    """With M = U S V^T and O near U V^T, O M^T is near U S U^T: symmetric and positive."""
    matrix = draw(1, *shape)
    product = orthogonalize(matrix)[0] @ matrix[0].T
    if shape[0] > shape[1]:
        product = orthogonalize(matrix)[0].T @ matrix[0]
    assert float((product - product.T).norm()) < 0.05 * float(product.norm())
    assert float(torch.linalg.eigvalsh((product + product.T) / 2).min()) > 0


def test_matrices_in_a_stack_do_not_touch():
    stack = draw(4, 16, 40) * torch.tensor([1.0, 1e3, 1e-3, 7.0])[:, None, None]
    together = orthogonalize(stack)
    for matrix, found in zip(stack, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None])[0], found, rtol=0.02, atol=0.02)


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalize(torch.zeros(1, 4, 6)).any()


def test_the_step_is_that_of_the_nesterov_momentum_at_adamws_size():
    """Two steps with weight decay, written out."""
    weight = nn.Parameter(draw(8, 20))
    expected, momentum = weight.detach().clone(), torch.zeros(8, 20)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    for seed in (1, 2):
        weight.grad = draw(8, 20, seed=seed)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * ADAMW_RMS * 20**0.5 * orthogonalize(ahead[None])[0]
        before = weight.detach().clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0.02, atol=2e-3)  # bfloat16 inside
    step = (weight.detach() - before * (1 - 0.1 * 0.5)) / 0.1
    assert float(step.square().mean().sqrt()) == pytest.approx(ADAMW_RMS, rel=0.2)


def test_a_convolution_counts_as_the_matrix_of_its_first_dimension_against_the_rest():
    kernel, matrix = nn.Parameter(draw(6, 4, 3, 3)), nn.Parameter(draw(6, 4, 3, 3).flatten(1))
    kernel.grad = draw(6, 4, 3, 3, seed=1)
    matrix.grad = kernel.grad.flatten(1)
    for parameter in (kernel, matrix):
        Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())


def test_without_a_gradient_nothing_moves():
    weight = nn.Parameter(draw(4, 4))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight.detach(), draw(4, 4))


def test_muon_finds_the_least_of_a_quadratic():
    target, weight = draw(12, 30), nn.Parameter(draw(12, 30, seed=1))
    optimizer = Muon([weight], lr=0.5)
    losses = []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.5 * (1 - step / 60)
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 30


# ---- which parameter goes where --------------------------------------------------------------------------------------


def names_of(module: nn.Module, stage: StageConfig) -> tuple[set[str], set[str]]:
    """The names that AdamW has, and those that Muon has; every trainable one is in exactly one group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[bool, list[str]] = {False: [], True: []}
    for optimizer in build_optimizers(module, stage):
        for group in optimizer.param_groups:
            found[isinstance(optimizer, Muon)] += [names[id(parameter)] for parameter in group["params"]]
    everything = found[False] + found[True]
    assert sorted(everything) == sorted(name for name, p in module.named_parameters() if p.requires_grad)
    return set(found[False]), set(found[True])


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: recipe(name).build({}) for name in RECIPES}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_trainable_parameter_is_in_exactly_one_group_in_every_stage(modules, name, kind):
    for stage in recipe(name).stages:
        freeze(modules[name], stage)
        muon = names_of(modules[name], replace(stage, optimizer=kind))[1]
        assert bool(muon) == (kind == "muon")


def test_muon_has_the_maps_between_hidden_states_and_adamw_the_rest(modules):
    freeze(modules["tiny"], EVERYTHING)
    adamw, muon = names_of(modules["tiny"], EVERYTHING)
    vision, layer = "model.tokenizer.encoder.vision_tower.", "model.language.network.layers.0."
    block = "model.denoiser.network.transformer_blocks.0."
    assert {
        vision + "encoder.layer.0.attention.q_proj.weight", layer + "self_attn.k_proj.weight",
        layer + "mlp.down_proj.weight", block + "attn1.to_q.weight", block + "ff.conv_inverted.weight",
        block + "ff.conv_point.weight", "model.router.gate.0.weight", "model.connector.projection.weight",
        "model.denoiser.network.patch_embed.proj.weight", "model.tokenizer.decoder.network.conv_in.weight",
    } <= muon
    assert {
        "model.language.network.embed_tokens.weight", vision + "embeddings.position_embeddings",
        vision + "embeddings.cls_token", vision + "embeddings.patch_embeddings.projection.weight",
        layer + "input_layernorm.weight", layer + "self_attn.q_proj.bias", block + "scale_shift_table",
        block + "ff.conv_depth.weight", "model.connector.queries", "model.connector.reference_gain",
        "model.router.alpha", "pixel_encoder.network.conv_in.conv.weight", "discriminator.layers.0.weight",
    } <= adamw
    parameters = dict(modules["tiny"].named_parameters())
    assert all(parameters[name].dim() > 1 for name in muon)
    assert not {name for name in muon if "norm" in name or "embed_tokens" in name or "conv_depth" in name}


def test_rates_and_decay_are_each_optimizers_own(modules):
    stage = replace(EVERYTHING, lr_multipliers=(("model.tokenizer.encoder.*", 0.1),))
    freeze(modules["tiny"], stage)
    names = {id(parameter): name for name, parameter in modules["tiny"].named_parameters()}
    optimizers = build_optimizers(modules["tiny"], stage)
    assert len(optimizers) == 2
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for parameter in group["params"]:
            slow = names[id(parameter)].startswith("model.tokenizer.encoder.")
            assert group["factor"] == (0.1 if slow else 1.0)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)


def test_a_stage_with_vectors_alone_or_matrices_alone_has_one_optimizer():
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4, bias=False)
    assert [type(o) for o in build_optimizers(norm, EVERYTHING)] == [torch.optim.AdamW]
    assert [type(o) for o in build_optimizers(linear, EVERYTHING)] == [Muon]
