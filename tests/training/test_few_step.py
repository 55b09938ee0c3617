"""Distillation to few steps: its target in closed forms, where gradients go, the steps that its model then takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from spar.checkpoints.spar_format import load_model
from spar.cli.main import main
from spar.common.errors import InputError
from spar.flow.sampler import euler_times
from spar.inference.pipeline import SparPipeline
from spar.recipes import recipe
from spar.recipes.shapes.curricula import MixedLessons
from spar.recipes.shapes.data import ShapesTrainingData
from spar.training.config import StageConfig, freeze
from spar.training.initial_weights import random_modules
from spar.training.objectives.base import StepContext
from spar.training.objectives.few_step import TEACHER_FROM_DENOISER, FewStepObjective
from spar.training.objectives.unified import CONNECTOR_FROM_LLM
from spar.training.plan import InitFolder, PlannedStage, StageStart, read_run, resolve
from spar.training.trainer import train
from spar.worlds.shapes.tokenizer import build_tokenizer

CPU = torch.device("cpu")


def few_recipe(guidance=4.5, edit_share=0.35, layouts=0.9, edit_guidance=None, **objective):
    """`tiny` with one stage alone."""
    base = recipe("tiny")
    stage = StageConfig(
        "few-steps", FewStepObjective(**objective), ("model.denoiser.*",), steps=2, batch=4, lr=1e-3, lr_end=1e-4,
        warmup=1, optimizer="muon", data=MixedLessons(edit_share=edit_share, layouts=layouts),
    )  # fmt: skip
    flow = replace(base.flow, guidance=guidance, edit_guidance=edit_guidance)
    return replace(base, name="few", stages=(stage,), flow=flow)


@pytest.fixture(scope="module")
def begin(tiny_run):
    """`begin(...)`: a step's terms as a function, and its context, from the trained tiny model."""

    def build(**changes):
        own = few_recipe(**changes)
        stage = own.stages[0]
        modules = random_modules(own, CPU, {})
        modules.model.load_state_dict(load_model(tiny_run.path / "model").model.state_dict())
        prompts = own.prompts(build_tokenizer())
        data = ShapesTrainingData(own.data, own.model.grid, own.seed, tiny_run.path / "cache")
        ctx = StepContext(modules.train(), prompts, own, stage, CPU)
        begins = StageStart("folder", tiny_run.path / "model")
        stage.objective.prepare(ctx, data, PlannedStage(stage, begins, (TEACHER_FROM_DENOISER,)))
        freeze(modules, stage)

        def terms(step=0):
            return stage.objective(replace(ctx, step=step), data.get_batch(stage, step, slice(None)))

        return ctx, terms

    return build


def test_the_times_of_few_steps_are_among_those_of_many():
    for shift in (1.0, 3.0):
        torch.testing.assert_close(euler_times(20, shift)[::5], euler_times(4, shift))
        assert euler_times(4, shift)[0] == 1 and euler_times(4, shift)[-1] == 0


def test_a_teacher_of_one_step_without_guidance_is_the_student_itself(begin):
    """So nothing is missed at the start, and with guidance something is."""
    _, terms = begin(windows=4, teacher_steps=1, guidance=1.0)
    for step in range(3):
        found = terms(step)
        assert float(found["loss"]) < 1e-10 < float(found["teacher_square"])
    _, guided = begin(windows=4, teacher_steps=1, guidance=4.5)
    assert float(guided()["loss"]) > 1e-6


def test_the_teachers_edits_have_their_own_guidance(begin):
    """Without any, one step of its is the student's; a caption's stays guided."""
    own = dict(windows=4, teacher_steps=1, guidance=4.5, edit_guidance=1.0, layouts=0.0)
    for share, missed in ((1.0, False), (0.0, True)):
        _, terms = begin(edit_share=share, **own)
        assert (float(terms()["loss"]) > 1e-6) == missed
    assert float(begin(edit_share=1.0, **{**own, "edit_guidance": None})[1]()["loss"]) > 1e-6


def test_where_the_teacher_arrives_is_eulers_product():
    """A linear field, dx/dt = a x, in steps of the sampler's times; guidance makes it a + s (b - a)."""

    class Linear:
        def key_values(self, states):
            return states

        def __call__(self, x, time, reads, mask, reference):
            return SimpleNamespace(velocity=reads * x)

    times, first = euler_times(6, 3.0), torch.tensor([0, 4])
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ctx = SimpleNamespace(
        parallel=SimpleNamespace(sharded=False), modules=SimpleNamespace(flow_teacher=Linear()),
    )  # fmt: skip
    one, two = (SimpleNamespace(states=value, mask=None, reference=None) for value in (0.5, 0.2))
    for other, rate in ((None, 0.5), (two, 0.2 + 3.0 * (0.5 - 0.2))):
        found = FewStepObjective(windows=3, teacher_steps=2)._arrival(ctx, x, times, first, one, other, 3.0)
        for row, begun in enumerate(first.tolist()):
            factor = 1.0
            for step in range(begun, begun + 2):
                factor *= 1 + rate * float(times[step + 1] - times[step])
            torch.testing.assert_close(found[row], factor * x[row])


def test_gradients_reach_the_denoiser_alone_and_the_teacher_stays(begin):
    ctx, terms = begin(windows=2, teacher_steps=2)
    terms()["loss"].backward()
    reached = {name for name, p in ctx.modules.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached and all(name.startswith("model.denoiser.") for name in reached)
    own, teacher = ctx.modules.model.denoiser.state_dict(), ctx.modules.flow_teacher.state_dict()
    assert all(torch.equal(own[name], teacher[name]) for name in own)


@pytest.mark.parametrize(
    "kind", [{"edit_share": 1.0}, {"edit_share": 0.0, "layouts": 1.0}, {"edit_share": 0.0, "layouts": 0.0}]
)
def test_captions_layouts_and_edits_are_learned_from(begin, kind):
    _, terms = begin(windows=4, teacher_steps=2, **kind)
    assert torch.isfinite(terms()["loss"])


def test_a_trained_model_takes_its_steps_without_guidance(tiny_run, tmp_path):
    own = few_recipe(windows=4, teacher_steps=2)
    plan = resolve(own, read_run(own, tmp_path / "run", tiny_run.path / "model"))
    assert plan.stages[0].prepares == (TEACHER_FROM_DENOISER,)
    train(own, tmp_path / "run", init_from=tiny_run.path / "model", device="cpu")
    pipe = SparPipeline.from_pretrained(tmp_path / "run" / "model", device="cpu", progress=False)
    sampling = pipe.bundle.sampling
    assert (sampling.steps, sampling.guidance, sampling.method, sampling.layout) == (4, 1.0, "euler", True)
    before = load_model(tiny_run.path / "model").model.state_dict()
    changed = {name for name, value in pipe.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("denoiser.") for name in changed)
    assert len(pipe.generate("a red circle", seed=0).images) == 1


def test_the_documented_commands_are_planned(capsys, tmp_path, monkeypatch):
    """From the bundled model by its name; without one it is refused, for it would train on nothing."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "shapes-few-steps", "--init-from", "spar", "--dry-run"]) == 0
    assert TEACHER_FROM_DENOISER in " ".join(capsys.readouterr().out.split())
    for more in ((), ("--from-scratch",)):
        assert main(["train", "shapes-few-steps", "--device", "cpu", *more]) == 2
        assert "stage few-steps goes on from a trained model" in capsys.readouterr().err
    anew = ("--reinitialize", "model.denoiser.*")
    assert main(["train", "shapes-few-steps", "--init-from", "spar", "--dry-run", *anew]) == 2
    assert "expected no --reinitialize" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_starts_that_do_not_draw_are_refused(tiny_run, tmp_path):
    own = few_recipe(windows=2, teacher_steps=2)
    begun = tiny_run.path / "tokenizer-3" / "done"
    with pytest.raises(InputError, match="expected a model that draws in .*got the end of a stage of kind tokenizer"):
        resolve(own, read_run(own, tmp_path, begun))
    assert resolve(own, read_run(own, tmp_path, tiny_run.path / "unified-3" / "done")).stages
    stage = own.stages[0]
    for kind in ("few_step", "self_flow"):  # the latter extends `unified`
        stage.objective.check_folder(stage, InitFolder(tmp_path, False, kind))
    with pytest.raises(InputError, match="end of a stage of kind dit"):
        stage.objective.check_folder(stage, InitFolder(tmp_path, False, "dit"))
    deeper = replace(own, model=replace(own.model, denoiser=replace(own.model.denoiser, layers=3)))
    with pytest.raises(InputError, match="missing"):
        train(deeper, tmp_path / "deeper", init_from=tiny_run.path / "model", device="cpu")


def test_a_model_of_few_steps_is_a_teacher_without_guidance(tiny_run, tmp_path):
    """Of as many steps as it takes; and a unified stage that goes on from there keeps its connector."""
    four = few_recipe(windows=4, teacher_steps=2)
    train(four, tmp_path / "four", init_from=tiny_run.path / "model", device="cpu")
    for wrong in (dict(guidance=4.5), dict(guidance=1.0, teacher_steps=3), dict(guidance=1.0, edit_guidance=2.0)):
        two = few_recipe(**{"windows": 2, "teacher_steps": 2, **wrong})
        with pytest.raises(InputError, match="draws in 4 steps of Euler's without guidance: expected flow.guidance 1"):
            train(two, tmp_path / "two", init_from=tmp_path / "four" / "model", device="cpu")
    two = few_recipe(windows=2, teacher_steps=2, guidance=1.0)
    train(two, tmp_path / "two", init_from=tmp_path / "four" / "model", device="cpu")
    sampling = load_model(tmp_path / "two" / "model").sampling
    assert (sampling.steps, sampling.guidance) == (2, 1.0)
    tiny = tiny_run.recipe
    again = resolve(tiny, read_run(tiny, tmp_path / "x", tmp_path / "four/few-steps/done"), stages=("unified-3",))
    assert CONNECTOR_FROM_LLM not in again.stages[0].prepares


def test_what_is_not_a_denoisers_parameter_is_refused():
    own = few_recipe()
    wrong = replace(own.stages[0], trainable=("model.router.*",))
    with pytest.raises(InputError, match="expected patterns of model.denoiser"):
        replace(own, stages=(wrong,))
    for bad in ({"windows": 0}, {"teacher_steps": 0}):
        with pytest.raises(InputError, match="expected at least 1"):
            FewStepObjective(**bad)
