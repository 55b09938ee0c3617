"""DualToken among processes and micro-batches: losses, weights and codebooks are those of one process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spar.common.errors import InputError
from spar.recipes import recipe
from spar.training.checkpoint import load_group
from spar.training.data import CaptionData
from spar.training.distributed import DistributedContext, ParallelismConfig
from spar.training.trainer import check_parallelism, train

STAGES = ("tokenizer", "tokenizer-gan", "unified")
LAUNCHED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_dualtoken_distributed as here
here.run_alone(Path({run!r}), Path({first!r}), strategy=sys.argv[1], shard_frozen=False)
"""


def exact():
    """`dualtoken-tiny` with AdamW at rates so low that rounding does not grow, and with images alone to write."""
    base = recipe("dualtoken-tiny")
    stages = tuple(replace(s, optimizer="adamw", lr=1e-5, lr_end=1e-6, steps=3) for s in base.stages)
    stages = tuple(replace(s, data=CaptionData()) if s.name == "unified" else s for s in stages)
    return replace(base, stages=stages, save_minutes=0.0)


def run_alone(path, first, **parallelism):
    """The LLM begins from one and the same tokenizer: rounding its weights would make small differences large."""
    parallel = ParallelismConfig(precision="fp32", **parallelism)
    train(exact(), path, stages=STAGES[:2], init_from=first, parallelism=parallel)
    train(exact(), language_run(path), stages=STAGES[2:], init_from=first.parents[1] / "tokenizer-gan" / "done",
          parallelism=parallel)  # fmt: skip
    return path


def language_run(path):
    return path.with_name(f"{path.name}-llm")


@pytest.fixture(scope="module")
def first(dual_run) -> Path:
    return dual_run.path / "towers" / "done"


@pytest.fixture(scope="module")
def alone(first, tmp_path_factory) -> Path:
    return run_alone(tmp_path_factory.mktemp("alone") / "run", first)


def logged(run):
    files = [folder / "metrics.jsonl" for folder in (run, language_run(run))]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def assert_alike(run, other):
    for a, b in zip(logged(run), logged(other), strict=True):
        assert a.keys() == b.keys() and (a["stage"], a["step"]) == (b["stage"], b["step"])
        for name in a.keys() - {"stage", "step", "seconds", "gan_weight"}:
            near = 1e-4 if name == "gan" else 2e-5                             # a mean of logits near zero
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=near), (a["stage"], a["step"], name)
    for stage in STAGES[:2]:
        one, two = (load_group(folder / stage / "done", "modules") for folder in (run, other))
        assert one.keys() == two.keys()
        for key in one:
            if "quantizer" in key:
                torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4, msg=key)


def test_micro_batches_change_neither_losses_nor_codebooks(alone, first, tmp_path):
    """The adaptive weight is a micro-batch's own, as LeCam's anchors are: with one draw it is the batch's."""
    assert_alike(run_alone(tmp_path / "run", first, grad_accum_steps=2, activation_checkpointing=True), alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_and_codebooks_of_one(alone, first, tmp_path, strategy):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = tmp_path / "both.py"
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), run=str(tmp_path / "run"), first=str(first)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), strategy
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(tmp_path / "run", alone)


def test_answers_are_not_split_and_images_are():
    two = DistributedContext(0, 2)
    check_parallelism((exact().stage("unified"), exact().stage("tokenizer")), two)
    with pytest.raises(InputError, match="stage unified: the objective dual_next_token weighs its whole batch's"):
        check_parallelism((recipe("dualtoken-tiny").stage("unified"),), two)


def test_a_sharded_teacher_in_the_perceptual_term_is_refused_beside_an_adversary(dual_run):
    parallel = DistributedContext(0, 2, sharded=True)
    ctx = SimpleNamespace(recipe=exact(), stage=exact().stage("tokenizer-gan"), parallel=parallel,
                          modules=SimpleNamespace(model=SimpleNamespace(tokenizer=None)))  # fmt: skip
    with pytest.raises(InputError, match="stage tokenizer-gan: .* expected --parallelism.shard-frozen False"):
        ctx.stage.objective.prepare(ctx, None, SimpleNamespace(prepares=()))
    whole = replace(parallel, config=ParallelismConfig(shard_frozen=False))
    ctx.parallel = whole
    ctx.stage.objective.prepare(ctx, None, SimpleNamespace(prepares=()))
