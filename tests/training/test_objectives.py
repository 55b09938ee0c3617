"""The objectives: what each reads, what its loss is the sum of, where its gradients go, and that it can learn."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spar.common.errors import InputError
from spar.data.batches import Layouts
from spar.models.spar import Condition
from spar.recipes.shapes.dense_tagging import DenseTaggingObjective
from spar.training.data import resized
from spar.training.distributed import DistributedContext, ParallelismConfig
from spar.training.objectives import flow, unified
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.common import add_latent_noise
from spar.training.objectives.tokenizer import TokenizerObjective
from spar.training.optimizer import build_optimizers
from spar.training.systems.spar import AlignmentConfig

ENCODER = "model.tokenizer.encoder."


def run(begun: Any, step: int = 0) -> dict[str, Tensor]:
    """The terms of a step of a Start."""
    with torch.autocast("cpu", torch.bfloat16):  # as the loop runs it
        return begun.terms(step)


def gradients(begun: Any) -> dict[str, float]:
    """The largest gradient of every parameter that has one."""
    named = begun.modules.named_parameters()
    return {name: float(p.grad.abs().max()) for name, p in named if p.grad is not None}


def moved(values: dict[str, float], start: str) -> bool:
    return any(value > 0 for name, value in values.items() if name.startswith(start))


def spy(monkeypatch, owner, name: str) -> list[tuple]:
    """Record the arguments of every call of `owner.name`, which goes on working."""
    calls, original = [], getattr(owner, name)

    def recorded(*args, **keywords):
        calls.append((*args, *keywords.values()))
        return original(*args, **keywords)

    monkeypatch.setattr(owner, name, recorded)
    return calls


def is_the_first(found: Tensor, first: Tensor, second: Tensor) -> bool:
    """Whether features are the first of two tensors, as far as bfloat16 leaves them, and not the second."""
    apart = [float((found.float() - one.float()).norm() / one.float().norm()) for one in (first, second)]
    return apart[0] < 0.1 and apart[0] < apart[1] / 3


# ---- the loss is what its terms say ----------------------------------------------------------------------------------


def weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> float:
    return sum(float(terms[name]) * weight for name, weight in weights.items())


def test_a_stage_of_another_side_sees_its_pictures_at_that_side(start, monkeypatch):
    """All of it: the frozen encoder's features, the native latents, the target; the latents have the smaller grid."""
    begun = start("tokenizer-1", image_size=32)
    fused = spy(monkeypatch, begun.modules.model.tokenizer, "fuse")
    native = spy(monkeypatch, begun.modules, "native_latents")
    terms = run(begun)
    assert torch.isfinite(terms["loss"])
    assert (fused[0][0].shape[1], fused[0][1]) == (16, (32, 32)) and native[0][0].shape[-2:] == (32, 32)
    whole = begun.data.pixels(np.arange(2))
    halved = torch.nn.functional.interpolate(whole, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(whole, begun.stage.data.image_size), halved)


def test_the_encoders_loss_is_its_tags_plus_its_pixels(start):
    terms = run(start("encoder", objective=DenseTaggingObjective(dense=2.0, pixel=3.0)))
    dense = dict.fromkeys(("shape", "color", "size", "background", "center", "coverage"), 2.0)
    assert float(terms["loss"]) == pytest.approx(weighted(terms, {**dense, "pixels": 3.0}), rel=1e-5)


def test_the_autoencoders_loss_is_its_terms(start):
    terms = run(start("autoencoder", objective=AutoencoderObjective(mse=2.0, latent_penalty=0.5)))
    assert float(terms["loss"]) == pytest.approx(weighted(terms, {"mse": 2.0, "latent_square": 0.5}), rel=1e-5)


@pytest.mark.parametrize(("step", "on"), [(0, 0.0), (1, 0.0), (2, 1.0)])
def test_the_tokenizers_loss_is_its_terms_and_the_adversary_counts_from_its_step(start, step, on):
    weights = TokenizerObjective(
        mse=2.0, perceptual=3.0, native=0.5, native_fused=0.3, semantic=4.0, gan=0.7, lecam=1.0, gan_start=2
    )
    begun = start("tokenizer-3", objective=weights)
    with torch.no_grad():
        begun.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
    terms = run(begun, step)
    sums = {"mse": 2.0, "perceptual": 3.0, "native": 0.5, "native_fused": 0.3, "semantic": 4.0, "discriminator": 1.0}
    sums["gan"] = 0.7 * on
    assert float(terms["loss"]) == pytest.approx(weighted(terms, sums), rel=1e-4)
    assert min(float(terms[name]) for name in ("perceptual", "native", "semantic")) > 0 and float(terms["gan"]) != 0


def test_terms_that_are_off_are_not_computed(start):
    terms = run(start("tokenizer-2", objective=TokenizerObjective(mse=1.0)))
    assert terms.keys().isdisjoint({"perceptual", "native", "native_fused", "semantic", "gan", "discriminator"})
    assert "cosine_plain" not in run(start("unified-1"))


def test_the_joint_loss_is_the_flow_minus_the_centred_cosine(start):
    terms = run(start("unified-2", align=0.5, balance=0.0))
    expected = float(terms["flow"]) - 0.5 * float(terms["cosine_centered"])
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(terms["cosine_centered"]) != float(terms["cosine_plain"])


def test_the_papers_plain_cosine_is_an_option(start, tiny_run):
    plain = replace(tiny_run.recipe, alignment=AlignmentConfig(center=False))
    terms = run(start("unified-2", recipe=plain, align=0.5, balance=0.0))
    assert float(terms["loss"]) == pytest.approx(float(terms["flow"]) - 0.5 * float(terms["cosine_plain"]), rel=1e-5)


def test_an_even_routing_costs_nothing_and_one_layer_for_all_costs_log_k(start):
    def imbalance(weights, mask):
        states = torch.zeros(1, len(weights), 2)
        return float(unified.routing_imbalance(Condition(states, torch.tensor([mask]), torch.tensor([weights]))))

    one, other = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
    assert imbalance([[0.25] * 4] * 2, [1, 1]) == pytest.approx(0, abs=1e-6)
    assert imbalance([one] * 3, [1, 1, 1]) == pytest.approx(math.log(4))
    assert imbalance([one, other], [1, 1]) == pytest.approx(math.log(2))  # each token may choose: the mean counts
    assert imbalance([one, other], [0, 1]) == pytest.approx(math.log(4))  # padding does not count
    rows = Condition(torch.zeros(2, 1, 2), torch.ones(2, 1), torch.tensor([[one], [other]]))
    assert float(unified.routing_imbalance(rows)) == pytest.approx(math.log(4))  # each prompt by itself
    terms = run(start("unified-2", align=0.0, balance=2.0))
    assert float(terms["loss"]) == pytest.approx(float(terms["flow"]) + 2 * float(terms["imbalance"]), rel=1e-5)
    assert "imbalance" not in run(start("unified-2", balance=0.0))


@pytest.mark.parametrize("stage", ["encoder", "mllm", "autoencoder", "dit", "tokenizer-3", "unified-2"])
def test_a_step_is_a_function_of_its_number(start, stage):
    first, again, next_one = run(start(stage), 4), run(start(stage), 4), run(start(stage), 5)
    assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in again.items()}
    assert float(first["loss"]) != float(next_one["loss"])


def test_noise_is_drawn_anew_for_each_stage_and_step(start):
    begun = [start(stage) for stage in ("dit", "unified-2")]
    seeds = [one.at(step).generator().initial_seed() for one in begun for step in (0, 1, 0)]
    assert len(set(seeds)) == 4 and seeds[0] == seeds[2] and seeds[3] == seeds[5]
    other = replace(begun[0].ctx, recipe=replace(begun[0].recipe, seed=1))
    assert other.generator().initial_seed() not in seeds


def test_what_is_drawn_for_one_purpose_says_nothing_of_another(start):
    ctx = start("dit").at(4)
    draws = {purpose: ctx.rng(purpose).random(8).tolist() for purpose in ("noise", "unconditional")}
    assert draws["noise"] != draws["unconditional"] and draws["noise"] == ctx.rng("noise").random(8).tolist()


# ---- what the prompts and pictures are -------------------------------------------------------------------------------


def test_generation_reads_captions_and_denoises_their_own_pictures(start, monkeypatch):
    begun = start("unified-2", edit_share=0.0, layouts=0.0, position_captions=1.0, scene_kinds=("single", "two"))
    matched, aligned = (spy(monkeypatch, unified, name) for name in ("flow_matching", "alignment_terms"))
    prompts = spy(monkeypatch, begun.ctx.prompts, "generation")
    assert "flow_generate" in run(begun)
    rng = begun.data.rng("unified-2", 0)
    rng.random()
    indices = begun.data.draw(rng, 4, kinds=("single", "two"))
    captions = begun.data.captions(rng, indices, position_captions=1.0)
    assert any("column" in text for text in captions)
    assert [a or b for a, b in zip(prompts[0][0], captions, strict=True)] == captions
    tokenizer = begun.modules.model.tokenizer
    latents = tokenizer.encode(begun.data.pixels(indices))
    clean = tokenizer.normalize(latents.z_f)
    assert is_the_first(matched[0][1].clean[::2], clean, clean.roll(1, 0))
    assert is_the_first(aligned[0][3].flatten(1, 2), latents.f_v, latents.f_v.roll(1, 0))


def test_layouts_are_drawn_on_a_blank_canvas(start, monkeypatch):
    begun = start("unified-2", edit_share=0.0, layouts=1.0)
    matched, conditions = spy(monkeypatch, unified, "flow_matching"), spy(monkeypatch, begun.modules.model, "condition")
    prompts = spy(monkeypatch, begun.ctx.prompts, "layout")
    assert "flow_layout" in run(begun)
    batch, tokenizer = begun.batch(0), begun.modules.model.tokenizer
    assert isinstance(batch, Layouts) and all("column" in text for text in batch.texts)
    assert [a or b for a, b in zip(prompts[0][0], batch.texts, strict=True)] == [*batch.texts]
    blank = tokenizer.encoder(torch.full((1, 3, 64, 64), 0.5)).expand(4, -1, -1)
    assert is_the_first(conditions[0][2], blank, tokenizer.encoder(batch.pixels))
    clean = tokenizer.normalize(tokenizer.encode(batch.pixels).z_f)
    assert is_the_first(matched[0][1].clean[::2], clean, clean.roll(1, 0))


def test_editing_reads_the_source_and_denoises_the_target(start, monkeypatch):
    begun = start("unified-2", edit_share=1.0, edit_layouts=0.0)
    matched, aligned = (spy(monkeypatch, unified, name) for name in ("flow_matching", "alignment_terms"))
    conditions = spy(monkeypatch, begun.modules.model, "condition")
    prompts = spy(monkeypatch, begun.ctx.prompts, "edit")
    assert "flow_edit" in run(begun)
    rng = begun.data.rng("unified-2", 0)
    rng.random()
    indices = begun.data.draw(rng, 4, edits=True, kinds=begun.stage.data.scene_kinds)
    instructions = begun.data.instructions(rng, indices)
    assert [a or b for a, b in zip(prompts[0][0], instructions, strict=True)] == instructions
    tokenizer = begun.modules.model.tokenizer
    source = tokenizer.encode(begun.data.pixels(indices))
    target = tokenizer.encode(begun.data.pixels(indices, edited=True))
    assert is_the_first(conditions[0][2], source.f_v, target.f_v)
    assert is_the_first(matched[0][1].clean[::2], tokenizer.normalize(target.z_f), tokenizer.normalize(source.z_f))
    assert is_the_first(aligned[0][3].flatten(1, 2), target.f_v, source.f_v)


@pytest.mark.parametrize("stage", ["dit", "unified-1", "unified-2"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_unconditional_share_drops_the_words(start, tiny_run, monkeypatch, stage, share):
    dropping = replace(tiny_run.recipe, flow=replace(tiny_run.recipe.flow, unconditional_share=share))
    begun = start(stage, recipe=dropping, **({"edit_share": 1.0} if stage == "unified-2" else {}))
    calls = spy(monkeypatch, begun.ctx.prompts, "edit" if stage == "unified-2" else "generation")
    run(begun)
    assert [text is None for text in calls[0][0]] == [share == 1.0] * 4


def test_half_of_the_batches_edit_at_a_share_of_a_half(start):
    training_data = start("unified-2").data
    shares = [training_data.rng("unified-2", step).random() < 0.5 for step in range(200)]
    assert 70 < sum(shares) < 130  # the draw that decides is the step's first


def test_each_picture_has_its_own_draws_of_noise_and_time(start, monkeypatch):
    begun = start("dit", noise_samples=3)
    calls = spy(monkeypatch, begun.modules.model, "velocity")
    paths = spy(monkeypatch, flow, "interpolate")
    run(begun)
    clean, noise, time = paths[0]
    assert len(clean) == 12 and torch.equal(clean, clean[::3].repeat_interleave(3, 0))
    assert len({row.numpy().tobytes() for row in noise}) == 12 and len(set(time.tolist())) == 12
    assert torch.equal(calls[0][0], (1 - time[:, None, None, None]) * clean + time[:, None, None, None] * noise)
    assert torch.equal(calls[0][1], time) and len(calls[0][2].states) == 4


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("training_shift", 3.0, lambda t: 3 * t / (1 + 2 * t)),
        ("time_mean", 1.0, lambda t: torch.sigmoid(torch.logit(t) + 1)),
        ("time_std", 0.5, lambda t: torch.sigmoid(0.5 * torch.logit(t))),
    ],
)
def test_training_times_follow_the_flow_settings(start, tiny_run, monkeypatch, field, value, expected):
    times = []
    plain = replace(tiny_run.recipe.flow, training_shift=1.0)
    for settings in (plain, replace(plain, **{field: value})):
        begun = start("dit", recipe=replace(tiny_run.recipe, flow=settings))
        calls = spy(monkeypatch, begun.modules.model, "velocity")
        run(begun)
        times.append(calls[0][1])
    assert torch.allclose(times[1], expected(times[0]), atol=1e-5)


def test_the_flow_loss_is_the_error_of_the_velocity(start, monkeypatch):
    begun = start("dit")
    paths = spy(monkeypatch, flow, "interpolate")
    monkeypatch.setattr(begun.modules.model, "velocity", lambda x, t, c: SimpleNamespace(velocity=torch.zeros_like(x)))
    terms = run(begun)
    clean, noise, _ = paths[0]
    assert float(terms["flow"]) == pytest.approx(float((noise - clean).square().mean()), rel=1e-5)


def test_the_dit_sees_native_latents_of_unit_size(start, monkeypatch):
    begun = start("dit", batch=64)
    paths = spy(monkeypatch, flow, "interpolate")
    run(begun)
    assert float(paths[0][0].square().mean().sqrt()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("stage", "part"),
    [("mllm", ENCODER), ("tokenizer-1", ENCODER), ("tokenizer-1", "pixel_encoder"), ("dit", "pixel_encoder")],
)
def test_frozen_features_are_computed_once_a_picture(start, stage, part):
    changes = {
        "tokenizer-1": {"objective": TokenizerObjective(mse=0.0, native=1.0)}, "mllm": {"prompt_share": 0.0}
    }.get(stage, {})  # fmt: skip
    begun, computed = start(stage, **changes), []
    network = begun.modules.get_submodule(part.rstrip("."))
    network.register_forward_hook(lambda _, given, __: computed.append(len(given[0])))
    for step in (0, 1, 0):
        run(begun, step)
    asked = {key for step in (0, 1) for key in begun.batch(step).keys.tolist()}
    assert sum(computed) == len(asked)


# ---- where gradients go ----------------------------------------------------------------------------------------------


def test_the_share_of_a_gradient_is_the_mean_of_its_rows():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], requires_grad=True)
    one, two = features.square().sum() / 2, 3 * features.square().sum() / 2  # gradients x and 3 x
    assert float(unified.gradient_share(one, two, features)) == pytest.approx((0.25 + 0.25 + 0.0) / 3)
    of_one_row = unified.gradient_share(2 * features[0].square().sum(), features.sum(), features)
    assert features.grad is None and float(of_one_row) == pytest.approx((20 / (20 + 2**0.5)) / 3)


def test_the_logged_share_of_the_alignment_leaves_the_step_as_it_is(start):
    shares, found = [], []
    for changes in ({}, {"gradient_share": True}, {"gradient_share": True, "align": 5.0}):
        begun = start("unified-2", **changes)
        terms = begun.terms()
        terms["loss"].backward()
        shares.append(float(terms.get("align_share", 0)))
        found.append(gradients(begun))
    assert found[0] == found[1] and shares[0] == 0 < shares[1] < shares[2] < 1


@pytest.mark.parametrize("changes", [{"compile": True}, {"strategy": "fsdp"}])
def test_the_share_is_refused_where_blocks_go_back_once(start, changes):
    begun = start("unified-2", gradient_share=True)
    parallel = DistributedContext(config=ParallelismConfig(**changes), sharded="strategy" in changes)
    with pytest.raises(InputError, match="stage unified-2: gradient_share goes back twice"):
        begun.stage.objective.prepare(replace(begun.ctx, parallel=parallel), begun.data, None)


def test_the_two_sides_of_the_adversary_do_not_touch(start):
    begun = start("tokenizer-3")
    pixels = begun.data.pixels(np.arange(4))
    discriminator = list(begun.modules.discriminator.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        picture = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        terms = begun.stage.objective._adversarial(begun.ctx, picture, pixels)
    generator_side = torch.autograd.grad(terms["gan"], [picture, *discriminator], retain_graph=True, allow_unused=True)
    assert float(generator_side[0].abs().max()) > 0 and generator_side[1:] == (None,) * len(discriminator)
    adversary_side = torch.autograd.grad(terms["discriminator"], [picture, *discriminator], allow_unused=True)
    assert adversary_side[0] is None
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in adversary_side[1:])


def test_before_its_step_the_adversary_learns_and_the_decoder_does_not_feel_it(start):
    found = []
    for gan in (1.0, 1e-6):
        begun = start("tokenizer-3", objective=TokenizerObjective(mse=1.0, gan=gan, gan_start=9))
        run(begun, 0)["loss"].backward()
        found.append(gradients(begun))
        assert moved(found[-1], "discriminator.")
    assert found[0] == found[1]


@pytest.mark.parametrize(("step", "learns"), [(1, False), (2, True)])
def test_the_discriminator_has_its_own_start(start, step, learns):
    begun = start("tokenizer-3", objective=TokenizerObjective(mse=1.0, gan=1.0, gan_start=9, discriminator_start=2))
    run(begun, step)["loss"].backward()
    assert moved(gradients(begun), "discriminator.") == learns


@pytest.mark.parametrize("editing", [0.0, 1.0])
def test_the_alignments_target_is_the_encoders_own_and_gives_it_no_gradient(start, editing):
    begun = start("unified-2", edit_share=editing, align=0.5)
    begun.modules.model.tokenizer.requires_grad_(True)
    run(begun)["loss"].backward()
    found = gradients(begun)
    assert not any(name.startswith("model.tokenizer.") for name in found)
    assert moved(found, "alignment_head.") and moved(found, "model.denoiser.")


def test_the_alignment_reaches_the_tapped_block_and_no_later_one(start, monkeypatch):
    begun = start("unified-2", edit_share=0.0, align=1.0)
    monkeypatch.setattr(flow, "velocity_target", lambda x, noise: x * 0)
    original = begun.modules.model.velocity
    monkeypatch.setattr(
        begun.modules.model, "velocity", lambda *a: replace(original(*a), velocity=torch.zeros(8, 8, 8, 8))
    )
    run(begun)["loss"].backward()
    found = gradients(begun)
    assert moved(found, "model.denoiser.network.transformer_blocks.0.")
    assert not moved(found, "model.denoiser.network.transformer_blocks.1.")  # tiny taps block 1 of 2
    assert moved(found, "model.router.") and moved(found, "model.connector.queries")


def test_the_teachers_get_no_gradient_in_stage_three(start):
    begun = start("tokenizer-3", objective=TokenizerObjective(mse=1.0, perceptual=1.0, native=1.0, semantic=1.0))
    begun.modules.teacher.requires_grad_(True)
    with torch.no_grad():
        begun.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
    run(begun)["loss"].backward()
    found = gradients(begun)
    assert not moved(found, "teacher.") and not moved(found, "pixel_encoder.") and moved(found, ENCODER)


def test_every_trainable_part_gets_a_gradient_in_stage_three_and_the_encoder_from_each_term(start):
    only = {
        "mse": TokenizerObjective(mse=1.0),
        "perceptual": TokenizerObjective(mse=0.0, perceptual=1.0),
        "semantic": TokenizerObjective(mse=0.0, semantic=1.0),
    }
    for objective in only.values():
        begun = start("tokenizer-3", objective=objective)
        with torch.no_grad():
            begun.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
        run(begun)["loss"].backward()
        assert moved(gradients(begun), ENCODER)
        assert moved(gradients(begun), "model.tokenizer.decoder.") == (objective.semantic == 0)


def test_the_native_latents_teach_the_pixel_stream_alone(start):
    begun = start("tokenizer-1", objective=TokenizerObjective(mse=0.0, native=1.0))
    run(begun)["loss"].backward()
    found = gradients(begun)
    assert moved(found, "model.tokenizer.pixel_stream.")
    assert not moved(found, "model.tokenizer.semantic_stream.") and not moved(found, "model.tokenizer.fusion.")


def test_the_fused_term_holds_the_fused_latent_near_the_native_one(start):
    begun = start("tokenizer-1", objective=TokenizerObjective(mse=0.0, native_fused=1.0))
    terms = run(begun)
    terms["loss"].backward()
    assert float(terms["loss"]) == pytest.approx(float(terms["native_fused"]))
    found = gradients(begun)
    assert all(moved(found, f"model.tokenizer.{part}.") for part in ("semantic_stream", "pixel_stream", "fusion"))


def test_latent_noise_is_relative_to_the_latents_size(start):
    begun = start("tokenizer-2", batch=512)
    scale = torch.tensor([1.0, 7.0]).repeat(256)[:, None, None, None]
    latent = torch.randn(512, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
    noise = (add_latent_noise(begun.ctx, latent, 0.2) - latent) / scale
    sizes = noise.square().mean((1, 2, 3)).sqrt()
    assert 0.19 < float(sizes.max()) < 0.22 and float(sizes.mean()) == pytest.approx(0.1, abs=0.01)
    assert add_latent_noise(begun.ctx, latent, 0.0) is latent


# ---- a term that is on and lacks its input ---------------------------------------------------------------------------


def test_an_external_teacher_that_was_not_loaded_raises(start, tiny_run):
    external = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="external", external="some/encoder"))
    begun = start("unified-2")
    with pytest.raises(KeyError, match="external_teacher"):
        run(replace(begun, ctx=replace(begun.ctx, recipe=external)))


@pytest.mark.parametrize("editing", [0.0, 1.0])
def test_an_external_teacher_is_what_aligns_on_its_own_grid(start, tiny_run, monkeypatch, editing):
    external = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="external", external="some/encoder"))

    def teacher(pixels):
        """The colours of the pictures' own 4 x 4 squares, so that order and pairing can be told."""
        colours = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
        return torch.nn.functional.pad(colours, (0, 29)), (4, 4)

    begun = start("unified-2", recipe=external, edit_share=editing, teacher=teacher)
    calls, grids = spy(monkeypatch, flow, "alignment_loss"), spy(monkeypatch, flow, "match_grid")
    run(begun)
    rng = begun.data.rng("unified-2", 0)
    rng.random()
    pixels = begun.data.pixels(
        begun.data.draw(rng, 4, edits=bool(editing), kinds=begun.stage.data.scene_kinds), edited=bool(editing)
    )
    assert torch.equal(calls[0][1], teacher(pixels)[0].repeat_interleave(2, 0))
    assert grids[0][1:] == ((8, 8), (4, 4)) and calls[0][0].shape == (8, 16, 32)
    everything = teacher(begun.data.pixels(np.arange(len(begun.data.scenes))))[0]
    assert torch.allclose(begun.modules.teacher_mean, everything.mean((0, 1)), atol=1e-5)


def test_alignment_with_no_teacher_is_off(start, tiny_run):
    nobody = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="none"))
    terms = run(start("unified-2", recipe=nobody, balance=0.0))
    assert "cosine_plain" not in terms and torch.equal(terms["loss"], terms["flow"])
    assert "cosine_plain" in run(start("unified-2"))


def without_pixel_stream(begun: Any) -> Any:
    fuse = begun.modules.model.tokenizer.fuse
    begun.modules.model.tokenizer.fuse = lambda *args: replace(fuse(*args), z_p=None)
    return begun


def test_the_native_term_without_a_pixel_stream_raises(start):
    with pytest.raises(ValueError, match="z_p"):
        run(without_pixel_stream(start("tokenizer-1", objective=TokenizerObjective(mse=1.0, native=1.0))))


def test_the_fused_term_needs_no_pixel_stream(start):
    terms = run(without_pixel_stream(start("tokenizer-1", objective=TokenizerObjective(mse=1.0, native_fused=1.0))))
    assert float(terms["native_fused"]) > 0


# ---- learning --------------------------------------------------------------------------------------------------------


def overfit(begun: Any, count: int, term: str, lr: float) -> tuple[float, float]:
    """The first and the last value of a term over `count` steps on the batch of step 0."""
    optimizers = build_optimizers(begun.modules, replace(begun.stage, lr=lr))
    values = []
    for _ in range(count):
        terms = run(begun)
        begun.modules.zero_grad(set_to_none=True)
        terms["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        values.append(float(terms[term]))
    return values[0], values[-1]


LEARN: list[tuple[str, dict, int, str, float, float]] = [
    ("encoder", {}, 30, "loss", 3e-3, 2.0),
    ("mllm", {"prompt_share": 0.0}, 40, "loss", 5e-3, 3.0),
    ("tokenizer-2", {"objective": TokenizerObjective(mse=1.0)}, 40, "mse", 3e-3, 3.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "changes", "count", "term", "lr", "factor"), LEARN, ids=[row[0] for row in LEARN])
def test_one_batch_can_be_overfitted(start: Callable[..., Any], stage, changes, count, term, lr, factor):
    first, last = overfit(start(stage, **changes), count, term, lr)
    assert last < first / factor
