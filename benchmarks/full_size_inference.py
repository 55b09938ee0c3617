"""The parts of inference at full size against the plain way with the same libraries' classes and the same weights.

- denoiser: a step for one image with guidance (two rows). Plain: diffusers' SanaTransformer2DModel.
- decoder: one latent. Plain: diffusers' AutoencoderDC decoder.
- encoder: one image to f_v and z_f. Plain: transformers' InternVL vision tower alone.
- condition: LLM, router, connector and the denoiser's keys for a prompt and an empty one. Plain: transformers' Qwen2
  with all hidden states; its denoiser computes its keys at every step.

Random weights, bfloat16 where the CPU has it. Rounds in which both take turns; a ratio is the median of the rounds'
own. The roofline share: the plain way's operations over the part's own seconds and the run's matmul peak; beside it
with the part's own operations (the plain encoder and condition have fewer parts, the plain decoder more products). The
last line is JSON.

    python benchmarks/full_size_inference.py --recipe spar-1b --rounds 5
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from inference_memory import full_size
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from train_step import matmul_peak
from transformers import InternVLVisionModel, Qwen2Model

from spar.checkpoints.model_header import versions
from spar.common.device import dtype_name, native_dtype
from spar.inference.pipeline import SparPipeline
from spar.models.autoencoder import build_autoencoder
from spar.models.config import library_fields
from spar.models.denoiser import SANA_FIELDS
from spar.models.encoder import qwen_config, vision_config
from spar.models.spar import SparModel
from spar.training.bundle import hardware_info

Run = Callable[[], object]
PROMPT = "a large red circle on a gray background"


def plain_denoiser(model: SparModel, dtype: torch.dtype) -> SanaTransformer2DModel:
    """diffusers' own class with the weights of ours."""
    config, channels = model.config, model.config.autoencoder.latent_channels
    with torch.device("meta"):
        built = SanaTransformer2DModel(
            **library_fields(config.denoiser, SANA_FIELDS), in_channels=channels, out_channels=channels,
            cross_attention_dim=config.denoiser.width, sample_size=config.grid, patch_size=1,
            interpolation_scale=config.denoiser.interpolation_scale,
        )  # fmt: skip
    state = {name: value.to(dtype) for name, value in model.denoiser.network.state_dict().items()}
    built.load_state_dict(state, assign=True)
    return built.eval().requires_grad_(False)


def plain_autoencoder(pipe: SparPipeline) -> AutoencoderDC:
    """diffusers' autoencoder as it is, with random weights: time does not depend on them."""
    fields = build_autoencoder(pipe.model.config.autoencoder).config
    plain = AutoencoderDC(**{name: value for name, value in fields.items() if not name.startswith("_")})
    return plain.to(pipe.dtype).eval().requires_grad_(False)


def pairs(pipe: SparPipeline, sana: SanaTransformer2DModel) -> dict[str, tuple[Run, Run]]:
    """By part what ours and the plain way compute."""
    model, config = pipe.model, pipe.model.config
    grid, side, width = config.grid, config.image_size, config.text.hidden_size
    latent, times = torch.randn(2, config.autoencoder.latent_channels, grid, grid), torch.full((2,), 0.5)
    tokens = pipe.prompts.generation([PROMPT, ""])
    with pipe._compute(2):
        condition = model.condition(tokens.ids, tokens.mask)
        reads = model.precompute_key_values(condition)
    autoencoder = plain_autoencoder(pipe)
    pixels = torch.rand(1, 3, side, side)
    small = {"dtype": pipe.dtype}
    with torch.device("meta"):
        tower, qwen = InternVLVisionModel(vision_config(config.vision)), Qwen2Model(qwen_config(config.text))
    tower, qwen = (one.to_empty(device="cpu").to(pipe.dtype).eval().requires_grad_(False) for one in (tower, qwen))
    for one in (tower, qwen):
        for parameter in one.parameters():
            parameter.data.normal_(std=0.02)
    words = torch.randn(*condition.mask.shape, width).to(pipe.dtype)

    def ours(run: Callable[[], object], rows: int) -> Run:
        def timed() -> object:
            with pipe._compute(rows):
                return run()

        return timed

    def decode() -> Tensor:
        return autoencoder.decode(latent[:1].to(**small), return_dict=False)[0]

    return {
        "denoiser": (
            ours(lambda: model.velocity(latent, times, reads).velocity, 2),
            lambda: sana(
                latent.to(**small), encoder_hidden_states=condition.states.to(**small), timestep=1000 * times,
                encoder_attention_mask=condition.mask, return_dict=False,
            ),
        ),
        "decoder": (ours(lambda: model.decode(latent[:1]), 1), decode),
        "encoder": (
            ours(lambda: model.tokenizer.encode(pixels), 1),
            lambda: tower(pixel_values=pixels.to(**small)).last_hidden_state,
        ),
        "condition": (
            ours(lambda: model.precompute_key_values(model.condition(tokens.ids, tokens.mask)), 2),
            lambda: qwen(inputs_embeds=words, attention_mask=condition.mask, output_hidden_states=True),
        ),
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="spar-1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="our blocks")
    parser.add_argument("--weights", choices=("dtype", "packed"), default="dtype", help="ours")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"expected at least one round, got {args.rounds}")
    cpu = torch.device("cpu")
    loaded = full_size(args.recipe, cpu)
    sana = plain_denoiser(loaded.model, native_dtype(cpu))  # before the weights may be packed
    pipe = SparPipeline(loaded, native_dtype(cpu), cpu, weights=args.weights, compile=args.compile, progress=False)
    peak, rows = matmul_peak(cpu), {}
    for name, (ours, plain) in pairs(pipe, sana).items():
        with FlopCounterMode(display=False) as counted:
            plain()
        with FlopCounterMode(display=False) as own_counted:
            ours()
        taken: list[tuple[float, float]] = []
        for _ in range(args.rounds):
            begun = time.perf_counter()
            ours()
            middle = time.perf_counter()
            plain()
            taken.append((middle - begun, time.perf_counter() - middle))
        own, other = (statistics.median(one) for one in zip(*taken, strict=True))
        flops, own_flops = counted.get_total_flops(), own_counted.get_total_flops()
        rows[name] = {
            "seconds": own, "plain_seconds": other, "times_faster": statistics.median(b / a for a, b in taken),
            "tflop": flops / 1e12, "roofline_share": flops / own / peak,
            "own_tflop": own_flops / 1e12, "own_roofline_share": own_flops / own / peak,
        }  # fmt: skip
        print(f"{name}: {rows[name]}", flush=True)
    steps = 20
    image: dict[str, float] = {
        kind: steps * rows["denoiser"][kind] + rows["decoder"][kind] + rows["condition"][kind]
        for kind in ("seconds", "plain_seconds")
    }
    image |= {"steps": steps, "times_faster": image["plain_seconds"] / image["seconds"]}
    print(json.dumps({
        "benchmark": "full_size_inference", "recipe": args.recipe, "side": pipe.image_size,
        "dtype": dtype_name(pipe.dtype),
        "rounds": args.rounds, "compile": args.compile, "weights": args.weights, "image": image,
        "results": rows, "peak_gflops": peak / 1e9, "threads": torch.get_num_threads(), "machine": hardware_info(),
        "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
