"""DualToken's pipeline: understand, generate, reconstruct and chat by the contract of all pipelines.

Images are drawn row by row: position by position the LLM's state gives the codes of both vocabularies, and the pixel
codes decode to the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spar.checkpoints.dualtoken_format import DualTokenBundle, load_dualtoken, save_dualtoken
from spar.checkpoints.hub import adapter_files, model_folder, model_name
from spar.checkpoints.lora_files import merge_adapter
from spar.checkpoints.model_header import TITLES
from spar.common import limits
from spar.common.errors import Cancelled, InputError
from spar.common.generators import cpu_generator
from spar.common.limits import check_int_range, check_range
from spar.common.seeds import list_seeds
from spar.inference.base import TOKEN_MULTIPLE, choose_device_and_dtype, text_sampling
from spar.inference.layouts import Layout, LayoutPipeline
from spar.inference.offload import Weights, cast_weights
from spar.inference.outputs import GenerateOutput, ReconstructOutput, UnderstandOutput
from spar.inference.progress import Callback, sampling_bar
from spar.models.blocks import compile_blocks
from spar.models.dualtoken.sampling import CodeSampling
from spar.models.dualtoken.tokenizer import DualCodes
from spar.processing.images import ImageSource, to_pil
from spar.processing.prompts import PromptEncoder, tower_tokens

LABELS_AT_ONCE = 256  # that the text tower reads together


@dataclass(frozen=True, repr=False)
class DualGenerateOutput(GenerateOutput):
    """Images with the `codes` that they were drawn as, which `understand_codes` takes."""

    codes: DualCodes


@dataclass(repr=False)
class DualTokenPipeline(LayoutPipeline):
    """One model and its tasks. Build it with `from_pretrained`."""

    system: ClassVar[str] = TITLES["dualtoken"]
    tasks: ClassVar[tuple[str, ...]] = ("generate", "understand", "reconstruct", "classify", "encode")

    bundle: DualTokenBundle
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    weights: Weights = "float32"
    compile: bool = False
    origin: Mapping[str, str | None] = field(default_factory=dict)
    progress: bool = True
    _labels: tuple[tuple[str, ...], Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.model = self.bundle.model
        if self.weights == "dtype":  # the tokenizer encodes in float32
            for part in (model.language, model.embedder, *model.heads.values()):
                cast_weights(part, self.dtype)
        if self.compile:
            compile_blocks(model)
        model.to(self.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.prompts = PromptEncoder(
            self.bundle.text_tokenizer, model.config.grid**2, image_start=True, multiple=TOKEN_MULTIPLE
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None,
        adapter: str | Path | None = None, weights: Weights = "float32", compile: bool = False, progress: bool = True,
    ) -> "DualTokenPipeline":  # fmt: skip
        """Load a DualToken folder, or `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`.

        Args:
            dtype: type of matrix products, also by its name; by default bfloat16 if the device has it in hardware.
                Images are encoded in float32 in any case, since their codes differ otherwise.
            device: by default a CUDA device if available, else the CPU.
            adapter: LoRA to merge into the model: a folder (`RUN/adapter`, or peft's or diffusers'), a .safetensors
                file, or `hf://OWNER/NAME`.
            weights: type of the weights in memory: "float32" as stored, or "dtype", those of the LLM's and the heads'
                matrix products in `dtype`, for the same results.
            compile: compile repeated layers with torch.compile.
            progress: show a bar of sampling on a terminal or in a notebook, unless a call has its own callback.

        Raises:
            InputError: a missing, partial, foreign or damaged folder, an unavailable device, or other weights.
        """
        where, compute = choose_device_and_dtype(device, dtype)
        if weights not in ("float32", "dtype"):
            raise InputError(f"weights: expected float32 or dtype of a DualToken model, got {weights!r}")
        folder = model_folder(path)
        loaded = load_dualtoken(folder)
        lora = None if adapter is None else adapter_files(adapter)
        if lora is not None:
            merge_adapter(loaded.model, lora)
        origin = {
            "model": model_name(path, folder), "adapter": model_name(adapter, lora) if adapter and lora else None
        }
        return cls(loaded, compute, where, weights, compile, origin, progress)

    def _save(self, folder: Path, dtype: torch.dtype | None) -> None:
        save_dualtoken(self.bundle, folder, dtype)

    @property
    def max_prompt_tokens(self) -> int:
        return self.bundle.max_prompt_tokens

    @property
    def default_steps(self) -> int:
        return int(self.model.config.grid)

    @property
    def steps_range(self) -> tuple[int, int]:
        return self.default_steps, self.default_steps

    @property
    def default_guidance(self) -> float:
        return self.bundle.sampling.guidance

    @torch.inference_mode()
    def generate(
        self, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
        callback: Callback | None = None, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, layout: Layout = None,
    ) -> DualGenerateOutput:  # fmt: skip
        """Generate images from prompts.

        Args:
            prompt: one or a list.
            negative_prompt: what the images should not show; by default the true unconditional prompt.
            height: the trained side in pixels, the only one.
            width: as `height`.
            num_inference_steps: a step is a row of the grid: the number of rows, the only one.
            guidance_scale: by default the model's own; 1 is the conditional branch.
            num_images_per_prompt: images of one prompt are adjacent in the result.
            seed: one (image i gets seed + i) or one per image; random when None. `.seeds` has those used.
            callback: called after each row with (rows done, rows, pixel codes `[B, h, w, D]`, of which `preview` makes
                images); returning False, exactly, cancels.
            temperature: of the codes; 0 takes the likeliest. By default the model's own, as the next two.
            top_k: codes that remain to draw from; 0: all.
            top_p: the likeliest codes that together have this probability remain.
            layout: as in `SparPipeline.generate`; the image's prompt is then the layout.

        Raises:
            InputError: the message has the expected and the given value.
            Cancelled: by the callback; there is no result, and the pipeline is unchanged.
        """
        texts = self._texts(prompt, "prompt")
        taught = self.bundle.sampling.layout
        write = self._layout_writer(layout, len(texts), self.output_size(height, width), taught=taught)
        rows = self.model.config.grid
        if num_inference_steps is not None:
            check_int_range("num_inference_steps", num_inference_steps, rows, rows)
        sampling = self._sampling(guidance_scale, temperature, top_k, top_p)
        negatives = self._negatives(negative_prompt, len(texts), sampling.guidance != 1)
        check_int_range("num_images_per_prompt", num_images_per_prompt, 1, limits.MAX_IMAGES)
        count = len(texts) * num_images_per_prompt
        check_range("images in all", count, 1, limits.MAX_IMAGES)
        seeds = list_seeds(seed, count)
        written = [text for text in texts for _ in range(num_images_per_prompt)]
        against = [text for text in negatives for _ in range(num_images_per_prompt)]
        generators = [cpu_generator(one) for one in seeds]
        with self._compute(count):
            layouts = None if write is None else write(written, seeds, None)
            asked: list[str | None] = [*(layouts or written), *([] if sampling.guidance == 1 else against)]
            tokens = self.prompts.generation(asked).to(self.device)
            steps = self.model.generate_codes(tokens.ids, tokens.mask, sampling, generators)
            with sampling_bar(callback, rows, shown=self.progress) as watch:
                codes = self._collect(steps, count, watch)
            images = self.model.tokenizer.decode(codes.pixel).float().clamp(0, 1)
        shared = {**self._sampling_metadata(sampling), **self._layout_turned_off(layout, taught=taught)}
        metadata = [
            {
                "prompt": written[i], "negative_prompt": against[i], "seed": one,
                **({"layout": layouts[i]} if layouts else {}), **shared,
            }
            for i, one in enumerate(seeds)
        ]  # fmt: skip
        return DualGenerateOutput(images=to_pil(images), seeds=seeds, routing=[], metadata=metadata, codes=codes)

    def _sampling(
        self, guidance: float | None, temperature: float | None, top_k: int | None, top_p: float | None
    ) -> CodeSampling:
        """The model's own sampling with what the caller changes."""
        if guidance is not None:
            check_range("guidance_scale", guidance, 0, limits.MAX_GUIDANCE)
        given: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return replace(self.bundle.sampling, **{name: value for name, value in given.items() if value is not None})

    def _sampling_metadata(self, sampling: CodeSampling) -> dict[str, Any]:
        """Metadata that all images of a call share."""
        numbers = {name: float(getattr(sampling, name)) for name in ("guidance", "temperature", "top_p")}
        return {**numbers, "top_k": sampling.top_k, **self.run_metadata()}

    def _collect(self, steps: Iterator[DualCodes], count: int, callback: Callback | None) -> DualCodes:
        """The codes `[B, h, w, D]` of all positions; the callback sees the pixel codes after each finished row."""
        config, grid = self.model.config, self.model.config.grid
        semantic = torch.zeros(count, grid, grid, config.semantic.depth, dtype=torch.long, device=self.device)
        pixel = semantic if config.one_codebook else semantic.new_zeros(count, grid, grid, config.pixel.depth)
        for place, step in enumerate(steps):
            row, column = divmod(place, grid)
            pixel[:, row, column], semantic[:, row, column] = step.pixel, step.semantic
            if callback and column == grid - 1 and callback(row + 1, grid, pixel) is False:
                raise Cancelled(f"cancelled after {row + 1} of {grid} rows")
        return DualCodes(pixel, semantic)

    @torch.inference_mode()
    def understand_codes(
        self, codes: DualCodes, question: str | Sequence[str], *, max_new_tokens: int = 48, temperature: float = 0.0,
        top_p: float = 1.0, seed: int | Sequence[int] | None = None,
    ) -> UnderstandOutput:  # fmt: skip
        """`understand`, with its arguments, of images that are given as their codes, `[B, h, w, D]` each: those of
        `encode`, or as `generate` drew them.
        """
        check_int_range("max_new_tokens", max_new_tokens, 1)
        questions = self._texts(question, "question")
        for name, values in (("pixel", codes.pixel), ("semantic", codes.semantic)):
            one = self.model.tokenizer.quantizers.get(name, self.model.tokenizer.semantic_quantizer).config
            grid = self.model.config.grid
            if values.dim() != 4 or values.shape[1:] != (grid, grid, one.depth):
                expected, given = f"[B, {grid}, {grid}, {one.depth}]", list(values.shape)
                raise InputError(f"codes.{name}: expected {expected} of this model, got {given}")
            if not len(values) or len(values) != len(codes.pixel):
                expected = f"{len(codes.pixel)} images, as codes.pixel" if len(codes.pixel) else "at least one image"
                raise InputError(f"codes.{name}: expected those of {expected}, got {len(values)}")
            if values.dtype != torch.long:
                raise InputError(f"codes.{name}: expected whole numbers (int64), got {values.dtype}")
            if not 0 <= int(values.min()) <= int(values.max()) < one.entries:
                raise InputError(f"codes.{name}: expected 0 to {one.entries - 1}, got {values.min()} to {values.max()}")
        pixel, asked = self._paired(codes.pixel, questions, "question")
        semantic, _ = self._paired(codes.semantic, questions, "question")
        sampling = text_sampling(temperature, top_p, seed, len(asked))
        return self._answers(
            lambda: DualCodes(pixel.to(self.device), semantic.to(self.device)), asked, max_new_tokens, sampling
        )

    @torch.inference_mode()
    def image_loss(
        self, image: ImageSource | Sequence[ImageSource], prompt: Sequence[str], seed: int = 0
    ) -> list[float]:
        """How badly the model predicts images from prompts: the mean cross-entropy of their codes (nats, teacher
        forcing), one number a pair. Nothing is drawn: `seed` has no effect. Codes of another tokenizer are not
        comparable.
        """
        pixels, prompts = self._paired(self._squares(image), self._texts(prompt, "prompt"), "prompt")
        codes, tokens = self._read_images(pixels), self.prompts.generation(prompts).to(self.device)
        with self._compute(len(prompts)):
            found = self.model.image_logits(tokens.ids, tokens.mask, codes)
        losses = [
            F.cross_entropy(logits.float().flatten(0, 1), getattr(codes, name).flatten(), reduction="none")
            for name, logits in found.items()
        ]
        return torch.stack([loss.view(len(prompts), -1).mean(1) for loss in losses]).mean(0).tolist()

    @torch.inference_mode()
    def encode(self, image: ImageSource | Sequence[ImageSource]) -> DualCodes:
        """The codes of images, in float32: pixel and semantic `[B, h, w, D]`."""
        return self._read_images(self._squares(image))

    @property
    def entries(self) -> dict[str, int]:
        """The number of entries of each vocabulary."""
        return {name: quantizer.config.entries for name, quantizer in self.model.tokenizer.quantizers.items()}

    @torch.inference_mode()
    def classify(
        self, image: ImageSource | Sequence[ImageSource], labels: Sequence[str], *, quantized: bool = True
    ) -> list[int]:
        """The number of the label that is nearest to each image, by the two towers (zero-shot).

        Args:
            labels: texts, cut to the text tower's length.
            quantized: whether the image's feature is that of its semantic codes, or the encoder's own.
        """
        texts = self._texts(labels, "label")
        check_range("labels", len(texts), 1, limits.MAX_LABELS)
        tokenizer, pixels = self.model.tokenizer, self._squares(image)
        with torch.autocast(self.device.type, enabled=False):
            features = self._label_features(tuple(texts))
            pooled = tokenizer.pooled(tokenizer.encode(pixels).semantic) if quantized else tokenizer.encoder(pixels)[1]
            return (pooled @ features.T).argmax(1).tolist()

    def _label_features(self, texts: tuple[str, ...]) -> Tensor:
        """The text tower's unit features `[labels, W]`; the last labels' are kept, since a run asks for the same ones
        with every batch of images.
        """
        if self._labels is None or self._labels[0] != texts:
            tower = self.model.tokenizer.text_tower
            ids = tower_tokens(self.bundle.tower_tokenizer or self.text_tokenizer, texts, tower.config.positions)
            chunks = [tower(chunk) for chunk in ids.to(self.device).split(LABELS_AT_ONCE)]
            self._labels = texts, F.normalize(torch.cat(chunks), dim=1)
        return self._labels[1]

    @torch.inference_mode()
    def reconstruct(self, image: ImageSource | Sequence[ImageSource]) -> ReconstructOutput:
        """Encode images to codes and decode their pixel codes."""
        pixels = self._squares(image)
        codes = self._read_images(pixels)
        with self._compute(len(pixels)):
            out = self.model.tokenizer.decode(codes.pixel).float().clamp(0, 1)
        return ReconstructOutput(to_pil(out), [self.run_metadata() for _ in out])

    def output_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of images of `generate`; InputError for any but the trained side."""
        for name, value in (("height", height), ("width", width)):
            if value not in (None, self.image_size):
                raise InputError(f"{name}: expected {self.image_size}, the only side of this model, got {value!r}")
        return self.image_size, self.image_size

    @torch.inference_mode()
    def preview(self, state: Tensor) -> list[Image.Image]:
        """Decode a callback's codes; rows that are not drawn yet have the first entry's look."""
        with self._compute(len(state)):
            images = self.model.tokenizer.decode(state).float()
        return to_pil(images.clamp(0, 1))

    def _read_images(self, pixels: Tensor) -> DualCodes:
        with torch.autocast(self.device.type, enabled=False):
            return self.model.tokenizer.encode(pixels.float())

    def _settings(self) -> dict[str, Any]:
        return {"compile": self.compile or None}
