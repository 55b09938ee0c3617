"""The step functions: what each reads, what its loss is the sum of, where its gradients go, and that it can learn."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from spar.training import steps
from spar.training.config import AlignmentConfig, LossWeights
from spar.training.optimizer import build_optimizers
from spar.training.shapes_data import resized
from spar.training.steps import STEPS, StepContext

ENCODER = "model.tokenizer.encoder."


def run(ctx: StepContext, step: int = 0) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):  # as the loop runs it
        batch = ctx.data.get_batch(ctx.stage, step, ctx.parallel.rows(ctx.stage.batch, 0))
        return STEPS[ctx.stage.step](ctx, batch, step)


def gradients(ctx: StepContext) -> dict[str, float]:
    """The largest gradient of every parameter that has one."""
    named = ctx.modules.named_parameters()
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
    ctx = start("tokenizer-1", image_size=32)
    fused = spy(monkeypatch, ctx.modules.model.tokenizer, "fuse")
    native = spy(monkeypatch, ctx.modules, "native_latents")
    terms = run(ctx)
    assert torch.isfinite(terms["loss"])
    assert (fused[0][0].shape[1], fused[0][1]) == (16, (32, 32)) and native[0][0].shape[-2:] == (32, 32)
    whole = ctx.data.pixels(np.arange(2))
    halved = torch.nn.functional.interpolate(whole, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(whole, ctx.stage.image_size), halved)


def test_the_encoders_loss_is_its_tags_plus_its_pixels(start):
    terms = run(start("encoder", losses=LossWeights(dense=2.0, pixel=3.0)))
    dense = dict.fromkeys(("shape", "color", "size", "background", "center", "coverage"), 2.0)
    assert float(terms["loss"]) == pytest.approx(weighted(terms, {**dense, "pixels": 3.0}), rel=1e-5)


def test_the_autoencoders_loss_is_its_terms(start):
    terms = run(start("autoencoder", losses=LossWeights(mse=2.0, latent_penalty=0.5)))
    assert float(terms["loss"]) == pytest.approx(weighted(terms, {"mse": 2.0, "latent_square": 0.5}), rel=1e-5)


@pytest.mark.parametrize(("step", "on"), [(0, 0.0), (1, 0.0), (2, 1.0)])
def test_the_tokenizers_loss_is_its_terms_and_the_adversary_counts_from_its_step(start, step, on):
    weights = LossWeights(
        mse=2.0, perceptual=3.0, native=0.5, native_fused=0.3, semantic=4.0, gan=0.7, lecam=1.0, gan_start=2
    )
    ctx = start("tokenizer-3", losses=weights)
    with torch.no_grad():
        ctx.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
    terms = run(ctx, step)
    sums = {"mse": 2.0, "perceptual": 3.0, "native": 0.5, "native_fused": 0.3, "semantic": 4.0, "discriminator": 1.0}
    sums["gan"] = 0.7 * on
    assert float(terms["loss"]) == pytest.approx(weighted(terms, sums), rel=1e-4)
    assert min(float(terms[name]) for name in ("perceptual", "native", "semantic")) > 0 and float(terms["gan"]) != 0


def test_terms_that_are_off_are_not_computed(start):
    terms = run(start("tokenizer-2", losses=LossWeights(mse=1.0)))
    assert terms.keys().isdisjoint({"perceptual", "native", "native_fused", "semantic", "gan", "discriminator"})
    assert "cosine_plain" not in run(start("unified-1"))


def test_the_joint_loss_is_the_flow_minus_the_centred_cosine(start):
    terms = run(start("unified-2", losses=LossWeights(align=0.5)))
    expected = float(terms["flow"]) - 0.5 * float(terms["cosine_centered"])
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(terms["cosine_centered"]) != float(terms["cosine_plain"])


def test_the_papers_plain_cosine_is_an_option(start, tiny_run):
    plain = replace(tiny_run.recipe, alignment=AlignmentConfig(center=False))
    terms = run(start("unified-2", recipe=plain, losses=LossWeights(align=0.5)))
    assert float(terms["loss"]) == pytest.approx(float(terms["flow"]) - 0.5 * float(terms["cosine_plain"]), rel=1e-5)


@pytest.mark.parametrize("stage", ["encoder", "mllm", "autoencoder", "dit", "tokenizer-3", "unified-2"])
def test_a_step_is_a_function_of_its_number(start, stage):
    first, again, next_one = run(start(stage), 4), run(start(stage), 4), run(start(stage), 5)
    assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in again.items()}
    assert float(first["loss"]) != float(next_one["loss"])


def test_noise_is_drawn_anew_for_each_stage_and_step(start):
    seeds = [start(stage).generator(step).initial_seed() for stage in ("dit", "unified-2") for step in (0, 1, 0)]
    assert len(set(seeds)) == 4 and seeds[0] == seeds[2] and seeds[3] == seeds[5]


# ---- what the prompts and pictures are -------------------------------------------------------------------------------


def test_generation_reads_captions_and_denoises_their_own_pictures(start, monkeypatch):
    ctx = start("unified-2", edit_share=0.0, position_captions=1.0, scene_kinds=("single", "two"))
    flow = spy(monkeypatch, steps, "_flow_terms")
    prompts = spy(monkeypatch, ctx.data.prompts, "generation")
    assert "flow_generate" in run(ctx)
    rng = ctx.data.rng("unified-2", 0)
    rng.random()
    indices = ctx.data.draw(rng, 4, kinds=("single", "two"))
    captions = ctx.data.captions(rng, indices, position_captions=1.0)
    assert any("column" in text for text in captions)
    assert [a or b for a, b in zip(prompts[0][0], captions, strict=True)] == captions
    tokenizer = ctx.modules.model.tokenizer
    latents = tokenizer.encode(ctx.data.pixels(indices))
    clean = tokenizer.normalize(latents.z_f)
    assert is_the_first(flow[0][2], clean, clean.roll(1, 0))
    assert is_the_first(flow[0][4].flatten(1, 2), latents.f_v, latents.f_v.roll(1, 0))


def test_editing_reads_the_source_and_denoises_the_target(start, monkeypatch):
    ctx = start("unified-2", edit_share=1.0)
    flow = spy(monkeypatch, steps, "_flow_terms")
    conditions = spy(monkeypatch, ctx.modules.model, "condition")
    prompts = spy(monkeypatch, ctx.data.prompts, "edit")
    assert "flow_edit" in run(ctx)
    rng = ctx.data.rng("unified-2", 0)
    rng.random()
    indices = ctx.data.draw(rng, 4, edits=True, kinds=ctx.stage.scene_kinds)
    instructions = ctx.data.instructions(indices)
    assert [a or b for a, b in zip(prompts[0][0], instructions, strict=True)] == instructions
    tokenizer = ctx.modules.model.tokenizer
    source, target = tokenizer.encode(ctx.data.pixels(indices)), tokenizer.encode(ctx.data.pixels(indices, edited=True))
    assert is_the_first(conditions[0][2], source.f_v, target.f_v)
    assert is_the_first(flow[0][2], tokenizer.normalize(target.z_f), tokenizer.normalize(source.z_f))
    assert is_the_first(flow[0][4].flatten(1, 2), target.f_v, source.f_v)


@pytest.mark.parametrize("stage", ["dit", "unified-1", "unified-2"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_unconditional_share_drops_the_words(start, tiny_run, monkeypatch, stage, share):
    dropping = replace(tiny_run.recipe, flow=replace(tiny_run.recipe.flow, unconditional_share=share))
    ctx = start(stage, recipe=dropping, edit_share=1.0 if stage == "unified-2" else 0.0)
    calls = spy(monkeypatch, ctx.data.prompts, "edit" if stage == "unified-2" else "generation")
    run(ctx)
    assert [text is None for text in calls[0][0]] == [share == 1.0] * 4


def test_half_of_the_batches_edit_at_a_share_of_a_half(start):
    training_data = start("unified-2").data
    shares = [training_data.rng("unified-2", step).random() < 0.5 for step in range(200)]
    assert 70 < sum(shares) < 130  # the draw that decides is the step's first


def test_each_picture_has_its_own_draws_of_noise_and_time(start, monkeypatch):
    ctx = start("dit", noise_samples=3)
    calls = spy(monkeypatch, ctx.modules.model, "velocity")
    paths = spy(monkeypatch, steps, "interpolate")
    run(ctx)
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
    for flow in (plain, replace(plain, **{field: value})):
        ctx = start("dit", recipe=replace(tiny_run.recipe, flow=flow))
        calls = spy(monkeypatch, ctx.modules.model, "velocity")
        run(ctx)
        times.append(calls[0][1])
    assert torch.allclose(times[1], expected(times[0]), atol=1e-5)


def test_the_flow_loss_is_the_error_of_the_velocity(start, monkeypatch):
    ctx = start("dit")
    paths = spy(monkeypatch, steps, "interpolate")
    monkeypatch.setattr(ctx.modules.model, "velocity", lambda x, t, c: SimpleNamespace(velocity=torch.zeros_like(x)))
    terms = run(ctx)
    clean, noise, _ = paths[0]
    assert float(terms["flow"]) == pytest.approx(float((noise - clean).square().mean()), rel=1e-5)


def test_the_dit_sees_native_latents_of_unit_size(start, monkeypatch):
    ctx = start("dit", batch=64)
    paths = spy(monkeypatch, steps, "interpolate")
    run(ctx)
    assert float(paths[0][0].square().mean().sqrt()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("stage", "part"),
    [("mllm", ENCODER), ("tokenizer-1", ENCODER), ("tokenizer-1", "pixel_encoder"), ("dit", "pixel_encoder")],
)
def test_frozen_features_are_computed_once_a_picture(start, stage, part):
    changes = {"losses": LossWeights(native=1.0)} if stage == "tokenizer-1" else {}
    ctx, computed = start(stage, **changes), []
    network = ctx.modules.get_submodule(part.rstrip("."))
    network.register_forward_hook(lambda _, given, __: computed.append(len(given[0])))
    for step in (0, 1, 0):
        run(ctx, step)
    asked = {i for step in (0, 1) for i in ctx.data.draw(ctx.data.rng(stage, step), 4).tolist()}
    assert sum(computed) == len(asked)


# ---- where gradients go ----------------------------------------------------------------------------------------------


def test_the_two_sides_of_the_adversary_do_not_touch(start):
    ctx = start("tokenizer-3")
    pixels = ctx.data.pixels(np.arange(4))
    discriminator = list(ctx.modules.discriminator.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        picture = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        terms = steps._adversarial(ctx, picture, pixels)
    generator_side = torch.autograd.grad(terms["gan"], [picture, *discriminator], retain_graph=True, allow_unused=True)
    assert float(generator_side[0].abs().max()) > 0 and generator_side[1:] == (None,) * len(discriminator)
    adversary_side = torch.autograd.grad(terms["discriminator"], [picture, *discriminator], allow_unused=True)
    assert adversary_side[0] is None
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in adversary_side[1:])


def test_before_its_step_the_adversary_learns_and_the_decoder_does_not_feel_it(start):
    found = []
    for gan in (1.0, 1e-6):
        ctx = start("tokenizer-3", losses=LossWeights(mse=1.0, gan=gan, gan_start=9))
        run(ctx, 0)["loss"].backward()
        found.append(gradients(ctx))
        assert moved(found[-1], "discriminator.")
    assert found[0] == found[1]


@pytest.mark.parametrize("editing", [0.0, 1.0])
def test_the_alignments_target_is_the_encoders_own_and_gives_it_no_gradient(start, editing):
    ctx = start("unified-2", edit_share=editing, losses=LossWeights(align=0.5))
    ctx.modules.model.tokenizer.requires_grad_(True)
    run(ctx)["loss"].backward()
    found = gradients(ctx)
    assert not any(name.startswith("model.tokenizer.") for name in found)
    assert moved(found, "alignment_head.") and moved(found, "model.denoiser.")


def test_the_alignment_reaches_the_tapped_block_and_no_later_one(start, monkeypatch):
    ctx = start("unified-2", edit_share=0.0, losses=LossWeights(align=1.0))
    monkeypatch.setattr(steps, "velocity_target", lambda x, noise: x * 0)
    original = ctx.modules.model.velocity
    monkeypatch.setattr(
        ctx.modules.model, "velocity", lambda *a: replace(original(*a), velocity=torch.zeros(8, 8, 8, 8))
    )
    run(ctx)["loss"].backward()
    found = gradients(ctx)
    assert moved(found, "model.denoiser.network.transformer_blocks.0.")
    assert not moved(found, "model.denoiser.network.transformer_blocks.1.")  # tiny taps block 1 of 2
    assert moved(found, "model.router.") and moved(found, "model.connector.queries")


def test_the_teachers_get_no_gradient_in_stage_three(start):
    ctx = start("tokenizer-3", losses=LossWeights(mse=1.0, perceptual=1.0, native=1.0, semantic=1.0))
    ctx.modules.teacher.requires_grad_(True)
    with torch.no_grad():
        ctx.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
    run(ctx)["loss"].backward()
    found = gradients(ctx)
    assert not moved(found, "teacher.") and not moved(found, "pixel_encoder.") and moved(found, ENCODER)


def test_every_trainable_part_gets_a_gradient_in_stage_three_and_the_encoder_from_each_term(start):
    only = {
        "mse": LossWeights(mse=1.0), "perceptual": LossWeights(perceptual=1.0), "semantic": LossWeights(semantic=1.0)
    }
    for losses in only.values():
        ctx = start("tokenizer-3", losses=losses)
        with torch.no_grad():
            ctx.modules.teacher.multi_modal_projector.linear_2.weight.mul_(1.5)
        run(ctx)["loss"].backward()
        assert moved(gradients(ctx), ENCODER)
        assert moved(gradients(ctx), "model.tokenizer.decoder.") == (losses.semantic == 0)


def test_the_native_latents_teach_the_pixel_stream_alone(start):
    ctx = start("tokenizer-1", losses=LossWeights(native=1.0))
    run(ctx)["loss"].backward()
    found = gradients(ctx)
    assert moved(found, "model.tokenizer.pixel_stream.")
    assert not moved(found, "model.tokenizer.semantic_stream.") and not moved(found, "model.tokenizer.fusion.")


def test_the_fused_term_holds_the_fused_latent_near_the_native_one(start):
    ctx = start("tokenizer-1", losses=LossWeights(native_fused=1.0))
    terms = run(ctx)
    terms["loss"].backward()
    assert float(terms["loss"]) == pytest.approx(float(terms["native_fused"]))
    found = gradients(ctx)
    assert all(moved(found, f"model.tokenizer.{part}.") for part in ("semantic_stream", "pixel_stream", "fusion"))


def test_latent_noise_is_relative_to_the_latents_size(start):
    ctx = start("tokenizer-2", batch=512, losses=LossWeights(mse=1.0, latent_noise=0.2))
    scale = torch.tensor([1.0, 7.0]).repeat(256)[:, None, None, None]
    latent = torch.randn(512, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
    noise = (steps._add_latent_noise(ctx, 0, latent) - latent) / scale
    sizes = noise.square().mean((1, 2, 3)).sqrt()
    assert 0.19 < float(sizes.max()) < 0.22 and float(sizes.mean()) == pytest.approx(0.1, abs=0.01)
    assert steps._add_latent_noise(start("tokenizer-2", losses=LossWeights(mse=1.0)), 0, latent) is latent


# ---- a term that is on and lacks its input ---------------------------------------------------------------------------


def test_an_external_teacher_that_was_not_loaded_raises(start, tiny_run):
    external = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="external", external="some/encoder"))
    with pytest.raises(ValueError, match="no external teacher was loaded"):
        run(start("unified-2", recipe=external))


@pytest.mark.parametrize("editing", [0.0, 1.0])
def test_an_external_teacher_is_what_aligns_on_its_own_grid(start, tiny_run, monkeypatch, editing):
    external = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="external", external="some/encoder"))

    def teacher(pixels):
        """The colours of the pictures' own 4 x 4 squares, so that order and pairing can be told."""
        colours = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
        return torch.nn.functional.pad(colours, (0, 29)), (4, 4)

    ctx = start("unified-2", recipe=external, edit_share=editing, teacher=teacher)
    calls, grids = spy(monkeypatch, steps, "alignment_loss"), spy(monkeypatch, steps, "match_grid")
    run(ctx)
    rng = ctx.data.rng("unified-2", 0)
    rng.random()
    pixels = ctx.data.pixels(
        ctx.data.draw(rng, 4, edits=bool(editing), kinds=ctx.stage.scene_kinds), edited=bool(editing)
    )
    assert torch.equal(calls[0][1], teacher(pixels)[0].repeat_interleave(2, 0))
    assert grids[0][1:] == ((8, 8), (4, 4)) and calls[0][0].shape == (8, 16, 32)
    everything = teacher(ctx.data.pixels(np.arange(24)))[0]
    assert torch.allclose(ctx.modules.teacher_mean, everything.mean((0, 1)), atol=1e-5)


def test_alignment_with_no_teacher_is_off(start, tiny_run):
    nobody = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="none"))
    terms = run(start("unified-2", recipe=nobody))
    assert "cosine_plain" not in terms and torch.equal(terms["loss"], terms["flow"])
    assert "cosine_plain" in run(start("unified-2"))


def without_pixel_stream(ctx: StepContext) -> StepContext:
    fuse = ctx.modules.model.tokenizer.fuse
    ctx.modules.model.tokenizer.fuse = lambda *args: replace(fuse(*args), z_p=None)
    return ctx


def test_the_native_term_without_a_pixel_stream_raises(start):
    with pytest.raises(ValueError, match="z_p"):
        run(without_pixel_stream(start("tokenizer-1", losses=LossWeights(mse=1.0, native=1.0))))


def test_the_fused_term_needs_no_pixel_stream(start):
    terms = run(without_pixel_stream(start("tokenizer-1", losses=LossWeights(mse=1.0, native_fused=1.0))))
    assert float(terms["native_fused"]) > 0


# ---- learning --------------------------------------------------------------------------------------------------------


def overfit(ctx: StepContext, count: int, term: str, lr: float) -> tuple[float, float]:
    """The first and the last value of a term over `count` steps on the batch of step 0."""
    optimizers = build_optimizers(ctx.modules, replace(ctx.stage, lr=lr))
    values = []
    for _ in range(count):
        terms = run(ctx)
        ctx.modules.zero_grad(set_to_none=True)
        terms["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        values.append(float(terms[term]))
    return values[0], values[-1]


LEARN: list[tuple[str, dict, int, str, float, float]] = [
    ("encoder", {}, 30, "loss", 3e-3, 2.0),
    ("mllm", {}, 40, "loss", 5e-3, 3.0),
    ("tokenizer-2", {"losses": LossWeights(mse=1.0)}, 40, "mse", 3e-3, 3.0),
]


@pytest.mark.parametrize(("stage", "changes", "count", "term", "lr", "factor"), LEARN, ids=[row[0] for row in LEARN])
def test_one_batch_can_be_overfitted(start: Callable[..., StepContext], stage, changes, count, term, lr, factor):
    first, last = overfit(start(stage, **changes), count, term, lr)
    assert last < first / factor
