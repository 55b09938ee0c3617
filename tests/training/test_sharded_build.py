"""A sharded run's modules: the weights of one process, bit by bit, which no process ever holds whole."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from spar.checkpoints.safetensors_io import JoinedTensors, SafetensorsReader
from spar.checkpoints.spar_format import load_model
from spar.common.errors import InputError
from spar.common.generators import cpu_generator
from spar.recipes import recipe
from spar.recipes.shapes.curricula import MixedLessons
from spar.training import loop
from spar.training.checkpoint import GroupReader, checksum, load_group, save_folder, shards, write_meta
from spar.training.config import StageConfig, freeze
from spar.training.distributed import (
    DistributedContext,
    ParallelismConfig,
    copy_weights,
    own_rows,
    shard_modules,
    whole_tensor,
)
from spar.training.initial_weights import (
    load_initial_weights,
    load_previous_weights,
    random_modules,
    random_rows,
    stored_modules,
)
from spar.training.objectives.base import StepContext
from spar.training.objectives.few_step import FewStepObjective
from spar.training.objectives.self_flow import SelfFlowObjective
from spar.training.sharded_build import RowKeeper, build_rows
from spar.training.systems.spar import GrownVocabulary
from spar.training.trainer import train
from spar.worlds.shapes.tokenizer import build_tokenizer

LAUNCHED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import {module} as here
here.{function}(*map(Path, sys.argv[1:]))
"""
STAGE = "unified-2"  # averages, a frozen LLM and tokenizer, a scalar that trains


def on_two_processes(function, *paths):
    """Call a function of this module on two processes; their errors are those of the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = paths[0] / "both.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), module=Path(__file__).stem, function=function))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def built(rank, world, made, resident=0):
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(cpu_generator(made.seed).get_state())
        return build_rows(lambda: made.build({}), DistributedContext(rank, world, sharded=True), resident)


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "dualtoken-tiny", "lora"])
def test_the_rows_of_all_processes_are_the_weights_of_a_whole_build(name):
    """Also with LoRA, and where a weight is whole only while an operation works on it."""
    made = recipe("tiny" if name == "lora" else name)
    made = replace(made, lora=replace(made.lora, rank=2)) if name == "lora" else made
    whole = random_modules(made, "cpu", {})
    parts = [built(rank, 2, made) for rank in range(2)]
    for modules, rows in parts:
        assert all(parameter.is_meta for parameter in modules.parameters())
        assert same(dict(modules.named_buffers()), dict(whole.named_buffers()))  # those that no file has too
        assert {key: value.shape for key, value in modules.state_dict().items()} == {
            key: value.shape for key, value in whole.state_dict().items()
        }
        assert rows.keys() == dict(whole.named_parameters()).keys()
    for key, value in whole.named_parameters():
        joined = torch.cat([rows[key] for _, rows in parts]) if value.dim() else parts[0][1][key]
        assert torch.equal(joined, value), key


def test_a_process_holds_its_rows_and_what_is_worked_on(monkeypatch):
    """At most a handful of tensors are whole at any time, though the build draws all of them."""
    made, most, give_back = recipe("tiny"), [0], RowKeeper._give_back

    def spying(keeper, used):
        give_back(keeper, used)
        alive = [kept.size for reference, kept in keeper.whole.items() if not reference.expired()]
        most[0] = max(most[0], sum(alive))

    monkeypatch.setattr(RowKeeper, "_give_back", spying)
    modules, rows = built(0, 2, made)
    sizes = [parameter.numel() * 4 for parameter in modules.parameters()]
    held = sum(value.untyped_storage().nbytes() for value in rows.values())
    assert most[0] <= sum(sorted(sizes)[-2:]) < sum(sizes) / 2
    assert 0.45 < held / sum(sizes) < 0.6


def test_rows_are_those_that_fsdp_gives():
    for count in (1, 2, 5, 8, 9):
        for world in (1, 2, 3, 4):
            chunks = [len(chunk) for chunk in torch.arange(count).chunk(world)]
            found = [own_rows(count, rank, world) for rank in range(world)]
            assert [part.stop - part.start for part in found] == chunks + [0] * (world - len(chunks))


def test_a_tied_parameter_stays_tied():
    def build():
        one, other = nn.Linear(3, 4), nn.Linear(3, 4)
        other.weight = one.weight
        return nn.ModuleDict({"one": one, "other": other})

    modules, rows = build_rows(build, DistributedContext(1, 2, sharded=True))
    assert modules["one"].weight is modules["other"].weight and modules["one"].weight.is_meta
    assert {key: len(value) for key, value in rows.items()} == {"one.weight": 2, "one.bias": 2, "other.bias": 2}


def test_clones_and_views_of_a_weight_see_what_is_done_to_it():
    keeper = RowKeeper(0, 2, resident=0)
    with keeper:
        weights = [nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
        for weight in weights:
            keeper.keep(weight)
        with torch.no_grad():
            copy = weights[0].clone()
            weights[1].fill_(2)
            copy[1].fill_(1)  # a view of a row, as an embedding's padding is
            weights[2].copy_(copy).mul_(3)
            weights[0].view(2, 6).add_(weights[1].view(2, 6))
    assert [keeper.take(one).tolist() for one in (*weights, copy)] == [
        [[2.0] * 3, [2.0] * 3], [[2.0] * 3, [2.0] * 3], [[0.0] * 3, [3.0] * 3], [[0.0] * 3, [1.0] * 3],
    ]  # fmt: skip


def test_rows_of_a_group_are_read_from_all_processes_files(tmp_path):
    """One file of all, and a sharded group of three processes, one of them with none."""
    whole = {"a": torch.arange(8.0).view(4, 2), "b": torch.tensor(3.0), "c": torch.arange(5)}
    for rank in range(3):
        own = {key: value[own_rows(len(value), rank, 3)] for key, value in whole.items() if value.dim()}
        starts = {key: [own_rows(len(whole[key]), rank, 3).start, len(whole[key])] for key in own}
        path = tmp_path / f"modules-{rank:05}-of-00003.safetensors"
        save_file({**own, **({"b": whole["b"]} if rank == 0 else {})}, path, {"rows": str(starts).replace("'", '"')})
    write_meta(tmp_path, {"files": {path.name: checksum(path) for path in tmp_path.glob("*.safetensors")}})
    reader = GroupReader(tmp_path, "modules")
    assert {key: value.shape for key, value in reader.shapes.items()} == {k: v.shape for k, v in whole.items()}
    assert same(load_group(tmp_path, "modules"), whole)
    for rows in (slice(0, 4), slice(1, 3), slice(3, 3), slice(2, 4)):
        assert torch.equal(reader.read_rows("a", rows), whole["a"][rows])
    save_file(whole, tmp_path / "one.safetensors")
    assert torch.equal(SafetensorsReader(tmp_path / "one.safetensors").read_rows("a", slice(2, 2)), whole["a"][2:2])


@pytest.mark.parametrize("name", ["tiny", "dualtoken-tiny"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_written_from_stored_weights_is_the_one_of_whole_modules(name, rank, tmp_path):
    """Byte by byte, with LoRA's additions too; until then its parameters are nowhere but on the disk."""
    made = recipe(name)
    made, last = replace(made, lora=replace(made.lora, rank=rank)), made.stages[-1].name
    whole, prompts = random_modules(made, "cpu", {}), made.prompts(build_tokenizer())
    for parameter in whole.parameters():
        parameter.data.add_(0.01)
    meta = {"stage": last, "step": 1, "seconds": 1.0}
    save_folder(tmp_path / "run" / last / "done", {"modules": whole.state_dict()}, meta)
    outlines, stored = stored_modules(made, tmp_path / "run" / last / "done", {})
    assert all(parameter.is_meta for parameter in outlines.parameters())
    made.save_stored(outlines, stored, tmp_path / "run", prompts)
    made.save(whole, tmp_path / "other", prompts)
    written = sorted(path.relative_to(tmp_path / "other") for path in (tmp_path / "other").rglob("*.safetensors"))
    assert len(written) >= 5
    for path in written:
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "other" / path).read_bytes(), path


def test_rows_of_a_vocabulary_that_grows_begin_at_the_mean_of_the_old_ones():
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = JoinedTensors({}, {"network.embed_tokens.weight": table, "network.norm.weight": torch.ones(3)})
    grown, whole = GrownVocabulary(stored, 8), torch.cat([table.float(), table.float().mean(0).expand(3, -1)])
    assert {name: len(value) for name, value in grown.shapes.items()} == {
        "network.embed_tokens.weight": 8, "network.norm.weight": 3,
    }  # fmt: skip
    assert torch.equal(grown.read("network.embed_tokens.weight"), whole)
    for rows in (slice(0, 4), slice(4, 8), slice(6, 8), slice(5, 6), slice(3, 3)):
        assert torch.equal(grown.read_rows("network.embed_tokens.weight", rows).float(), whole[rows])
    assert torch.equal(grown.read("network.norm.weight"), torch.ones(3))
    assert GrownVocabulary(stored, 5).shapes["network.embed_tokens.weight"].shape == (5, 3)  # nothing to add


def test_numbers_that_are_not_finite_are_not_loaded(tmp_path):
    modules = random_modules(recipe("tiny"), "cpu", {})
    broken = dict(modules.state_dict())
    broken["native_scale"] = torch.tensor(float("nan"))
    save_folder(tmp_path / "done", {"modules": broken}, {"stage": "dit", "step": 1})
    with pytest.raises(InputError, match="expected finite weights, got native_scale"):
        load_previous_weights(modules, tmp_path / "done")


# ---- two processes ---------------------------------------------------------------------------------------------------


def check_build(scratch, done, model):
    """On each of two processes, with frozen weights sharded and whole."""
    made = recipe("tiny")
    made = replace(made, stages=tuple(replace(one, optimizer="adamw") for one in made.stages))
    stage = made.stage(STAGE)
    for shard_frozen in (True, False):
        parallelism = ParallelismConfig(strategy="fsdp", shard_frozen=shard_frozen, precision="fp32")
        parallel = DistributedContext.initialize(parallelism, "cpu")
        whole = random_modules(made, "cpu", {})
        modules, rows = random_rows(made, parallel, {})
        freeze(modules, stage)
        frame = shard_modules(modules, parallel, rows)
        assert not rows and _all_same(modules, whole)
        own = [parameter.to_local().numel() for parameter in modules.parameters() if isinstance(parameter, DTensor)]
        of = sum(parameter.numel() for parameter in modules.parameters() if isinstance(parameter, DTensor))
        assert 0.4 < sum(own) / of < 0.6
        for name, parameter in modules.named_parameters():
            sharded = bool(parameter.dim()) and (parameter.requires_grad or shard_frozen)
            assert isinstance(parameter, DTensor) == sharded, name
        assert modules.model.language.head is None  # the words' table is the head
        for load in (
            lambda one: load_previous_weights(one, done),
            lambda one: load_initial_weights(one, model, stage, made, ("model.router.*",)),
        ):
            load(modules)
            load(whole)
            assert _all_same(modules, whole)
        for one in (modules, whole):
            copy_weights(one.teacher, one.model.tokenizer.encoder)
            one.model.connector.initialize_from(one.model.language, copy_weights)
        layers = modules.model.connector.layers, modules.model.language.network.layers
        assert same(*({key: whole_tensor(value) for key, value in part[-1].state_dict().items()} for part in layers))
        assert _all_same(modules, whole)
        ctx = StepContext(modules, None, made, stage, parallel.device, parallel=parallel, sharded=frame)
        pixels = torch.rand(2, 3, made.image_size, made.image_size, generator=torch.Generator().manual_seed(0))
        encoded = ctx.compute(modules.model.tokenizer.encode, pixels).z_f
        torch.testing.assert_close(encoded, whole.model.tokenizer.encode(pixels).z_f.detach())
        assert _all_same(modules, whole)  # and sharded again
        going = loop.begin_stage(ctx, scratch / str(shard_frozen), resume=False)
        assert going.wrapper is frame and going.average is not None
        states = [value for one in going.optimizers for field in one.state.values() for value in field.values()]
        for value in (*going.average.averages.values(), *states):
            assert isinstance(value, DTensor) or not value.dim()


def _all_same(sharded, whole):
    own = {key: whole_tensor(value) for key, value in [*sharded.named_parameters(), *sharded.named_buffers()]}
    return same(own, dict([*whole.named_parameters(), *whole.named_buffers()]))


@pytest.mark.slow
def test_two_processes_build_and_load_what_one_does(tiny_run, tmp_path):
    on_two_processes("check_build", tmp_path, tiny_run.path / "tokenizer-3" / "done", tiny_run.path / "model")


def short():
    """`tiny` to its second unified stage, which is the last then."""
    base = recipe("tiny")
    stages = tuple(replace(s, optimizer="adamw", lr=1e-5, lr_end=1e-6, steps=4) for s in base.stages)
    last = [stage.name for stage in stages].index(STAGE)
    return replace(base, stages=stages[: last + 1], save_minutes=0.0, log_every=1)


def train_with_a_stop(run, first):
    """Stop after the second step; go on; at the end all is done, and the model is written again."""
    parallelism = ParallelismConfig(strategy="fsdp", precision="fp32")

    def stopping(_stage, step, _steps, _values):
        if step == 1:
            os.kill(os.getpid(), 15)

    begin = {"stages": (STAGE,), "parallelism": parallelism, "device": "cpu"}
    assert train(short(), run / "run", init_from=first, report=stopping, **begin) is None
    for _ in range(2):
        model = train(short(), run / "run", resume=True, **begin)
        assert isinstance(model.language.network.embed_tokens.weight, DTensor)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_state_and_writes_its_model(tiny_run, tmp_path):
    first = tiny_run.path / "unified-1" / "done"
    on_two_processes("train_with_a_stop", tmp_path, first)
    run, other = tmp_path / "run", tmp_path / "alone"
    train(short(), other, stages=(STAGE,), init_from=first, parallelism=ParallelismConfig(precision="fp32"))
    done, ended = load_group(run / STAGE / "done", "modules"), load_group(other / STAGE / "done", "modules")
    assert len(shards(run / STAGE / "done", "modules")) == 2
    before = load_group(first, "modules")
    trained = [key for key in ended if not torch.equal(ended[key], before[key])]
    moved, apart = (sum(float((x[k] - ended[k]).square().sum()) for k in trained) ** 0.5 for x in (before, done))
    assert len(trained) > 20 and apart < 0.01 * moved
    written = load_model(run / "model").model.state_dict()
    assert same(written, {key: done[f"model.{key}"] for key in written})


def distillation():
    """`tiny` to few steps, at a rate so low that rounding does not grow."""
    stage = StageConfig(
        "few-steps", FewStepObjective(windows=2, teacher_steps=2), ("model.denoiser.*",), steps=3, batch=4, lr=1e-5,
        lr_end=1e-6, warmup=1, optimizer="adamw", data=MixedLessons(edit_share=0.4, layouts=0.5),
    )  # fmt: skip
    return replace(recipe("tiny"), name="few", stages=(stage,), log_every=1)


def distil(run, model):
    parallelism = ParallelismConfig(strategy="fsdp", precision="fp32")
    trained = train(distillation(), run / "run", init_from=model, parallelism=parallelism, device="cpu")
    assert isinstance(trained.denoiser.network.proj_out.weight, DTensor)


@pytest.mark.slow
def test_distillation_to_few_steps_among_processes_is_that_of_one(tiny_run, tmp_path):
    """Also its teacher is sharded; both have the same losses, and say how the model is sampled then."""
    on_two_processes("distil", tmp_path, tiny_run.path / "model")
    runs = tmp_path / "run", tmp_path / "alone"
    train(distillation(), runs[1], init_from=tiny_run.path / "model", parallelism=ParallelismConfig(precision="fp32"))
    ours, alone = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    assert len(ours) == len(alone) == 3
    for one, other in zip(ours, alone, strict=True):
        for name in ("loss", "teacher_square", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=5e-4, abs=2e-5), name
    assert len(shards(runs[0] / "few-steps" / "done", "modules")) == 2
    teacher, before = load_group(runs[0] / "few-steps" / "done", "modules"), load_model(tiny_run.path / "model").model
    for key, value in before.denoiser.state_dict().items():
        assert torch.equal(teacher[f"flow_teacher.{key}"], value), key
    assert load_model(runs[0] / "model").sampling == load_model(runs[1] / "model").sampling
    assert load_model(runs[0] / "model").sampling.steps == 2


def self_flow():
    """`tiny` whose denoiser learns from its own average, in two stages at a rate at which rounding does not grow."""
    base = recipe("tiny")
    trainable = ("model.router.*", "model.connector.*", "model.denoiser.*", "self_flow_head.*")
    stages = tuple(
        replace(
            base.stage(name), objective=SelfFlowObjective(teacher_depth=2, decay=0.5), trainable=trainable, steps=3,
            optimizer="adamw", lr=1e-5, lr_end=1e-6, warmup=1,
        )
        for name in ("unified-2", "unified-3")
    )  # fmt: skip
    return replace(base, name="self-flow", stages=stages, log_every=1)


def teach_itself(run, first):
    """On each of two processes, with frozen weights sharded, the average's among them, and whole; one stops between."""

    def stopping(_stage, step, _steps, _values):
        if step == 1:
            os.kill(os.getpid(), 15)

    for frozen in (True, False):
        parallelism = ParallelismConfig(strategy="fsdp", shard_frozen=frozen, precision="fp32")
        given = {"init_from": first, "parallelism": parallelism, "device": "cpu"}
        folder = run / str(frozen)
        if frozen:
            assert train(self_flow(), folder, report=stopping, **given) is None
        assert train(self_flow(), folder, resume=frozen, **given) is not None


@pytest.mark.slow
def test_a_denoiser_that_teaches_itself_among_processes_is_that_of_one(tiny_run, tmp_path):
    """Its losses, its gradients and its average, which moves with weights that no process holds whole."""
    first = tiny_run.path / "unified-1" / "done"
    on_two_processes("teach_itself", tmp_path, first)
    train(self_flow(), tmp_path / "alone", init_from=first, parallelism=ParallelismConfig(precision="fp32"))
    start = load_group(first, "modules")
    for frozen in ("True", "False"):
        runs = tmp_path / frozen, tmp_path / "alone"
        ours, alone = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
        assert [(row["stage"], row["step"]) for row in ours] == [(row["stage"], row["step"]) for row in alone]
        assert len(ours) == 6 and {"cosine_plain", "mixed_flow", "grad_norm"} <= ours[0].keys() == alone[0].keys()
        for one, other in zip(ours, alone, strict=True):
            for name in one.keys() - {"stage", "step", "seconds"}:
                assert one[name] == pytest.approx(other[name], rel=5e-4, abs=2e-5), (frozen, one["step"], name)
        before = start
        for stage in self_flow().stages:
            done, ended = (load_group(run / stage.name / "done", "modules") for run in runs)
            assert done.keys() == ended.keys()
            for part in ("model.denoiser.", "denoiser_average."):
                moved, apart = 0.0, 0.0
                for key in (key for key in ended if key.startswith(part)):
                    began = before[key.replace("denoiser_average.", "model.denoiser.")]
                    moved += float((began - ended[key]).square().sum())
                    apart += float((done[key] - ended[key]).square().sum())
                assert apart < 1e-4 * moved, (frozen, stage.name, part, apart, moved)
            before = ended
