"""What the pipelines of all systems share: their inputs' checks, answers in words, metadata.

A system's own file has the rest of the contract: `generate`, `edit`, `reconstruct`, and how images reach its LLM.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from spar.checkpoints.model_header import versions
from spar.common import limits
from spar.common.device import choose_device, dtype_name, native_dtype
from spar.common.errors import InputError
from spar.common.limits import check_int_range
from spar.common.seeds import list_seeds
from spar.common.threads import threads_for
from spar.inference.inputs import broadcast, list_texts, open_sources
from spar.inference.offload import Weights
from spar.inference.outputs import ChatOutput, GenerateOutput, ReconstructOutput, UnderstandOutput
from spar.inference.progress import Callback
from spar.models.sampling import TextSampling
from spar.processing.chat import Squares, TextStream, read_messages
from spar.processing.images import ImageSource, to_size, to_square, to_tensor
from spar.processing.prompts import PromptEncoder, TokenBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Prompts are padded to multiples of this many tokens: attention sums in vectors of 16 numbers, where a prompt's tokens
# then have the same places in any batch, and an image is the same alone and in a batch.
TOKEN_MULTIPLE = 16


def choose_device_and_dtype(
    device: str | torch.device | None, dtype: torch.dtype | str | None
) -> tuple[torch.device, torch.dtype]:
    """The device, by default CUDA if available, and the type of matrix products, by default what it is fast in.

    Raises:
        InputError: an unavailable device, or a type that is not a floating one.
    """
    where = choose_device(device)
    return where, native_dtype(where) if dtype is None else read_dtype(dtype)


def read_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating type of torch, or the one of a name such as "bfloat16"; InputError for any other."""
    for name, known in DTYPES.items():
        if dtype is known or (isinstance(dtype, str) and dtype == name):
            return known
    raise InputError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")


def text_sampling(temperature: float, top_p: float, seed: int | Sequence[int] | None, count: int) -> TextSampling:
    """How `count` answers are drawn, each with its own seed; none of them has one at temperature 0.

    Raises:
        InputError: a number without meaning, or another number of seeds.
    """
    seeds = list_seeds(seed, count) if temperature or seed is not None else []
    return TextSampling(temperature, top_p, tuple(seeds) if temperature else ())


class Pipeline(ABC):
    """One model and its tasks.

    Attributes:
        bundle: the model with its text tokenizer, sampling defaults and manifest.
        dtype: type of matrix products.
        weights: type of the weights in memory, "float32" as stored.
        system: its name in messages.
        has_routing: whether its images come with the LLM layers that each token read.
        tasks: what the system defines, by the names of the methods.
        origin: names of the model and the adapter for the metadata of images, without their folders.
        progress: whether sampling shows a bar where the caller gives no callback.
    """

    bundle: Any
    model: Any
    dtype: torch.dtype
    device: torch.device
    weights: Weights
    origin: Mapping[str, str | None]
    prompts: PromptEncoder
    parameters: int
    progress: bool

    system: ClassVar[str]
    has_routing: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("generate", "understand", "reconstruct")

    def __repr__(self) -> str:
        name, dtype = self.origin.get("model") or self.manifest.get("recipe"), dtype_name(self.dtype)
        return (
            f"{type(self).__name__}({name}: {self.parameters / 1e6:.1f} M parameters, {self.image_size} x "
            f"{self.image_size} pixels, {dtype} on {self.device})"
        )

    @property
    @abstractmethod
    def max_prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""

    @property
    @abstractmethod
    def default_steps(self) -> int:
        """Steps of the sampler unless the caller says otherwise."""

    @property
    @abstractmethod
    def default_guidance(self) -> float:
        """Scale of classifier-free guidance unless the caller says otherwise."""

    @property
    def default_edit_guidance(self) -> float:
        """The same of edits."""
        return self.default_guidance

    @property
    def steps_range(self) -> tuple[int, int]:
        """The fewest and the most steps of the sampler."""
        return 1, limits.MAX_STEPS

    @abstractmethod
    def generate(
        self, prompt: str | Sequence[str], *, negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> GenerateOutput:  # fmt: skip
        """Generate images from prompts."""

    def edit(
        self, image: ImageSource | Sequence[ImageSource], instruction: str | Sequence[str], *,
        negative_prompt: str | Sequence[str] | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, num_images_per_prompt: int = 1, seed: int | Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> GenerateOutput:  # fmt: skip
        """Edit images by instruction; a system without this task refuses.

        Raises:
            InputError: always, where `tasks` lacks it.
        """
        raise InputError(self._undefined("editing"))

    def check_settings(self, keywords: Mapping[str, Any]) -> None:
        """Refuse keywords of `generate` that another system has; InputError names the first."""
        known = inspect.signature(self.generate).parameters
        for name, value in keywords.items():
            if name not in known:
                raise InputError(f"{name}: {self.system} has no such setting, got {value!r}")

    def _undefined(self, task: str) -> str:
        return f"{self.system} does not define {task}: its tasks are {', '.join(self.tasks)} and chat"

    @abstractmethod
    def reconstruct(self, image: ImageSource | Sequence[ImageSource]) -> ReconstructOutput:
        """Encode and decode images."""

    @abstractmethod
    def output_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width of images of `generate`; InputError for sides that it does not make."""

    def edited_size(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of the result of `edit`; InputError where there is none."""
        raise InputError(self._undefined("editing"))

    @abstractmethod
    def preview(self, state: Tensor) -> list[Image.Image]:
        """Images of what `generate` hands its callback."""

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
        """Write the whole model as a folder of its system, floating weights in `dtype` (default: as they are).

        Raises:
            InputError: the folder cannot be written, the weights are not those that were loaded, or another type.
        """
        if self.weights != "float32":
            raise InputError(f"weights: expected float32 to save a pipeline, got {self.weights}")
        self._save(Path(path), None if dtype is None else read_dtype(dtype))

    @abstractmethod
    def _save(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Write the folder."""

    @abstractmethod
    def _read_images(self, pixels: Tensor) -> Any:
        """What the LLM reads of images `[B, 3, S, S]`."""

    def _load_to_device(self, *parts: str) -> None:
        """Load the parts that compute next, if parts are offloaded."""

    def _settings(self) -> dict[str, Any]:
        """Settings of this pipeline that an image depends on; None is not written."""
        return {}

    @property
    def image_size(self) -> int:
        """Side of the training images in pixels."""
        return int(self.model.config.image_size)

    @property
    def text_tokenizer(self) -> Any:
        return self.bundle.text_tokenizer

    @property
    def manifest(self) -> dict[str, Any]:
        return self.bundle.manifest

    @torch.inference_mode()
    def understand(
        self, image: ImageSource | Sequence[ImageSource], question: str | Sequence[str], *, max_new_tokens: int = 48,
        temperature: float = 0.0, top_p: float = 1.0, seed: int | Sequence[int] | None = None,
        max_tiles: int | None = None,
    ) -> UnderstandOutput:  # fmt: skip
        """Answer questions about images; pairs as in `edit`.

        Args:
            max_new_tokens: is cut to MAX_NEW_TOKENS and to what fits.
            temperature: 0 takes the likeliest token at each step; above it, tokens are drawn.
            top_p: tokens are drawn from the likeliest that together have this probability.
            seed: of the first answer, the next ones count up from it, or one for each; None draws seeds. They are in
                the output, and the same seed gives the same answer in any batch.
            max_tiles: tiles that an image is read as at most, with the whole beside them if there are several
                (InternVL's dynamic tiling); by default the model's own number.
        """
        check_int_range("max_new_tokens", max_new_tokens, 1)
        cut = self._answer_squares(max_tiles)
        squares = open_sources(image, lambda one: to_tensor(cut(one)))
        count, texts = len(squares), self._texts(question, "question")
        places, questions = self._paired(torch.arange(count)[:, None, None, None], texts, "question")
        read = [squares[place] for place in places.flatten().tolist()]
        pixels, tiles = torch.cat(read).to(self.device), [len(one) for one in read]
        sampling = text_sampling(temperature, top_p, seed, len(questions))
        return self._answers(lambda: self._read_images(pixels), questions, max_new_tokens, sampling, tiles)

    def _answer_squares(self, max_tiles: int | None) -> Squares:
        """How this model cuts an image for an answer: its middle square."""
        if max_tiles not in (None, 1):
            raise InputError(f"max_tiles: {self.system} reads one square of an image, expected 1, got {max_tiles!r}")
        return lambda image: [to_square(image, self.image_size)]

    def _answers(
        self, read: Callable[[], Any], questions: Sequence[str], max_new_tokens: int, sampling: TextSampling,
        tiles: Sequence[int] | None = None,
    ) -> UnderstandOutput:  # fmt: skip
        """Answers about the images that `read` makes ready for the LLM, of so many `tiles` each (one), a question."""
        tokens = self.prompts.question(questions, tiles).to(self.device)
        room = self.model.config.text.max_seq_len - int(tokens.mask.sum(1).max())
        max_new_tokens = min(max_new_tokens, limits.MAX_NEW_TOKENS, max(room, 1))
        with self._compute(len(questions)):
            images = read()
            self._load_to_device("language")
            rows = self.model.understand(
                tokens.ids, tokens.mask, images, max_new_tokens=max_new_tokens, sampling=sampling
            )
        texts = [self.bundle.text_tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return UnderstandOutput(texts, [*sampling.seeds])

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, max_new_tokens: int | None = None, temperature: float = 0.0,
        top_p: float = 1.0, seed: int | None = None, max_tiles: int | None = None,
    ) -> ChatOutput:  # fmt: skip
        """Answer the last message of a conversation, as an iterator over pieces of the text.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`; a content is text, or a list of parts
                `{"type": "text", "text": str}` and `{"type": "image", "image": ImageSource}`. `read_messages` has the
                order. Images become squares as in `understand`.
            max_new_tokens: by default as many as fit, at most MAX_NEW_TOKENS; a larger number is cut to that, and an
                answer that reaches it ends with the finish reason "length".
            temperature: as in `understand`, and so the following.
            top_p: of the likeliest tokens.
            seed: of the answer.
            max_tiles: of an image.

        Raises:
            InputError: at the call, before any computation.
        """
        if max_new_tokens is not None:
            check_int_range("max_new_tokens", max_new_tokens, 1)
        sampling = text_sampling(temperature, top_p, seed, 1)
        turns = read_messages(messages, self._answer_squares(max_tiles))
        max_tokens = min(self.model.config.text.max_seq_len, limits.MAX_CHAT_TOKENS)
        for turn in turns:
            for text in turn.parts:
                if isinstance(text, str) and (text or turn.role != "assistant"):  # an assistant's text may be empty
                    self.prompts.check(text, turn.name, max_tokens)
        written = [(turn.role, [p if isinstance(p, str) else len(p) for p in turn.parts]) for turn in turns]
        tokens = self.prompts.conversation(written)
        length = tokens.ids.shape[1]
        if length >= max_tokens:
            raise InputError(
                f"messages: expected at most {max_tokens} tokens with their images and one for the answer, got {length}"
            )
        images = [image for turn in turns for image in turn.images]
        pixels = to_tensor(images).to(self.device) if images else None
        out = ChatOutput(length, seed=next(iter(sampling.seeds), None))
        room = min(limits.MAX_NEW_TOKENS, max_tokens - length)
        out.stream = self._stream(out, tokens, pixels, min(max_new_tokens or room, room), sampling)
        return out

    def _stream(
        self, out: ChatOutput, tokens: TokenBatch, pixels: Tensor | None, max_tokens: int, sampling: TextSampling
    ) -> Iterator[str]:
        """Yield the pieces of one answer. No mode of torch is active outside of the generator."""
        text, tokens = TextStream(self.bundle.text_tokenizer), tokens.to(self.device)
        with torch.inference_mode(), self._compute():
            images = None if pixels is None else self._read_images(pixels)
            self._load_to_device("language")
            embedded = self.model.embed(tokens.ids, images)
            steps = self.model.language.stream(
                embedded, tokens.mask, max_new_tokens=max_tokens, sampling=sampling
            )
        while True:
            with torch.inference_mode(), self._compute():
                self._load_to_device("language")  # other calls may come between two pieces
                step = next(steps, None)
            if step is None or step[0] is None:  # there is one row, which ends with the stream
                break
            out.completion_tokens += 1
            if piece := text.add_token(step[0]):
                yield piece
        out.finish_reason = "length" if out.completion_tokens == max_tokens else "stop"
        if piece := text.flush():
            yield piece

    def check_text(self, text: str, what: str) -> None:
        """Refuse a prompt that the tasks would refuse; `what` is its name in the error."""
        self.prompts.check(text, what, self.max_prompt_tokens)

    def run_metadata(self) -> dict[str, Any]:
        """Metadata of everything other than the arguments that an image depends on."""
        training = {name: self.manifest.get(name) for name in ("recipe", "commit")}  # None is not written
        run = {"dtype": dtype_name(self.dtype), "device": str(self.device)}
        return {**run, **self._settings(), **self.origin, **training, **versions()}

    @contextmanager
    def _compute(self, images: int = 1) -> Iterator[None]:
        """Autocast, and on a CPU the number of threads that suits the work on so many images."""
        work = self.parameters * images * self.model.config.grid**2 if self.device.type == "cpu" else math.inf
        with threads_for(work), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def _squares(self, image: ImageSource | Sequence[ImageSource]) -> Tensor:
        """One image or a list, cropped and resized to the trained square, `[B, 3, S, S]`."""
        side = self.image_size
        return to_tensor(open_sources(image, lambda one: to_size(one, side, side))).to(self.device)

    def _negatives(
        self, negative_prompt: str | Sequence[str] | None, count: int, guided: bool
    ) -> Sequence[str | None]:
        """The negative prompt of each of `count` texts, None without any.

        Raises:
            InputError: another number of them, or one that is not read, where the guidance scale is 1.
        """
        if negative_prompt is None:
            return [None] * count
        negatives = broadcast(self._texts(negative_prompt, "negative_prompt"), count, "negative_prompt")
        if not guided:
            raise InputError("negative_prompt: expected a guidance_scale other than 1 beside it, which alone reads it")
        return negatives

    def _texts(self, text: str | Sequence[str], what: str) -> list[str]:
        texts = list_texts(text, what)
        for one in texts:
            self.check_text(one, what)
        return texts

    def _paired(self, pixels: Tensor, texts: list[str], what: str) -> tuple[Tensor, list[str]]:
        """One image with several texts, several images with one text, or one each."""
        count = max(len(pixels), len(texts))
        if len(pixels) == 1 and count > 1:
            pixels = pixels.expand(count, -1, -1, -1)
        if len(pixels) != count:
            raise InputError(f"expected one image, or one for each of {count} {what}s, got {len(pixels)}")
        return pixels, broadcast(texts, count, what)
