"""Self-Flow: times of tokens, what teaches and what learns, the average, and a run that is stopped and goes on."""

import signal
from dataclasses import replace

import pytest
import torch

from spar.common.errors import InputError
from spar.flow.path import interpolate
from spar.models.denoiser import Denoiser
from spar.recipes import recipe
from spar.recipes.shapes.data import ShapesTrainingData
from spar.training.checkpoint import load_group
from spar.training.config import StageConfig, freeze
from spar.training.initial_weights import random_modules
from spar.training.objectives.base import StepContext
from spar.training.objectives.self_flow import AVERAGE_FROM_DENOISER, SelfFlowObjective
from spar.training.objectives.unified import CONNECTOR_FROM_LLM
from spar.training.plan import PlannedStage, StageStart, read_run, resolve
from spar.training.trainer import train
from spar.worlds.shapes.tokenizer import build_tokenizer

CPU = torch.device("cpu")


def self_flow_recipe(steps=2, **objective):
    """`tiny` with its joint stage under Self-Flow alone."""
    base = recipe("tiny")
    stage = replace(
        base.stage("unified-2"), objective=SelfFlowObjective(**{"teacher_depth": 2, **objective}), steps=steps, ema=0.0,
        trainable=("model.router.*", "model.connector.*", "model.denoiser.*", "self_flow_head.*"), warmup=1,
    )  # fmt: skip
    return replace(base, name="self-flow", stages=(stage,))


@pytest.fixture(scope="module")
def begin(tiny_run):
    """`begin(...)`: a stage's context, and a step's terms as a function, from the trained tiny model."""

    def build(**objective):
        own = self_flow_recipe(**objective)
        stage: StageConfig = own.stages[0]
        modules = random_modules(own, CPU, {})
        given = {**modules.state_dict(), **load_group(tiny_run.path / "unified-2" / "done", "modules")}
        modules.load_state_dict({name: given[name] for name in modules.state_dict()})
        ctx = StepContext(modules.train(), own.prompts(build_tokenizer()), own, stage, CPU)
        data = ShapesTrainingData(own.data, own.model.grid, own.seed, tiny_run.path / "cache")
        stage.objective.prepare(ctx, data, PlannedStage(stage, StageStart("random"), (AVERAGE_FROM_DENOISER,)))
        freeze(modules, stage)

        def terms(step=0):
            return stage.objective(replace(ctx, step=step), data.get_batch(stage, step, slice(None)))

        return ctx, terms

    return build


def test_times_of_tokens_that_are_one_time_are_that_time(config, randomize):
    """And a token's own time changes its own modulation: with one other time the output differs."""
    denoiser = randomize(Denoiser(config.denoiser, 4, 4))
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(4, 4, 4, 4, generator=generator)
    condition = torch.randn(2, 5, config.denoiser.caption_channels, generator=generator)
    time, mask = torch.tensor([0.1, 0.4, 0.7, 0.9]), torch.ones(2, 5)
    whole = denoiser(latent, time, condition, mask)
    each = denoiser(latent, time[:, None].expand(4, 16), condition, mask)
    torch.testing.assert_close(each.velocity, whole.velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each.features, whole.features, rtol=1e-5, atol=1e-5)
    mixed = time[:, None].repeat(1, 16)
    mixed[:, 3] = 0.0
    assert not torch.allclose(denoiser(latent, mixed, condition, mask).velocity, whole.velocity, atol=1e-3)


def test_a_time_for_each_cell_mixes_each_cell_by_its_own():
    x, noise = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    time = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    mixed = interpolate(x, noise, time.view(2, 1, 2, 2))
    assert torch.equal(mixed, time.view(2, 1, 2, 2).expand(2, 3, 2, 2))
    with pytest.raises(ValueError, match="expected one time for each of 2 samples"):
        interpolate(x, noise, time)
    with pytest.raises(ValueError, match="expected one time for each of 2 samples"):
        interpolate(x, noise, time.view(2, 1, 4, 1))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_each_image_has_two_times_in_the_asked_ratio(begin, ratio):
    ctx, _ = begin(mask_ratio=ratio, noise_samples=3)
    latent, shares = torch.zeros(ctx.stage.batch, 4, 8, 8), []
    for step in range(20):
        own = replace(ctx, step=step)
        noised = ctx.stage.objective.noised(own, latent)
        assert noised.time.shape == (3 * ctx.stage.batch, 64)
        assert all(len(set(row)) == (2 if 0 < ratio < 1 else 1) for row in noised.time.tolist())
        plain = replace(ctx.stage.objective, mask_ratio=0.0).noised(own, latent)
        assert torch.equal(plain.noise, noised.noise)
        shares.append(float((noised.time != plain.time).float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(ratio, abs=0.02)


def test_the_average_teaches_at_the_lesser_time_from_its_last_block(begin, monkeypatch):
    ctx, terms = begin(teacher_depth=2)
    average, calls = ctx.modules.denoiser_average, []
    assert len(average.network.transformer_blocks) == 2
    whole = ctx.modules.model.denoiser
    deeper, channels = replace(whole.config, align_depth=2), ctx.recipe.model.autoencoder.latent_channels

    def seen(module, given, output):
        latent, time, states, mask, reference = given
        monkeypatch.setattr(whole, "config", deeper)
        torch.testing.assert_close(output.features, whole(latent, time, states, mask, reference).features)
        calls.append(time)

    average.register_forward_hook(seen)
    drawn = ctx.stage.objective.noised(ctx, torch.zeros(ctx.stage.batch, channels, *(ctx.recipe.model.grid,) * 2))
    assert {"cosine_plain", "mixed_flow"} <= terms().keys()
    assert torch.equal(calls[0], drawn.time.min(1).values)


def test_gradients_reach_what_trains_and_the_average_has_none(begin):
    ctx, terms = begin(align=1.0)
    terms()["loss"].backward()
    reached = {name for name, p in ctx.modules.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.startswith("self_flow_head.") for name in reached)
    assert {name.split(".")[0] for name in reached} == {"model", "self_flow_head"}
    trains = ("model.router.", "model.connector.", "model.denoiser.", "self_flow_head.")
    assert all(name.startswith(trains) for name in reached)


def test_the_average_is_the_closed_form(begin):
    """a_1 = a + (1 - d) (w - a) with d = min(decay, (1 + n) / (10 + n)) after step n."""
    for decay, step, expected in ((0.999, 0, 0.1), (0.5, 89, 0.5), (0.95, 170, 0.95)):
        ctx, _ = begin(decay=decay)
        average = dict(ctx.modules.denoiser_average.named_parameters())
        before = {name: p.clone() for name, p in average.items()}
        own = dict(ctx.modules.model.denoiser.named_parameters())
        with torch.no_grad():
            for name in average:
                own[name].add_(1.0)
        ctx.stage.objective.after_step(replace(ctx, step=step))
        for name, p in average.items():
            torch.testing.assert_close(p, before[name] + (1 - expected), rtol=0, atol=1e-5)


def test_a_run_that_is_stopped_goes_on_with_its_average(tiny_run, tmp_path):
    own = self_flow_recipe(steps=4)
    start = tiny_run.path / "unified-1" / "done"
    planned = resolve(own, read_run(own, tmp_path / "whole", start)).stages[0]
    assert planned.prepares == (AVERAGE_FROM_DENOISER,) and CONNECTOR_FROM_LLM not in planned.prepares
    train(own, tmp_path / "whole", init_from=start, device="cpu")

    def report(stage, step, steps, values):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    halved = replace(own, log_every=1)
    assert train(halved, tmp_path / "parts", init_from=start, device="cpu", report=report) is None
    train(halved, tmp_path / "parts", init_from=start, device="cpu", resume=True)
    whole, parts = (load_group(tmp_path / name / own.stages[0].name / "done", "modules") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    given = load_group(start, "modules")
    pairs = {name: given[name.replace("denoiser_average.", "model.denoiser.")] for name in whole if "average." in name}
    assert any(not torch.equal(whole[name], begun) for name, begun in pairs.items())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio: expected 0 to 1, got 1.5"),
        ({"decay": float("nan")}, "decay: expected 0 to 1"),
        ({"teacher_depth": 0}, "teacher_depth: expected at least 1"),
        ({"teacher_depth": 9}, "stage unified-2, teacher_depth: expected 1 to 2, got 9"),
    ],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(bad, said):
    with pytest.raises(InputError, match=said):
        self_flow_recipe(**bad)


def test_all_stages_have_one_average():
    """The first stage's objective builds it: another depth in a later one would be that of the first, in silence."""
    own = self_flow_recipe()
    later = replace(own.stages[0], name="later")
    assert replace(own, stages=(*own.stages, later)).stages[1] == later
    deeper = replace(later, objective=replace(later.objective, teacher_depth=1))
    with pytest.raises(InputError, match="teacher_depth: expected one of all self_flow stages, got 2, 1"):
        replace(own, stages=(*own.stages, deeper))
