"""What a recipe costs: closed forms, the published model's own figure, and how memory and time go with the machine."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spar.checkpoints.lora import LoraConfig
from spar.common.errors import InputError
from spar.models.tokenizer import TransformerBlock
from spar.recipes import recipe
from spar.training import estimate as module
from spar.training.config import Recipe
from spar.training.cost import Cost, meta_input, part_cost
from spar.training.distributed import ParallelismConfig, RecomputedForward, apply_activation_checkpointing
from spar.training.estimate import GIB, GPUS, RESERVE, HardwareConfig, estimate
from spar.training.files_data import FilesData
from spar.training.modules import TrainingModules
from spar.training.objectives.autoencoder import AutoencoderObjective
from spar.training.objectives.flow import meta_velocity

TINY = recipe("tiny")


@pytest.fixture(scope="module")
def large() -> TrainingModules:
    with torch.device("meta"):
        return TrainingModules(recipe("spar-1b"), {}).to(torch.bfloat16)


def with_stage(name: str, part: str, base: Recipe = TINY, **changes) -> Recipe:
    """The recipe with other fields of a stage's `objective` or `data`."""
    stages = tuple(
        replace(s, **{part: replace(getattr(s, part), **changes)}) if s.name == name else s for s in base.stages
    )
    return replace(base, stages=stages)


def test_a_linear_map_costs_what_arithmetic_says():
    layer = nn.Linear(30, 50, bias=False, device="meta", dtype=torch.bfloat16)
    x = meta_input(7, 30)
    forward, kept = 2 * 7 * 30 * 50, 2 * 7 * 30
    assert part_cost(lambda: layer(x), layer) == Cost(3 * forward, kept)
    layer.requires_grad_(False)
    assert part_cost(lambda: layer(x), layer).flops == 2 * forward  # the gradient passes
    assert part_cost(lambda: layer(x), layer, through=False) == Cost(forward, 0)


def test_what_a_part_keeps_is_what_a_real_one_keeps(start):
    """The streams of `tiny`, on the CPU in bfloat16: bytes that autograd really holds."""
    tokenizer = start("tokenizer-1").modules.model.tokenizer.to(torch.bfloat16)
    f_v = torch.randn(1, 64, 32, dtype=torch.bfloat16, requires_grad=True)
    held: dict[int, int] = {}

    stream = tokenizer.semantic_stream
    weights = {parameter.untyped_storage().data_ptr() for parameter in stream.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = stream(f_v)
    stream.to("meta")
    counted = part_cost(lambda: stream(meta_input(1, 64, 32)), stream)
    assert out.shape[1] == 64 and counted.kept == pytest.approx(sum(held.values()), rel=0.02)


def test_the_published_dit_costs_what_the_library_s_own_class_does(large):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        sana = SanaTransformer2DModel(
            num_layers=28, num_attention_heads=36, attention_head_dim=32, num_cross_attention_heads=16,
            cross_attention_head_dim=72, cross_attention_dim=1152, caption_channels=2304, mlp_ratio=2.5,
            in_channels=32, out_channels=32, sample_size=16, patch_size=1,
        )  # fmt: skip
        sana(torch.zeros(2, 32, 16, 16), encoder_hidden_states=torch.zeros(2, 300, 2304), timestep=torch.zeros(2))
    cost = part_cost(lambda: meta_velocity(large.model, 300), large.model.denoiser)
    assert cost.flops / 3 == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_memory_and_time_go_with_the_machine():
    (one,) = estimate(TINY, HardwareConfig(gpus=1, sharded=False), ("unified-2",))
    (two,) = estimate(TINY, HardwareConfig(gpus=2), ("unified-2",))
    (held,) = estimate(TINY, HardwareConfig(gpus=2, sharded=False), ("unified-2",))
    (parted,) = estimate(TINY, HardwareConfig(gpus=1, sharded=False, grad_accum_steps=2), ("unified-2",))
    (again,) = estimate(TINY, HardwareConfig(gpus=1, sharded=False, activation_checkpointing=True), ("unified-2",))
    assert (one.micro_batch, two.micro_batch, parted.micro_batch) == (4, 2, 2)
    assert one.weights == 4 * (one.trainable + one.frozen) == 2 * two.weights == held.weights
    assert one.gradients == 4 * one.trainable and one.optimizer == 3 * one.gradients == 2 * two.optimizer  # with EMA
    assert one.activations == 2 * two.activations == 2 * parted.activations > again.activations
    assert one.flops == two.flops == parted.flops < again.flops < 1.5 * one.flops
    assert two.images_per_second == pytest.approx(2 * one.images_per_second)
    assert one.seconds == pytest.approx(2 * two.seconds)
    assert one.seconds == pytest.approx(3 * one.flops / (GPUS["h200"][0] * 0.4))
    assert one.memory == one.weights + one.gradients + one.optimizer + one.activations + RESERVE
    assert one.warnings == ()


def test_what_is_recomputed_is_held_one_block_at_a_time():
    """Of a chain of blocks their inputs are kept, and in the backward pass what the costliest of them makes again."""
    with torch.device("meta"):
        chain = nn.Sequential(*(TransformerBlock(16, 2, ratio) for ratio in (1, 4, 1)))
        x = torch.zeros(1, 10, 16, requires_grad=True)
    plain = part_cost(lambda: chain(x), chain)
    sizes = [part_cost(lambda: block(x), block).kept for block in chain]  # noqa: B023 (called at once)
    apply_activation_checkpointing(chain)
    again = part_cost(lambda: chain(x), chain)
    assert plain.recomputed == 0 and again.recomputed == max(sizes) > min(sizes)
    assert again.kept == 3 * 10 * 16 * 4 and again.held < plain.held
    assert again.flops == pytest.approx(plain.flops * 4 / 3)
    assert all(isinstance(block.forward, RecomputedForward) for block in chain)  # as it was


def test_memory_is_that_of_the_larger_kind_of_step():
    """A step is all generation or all editing: what its share is changes the mean of the work, not what must fit."""

    def kept(share: float) -> int:
        changed = with_stage("unified-2", "data", edit_share=share, layouts=0.0)
        (found,) = estimate(changed, HardwareConfig(), ("unified-2",))
        return found.activations

    assert kept(0.0) < kept(0.1) == kept(1.0)


def test_what_trains_and_what_is_drawn_more_often_costs_more():
    def flops(stage: str, part: str = "data", **changes) -> float:
        (found,) = estimate(with_stage(stage, part, **changes), HardwareConfig(), (stage,))
        return found.flops

    assert flops("unified-1") < flops("unified-2")  # the DiT trains
    assert flops("unified-2", edit_share=0.0) < flops("unified-2", edit_share=1.0)  # a reference is read too
    for stage in ("unified-2", "dit"):
        assert flops(stage, "objective", noise_samples=1) < flops(stage, "objective", noise_samples=4)
    assert flops("tokenizer-1") < flops("tokenizer-3")  # the encoder trains, an adversary plays
    for stage in ("tokenizer-1", "autoencoder"):
        assert 3 < flops(stage, image_size=64) / flops(stage, image_size=32) < 6


def test_lora_trains_little_and_a_cache_encodes_nothing():
    (plain,) = estimate(TINY, HardwareConfig(), ("unified-2",))
    (lora,) = estimate(replace(TINY, lora=LoraConfig(rank=2)), HardwareConfig(), ("unified-2",))
    assert lora.trainable < plain.trainable and lora.optimizer < plain.optimizer
    without_dit = tuple(stage for stage in TINY.stages if stage.name != "dit")  # it reads what no cache holds
    cached = replace(TINY, data=FilesData(sets=("x",), cache="y"), stages=without_dit)
    (found,) = estimate(cached, HardwareConfig(), ("unified-2",))
    assert found.flops < plain.flops and found.trainable == plain.trainable


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_would():
    full = recipe("spar-1b")
    (crowded,) = estimate(full, HardwareConfig(gpus=8, gpu="rtx4090"), ("unified-2",))
    assert "do not fit into 24: at most" in crowded.warnings[0]
    most = int(crowded.warnings[0].split("at most ")[1].split()[0])
    stages = tuple(replace(s, batch=8 * most) if s.name == "unified-2" else s for s in full.stages)
    (fits,) = estimate(replace(full, stages=stages), HardwareConfig(gpus=8, gpu="rtx4090"), ("unified-2",))
    assert fits.warnings == () and fits.memory <= 24 * GIB
    (odd,) = estimate(TINY, HardwareConfig(gpus=3), ("unified-2",))
    assert odd.warnings == ("a batch of 4 does not divide into 3 x 1 micro-batches",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu": "h900"}, "gpu: expected one of rtx4090, .*got 'h900'"), ({"gpus": 0}, "at least 1, got 0 and 1"),
        ({"mfu": 0.0}, "mfu: expected above 0"), ({"mfu": 1.5}, "mfu: expected above 0 and at most 1, got 1.5"),
    ],
)  # fmt: skip
def test_machines_that_cannot_be_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        HardwareConfig(**settings)


@pytest.mark.parametrize("stage", ["encoder", "autoencoder"])
def test_a_stage_whose_parts_all_train_costs_three_of_its_forward_passes(start, stage):
    begun = start(stage)
    with FlopCounterMode(display=False) as counter:
        begun.terms()
    (found,) = estimate(TINY, HardwareConfig(), (stage,))
    assert found.flops == pytest.approx(3 * counter.get_total_flops(), rel=0.02)  # an accuracy is logged too


def test_every_stage_of_a_recipe_is_counted_in_its_order():
    found = estimate(TINY, HardwareConfig())
    assert [one.stage for one in found] == [*TINY.stages]
    assert all(one.flops > 0 and one.seconds > 0 and one.activations > 0 for one in found)


@dataclass(frozen=True)
class Untold(AutoencoderObjective):
    """An objective that does not say what it costs."""

    def cost(self, modules, recipe, stage) -> None:
        return None


def test_an_objective_that_does_not_say_its_cost_is_counted_by_its_parameters_alone():
    stage = replace(TINY.stage("autoencoder"), objective=Untold())
    (found,) = estimate(replace(TINY, stages=(stage,)), HardwareConfig(gpus=1))
    (told,) = estimate(TINY, HardwareConfig(gpus=1), ("autoencoder",))
    assert (found.flops, found.activations, found.images_per_second, found.seconds) == (0, 0, 0, 0)
    assert (found.trainable, found.gradients, found.optimizer) == (told.trainable, told.gradients, told.optimizer)
    assert found.memory == found.weights + found.gradients + found.optimizer + RESERVE and found.warnings == ()


def test_this_machine_is_shared_by_the_processes_of_its_launcher(monkeypatch):
    monkeypatch.setattr(module, "measure_peak", lambda device, precision: 2e12)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    alone = HardwareConfig.of_this_machine("cpu", ParallelismConfig(grad_accum_steps=2, strategy="fsdp"))
    assert (alone.gpus, alone.gpu, alone.sharded, alone.grad_accum_steps) == (1, "cpu", False, 2)
    assert alone.limits == (2e12, memory) and alone.reserve == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = HardwareConfig.of_this_machine("cpu", ParallelismConfig(strategy="fsdp"))
    assert (both.gpus, both.sharded, both.limits) == (2, True, (2e12, memory // 2))
    (found,) = estimate(TINY, both, ("unified-2",))
    assert found.seconds == pytest.approx(3 * found.flops / (2 * 2e12 * both.mfu))


def test_a_peak_is_measured_on_the_device():
    assert module.measure_peak("cpu", torch.float32) > 1e8
