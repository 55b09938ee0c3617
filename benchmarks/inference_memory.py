"""Memory, time and change of each way of storing a model: one image of a recipe at full size, with random weights.

Memory is the device's peak; on a CPU it is the peak of the process so far, with the float32 model that every way
copies. Seconds are those of the second of two images, and the change is the mean difference of the image from that of
the first way (by default float32 weights), of 255. With random weights it shows whether results are equal, not their
quality: `--bundled` also measures the change of the bundled model's images.
The last line is JSON.

    python benchmarks/inference_memory.py --recipe spar-1b --device cuda
"""

import argparse
import copy
import gc
import json
import resource
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from spar.checkpoints.model_header import load_text_tokenizer, versions
from spar.checkpoints.spar_format import ModelBundle, SamplingConfig, read_config
from spar.common.device import dtype_name, native_dtype
from spar.inference.pipeline import BUNDLED, SparPipeline
from spar.models.spar import SparModel
from spar.processing.prompts import IMAGE_TOKEN
from spar.recipes import recipe
from spar.training.bundle import hardware_info

PROMPTS = ["a red circle on a beige background", "a blue star and a green ring", "three yellow squares"]
WAYS = {
    "float32": {},
    "dtype": {"weights": "dtype"},
    "int8": {"weights": "int8"},
    "dtype, offloaded": {"weights": "dtype", "offload": True},
    "int8, offloaded": {"weights": "int8", "offload": True},
    "dtype, offloaded, tiles": {"weights": "dtype", "offload": True, "decode_tile": 8},
    "dtype, compiled": {"weights": "dtype", "compile": True},
}


def full_size(name: str, device: torch.device) -> ModelBundle:
    """A recipe's model with random weights, on the CPU, and the bundled model's words."""
    torch.manual_seed(0)
    config, text = recipe(name).model, load_text_tokenizer(BUNDLED / "text_tokenizer", read_config(BUNDLED).text)
    ids = {
        "image_token_id": text.convert_tokens_to_ids(IMAGE_TOKEN), "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }  # fmt: skip
    with device:
        model = SparModel(replace(config, text=replace(config.text, **ids)))
    return ModelBundle(model.cpu().eval().requires_grad_(False), text, SamplingConfig())


def shown(pipe: SparPipeline, prompts: list[str], steps: int | None) -> np.ndarray:
    return np.stack([np.asarray(i, float) for i in pipe.generate(prompts, seed=0, num_inference_steps=steps).images])


def measure(loaded: ModelBundle, ways: dict, device: torch.device, steps: int) -> dict:
    cuda = device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    pipe = SparPipeline(copy.deepcopy(loaded), native_dtype(device), device, **ways)
    image = shown(pipe, PROMPTS[:1], steps)
    start = time.perf_counter()
    image = shown(pipe, PROMPTS[:1], steps)
    seconds = time.perf_counter() - start
    pipe.edit(Image.fromarray(image[0].astype(np.uint8)), PROMPTS[0], num_inference_steps=2)
    held = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"gib": held / 2**30, "seconds": seconds, "image": image}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="spar-1b")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="may be given several times; default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bundled", action="store_true", help="also how much the bundled model's images change")
    args = parser.parse_args()
    device, rows, plain, bundled = torch.device(args.device), {}, None, None
    dtype = native_dtype(device)
    ways = {name: WAYS[name] for name in args.way or WAYS if device.type != "cpu" or "offload" not in WAYS[name]}
    loaded = full_size(args.recipe, device)
    for name, way in ways.items():
        try:
            found = measure(loaded, way, device, args.steps)
        except Exception as error:  # what was measured before is not lost
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
            print(name, rows[name], flush=True)
            continue
        image = found.pop("image")
        plain = image if plain is None else plain
        found["change_of_255"] = float(np.abs(image - plain).mean())
        if args.bundled:
            images = shown(SparPipeline.from_pretrained(dtype=dtype, device=device, **way), PROMPTS, None)
            bundled = images if bundled is None else bundled
            found["bundled_change_of_255"] = float(np.abs(images - bundled).mean())
        rows[name] = found
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    print(json.dumps({
        "benchmark": "inference_memory", "recipe": args.recipe, "device": args.device, "dtype": dtype_name(dtype),
        "steps": args.steps, "guidance": SamplingConfig().guidance, "side": loaded.model.config.image_size, "seed": 0,
        "results": rows, "machine": hardware_info(), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
