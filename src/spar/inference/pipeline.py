"""The pipeline of the four tasks: generate, edit, understand, reconstruct.

The keyword names are diffusers'. Every task takes one input or a list, which it runs as one batch. An image depends on
its own seed and never on the rest of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from spar.checkpoints.bundled import BUNDLED_MODELS, DEFAULT_MODEL
from spar.checkpoints.hub import adapter_files, hub_address, model_folder, model_name
from spar.checkpoints.lora_files import merge_adapter
from spar.checkpoints.model_header import TITLES
from spar.checkpoints.spar_format import ModelBundle, load_model, save_model
from spar.common import limits
from spar.common.device import choose_device, read_move
from spar.common.errors import InputError
from spar.common.limits import check_int_range
from spar.flow.path import interpolate, velocity_target
from spar.inference.base import TOKEN_MULTIPLE, choose_device_and_dtype, read_dtype
from spar.inference.diffusers_call import draw
from spar.inference.flow_sampling import FlowSampling
from spar.inference.image_files import BUNDLED_MODEL
from spar.inference.image_sampling import StepwisePipeline
from spar.inference.layouts import Layout
from spar.inference.offload import WEIGHTS, Offload, Weights, cast_weights, quantize
from spar.inference.outputs import GenerateOutput, ReconstructOutput
from spar.inference.packed_weights import check_packing, pack_weights
from spar.inference.progress import Callback
from spar.models.blocks import compile_blocks
from spar.models.tiling import MIN_TILE
from spar.processing.chat import Squares
from spar.processing.images import ImageSource, nearest_size, to_pil
from spar.processing.prompts import PromptEncoder
from spar.processing.tiles import answer_images

BUNDLED = BUNDLED_MODELS[DEFAULT_MODEL]
MAX_SIDE_FACTOR = 2  # images up to twice the trained side
LOSS_TIMES = (0.95, 0.9, 0.8, 0.7, 0.5)  # 1 is noise: what an image shows is settled early


@dataclass(repr=False)
class SparPipeline(StepwisePipeline):
    """One model and its four tasks. Build it with `from_pretrained`.

    `origin` has the names of the `model` and the `adapter` for the metadata of images, without their folders.
    """

    system: ClassVar[str] = TITLES["spar"]
    has_routing: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("generate", "edit", "understand", "reconstruct")

    bundle: ModelBundle
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    decode_tile: int | None = None
    weights: Weights = "float32"
    offload: bool = False
    compile: bool = False
    origin: Mapping[str, str | None] = field(default_factory=dict)
    progress: bool = True

    def __post_init__(self) -> None:
        model = self.model = self.bundle.model
        if self.weights == "packed":
            check_packing(self.device, self.dtype, compiled=self.compile)
        if self.weights != "float32":
            cast_weights(model, self.dtype)
        if self.weights == "int8":
            quantize(model)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if self.weights == "packed":
            pack_weights(model)
        if self.compile:
            compile_blocks(model)
        self._offload = Offload(model, self.device) if self.offload else None
        if not self.offload:
            model.to(self.device)
        config = self.model.config
        self.prompts = PromptEncoder(
            self.bundle.text_tokenizer, config.grid**2, image_start=config.connector.image_start,
            multiple=TOKEN_MULTIPLE,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None, adapter: str | Path | None = None, decode_tile: int | None = None,
        weights: Weights = "float32", offload: bool = False, compile: bool = False, progress: bool = True,
        torch_dtype: torch.dtype | str | None = None,
    ) -> "SparPipeline":  # fmt: skip
        """Load a SPAR folder, or `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`; without a path, the bundled weights.
        OWNER/NAME is a repository too, where there is no such folder.

        Args:
            dtype: type of matrix products, also by its name; by default bfloat16 if the device has it in hardware.
            device: by default a CUDA device if available, else the CPU.
            adapter: LoRA to merge into the model: a folder (`RUN/adapter`, or peft's or diffusers'), a .safetensors
                file, or `hf://OWNER/NAME`.
            decode_tile: visual tokens per side above which an image is decoded in tiles of that size, which takes less
                memory and changes it a little; None never uses tiles.
            weights: type of the weights in memory: "float32" as stored; "dtype", those of matrix products in `dtype`,
                half the memory for the same results; "packed", those of bfloat16 on a CPU also in its matrix unit's
                layout, less time for results that may round otherwise; "int8", those of linear layers also rounded
                to 8 bits, for other results (needs torchao).
            offload: keep idle parts in the CPU's memory: less of the device's memory, more time.
            compile: compile repeated layers with torch.compile: the first call takes a minute or so, later ones less.
            progress: show a bar of sampling on a terminal or in a notebook, unless a call has its own callback.
            torch_dtype: diffusers' name of `dtype`.

        Raises:
            InputError: a missing, partial, foreign or damaged folder, an unavailable device, two types, offload from
                the CPU to itself, or packed weights where there are none.
        """
        if dtype is not None and torch_dtype is not None:
            raise InputError(f"torch_dtype: expected it or dtype, which are the same, got {torch_dtype} and {dtype}")
        where, compute = choose_device_and_dtype(device, torch_dtype if dtype is None else dtype)
        if decode_tile is not None:
            check_int_range("decode_tile", decode_tile, MIN_TILE, limits.MAX_TILE)
            decode_tile = int(decode_tile)
        if weights not in WEIGHTS:
            raise InputError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
        if weights == "packed":  # before anything is loaded
            check_packing(where, compute, compiled=compile)
        if offload and where.type == "cpu":
            raise InputError("offload: expected a device other than the CPU, got cpu")
        path = None if path is None else hub_address(path)
        folder = BUNDLED if path is None else model_folder(path)
        if path is None and not (folder / "config.json").exists():
            raise InputError("this installation has no bundled weights; give a model folder, or train one")
        loaded = load_model(folder)
        lora = None if adapter is None else adapter_files(adapter)
        if lora is not None:
            merge_adapter(loaded.model, lora)
        origin = {
            "model": BUNDLED_MODEL if path is None else model_name(path, folder),
            "adapter": model_name(adapter, lora) if adapter and lora else None,
        }
        return cls(loaded, compute, where, decode_tile, weights, offload, compile, origin, progress)

    def __call__(
        self, prompt: str | Sequence[str], image: ImageSource | Sequence[ImageSource] | None = None, **keywords: Any
    ) -> Any:
        """Generate images, or edit `image`, with the keywords and the output of `SparDiffusionPipeline`."""
        return draw(self, self, prompt, image, **keywords)

    def to(self, *arguments: Any, **keywords: Any) -> "SparPipeline":
        """Move to a device, and compute in another type: arguments of torch's `to`; returns this pipeline.

        Raises:
            InputError: other arguments, a device of an offloaded pipeline, or a type that its weights no longer hold.
        """
        device, dtype = read_move(*arguments, **keywords)
        if device is not None and self.offload:
            raise InputError(f"to: expected no device for an offloaded pipeline, got {device}")
        compute = self.dtype if dtype is None else read_dtype(dtype)
        if self.weights != "float32" and compute != self.dtype:
            raise InputError(f"to: expected {self.dtype}, in which the weights are, got {compute}: load them in that")
        if device is not None:
            where = choose_device(device)
            if self.weights == "packed":
                check_packing(where, compute)
            self.model.to(where)
            self.device = where
        self.dtype = compute
        return self

    def _save(self, folder: Path, dtype: torch.dtype | None) -> None:
        save_model(self.bundle, folder, dtype)

    def generate(
        self, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
        callback: Callback | None = None, sampler: str | None = None, layout: Layout = None,
        guidance_interval: Sequence[float] | None = None, step_cache: float = 0.0,
    ) -> GenerateOutput:  # fmt: skip
        """Generate images from prompts.

        Args:
            prompt: one or a list.
            negative_prompt: what the images should not show; by default the true unconditional prompt.
            height: pixels, a multiple of the token stride; by default the trained side.
            width: as `height`.
            num_inference_steps: by default the model's own.
            guidance_scale: by default the model's own; 1 is the conditional branch.
            num_images_per_prompt: images of one prompt are adjacent in the result.
            seed: one (image i gets seed + i) or one per image; random when None. `.seeds` has those used.
            callback: called after each step with (steps done, steps, estimate of the clean latent), which `preview`
                converts to images; returning False, exactly, cancels.
            sampler: of the flow, "dpmsolver++" or "euler"; by default the model's own.
            layout: whether the LLM first writes where everything lies, for each image anew, by its seed, and the image
                is drawn of that; by default where the model was taught to, at the trained size. Or the layout itself,
                one or one for each prompt, such as "a large red circle on column two row three on a gray background",
                which takes the prompt's place. It is in the metadata. A negative prompt stays as it is: no training has
                seen one beside a layout.
            guidance_interval: the first and the last time, from 0 to 1 (noise), at which guidance applies; elsewhere
                the conditional branch alone is computed. An approximation.
            step_cache: above 0, a step takes from the one before what the DiT's blocks but the first add, where the
                first one's part has changed by at most this share: an approximation, measured in docs/performance.md.

        Raises:
            InputError: the message has the expected and the given value.
            Cancelled: by the callback; there is no result, and the pipeline is unchanged.
        """
        size = self.output_size(height, width)
        return self._sample(
            self._prompted(prompt, layout, size), size, negative_prompt, num_inference_steps, guidance_scale,
            num_images_per_prompt, seed, callback, FlowSampling(sampler, guidance_interval, step_cache),
        )

    def edit(
        self, image: ImageSource | Sequence[ImageSource], instruction: str | Sequence[str], *,
        negative_prompt: str | Sequence[str] | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
        callback: Callback | None = None, sampler: str | None = None, layout: Layout = None,
        guidance_interval: Sequence[float] | None = None, step_cache: float = 0.0,
    ) -> GenerateOutput:  # fmt: skip
        """Edit images by instruction; keywords as in `generate`.

        A model that was taught to writes a layout here too, of what changes, and the image is drawn of the instruction
        and the layout: "no small red circle on column two row three, a small blue star on column two row three".

        One image with several instructions, or several images with one instruction, are paired; else one each. The
        result has the image's proportions, at about the trained number of pixels; images of one call must share them.
        Each image has one reference image: the model has no place for a second one.
        """
        pixels = self._edited(image)
        return self._sample(
            self._instructed(pixels, instruction, layout), (pixels.shape[-2], pixels.shape[-1]), negative_prompt,
            num_inference_steps, guidance_scale, num_images_per_prompt, seed, callback,
            FlowSampling(sampler, guidance_interval, step_cache),
        )

    @torch.inference_mode()
    def reconstruct(self, image: ImageSource | Sequence[ImageSource]) -> ReconstructOutput:
        """Encode and decode images with the unified tokenizer."""
        pixels = self._squares(image)
        with self._compute(len(pixels)):
            tokenizer = self.model.tokenizer
            self._load_to_device("encoder", "streams")
            z_f = tokenizer.encode(pixels).z_f
            self._load_to_device("decoder")
            out = tokenizer.decode(z_f, self.decode_tile).float().clamp(0, 1)
        return ReconstructOutput(to_pil(out), [self.run_metadata() for _ in out])

    def output_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of images of `generate`.

        Raises:
            InputError: a side that is not a multiple of the token stride or more than twice the trained one.
        """
        stride, side = self.model.config.token_stride, self.image_size
        for name, value in (("height", height), ("width", width)):
            if value is not None and (
                not isinstance(value, Integral) or value % stride or not stride <= value <= MAX_SIDE_FACTOR * side
            ):
                raise InputError(
                    f"{name}: expected a multiple of {stride} from {stride} to {MAX_SIDE_FACTOR * side}, got {value!r}"
                )
        return int(height or side), int(width or side)

    def edited_size(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of the result of `edit`; InputError for too extreme proportions."""
        return nearest_size(image, self.image_size, self.model.config.token_stride)

    @torch.inference_mode()
    def preview(self, state: Tensor) -> list[Image.Image]:
        """Decode a callback's latent `[B, C, h, w]`: blurred at first, and after the last step the result."""
        self._load_to_device("decoder")
        with self._compute(len(state)):
            images = self.model.decode(state, self.decode_tile).float()
        self._load_to_device("denoiser")  # for the sampler's next step
        return to_pil(images)

    @torch.inference_mode()
    def image_loss(
        self, image: ImageSource | Sequence[ImageSource], prompt: Sequence[str], seed: int = 0
    ) -> list[float]:
        """How badly the model predicts images from prompts: the flow loss, its mean over LOSS_TIMES, one number a pair.

        Noise is of the pair's number and `seed`, so that two models are compared on the same. Latents of another
        tokenizer have another scale: only models that share one are comparable.
        """
        pixels, prompts = self._paired(self._squares(image), self._texts(prompt, "prompt"), "prompt")
        with self._compute(len(prompts)):
            self._load_to_device("encoder", "streams")
            clean = self.model.tokenizer.normalize(self.model.tokenizer.encode(pixels).z_f).float()
            self._load_to_device("streams", "language", "router_and_connector")
            tokens = self.prompts.generation(prompts).to(self.device)
            condition, total = self.model.condition(tokens.ids, tokens.mask), torch.zeros(len(prompts))
            self._load_to_device("denoiser")
            for number, time in enumerate(LOSS_TIMES):
                seeds = [seed + len(LOSS_TIMES) * pair + number for pair in range(len(prompts))]
                noise = self._noise(seeds, (self.image_size, self.image_size))
                times = torch.full((len(prompts),), time, device=self.device)
                velocity = self.model.velocity(interpolate(clean, noise, times), times, condition).velocity.float()
                total += (velocity - velocity_target(clean, noise)).square().mean((1, 2, 3)).cpu() / len(LOSS_TIMES)
        return total.tolist()

    @torch.inference_mode()
    def token_features(self, image: ImageSource | Sequence[ImageSource]) -> Tensor:
        """`f_v` of images, which the LLM reads: float32 `[B, N, D_s]` on the CPU, tokens in row-major order."""
        pixels = self._squares(image)
        with self._compute(len(pixels)):
            self._load_to_device("encoder")
            return self.model.tokenizer.encoder(pixels).float().cpu()

    @property
    def max_prompt_tokens(self) -> int:
        return self.bundle.sampling.max_prompt_tokens

    @property
    def default_steps(self) -> int:
        return self.bundle.sampling.steps

    @property
    def default_guidance(self) -> float:
        return self.bundle.sampling.guidance

    @property
    def default_edit_guidance(self) -> float:
        own = self.bundle.sampling.edit_guidance
        return self.default_guidance if own is None else own

    def _settings(self) -> dict[str, Any]:
        weights = self.weights if self.weights in ("packed", "int8") else None  # the others give the same results
        return {"weights": weights, "compile": self.compile or None, "decode_tile": self.decode_tile}

    def _load_to_device(self, *parts: str) -> None:
        """Load the parts that compute next, if parts are offloaded."""
        if self._offload:
            self._offload.load_to_device(*parts)

    def _answer_squares(self, max_tiles: int | None) -> Squares:
        """By the model's own geometry and number of tiles, unless a call gives another."""
        own, side = self.model.config.understanding, self.image_size
        if max_tiles is not None:
            check_int_range("max_tiles", max_tiles, 1, limits.MAX_IMAGE_TILES)
        return lambda image: answer_images(image, side, own.geometry, max_tiles or own.max_tiles)

    def _read_images(self, pixels: Tensor) -> Tensor:
        self._load_to_device("encoder")
        return self.model.tokenizer.encoder(pixels).float()
