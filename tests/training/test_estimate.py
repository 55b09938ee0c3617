"""What a recipe costs: closed forms, the published model's own figure, and how memory and time go with the machine."""

from dataclasses import replace

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
from spar.training.config import DataConfig
from spar.training.estimate import GIB, GPUS, RESERVE, Cost, HardwareConfig, estimate
from spar.training.modules import TrainingModules

TINY = recipe("tiny")


@pytest.fixture(scope="module")
def large() -> TrainingModules:
    with torch.device("meta"):
        return TrainingModules(recipe("spar-1b")).to(torch.bfloat16)


def test_a_linear_map_costs_what_arithmetic_says():
    layer = nn.Linear(30, 50, bias=False, device="meta", dtype=torch.bfloat16)
    x = module._input(7, 30)
    forward, kept = 2 * 7 * 30 * 50, 2 * 7 * 30
    assert module._part_cost(lambda: layer(x), layer) == Cost(3 * forward, kept)
    layer.requires_grad_(False)
    assert module._part_cost(lambda: layer(x), layer).flops == 2 * forward  # the gradient passes
    assert module._part_cost(lambda: layer(x), layer, through=False) == Cost(forward, 0)


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
    counted = module._part_cost(lambda: stream(module._input(1, 64, 32)), stream)
    assert out.shape[1] == 64 and counted.kept == pytest.approx(sum(held.values()), rel=0.02)


def test_the_published_dit_costs_what_the_library_s_own_class_does(large):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        sana = SanaTransformer2DModel(
            num_layers=28, num_attention_heads=36, attention_head_dim=32, num_cross_attention_heads=16,
            cross_attention_head_dim=72, cross_attention_dim=1152, caption_channels=2304, mlp_ratio=2.5,
            in_channels=32, out_channels=32, sample_size=16, patch_size=1,
        )  # fmt: skip
        sana(torch.zeros(2, 32, 16, 16), encoder_hidden_states=torch.zeros(2, 300, 2304), timestep=torch.zeros(2))
    cost = module._part_cost(lambda: module._velocity(large.model, 300), large.model.denoiser)
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
    assert two.images_per_second == pytest.approx(2 * one.images_per_second) and one.days == pytest.approx(2 * two.days)
    assert one.days == pytest.approx(3 * one.flops / (GPUS["h200"][0] * 0.4) / 86400)
    assert one.memory == one.weights + one.gradients + one.optimizer + one.activations + RESERVE
    assert one.warnings == ()


def test_what_is_recomputed_is_held_one_block_at_a_time():
    """Of a chain of blocks their inputs are kept, and in the backward pass what the costliest of them makes again."""
    with torch.device("meta"):
        chain = nn.Sequential(*(TransformerBlock(16, 2, ratio) for ratio in (1, 4, 1)))
        x = torch.zeros(1, 10, 16, requires_grad=True)
    plain = module._part_cost(lambda: chain(x), chain)
    sizes = [module._part_cost(lambda: block(x), block).kept for block in chain]  # noqa: B023 (called at once)
    module.apply_activation_checkpointing(chain)
    again = module._part_cost(lambda: chain(x), chain)
    assert plain.recomputed == 0 and again.recomputed == max(sizes) > min(sizes)
    assert again.kept == 3 * 10 * 16 * 4 and again.held < plain.held
    assert again.flops == pytest.approx(plain.flops * 4 / 3)
    assert all(hasattr(block.forward, "recomputed") for block in chain)  # as it was


def test_memory_is_that_of_the_larger_kind_of_step():
    """A step is all generation or all editing: what its share is changes the mean of the work, not what must fit."""

    def kept(share: float) -> int:
        stages = tuple(replace(s, edit_share=share) if s.name == "unified-2" else s for s in TINY.stages)
        (found,) = estimate(replace(TINY, stages=stages), HardwareConfig(), ("unified-2",))
        return found.activations

    assert kept(0.0) < kept(0.1) == kept(1.0)


def test_what_trains_and_what_is_drawn_more_often_costs_more():
    def flops(stage: str, **changes) -> float:
        stages = tuple(replace(s, **changes) if s.name == stage else s for s in TINY.stages)
        (found,) = estimate(replace(TINY, stages=stages), HardwareConfig(), (stage,))
        return found.flops

    assert flops("unified-1") < flops("unified-2")  # the DiT trains
    assert flops("unified-2", edit_share=0.0) < flops("unified-2", edit_share=1.0)  # a reference is read too
    assert flops("unified-2", noise_samples=1) < flops("unified-2", noise_samples=4)
    assert flops("tokenizer-1") < flops("tokenizer-3")  # the encoder trains, an adversary plays
    assert 3 < flops("tokenizer-1", image_size=64) / flops("tokenizer-1", image_size=32) < 6


def test_lora_trains_little_and_a_cache_encodes_nothing():
    (plain,) = estimate(TINY, HardwareConfig(), ("unified-2",))
    (lora,) = estimate(replace(TINY, lora=LoraConfig(rank=2)), HardwareConfig(), ("unified-2",))
    assert lora.trainable < plain.trainable and lora.optimizer < plain.optimizer
    cached = replace(TINY, data=DataConfig(source="files", sets=("x",), cache="y"))
    (found,) = estimate(cached, HardwareConfig(), ("unified-2",))
    assert found.flops < plain.flops and found.trainable == plain.trainable


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


def test_the_foundations_are_not_counted():
    with pytest.raises(InputError, match="expected stages with a tokenizer or unified step, got encoder, "):
        estimate(TINY, HardwareConfig())
