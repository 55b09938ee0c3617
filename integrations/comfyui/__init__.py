"""ComfyUI nodes: load, generate, edit, understand, reconstruct. They wrap the pipelines.

This folder goes into ComfyUI's custom_nodes, the package `spar` into ComfyUI's Python (README.md). An image is
ComfyUI's IMAGE, `[B, H, W, C]` in [0, 1]. The lowest value of a widget (steps, width and height 0, guidance -1) means
the model's default.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spar import load_pipeline
from spar.common.limits import MAX_GUIDANCE, MAX_NEW_TOKENS, MAX_SEED, MAX_STEPS
from spar.inference.base import Pipeline
from spar.processing.images import to_tensor

MODEL = "SPAR_MODEL"
MAX_WIDGET_SEED = 2**64 - 1  # the largest seed of ComfyUI
MAX_BATCH = 64
MAX_SIDE = 16384

Inputs = dict[str, dict[str, tuple]]


def text_box(tip: str) -> tuple[str, dict[str, Any]]:
    return ("STRING", {"multiline": True, "default": "", "tooltip": tip})


def sampling() -> dict[str, tuple]:
    """Inputs of both sampling nodes."""
    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": MAX_WIDGET_SEED, "control_after_generate": True}),
        "steps": ("INT", {"default": 0, "min": 0, "max": MAX_STEPS, "tooltip": "0: the model's own"}),
        "guidance": (
            "FLOAT",
            {"default": -1.0, "min": -1.0, "max": MAX_GUIDANCE, "step": 0.1, "tooltip": "1: none; -1: the model's own"},
        ),
    }


def keywords(seed: int, count: int, steps: int, guidance: float, negative_prompt: str) -> dict[str, Any]:
    """The pipeline's keywords from widgets. Seeds beyond the pipeline's wrap around to zero."""
    return {
        "seed": [(seed + index) % (MAX_SEED + 1) for index in range(count)],
        "num_inference_steps": steps or None,
        "guidance_scale": None if guidance < 0 else guidance,
        "negative_prompt": negative_prompt.strip() or None,
        "callback": progress(),
    }


def progress() -> Callable[[int, int, Tensor], None] | None:
    """Callback that updates ComfyUI's bar and stops on Cancel; None outside ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    shown: list[Any] = []

    def step(done: int, total: int, _: Tensor) -> None:
        throw_exception_if_processing_interrupted()
        if not shown:
            shown.append(ProgressBar(total))
        shown[0].update_absolute(done, total)

    return step


def pil_images(image: Tensor) -> list[Image.Image]:
    """Convert IMAGE to Pillow images: grey, RGB or RGBA by its last dimension."""
    pixels = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return [Image.fromarray(np.squeeze(one, -1) if one.shape[-1] == 1 else one) for one in pixels]


def image_tensor(generated: list[Image.Image]) -> Tensor:
    """Convert RGB images of one size to IMAGE."""
    return to_tensor(generated).permute(0, 2, 3, 1).contiguous()


class SparLoad:
    """A folder of SPAR or of DualToken, or the small bundled model."""

    CATEGORY, FUNCTION = "SPAR", "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "folder": ("STRING", {"default": "", "tooltip": "folder, or dualtoken; empty: the bundled SPAR"}),
                "device": (["auto", "cpu", "cuda", "mps"],),
                "dtype": (["auto", "float32", "bfloat16", "float16"],),
                "weights": (["dtype", "float32", "int8"], {"tooltip": "dtype: half the memory, the same images"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, folder: str, **_: Any) -> float:
        """The folder's time of change, which makes ComfyUI load it again."""
        config = Path(folder) / "config.json"
        return config.stat().st_mtime if folder and config.is_file() else 0.0

    def load(self, folder: str, device: str, dtype: str, weights: str) -> tuple[Pipeline]:
        return (
            load_pipeline(
                folder or None,
                device=None if device == "auto" else device,
                dtype=None if dtype == "auto" else dtype,
                weights=weights,
            ),
        )


class SparGenerate:
    """Generate images from a prompt."""

    CATEGORY, FUNCTION = "SPAR", "generate"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = {"default": 0, "min": 0, "max": MAX_SIDE, "tooltip": "0: the side of the training images"}
        return {
            "required": {
                "model": (MODEL,),
                "prompt": text_box("What to generate"),
                "negative_prompt": text_box("What the image should not show"),
                "width": ("INT", side),
                "height": ("INT", side),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": MAX_BATCH, "tooltip": "Image i: seed + i"}),
                **sampling(),
            }
        }

    def generate(
        self, model: Pipeline, prompt: str, negative_prompt: str, width: int, height: int, batch_size: int,
        seed: int, steps: int, guidance: float,
    ) -> tuple[Tensor]:  # fmt: skip
        out = model.generate(
            prompt, width=width or None, height=height or None, num_images_per_prompt=batch_size,
            **keywords(seed, batch_size, steps, guidance, negative_prompt),
        )
        return (image_tensor(out.images),)


class SparEdit:
    """Edit images by instruction: each keeps its proportions, at about the trained number of pixels."""

    CATEGORY, FUNCTION = "SPAR", "edit"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "instruction": text_box("What to change"),
                "negative_prompt": text_box("What the image should not show"),
                **sampling(),
            }
        }

    def edit(
        self, model: Pipeline, image: Tensor, instruction: str, negative_prompt: str, seed: int, steps: int,
        guidance: float,
    ) -> tuple[Tensor]:  # fmt: skip
        settings = keywords(seed, len(image), steps, guidance, negative_prompt)
        return (image_tensor(model.edit(pil_images(image), instruction, **settings).images),)


class SparUnderstand:
    """Answer a question about each image."""

    CATEGORY, FUNCTION = "SPAR", "understand"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("STRING",), ("answers",), (True,)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "question": text_box("What to ask"),
                "max_new_tokens": ("INT", {"default": 48, "min": 1, "max": MAX_NEW_TOKENS}),
            }
        }

    def understand(self, model: Pipeline, image: Tensor, question: str, max_new_tokens: int) -> tuple[list[str]]:
        return (model.understand(pil_images(image), question, max_new_tokens=max_new_tokens).texts,)


class SparReconstruct:
    """Encode and decode images with the unified tokenizer: the upper bound of the quality of generated images."""

    CATEGORY, FUNCTION = "SPAR", "reconstruct"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": (MODEL,), "image": ("IMAGE",)}}

    def reconstruct(self, model: Pipeline, image: Tensor) -> tuple[Tensor]:
        return (image_tensor(model.reconstruct(pil_images(image)).images),)


NODE_CLASS_MAPPINGS = {
    "SparLoad": SparLoad,
    "SparGenerate": SparGenerate,
    "SparEdit": SparEdit,
    "SparUnderstand": SparUnderstand,
    "SparReconstruct": SparReconstruct,
}
NODE_DISPLAY_NAME_MAPPINGS = {name: name.replace("Spar", "SPAR ") for name in NODE_CLASS_MAPPINGS}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
