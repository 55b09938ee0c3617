"""The loop: closed forms, bit-exact resumption, a stop before the optimizer, states that are whole or refused."""

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spar.common.errors import InputError
from spar.data.batches import Images
from spar.recipes.shapes.dense_tagging import DenseTaggingObjective
from spar.training import loop
from spar.training.checkpoint import (
    FoundState,
    TrainState,
    find_state,
    load_group,
    read_meta,
    read_train_state,
    save_folder,
    write_meta,
)
from spar.training.config import StageConfig
from spar.training.data import TrainingData
from spar.training.distributed import DistributedContext, ParallelismConfig
from spar.training.interruption import Interruption, listening
from spar.training.loop import EMA, NonFiniteLoss, Report, clip_grad_norm, learning_rate, run_stage
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.base import Objective, StepContext, Terms
from spar.training.optimizer import Muon, build_optimizers
from spar.training.systems.spar import AlignmentConfig

GROUPS = {"modules", "optimizer", "average"}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def state(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.stem: load_group(folder, path.stem) for path in folder.glob("*.safetensors")}


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def go(begun: Any, run: Path, *, resume: bool = False, report: Report | None = None) -> bool:
    """Train the stage of a Start."""
    return run_stage(begun.ctx, begun.data, run, resume=resume, report=report)


def interrupt(at: int, number: int = signal.SIGINT):
    """A report that sends this process a signal at a step, as Ctrl-C does."""

    def report(stage, step, steps, values):
        if step == at:
            os.kill(os.getpid(), number)

    return report


# ---- the allocator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "calls"),
    [
        (2**40, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),  # glibc before 2.35
        (0, [(-3, 2**30), (-3, 2**25)]),  # the trim threshold alone would make it worse
    ],
)
def test_the_allocator_keeps_memory_as_far_as_it_can_be_told_to(monkeypatch, largest, calls):
    made = []

    def mallopt(option, value):
        made.append((option, value))
        return int(option != -3 or value <= largest)

    monkeypatch.setattr(loop.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    loop.tune_allocator()
    assert made == calls
    loop.tune_allocator(keep=False)
    assert made[len(calls) :] == [(-3, 2**20)]
    monkeypatch.setattr(loop.ctypes, "CDLL", lambda _: SimpleNamespace())
    loop.tune_allocator()


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_then_follows_a_cosine():
    stage = StageConfig("s", AutoencoderObjective(), ("*",), steps=1100, lr=2e-3, lr_end=4e-4, warmup=100)
    assert [learning_rate(stage, step) for step in (0, 49, 99)] == pytest.approx([2e-5, 1e-3, 2e-3])
    for step in (100, 350, 600, 850, 1100):
        share = (step - 100) / 1000
        expected = 4e-4 + 1.6e-3 * (1 + math.cos(math.pi * share)) / 2
        assert learning_rate(stage, step) == pytest.approx(expected)
    assert learning_rate(stage, 600) == pytest.approx(1.2e-3) and learning_rate(stage, 1100) == pytest.approx(4e-4)
    after = [learning_rate(stage, step) for step in range(99, 1100)]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(("warmup", "first"), [(0, 1.0), (1, 1.0), (5, 0.2), (50, 0.02)])
def test_the_warm_up_is_what_the_stage_says_and_can_be_none_or_all(warmup, first):
    stage = StageConfig("s", AutoencoderObjective(), ("*",), steps=50, lr=1.0, lr_end=0.0, warmup=warmup)
    assert learning_rate(stage, 0) == pytest.approx(first)
    assert max(learning_rate(stage, step) for step in range(50)) == pytest.approx(1.0)
    assert learning_rate(stage, max(0, warmup - 1)) == pytest.approx(1.0)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_the_moving_average_in_closed_form(decay):
    module = nn.ParameterDict({"live": nn.Parameter(torch.zeros(3)), "still": nn.Parameter(torch.full((2,), 5.0))})
    module["still"].requires_grad_(False)
    average = EMA(module, decay)
    weight, expected = 1.0, np.zeros(3)
    for step in range(20):
        value = np.array([1.0, step, -(step**2)])
        with torch.no_grad():
            module["live"].copy_(torch.from_numpy(value))
        average.update(step)
        keep = min(decay, (1 + step) / (10 + step))  # short while there is little to remember
        expected, weight = keep * expected + (1 - keep) * value, weight * keep
    assert list(average.averages) == ["live"]
    assert np.allclose(average.averages["live"].numpy(), expected, rtol=1e-5)
    assert average.averages["live"][0] == pytest.approx(
        1 - weight, rel=1e-5
    )  # constant input: 1 - the product of decays
    assert module["live"].tolist() == [1.0, 19.0, -361.0]  # training goes on from its own weights
    average.apply()
    assert np.allclose(module["live"].detach().numpy(), expected, rtol=1e-5) and module["still"].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_loop_sets_each_groups_rate(start, tmp_path, monkeypatch, kind):
    made = []
    monkeypatch.setattr(loop, "build_optimizers", lambda *a: made.extend(build_optimizers(*a)) or made)
    begun = start("tokenizer-3", steps=2, optimizer=kind)
    assert go(begun, tmp_path)
    assert {type(optimizer) for optimizer in made} == {torch.optim.AdamW, *([Muon] if kind == "muon" else [])}
    for optimizer in made:
        rates = {group["factor"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({factor: factor * learning_rate(begun.stage, 1) for factor in (1.0, 0.5, 0.1)})


def test_the_gradient_is_clipped_to_its_norm(start, tmp_path, monkeypatch):
    norms = []

    class Watched(torch.optim.SGD):
        def step(self):
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))

    monkeypatch.setattr(
        loop, "build_optimizers",
        lambda w, s: [Watched([{"params": [p for p in w.parameters() if p.requires_grad], "factor": 1.0}], lr=1.0)],
    )
    go(start("encoder", steps=1, max_grad_norm=0.25), tmp_path)
    assert norms == pytest.approx([0.25], rel=1e-3)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"]
    assert logged > 1  # what is logged is the norm before


def test_the_two_sides_of_the_adversary_are_clipped_apart(start):
    begun = start("tokenizer-3")
    modules, apart = begun.modules, begun.stage.objective.clipped_apart
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 9.0 if name.startswith("discriminator.") else 0.01)
    size = sum(p.numel() for name, p in trainable(modules) if not name.startswith("discriminator."))
    assert float(clip_grad_norm(modules, 1.0, apart=apart)) == pytest.approx(0.01 * size**0.5, rel=1e-3)
    for side in (0, 1):
        rows = [p.grad.square().sum() for n, p in trainable(modules) if n.startswith("discriminator.") == side]
        assert float(torch.stack(rows).sum().sqrt()) == pytest.approx(1.0, rel=1e-3)


def test_where_nothing_is_clipped_apart_there_is_one_norm(start):
    begun = start("unified-2")
    for _, parameter in trainable(begun.modules):
        parameter.grad = torch.full_like(parameter, 0.5)
    size = sum(parameter.numel() for _, parameter in trainable(begun.modules))
    norm = clip_grad_norm(begun.modules, 1.0, apart=begun.stage.objective.clipped_apart)
    assert float(norm) == pytest.approx(0.5 * size**0.5, rel=1e-3)
    rows = [parameter.grad.square().sum() for _, parameter in trainable(begun.modules)]
    assert float(torch.stack(rows).sum().sqrt()) == pytest.approx(1.0, rel=1e-3)


def test_a_discriminators_gradient_that_is_not_finite_is_seen(start):
    begun = start("tokenizer-3")
    modules, apart = begun.modules, begun.stage.objective.clipped_apart
    for name, parameter in trainable(modules):
        parameter.grad = torch.full_like(parameter, math.nan if name.startswith("discriminator.") else 0.01)
    assert not bool(torch.isfinite(clip_grad_norm(modules, 1.0, apart=apart)))


# ---- an objective and a source of one's own --------------------------------------------------------------------------


@dataclass(frozen=True)
class Reddest(Objective):
    """The least that an objective is: the encoder's first feature is to be how red the image is."""

    kind: ClassVar[str] = "reddest"
    takes: ClassVar[tuple[type[Images], ...]] = (Images,)

    def __call__(self, ctx: StepContext, batch: Images) -> Terms:
        found = ctx.modules.model.tokenizer.encoder(batch.pixels)[..., 0].float().mean(1)
        return {"loss": (found - batch.pixels[:, 0].mean((1, 2))).square().mean()}


class Plain(TrainingData):
    """The least that a source is: images of one colour each."""

    def get_batch(self, stage: StageConfig, step: int, rows: slice) -> Images:
        colours = torch.from_numpy(self.rng(stage.name, step).random((stage.batch, 3), np.float32))[rows]
        return Images(keys=np.full(len(colours), -1), pixels=colours[..., None, None].expand(-1, -1, 64, 64))

    def sample(self, count: int) -> tuple[Tensor, ...]:
        return ()


@pytest.mark.slow
def test_an_objective_and_a_source_of_ones_own_are_trained_stopped_and_resumed(start, tmp_path):
    stage = StageConfig(
        "own", Reddest(), ("model.tokenizer.encoder.*",), steps=40, batch=16, lr=3e-3, warmup=1, optimizer="muon"
    )  # fmt: skip

    def train(run, **options):
        ctx = replace(start("encoder").ctx, stage=stage)
        return run_stage(ctx, Plain(seed=0), run, **options)

    assert train(tmp_path / "whole", resume=False)
    losses = [row["loss"] for row in lines(tmp_path / "whole")]
    assert len(losses) == 40 and max(losses[-5:]) < min(losses[:5]) / 5
    assert not train(tmp_path / "parted", resume=False, report=interrupt(20))
    assert train(tmp_path / "parted", resume=True)
    assert [row["loss"] for row in lines(tmp_path / "parted")] == losses
    ends = [load_group(tmp_path / name / "own" / "done", "modules") for name in ("whole", "parted")]
    assert same(*ends)
    config = json.loads((tmp_path / "whole" / "own" / "done" / "meta.json").read_text())["config"]
    assert config["objective"] == {"kind": "reddest"} and config["data"] == {"kind": "images", "image_size": None}


# ---- what a stage measures when it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["tokenizer-1", "tokenizer-3"])
def test_the_measured_latent_scale_gives_unit_size(start, stage):
    begun = start(stage)
    tokenizer, pixels = begun.modules.model.tokenizer, begun.data.pixels(np.arange(len(begun.data.scenes)))
    with torch.no_grad():
        tokenizer.latent_scale.fill_(123.0)
        tokenizer.fusion[-1].weight.mul_(3.0)
    begun.stage.objective.finish(begun.ctx, begun.data)
    with torch.no_grad(), begun.ctx.autocast():
        latents = tokenizer.encode(pixels)
    assert float(tokenizer.normalize(latents.z_f).float().square().mean().sqrt()) == pytest.approx(1, abs=2e-3)
    assert torch.allclose(tokenizer.denormalize(tokenizer.normalize(latents.z_f)), latents.z_f, rtol=1e-2)


@pytest.mark.parametrize("stage", ["unified-2", "unified-3"])
def test_before_alignment_the_teachers_mean_is_measured(start, stage):
    begun = start(stage)
    with torch.no_grad(), begun.ctx.autocast():
        f_v = begun.modules.model.tokenizer.encoder(begun.data.pixels(np.arange(len(begun.data.scenes))))
    assert torch.allclose(begun.modules.teacher_mean, f_v.float().mean((0, 1)), atol=1e-3)
    assert not start("unified-1").modules.teacher_mean.any()


def test_the_measured_native_scale_gives_unit_size(start):
    begun = start("autoencoder")
    begun.stage.objective.finish(begun.ctx, begun.data)
    with torch.no_grad(), begun.ctx.autocast():
        latents = begun.modules.pixel_encoder(begun.data.pixels(np.arange(len(begun.data.scenes)))).float()
    assert float((latents * begun.modules.native_scale).square().mean().sqrt()) == pytest.approx(1, abs=2e-3)
    assert float(begun.modules.native_scale) != 1


@pytest.mark.parametrize("stage", ["mllm", "dit", "unified-1", "unified-2"])
def test_other_stages_measure_nothing(start, stage):
    begun = start(stage)
    before = {name: value.clone() for name, value in begun.modules.state_dict().items()}
    begun.stage.objective.finish(begun.ctx, begun.data)
    assert same(before, begun.modules.state_dict())


# ---- resumption ------------------------------------------------------------------------------------------------------

STEPS_N, CUT = 3, 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind"),
    [("encoder", "adamw"), ("mllm", "muon"), ("tokenizer-3", "muon"), ("unified-2", "adamw"), ("unified-2", "muon")],
)
def test_n_steps_equal_k_then_resume_then_the_rest_bit_for_bit(start, tmp_path, stage, kind):
    def begin():
        return start(stage, steps=STEPS_N, optimizer=kind)

    straight, parted = tmp_path / "straight", tmp_path / "parted"
    last = interrupt(STEPS_N - 1)
    assert not go(begin(), straight, report=last)

    assert not go(begin(), parted, report=interrupt(CUT))
    assert read_train_state(parted / stage / "state").step == CUT + 1
    halfway = state(parted / stage / "state")
    assert any(name.endswith("|momentum") for name in halfway["optimizer"]) == (kind == "muon")
    assert not go(begin(), parted, resume=True, report=last)

    one, other = state(straight / stage / "state"), state(parted / stage / "state")
    assert one.keys() == other.keys() == (GROUPS if begin().stage.ema else GROUPS - {"average"})
    for group in one:
        assert same(one[group], other[group]), group
        assert not same(one[group], halfway[group]), group
    for run in (straight, parted):  # all steps are done: only the end of the stage is left
        assert go(begin(), run, resume=True)
    ends = [load_group(run / stage / "done", "modules") for run in (straight, parted)]
    assert same(*ends)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_in_flight_saves_and_stops(start, tmp_path, number):
    before = signal.getsignal(number)
    begun = start("encoder", steps=9)
    assert go(begun, tmp_path, report=interrupt(2, number)) is False
    assert same(state(tmp_path / "encoder" / "state")["modules"], begun.modules.state_dict())
    meta = json.loads((tmp_path / "encoder" / "state" / "meta.json").read_text())
    assert (meta["stage"], meta["step"], meta["config"]["steps"]) == ("encoder", 3, 9)
    assert not (tmp_path / "encoder" / "done").exists()
    assert signal.getsignal(number) is before


def test_sigusr1_saves_and_goes_on(start, tmp_path):
    seen, folder = [], tmp_path / "encoder" / "state"

    def report(stage, step, *_):
        seen.append(read_train_state(folder) and read_train_state(folder).step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    assert go(start("encoder", steps=4), tmp_path, report=report)
    assert seen == [None, None, 2, 2] and (tmp_path / "encoder" / "done").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_does_not_lose_the_stage(start, tmp_path, monkeypatch, number):
    """While the end is measured and written, a stop is noted: the stage is whole, and the caller stops after it."""
    begun = start("encoder", steps=2)
    finish = type(begun.stage.objective).finish

    def interrupted(self, ctx, data):
        os.kill(os.getpid(), number)
        finish(self, ctx, data)

    monkeypatch.setattr(type(begun.stage.objective), "finish", interrupted)
    with listening() as interruption:
        assert run_stage(begun.ctx, begun.data, tmp_path, resume=False, interruption=interruption)
    assert interruption.stopped and read_train_state(tmp_path / "encoder" / "done").step == 2


def test_without_resume_a_saved_state_is_not_used(start, tmp_path):
    go(start("encoder", steps=4), tmp_path, report=interrupt(1))
    seen = []
    go(start("encoder", steps=4), tmp_path, report=lambda stage, step, *_: seen.append(step))
    assert seen == [0, 1, 2, 3]


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(start, tmp_path):
    seen = []
    assert go(start("encoder", steps=2), tmp_path, resume=True, report=lambda s, step, *_: seen.append(step))
    assert seen == [0, 1]


def test_the_end_holds_the_averaged_weights(start, tmp_path):
    begun = start("dit", steps=3)
    go(begun, tmp_path, report=interrupt(2))
    saved = state(tmp_path / "dit" / "state")
    assert go(start("dit", steps=3), tmp_path, resume=True)
    done = load_group(tmp_path / "dit" / "done", "modules")
    assert saved["average"] and all(torch.equal(done[name], value) for name, value in saved["average"].items())
    assert not same({name: saved["modules"][name] for name in saved["average"]}, saved["average"])


def test_the_state_is_saved_every_so_many_minutes(start, tmp_path, tiny_run):
    def steps_saved(minutes):
        seen, run = [], tmp_path / str(minutes)
        begun = start("encoder", recipe=replace(tiny_run.recipe, save_minutes=minutes), steps=3)
        folder = run / "encoder" / "state"
        go(begun, run, report=lambda *_: seen.append(read_train_state(folder)))
        return [progress and progress.step for progress in seen]

    assert steps_saved(0.0) == [None, 1, 2] and steps_saved(5.0) == [None, None, None]


def test_outside_the_main_thread_signals_are_left_alone():
    import threading

    found = []

    def work():
        with listening() as interruption:
            found.append(interruption)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [Interruption()]


# ---- a freezing that says more than it does --------------------------------------------------------------------------


def test_a_trainable_part_that_the_loss_does_not_reach_is_refused(start, tmp_path):
    begun = start("mllm", trainable=("model.language.*", "model.tokenizer.encoder.*"))  # f_v comes from a cache here
    before = {name: value.clone() for name, value in begun.modules.state_dict().items()}
    with pytest.raises(InputError, match=r"mllm: 'model.tokenizer.encoder.\*' is trainable, but its loss does not"):
        go(begun, tmp_path)
    assert same(before, begun.modules.state_dict())


def test_an_alignment_head_may_rest_where_alignment_is_off_and_nowhere_else(start, tmp_path, tiny_run):
    nobody = replace(tiny_run.recipe, alignment=AlignmentConfig(teacher="none"))
    assert go(start("unified-2", recipe=nobody, steps=1), tmp_path)
    assert go(start("unified-2", align=0.0, steps=1), tmp_path)
    with pytest.raises(InputError, match="alignment_head"):
        go(start("mllm", trainable=("model.language.*", "alignment_head.*")), tmp_path)


# ---- a loss that is not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_a_non_finite_number_stops_before_the_optimizer_and_leaves_the_saved_state(
    start, tmp_path, tiny_run, monkeypatch, where
):
    often = replace(tiny_run.recipe, save_minutes=0.0)
    whole = DenseTaggingObjective.__call__

    def planted(objective, ctx, batch):
        terms = whole(objective, ctx, batch)
        if ctx.step == 2:
            weight = ctx.modules.dense_head.coverage.weight
            poison = torch.full((), math.nan) if where == "loss" else (weight * 0).sum().sqrt()
            terms["loss"] = terms["loss"] + poison
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(DenseTaggingObjective, "__call__", planted)
        begun = start("encoder", recipe=often, steps=4)
        with pytest.raises(NonFiniteLoss, match="stage encoder, step 2: .*shape"):
            go(begun, tmp_path)
    folder = tmp_path / "encoder" / "state"
    assert read_train_state(folder).step == 2
    assert same(load_group(folder, "modules"), begun.modules.state_dict())
    assert all(torch.isfinite(value).all() for value in load_group(folder, "modules").values())

    assert go(start("encoder", steps=4), tmp_path, resume=True)
    assert go(start("encoder", steps=4), tmp_path / "other")
    ends = [load_group(run / "encoder" / "done", "modules") for run in (tmp_path, tmp_path / "other")]
    assert same(*ends)


# ---- states that are damaged -----------------------------------------------------------------------------------------


@pytest.fixture
def stopped(start, tmp_path):
    """A run stopped in the middle of a stage with an average, and its saved state."""
    go(start("dit", steps=4), tmp_path, report=interrupt(1))
    return tmp_path, tmp_path / "dit" / "state"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(path: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip(path: Path) -> None:
    """One bit in the middle of a file, which no header tells of."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [
    *((lambda s, name=name: cut(s / f"{name}.safetensors"), f"{name}.safetensors disagrees with its checksum")
      for name in ("modules", "optimizer", "average")),
    *((lambda s, name=name: flip(s / f"{name}.safetensors"), f"{name}.safetensors disagrees with its checksum")
      for name in ("modules", "optimizer", "average")),
    (lambda s: (s / "modules.safetensors").write_bytes(b""), "modules.safetensors disagrees with its checksum"),
    (lambda s: (s / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    (lambda s: rewrite(s / "average.safetensors", lambda t: t.popitem()), "average.safetensors disagrees"),
    (lambda s: cut(s / "meta.json"), "meta.json is not readable JSON"),
    (lambda s: flip(s / "meta.json"), "meta.json"),
    (lambda s: (s / "meta.json").write_text("[]"), "expected a JSON object, got list"),
    (lambda s: (s / "meta.json").write_text("{}"), "meta.json disagrees with its own checksum"),
    (lambda s: (s / "meta.json").unlink(), "meta.json is missing"),
    (lambda s: write_meta(s, {**read_meta(s), "step": "2"}), "int, got '2'"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_state_is_refused_in_words_and_never_taken_for_none(start, stopped, damage, message):
    run, folder = stopped
    damage(folder)
    with pytest.raises(InputError, match=message):
        go(start("dit", steps=4), run, resume=True)
    assert not (run / "dit" / "done").exists()


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES[:-1]])
def test_an_older_whole_state_is_taken_and_says_so(start, tmp_path, caplog, tiny_run, damage):
    """Two states are kept; the run that goes on from the older one ends as one that never stopped."""
    often = replace(tiny_run.recipe, save_minutes=0.0)
    go(start("dit", recipe=often, steps=5), tmp_path / "run", report=interrupt(2))
    folder = tmp_path / "run" / "dit" / "state"
    assert [find_state(folder.with_name(name)).state.step for name in ("state", "state.1")] == [3, 2]
    assert not folder.with_name("state.2").exists()
    damage(folder)
    seen = []
    assert go(start("dit", recipe=often, steps=5), tmp_path / "run", resume=True,
              report=lambda s, step, *_: seen.append(step))  # fmt: skip
    assert seen == [2, 3, 4] and "passed over state (" in caplog.text and "going on from state.1" in caplog.text
    assert go(start("dit", steps=5), tmp_path / "straight")
    assert same(*(load_group(tmp_path / name / "dit" / "done", "modules") for name in ("run", "straight")))


def test_all_processes_go_on_from_the_state_that_the_main_one_has_found(start, tmp_path, tiny_run):
    """One that read the newest state in a bad moment went on from an older one alone, or removed what others read."""
    often = replace(tiny_run.recipe, save_minutes=0.0)
    go(start("encoder", recipe=often, steps=5), tmp_path, report=interrupt(2))
    state, older = (tmp_path / "encoder" / name for name in ("state", "state.1"))
    decided = FoundState(older, TrainState("encoder", 2), ("state (it could not be read)",), (state,))

    class Second(DistributedContext):
        def main_only(self, work):
            return decided

    begun = start("encoder", recipe=often, steps=5)
    ctx = replace(begun.ctx, parallel=Second(rank=1))
    assert loop.begin_stage(ctx, tmp_path, resume=True).start == 2 and state.is_dir()


@pytest.mark.parametrize(("saved", "warns"), [("bfloat16", True), ("float32", False), (None, False)])
def test_a_state_of_another_type_is_resumed_with_a_warning(start, tmp_path, caplog, saved, warns):
    plain = {"parallel": DistributedContext(config=ParallelismConfig(precision="fp32"))}
    begun = start("encoder", steps=3)
    run_stage(replace(begun.ctx, **plain), begun.data, tmp_path, resume=False, report=interrupt(0))
    folder = tmp_path / "encoder" / "state"
    assert read_meta(folder)["dtype"] == "float32"
    write_meta(folder, {key: value for key, value in {**read_meta(folder), "dtype": saved}.items() if value})
    begun = start("encoder", steps=3)
    assert loop.begin_stage(replace(begun.ctx, **plain), tmp_path, resume=True).start == 1
    assert ("its steps so far were computed in bfloat16, the others will be in float32" in caplog.text) == warns


def test_one_state_is_kept_where_the_recipe_says_so(start, tmp_path, tiny_run):
    once = replace(tiny_run.recipe, save_minutes=0.0, keep_states=1)
    go(start("encoder", recipe=once, steps=5), tmp_path, report=interrupt(2))
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["state"]


# ---- weights that are not finite -------------------------------------------------------------------------------------


def spoil(begun) -> None:
    with torch.no_grad():
        next(p for p in begun.modules.parameters() if p.requires_grad).view(-1)[0] = float("nan")


@pytest.mark.parametrize("last", [False, True])
def test_weights_that_are_not_finite_are_never_written(start, tmp_path, tiny_run, monkeypatch, last):
    """An update that overflows after a finite loss: neither state nor end is written over, and the run can go on."""
    often = replace(tiny_run.recipe, save_minutes=0.0)
    begun = start("encoder", recipe=often, steps=4)
    step = loop.train_step

    def overflowing(ctx, *rest, **keywords):
        done = step(ctx, *rest, **keywords)
        if ctx.step == (3 if last else 2):
            spoil(begun)
        return done

    monkeypatch.setattr(loop, "train_step", overflowing)
    said = r"after step \d weights are not finite \(.* of modules.*nothing was written"
    with pytest.raises(NonFiniteLoss, match=said):
        go(begun, tmp_path)
    monkeypatch.undo()
    assert find_state(tmp_path / "encoder" / "state").state.step == (3 if last else 2)
    assert not (tmp_path / "encoder" / "done").exists()
    assert go(start("encoder", recipe=often, steps=4), tmp_path, resume=True)


def test_a_loss_that_is_not_finite_names_the_samples(start, tmp_path):
    begun = start("encoder", steps=2)
    keys = begun.batch(0).keys.tolist()
    with torch.no_grad():
        next(begun.modules.model.tokenizer.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=f"samples: {', '.join(map(str, keys))}$"):
        go(begun, tmp_path)


def test_a_save_that_was_cut_between_its_two_renames_is_resumed(start, stopped):
    run, folder = stopped
    folder.rename(folder.with_name("state.old"))
    seen = []
    assert go(start("dit", steps=4), run, resume=True, report=lambda s, step, *_: seen.append(step))
    assert seen == [2, 3]


def test_a_save_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    target = tmp_path / "stage" / "state"
    save_folder(target, {"a": {"x": torch.ones(2)}}, vars(TrainState("s", 1)))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("spar.training.checkpoint.save_file", full)
        with pytest.raises(OSError):
            save_folder(target, {"a": {"x": torch.zeros(2)}}, vars(TrainState("s", 2)))
    assert read_train_state(target).step == 1 and load_group(target, "a")["x"].tolist() == [1, 1]
    save_folder(target, {"b": {"x": torch.zeros(2)}}, vars(TrainState("s", 3)))  # over what the failed one left
    assert sorted(p.name for p in target.iterdir()) == ["b.safetensors", "meta.json"]
    assert [p.name for p in target.parent.iterdir()] == ["state"]


def test_no_state_is_no_progress(tmp_path):
    assert read_train_state(tmp_path / "state") is None


# ---- metrics ---------------------------------------------------------------------------------------------------------


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_logged_step_is_a_line_of_finite_numbers(tiny_run):
    read = lines(tiny_run.path)
    expected = [(stage.name, step) for stage in tiny_run.recipe.stages for step in range(3)]
    assert [(row["stage"], row["step"]) for row in read] == expected
    for row, (stage, step, steps, values) in zip(read, tiny_run.reports, strict=True):
        assert row == {"stage": stage, "step": step, **values} and steps == 3
        assert {"loss", "lr", "grad_norm", "seconds"} <= values.keys()
        assert all(math.isfinite(value) for value in values.values()) and values["grad_norm"] > 0
        assert values["lr"] == learning_rate(tiny_run.recipe.stage(stage), step)
    for before, after in zip(read, read[1:], strict=False):
        assert before["stage"] != after["stage"] or before["seconds"] < after["seconds"]


def test_the_curves_are_in_tensorboard_too(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tiny_run.path / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("unified-2/loss")]
    assert logged == pytest.approx([row["loss"] for row in lines(tiny_run.path) if row["stage"] == "unified-2"])


def test_steps_between_are_not_logged_but_the_last_is(start, tmp_path, tiny_run):
    begun = start("encoder", recipe=replace(tiny_run.recipe, log_every=3), steps=6)
    go(begun, tmp_path)
    assert [row["step"] for row in lines(tmp_path)] == [0, 3, 5]


def test_the_seconds_go_on_where_a_resumed_stage_stopped(start, tmp_path):
    go(start("encoder", steps=4), tmp_path, report=interrupt(1))
    folder = tmp_path / "encoder" / "state"
    write_meta(folder, {**read_meta(folder), "seconds": 1000.0})
    go(start("encoder", steps=4), tmp_path, resume=True)
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 3]
    assert [row["seconds"] > 1000 for row in lines(tmp_path)] == [False, False, True, True]
    assert json.loads((tmp_path / "encoder" / "done" / "meta.json").read_text())["seconds"] > 1000


def test_after_a_crash_each_step_is_logged_once(start, tmp_path):
    def crash(stage, step, *_):
        if step == 3:
            raise MemoryError

    go(start("encoder", steps=5), tmp_path, report=interrupt(1))
    with pytest.raises(MemoryError):
        go(start("encoder", steps=5), tmp_path, resume=True, report=crash)
    go(start("encoder", steps=5), tmp_path, resume=True)
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_run_without_tensorboard_keeps_its_lines(start, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    go(start("encoder", steps=1), tmp_path)
    assert len(lines(tmp_path)) == 1 and not (tmp_path / "tensorboard").exists()


def test_states_hold_no_pickle(stopped):
    _, folder = stopped
    assert sorted(p.name for p in folder.iterdir()) == [
        "average.safetensors", "meta.json", "modules.safetensors", "optimizer.safetensors"
    ]
    shutil.rmtree(folder)


def test_a_damaged_newer_state_is_gone_before_the_next_save(start, tmp_path, tiny_run):
    """Else it would be put in the place of the whole one, and a kill in between would leave nothing."""
    often = replace(tiny_run.recipe, save_minutes=0.0)
    go(start("encoder", recipe=often, steps=5), tmp_path, report=interrupt(2))
    folder = tmp_path / "encoder" / "state"
    flip(folder / "modules.safetensors")
    names = []
    go(start("encoder", recipe=replace(often, save_minutes=60.0), steps=5), tmp_path, resume=True,
       report=lambda *_: names.append(sorted(path.name for path in folder.parent.iterdir())))  # fmt: skip
    assert names[0] == ["state.1"]


def test_a_state_whose_removal_was_broken_off_is_none(start, tmp_path, tiny_run, monkeypatch):
    go(start("encoder", steps=3), tmp_path, report=interrupt(1))
    folder = tmp_path / "encoder" / "state"
    from spar.training import checkpoint

    real = checkpoint.shutil.rmtree
    removed = []

    def broken_off(path, **keywords):
        removed.append(Path(path).name)
        if Path(path).exists() and Path(path).suffix == ".trash":
            (Path(path) / "meta.json").unlink()
            raise KeyboardInterrupt
        real(path, **keywords)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", broken_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove_states(folder)
    monkeypatch.undo()
    assert find_state(folder) is None and [path.name for path in folder.parent.iterdir()] == ["state.trash"]
