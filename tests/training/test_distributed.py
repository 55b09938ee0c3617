"""Several processes: the losses and weights of one, states that any number of processes reads, a lost process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spar.common.errors import InputError
from spar.common.process_group import PATIENCE
from spar.models.blocks import BLOCKS, repeated_blocks
from spar.recipes import recipe
from spar.training import distributed as module
from spar.training.checkpoint import load_group, read_train_state, shards
from spar.training.config import Recipe
from spar.training.distributed import DistributedContext, ParallelismConfig
from spar.training.initial_weights import random_modules
from spar.training.trainer import check_parallelism, train

STAGES = ("tokenizer-3", "unified-2")  # both sides of the adversary and averages; generation and editing
# Rank 1 dies behind the second step of the stage named first.
KILLED = """
import os, signal, sys
from spar.cli.main import main
from spar.training import loop
step = loop.train_step
def killing(ctx, *rest, **keywords):
    done = step(ctx, *rest, **keywords)
    if ctx.step == 2 and ctx.parallel.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
loop.train_step = killing
sys.exit(main(sys.argv[1:]))
"""


def exact() -> Recipe:
    """`tiny` with AdamW, which FSDP can shard, at rates so low that rounding does not grow from step to step."""
    base = recipe("tiny")
    stages = tuple(replace(s, optimizer="adamw", lr=1e-5, lr_end=1e-6, steps=4) for s in base.stages)
    return replace(base, stages=stages, save_minutes=0.0)


def flags() -> list[str]:
    rates = {"optimizer": "adamw", "lr": "1e-5", "lr-end": "1e-6", "steps": "4"}
    each = [(f"--stages.{s.name}.{key}", value) for s in recipe("tiny").stages for key, value in rates.items()]
    return [*(word for pair in each for word in pair), "--save-minutes", "0", "--parallelism.precision", "fp32"]


def launch(
    run: Path, first: Path, *extra: str, script: str | None = None, resume: bool = False
) -> subprocess.CompletedProcess[str]:
    """`spar train tiny` on two processes, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begin = ["--resume", "auto"] if resume else ["--init-from", str(first)]
    target = [script] if script else ["-m", "--", "spar"]
    stages = [word for name in STAGES for word in ("--stage", name)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *target]
    command += ["train", "tiny", *stages, *begin, "--run", str(run), *flags(), *extra]
    if script:  # behind a path torchrun would read the flags' beginnings as its own
        command.insert(command.index(script), "--")
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_alike(run: Path, other: Path, first: Path) -> None:
    """The same losses, gradient norms and weights up to rounding."""
    for a, b in zip(logged(run), logged(other), strict=True):
        assert a.keys() == b.keys() and (a["stage"], a["step"]) == (b["stage"], b["step"])
        for name in a.keys() - {"stage", "step", "seconds"}:
            assert a[name] == pytest.approx(b[name], rel=5e-4, abs=2e-5), (a["stage"], a["step"], name)
    assert_same_end(run, other, first)


def assert_same_end(run: Path, other: Path, first: Path) -> None:
    """Both trainings went the same way: their ends lie within a hundredth of the way that they went.

    Not every weight is alike to its last digits: AdamW's first steps are the signs of gradients, small ones too.
    """
    for stage, before in zip(STAGES, (first, other / STAGES[0] / "done"), strict=True):
        folders = (before, run / stage / "done", other / stage / "done")
        old, a, b = (load_group(folder, "modules") for folder in folders)
        assert old.keys() == a.keys() == b.keys()
        trained = [key for key in b if not torch.equal(b[key], old[key]) and not key.startswith("lecam.")]
        moved, apart = (sum(float((x[k] - b[k]).square().sum()) for k in trained) ** 0.5 for x in (old, a))
        assert len(trained) > 20 and apart < 0.01 * moved, (stage, apart, moved)


@pytest.fixture(scope="module")
def first(tiny_run) -> Path:
    return tiny_run.path / "tokenizer-2" / "done"


@pytest.fixture(scope="module")
def alone(first, tmp_path_factory) -> Path:
    """The stages on one process, in one piece."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(exact(), run, stages=STAGES, init_from=first, parallelism=ParallelismConfig(precision="fp32"))
    return run


# ---- one process -----------------------------------------------------------------------------------------------------


def test_rows_are_dealt_once_each_and_to_a_process_every_so_many():
    for world, accumulate in ((1, 1), (2, 3), (3, 2)):
        deal = {
            (rank, piece): np.arange(12)[
                DistributedContext(rank, world, config=ParallelismConfig(grad_accum_steps=accumulate)).rows(12, piece)
            ]
            for rank in range(world)
            for piece in range(accumulate)
        }
        assert sorted(np.concatenate([*deal.values()]).tolist()) == list(range(12))
        assert all(set(rows % world) == {rank} for (rank, _), rows in deal.items())  # as the loader of files deals
    with pytest.raises(InputError, match="2 processes of 3 micro-batches divide, got 8"):
        DistributedContext(1, 2, config=ParallelismConfig(grad_accum_steps=3)).rows(8, 0)


@pytest.mark.parametrize(
    "changed",
    [
        ParallelismConfig(grad_accum_steps=2),
        ParallelismConfig(grad_accum_steps=4, activation_checkpointing=True),
        ParallelismConfig(activation_checkpointing=True),
    ],
)
def test_pieces_and_recomputation_change_neither_losses_nor_weights(alone, first, tmp_path, changed):
    train(exact(), tmp_path / "run", stages=STAGES, init_from=first, parallelism=replace(changed, precision="fp32"))
    assert_alike(tmp_path / "run", alone, first)


def test_recomputation_keeps_less(start):
    """The backward pass of a block that recomputes holds its input, not what lies between."""
    kept = {False: 0, True: 0}
    for recompute in kept:
        block = start("unified-2").modules.model.denoiser.network.transformer_blocks[0]
        if recompute:
            module.apply_activation_checkpointing(nn.ModuleList([block]))
        width = block.norm1.normalized_shape[0]
        x = torch.randn(1, 64, width, requires_grad=True)
        arguments = (torch.zeros(1, 1, 6, width), torch.randn(1, 3, width), torch.zeros(1, 1, 1, 3), (1, 1, 8, 8))

        def keep(tensor: torch.Tensor, recompute: bool = recompute) -> torch.Tensor:
            kept[recompute] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = block(x, *arguments)
        out.square().sum().backward()
    assert kept[True] < kept[False] / 3


def test_compiled_blocks_are_the_ones_that_repeat(start, monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward.__self__) or (lambda *x: forward(*x)))
    both = start("unified-2").modules, random_modules(recipe("dualtoken-tiny"), "cpu", {})
    for modules in both:
        for _ in range(2):  # each stage of a run asks for it
            module.wrap_modules(
                modules, DistributedContext(config=ParallelismConfig(compile=True, activation_checkpointing=True))
            )
    assert compiled == [block for modules in both for block in repeated_blocks(modules)]
    assert set(BLOCKS) <= {base.__name__ for part in compiled for base in type(part).__mro__}
    assert not torch._functorch.config.donated_buffer  # or the adversary's weight, which walks a graph twice, fails


@pytest.mark.parametrize(
    ("stage", "parallel", "said"),
    [
        (
            "mllm",
            DistributedContext(0, 2),
            "stage mllm: .*expected one process and parallelism.grad_accum_steps 1, got 2 and 1",
        ),
        ("encoder", DistributedContext(config=ParallelismConfig(grad_accum_steps=2)), "stage encoder: .*got 1 and 2"),
        (
            "unified-2",
            DistributedContext(0, 3),
            "stage unified-2: expected a batch that 3 processes of 1 micro-batches divide, got 4",
        ),
        ("unified-2", DistributedContext(0, 2, sharded=True), "stage unified-2: Muon wants whole matrices"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(stage, parallel, said):
    with pytest.raises(InputError, match=said):
        check_parallelism((recipe("tiny").stage(stage),), parallel)


def test_several_processes_want_a_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="fsdp is for several processes, got one: start them with `torchrun"):
        train(exact(), tmp_path / "run", parallelism=ParallelismConfig(strategy="fsdp"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"parallelism.grad_accum_steps: expected at least 1, got 0"):
        ParallelismConfig(grad_accum_steps=0)


def test_processes_wait_for_a_main_one_that_works_alone(monkeypatch):
    """It writes, hashes and indexes alone, which may take longer than the ten minutes that torch waits."""
    waited = []

    class State:
        num_processes, process_index, device = 2, 0, torch.device("cpu")

        def __init__(self, *, cpu, timeout=None):
            waited.append(timeout)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", State)
    assert DistributedContext.initialize(ParallelismConfig(), "cpu").world == 2 and waited == [PATIENCE]


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpi_are_refused(monkeypatch, tmp_path, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=f"{name}: expected processes of torchrun or accelerate, got those of MPI"):
        train(exact(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, "1")
    assert DistributedContext.initialize(ParallelismConfig(), "cpu").world == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_accelerate_on_a_cpu_starts_one_process_which_says_so_where_several_were_meant(tmp_path, number):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(number), "-m", "--", "spar"]
    command += ["train", "tiny", "--run", str(tmp_path / "run"), "--parallelism.grad-accum-steps", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    alone = "expected a batch that 1 processes of 1000 micro-batches divide"
    said = alone if number == 1 else "accelerate launch: expected several processes, got one"
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run").exists()


def test_a_state_with_a_part_missing_is_refused(tmp_path):
    for rank in (0, 2):
        (tmp_path / f"modules-{rank:05}-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="expected the 3 parts of modules, missing modules-00001-of-00003"):
        shards(tmp_path, "modules")


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [("--parallelism.strategy", "ddp"), ("--parallelism.strategy", "fsdp", "--parallelism.shard-frozen", "False")],
)
def test_two_processes_have_the_losses_and_weights_of_one(alone, first, tmp_path, extra):
    done = launch(tmp_path / "run", first, *extra)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(tmp_path / "run", alone, first)
    sharded = "fsdp" in extra
    assert [path.name for path in shards(tmp_path / "run" / "unified-2" / "done", "modules")] == (
        ["modules-00000-of-00002.safetensors", "modules-00001-of-00002.safetensors"]
        if sharded
        else ["modules.safetensors"]
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_run_clearly_and_one_process_goes_on_from_its_sharded_state(alone, first, tmp_path):
    run, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED)
    done = launch(run, first, "--parallelism.strategy", "fsdp", script=str(script))
    assert done.returncode != 0
    assert "spar: error: another process of this run has ended" in done.stderr, done.stderr[-3000:]
    assert "; go on under the same launcher with: spar train tiny --stage" in done.stderr, done.stderr[-3000:]
    state = run / STAGES[0] / "state"
    assert read_train_state(state).step in (2, 3) and len(shards(state, "optimizer")) == 2
    train(exact(), run, stages=STAGES, resume=True, parallelism=ParallelismConfig(precision="fp32"))
    assert_same_end(run, alone, first)
