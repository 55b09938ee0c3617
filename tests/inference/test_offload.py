"""Held weights change nothing, rounded ones little, and absent ones are never computed with."""

import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from spar.common.errors import InputError
from spar.inference import offload as memory
from spar.inference import pipeline
from spar.inference.offload import Offload, cast_weights, quantize
from spar.inference.packed_weights import PackedLinear, check_packing, pack_weights
from spar.inference.pipeline import SparPipeline
from spar.models.blocks import repeated_blocks
from spar.models.spar import SparModel
from spar.recipes import recipe

QUESTION = {"type": "text", "text": "what color is the background?"}
PROMPTS = ["a red circle on a beige background", "a blue star and a green ring"]


@pytest.fixture(scope="module")
def model() -> SparModel:
    torch.manual_seed(0)
    return SparModel(recipe("tiny").model)


def everything(pipe: SparPipeline) -> list:
    """What each of the four tasks gives, images as arrays."""
    made = pipe.generate(PROMPTS, seed=0, num_inference_steps=4).images
    edited = pipe.edit(made, "change the background to navy", seed=0, num_inference_steps=4).images
    again = pipe.reconstruct(made).images
    answers = pipe.understand(made, QUESTION["text"], max_new_tokens=4).texts
    answer = "".join(pipe.chat([{"role": "user", "content": [{"type": "image", "image": made[0]}, QUESTION]}]))
    losses = pipe.image_loss(made, PROMPTS)
    return [np.asarray(image) for image in (*made, *edited, *again)] + answers + [answer, *losses]


def test_weights_held_in_the_type_they_are_computed_in_change_no_result():
    plain = SparPipeline.from_pretrained(dtype=torch.bfloat16, device="cpu")
    held = SparPipeline.from_pretrained(dtype=torch.bfloat16, device="cpu", weights="dtype")
    sizes = [sum(p.numel() * p.element_size() for p in pipe.model.parameters()) for pipe in (plain, held)]
    assert sizes[1] < 0.55 * sizes[0]
    for one, other in zip(everything(plain), everything(held), strict=True):
        assert np.array_equal(one, other)


@pytest.fixture
def packing():
    """Skips where the CPU or torch has no products on packed weights."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 of oneDNN's on this CPU")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33, 5), (512, 160, 384), (1, 64, 64)])
def test_a_packed_map_is_the_linear_map_of_its_weights(packing, shape, bias):
    """Up to the rounding of sums of about 1 to bfloat16, from float32 as autocast reads it, and of strided rows."""
    rows, wide, high = shape
    torch.manual_seed(0)
    plain = nn.Linear(wide, high, bias=bias)
    x = torch.randn(2, wide, rows).transpose(1, 2)
    packed = PackedLinear(plain.weight.data.bfloat16(), plain.bias)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(packed(x), plain(x), atol=2**-7, rtol=2**-7)


def test_packed_weights_give_nearly_the_same_and_are_the_only_copy(packing):
    plain = SparPipeline.from_pretrained(dtype=torch.bfloat16, device="cpu", weights="dtype")
    packed = SparPipeline.from_pretrained(dtype=torch.bfloat16, device="cpu", weights="packed")
    assert packed.parameters == plain.parameters
    maps = [part for part in packed.model.denoiser.modules() if isinstance(part, PackedLinear)]
    assert len(maps) > 50 and not [part for part in packed.model.denoiser.modules() if type(part) is nn.Linear]
    for one, other in zip(everything(plain), everything(packed), strict=True):
        if isinstance(one, np.ndarray):
            assert np.abs(one.astype(int) - other.astype(int)).mean() <= 1
        elif isinstance(one, str):
            assert one == other
        else:
            assert other == pytest.approx(one, rel=0.02)
    assert packed.run_metadata()["weights"] == "packed"


def test_each_map_frees_its_own_weights_as_it_is_packed(packing, monkeypatch):
    """Else a part's weights would be there twice until its last map is packed."""
    model = SparModel(recipe("tiny").model)
    cast_weights(model, torch.bfloat16)
    own = [weakref.ref(part.weight) for part in model.denoiser.modules() if type(part) is nn.Linear]
    there = []

    class Counted(PackedLinear):
        def __init__(self, weight, bias):
            if any(one() is weight for one in own):
                there.append(sum(one() is not None for one in own))
            super().__init__(weight, bias)

    monkeypatch.setattr("spar.inference.packed_weights.PackedLinear", Counted)
    pack_weights(model)
    assert len(there) == len(own) > 20 and there[0] == len(own) and there[-1] < len(own) / 3
    assert not any(one() is not None for one in own)


def test_packed_weights_are_refused_where_there_are_none(packing, tmp_path):
    nothing = tmp_path / "nothing"  # which is refused before anything is loaded
    with pytest.raises(InputError, match="weights packed: expected the CPU and bfloat16, got cpu and torch.float32"):
        SparPipeline.from_pretrained(nothing, dtype="float32", device="cpu", weights="packed")
    with pytest.raises(InputError, match="compile: expected none beside packed weights"):
        SparPipeline.from_pretrained(nothing, dtype="bfloat16", device="cpu", weights="packed", compile=True)
    packed = SparPipeline.from_pretrained(dtype="bfloat16", device="cpu", weights="packed")
    with pytest.raises(InputError, match="weights packed: expected the CPU and bfloat16, got meta"):
        check_packing(torch.device("meta"), torch.bfloat16)
    with pytest.raises(InputError, match="expected float32 to save a pipeline, got packed"):
        packed.save_pretrained(tmp_path / "saved")
    assert packed.to("cpu") is packed


def test_packed_weights_need_onednns_products(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(InputError, match="expected a CPU with bfloat16 and a torch with oneDNN"):
        SparPipeline.from_pretrained(dtype="bfloat16", device="cpu", weights="packed")


def test_a_pipeline_whose_weights_are_no_longer_its_folders_is_not_saved(tmp_path):
    held = SparPipeline.from_pretrained(device="cpu", weights="dtype")
    with pytest.raises(InputError, match="expected float32 to save a pipeline, got dtype"):
        held.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_rounding_to_eight_bits_moves_a_weight_by_half_a_step_of_its_row(model):
    pytest.importorskip("torchao")
    cast_weights(model, torch.float32)
    plain = {name: part.weight.clone() for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    quantize(model)
    rounded = {
        name: part.weight.dequantize() for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and type(part.weight.data) is not torch.Tensor
    }  # fmt: skip
    assert {name.split(".")[0] for name in rounded} == {"tokenizer", "language", "connector", "denoiser"}
    for name, weight in rounded.items():
        step = plain[name].abs().amax(1, keepdim=True) / 127
        assert ((weight - plain[name]).abs() <= 0.51 * step + 1e-6).all(), name


def test_eight_bits_show_nearly_the_same_images():
    pytest.importorskip("torchao")
    shown = [
        SparPipeline.from_pretrained(dtype=torch.bfloat16, device="cpu", weights=weights).reconstruct(
            SparPipeline.from_pretrained(device="cpu").generate(PROMPTS, seed=0).images
        ).images
        for weights in ("float32", "int8")
    ]  # fmt: skip
    for plain, rounded in zip(*shown, strict=True):
        change = np.abs(np.asarray(plain, float) - np.asarray(rounded, float)).mean()
        assert 0 < change < 4


def test_without_torchao_eight_bits_say_what_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="pip install 'spar-unified\\[quantize\\]'"):
        quantize(model)


class Absent(Offload):
    """An offload whose absent parts have no weights at all: computing with one fails."""

    def __init__(self, model: SparModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.bring()

    def bring(self, *names: str) -> None:
        super().load_to_device(*names)
        for name in self.weights_by_part.keys() - set(names):
            for module, key, weight in self.weights_by_part[name]:
                module._parameters[key] = nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)


def test_what_failed_while_a_part_came_is_made_good_by_the_next_call(model, monkeypatch):
    """Memory may run out in the middle of a part; the parts that were there before have gone home by then."""
    parts, copies, parameter = Offload(model, torch.device("cpu")), [], nn.Parameter
    homes = {name: [weight for _, _, weight in places] for name, places in parts.weights_by_part.items()}

    def there(name: str) -> list[bool]:
        return [
            m._parameters[k] is not w for (m, k, _), w in zip(parts.weights_by_part[name], homes[name], strict=True)
        ]

    def copy(data: torch.Tensor, **settings: bool) -> nn.Parameter:
        copies.append(data)
        if len(copies) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return parameter(data, **settings)

    parts.load_to_device("encoder")
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(memory.nn, "Parameter", copy)
        parts.load_to_device("language")
    parts.load_to_device("encoder")
    assert all(there("encoder")) and not any(there("language"))


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_every_task_computes_only_with_the_parts_that_are_present(monkeypatch, weights):
    if weights == "int8":
        pytest.importorskip("torchao")
    plain = SparPipeline.from_pretrained(device="cpu", weights=weights)
    monkeypatch.setattr(pipeline, "Offload", Absent)
    parts = SparPipeline(
        SparPipeline.from_pretrained(device="cpu").bundle, plain.dtype, weights=weights, offload=True
    )
    homes = [weight for places in parts._offload.weights_by_part.values() for _, _, weight in places]
    assert len(homes) == len(list(plain.model.parameters()))
    with pytest.raises((NotImplementedError, RuntimeError)):
        parts.model.denoiser(torch.zeros(1, 32, 8, 8), torch.zeros(1), torch.zeros(1, 2, 8), torch.ones(1, 2))
    for one, other in zip(everything(plain), everything(parts), strict=True):
        assert np.array_equal(one, other)
    seen = []  # a preview needs the decoder, and leaves the sampler its denoiser
    out = parts.generate(
        "a red circle", seed=0, num_inference_steps=3, callback=lambda *step: seen.append(parts.preview(step[2])[0])
    )
    assert len(seen) == 3 and np.array_equal(seen[-1], out.images[0]) and not np.array_equal(seen[0], seen[-1])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weights": "int4"}, "weights: expected one of float32, dtype, packed, int8, got 'int4'"),
        ({"offload": True}, "offload: expected a device other than the CPU"),
    ],
)
def test_what_cannot_be_is_refused(keywords, message):
    with pytest.raises(InputError, match=message):
        SparPipeline.from_pretrained(device="cpu", **keywords)


@pytest.mark.slow
def test_no_layer_falls_back_from_its_compilation_to_plain_python(monkeypatch):
    """Vision, LLM and connector share one function of transformers, and torch counts what it compiles of a function."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compiled(forward, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = SparPipeline.from_pretrained(device="cpu", dtype=torch.bfloat16, compile=True)
    for words in (PROMPTS[0], PROMPTS):
        images = pipe.generate(words, seed=0, num_inference_steps=1).images
    pipe.edit(images, "remove the blue star", seed=0, num_inference_steps=1)
    pipe.understand(images, QUESTION["text"], max_new_tokens=3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 10 and not counters["unimplemented"]


def test_compiled_layers_are_the_ones_that_repeat(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "compile", lambda forward: taken.append(forward.__self__) or forward)
    pipe = SparPipeline.from_pretrained(device="cpu", compile=True)
    assert taken == repeated_blocks(pipe.model) and len(taken) > 20
