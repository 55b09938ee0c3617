"""Arguments of the four tasks and of `spar info`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from spar.cli.arguments import Flag, Guidance, ModelArguments, OutputPath, Steps, check_nonempty, check_utf8
from spar.common.errors import InputError
from spar.common.limits import (
    MAX_GUIDANCE,
    MAX_IMAGE_TILES,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    check_range,
)

MAX_ANIMATIONS = 64  # images whose steps are kept in memory


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(ModelArguments, ABC):
    """Sampling and output of images."""

    output: OutputPath = None
    """PNG file, or a folder for several images, named by number and seed; by default out.png, or out for several."""
    overwrite: Flag = False
    """Replace files that exist."""
    seed: int | None = None
    """Image i uses seed + i; random by default."""
    num_inference_steps: Steps = None
    """Sampling steps; by default the model's own."""
    guidance_scale: Guidance = None
    """Classifier-free guidance, 1 for none; by default the model's own."""
    sampler: Literal["dpmsolver++", "euler"] | None = None
    """Of a SPAR model: how the flow is sampled; by default the model's own way."""
    num_images_per_prompt: Annotated[int, arg(aliases=["-n"])] = 1
    """Images for each prompt."""
    grid: Flag = False
    """Also write a contact sheet of all images: grid.png beside them, a row for each prompt if -n is above 1."""
    save_steps: Flag = False
    """Also write the steps of sampling as a GIF beside each image."""
    negative_prompt: str | None = None
    """What the images should not show."""

    def __post_init__(self) -> None:
        check_range("--seed", self.seed, 0, MAX_SEED)
        check_range("--steps", self.num_inference_steps, 1, MAX_STEPS)
        check_range("--guidance", self.guidance_scale, 0, MAX_GUIDANCE)
        check_range("--num-images-per-prompt", self.num_images_per_prompt, 1, MAX_IMAGES)
        check_utf8(self.negative_prompt, "--negative-prompt")

    @property
    @abstractmethod
    def texts(self) -> tuple[str, ...]:
        """What each image or group of images is made of."""

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.texts) * self.num_images_per_prompt

    def check_count(self) -> None:
        """Refuse more images than one call makes, or than whose steps are kept."""
        check_range("number of images", self.count, 1, MAX_IMAGES)
        if self.save_steps:
            check_range("number of images with --save-steps", self.count, 1, MAX_ANIMATIONS)

    def keywords(self) -> dict[str, Any]:
        """Keywords of the pipeline's sampling tasks; the seeds of all images come beside them."""
        names = ("negative_prompt", "num_inference_steps", "guidance_scale", "num_images_per_prompt")
        own = {"sampler": self.sampler} if self.sampler else {}
        return {**{name: getattr(self, name) for name in names}, **own}


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(SamplingArguments):
    """Generate images from prompts: spar generate "a large red circle on a gray background" -o out.png"""

    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT")]
    """What to generate; several prompts give several images."""
    height: int | None = None
    """Pixels; by default the side of the training images."""
    width: int | None = None
    """Pixels; by default the side of the training images."""
    layout: str | None = None
    """Of a SPAR model that writes layouts: where everything lies, in words, in place of its own layout."""
    no_layout: Flag = False
    """Of such a model: draw of the prompt itself, without a layout."""
    temperature: float | None = None
    """Of a DualToken model: of the codes that are drawn, 0 for the likeliest; by default the model's own."""
    top_k: int | None = None
    """Of a DualToken model: draw from so many of the likeliest codes, 0 for all."""
    top_p: float | None = None
    """Of a DualToken model: draw from the likeliest codes that together have this probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonempty(self.prompt, "prompt", "PROMPT")
        if self.no_layout and self.layout is not None:
            raise InputError("expected one of --layout and --no-layout, got both")
        check_utf8(self.layout, "--layout")
        check_range("--temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_range("--top-k", self.top_k, 0, MAX_TOP_K)
        check_range("--top-p", self.top_p, 0, 1)
        self.check_count()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompt

    def keywords(self) -> dict[str, Any]:
        """Keywords of `generate`; those of one system alone where they are given."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        own["layout"] = False if self.no_layout else self.layout
        given = {name: value for name, value in own.items() if value is not None}
        return {"height": self.height, "width": self.width, **super().keywords(), **given}


@dataclass(frozen=True, kw_only=True)
class EditArguments(SamplingArguments):
    """Edit an image by instruction: spar edit photo.png "remove the red circle" -o edited.png"""

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """The image to edit."""
    instruction: Annotated[Positional[tuple[str, ...]], arg(metavar="INSTRUCTION")]
    """What to change; several instructions give several images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonempty(self.instruction, "instruction", "IMAGE INSTRUCTION")
        self.check_count()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.instruction


@dataclass(frozen=True, kw_only=True)
class UnderstandArguments(ModelArguments):
    """Answer questions about an image: spar understand photo.png "how many objects are there?\""""

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """The image."""
    question: Annotated[Positional[tuple[str, ...]], arg(metavar="QUESTION")]
    """What to ask; one line is printed for each question."""
    max_new_tokens: int = 48
    """Tokens of the longest answer; more than 2048 is cut to that."""
    temperature: float = 0.0
    """0 takes the likeliest word at each step; above it, words are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest words that together have this probability."""
    seed: int | None = None
    """Of the first answer; the next ones count up from it. By default drawn."""
    max_tiles: int | None = None
    """Read the image as up to so many tiles and the whole (InternVL's dynamic tiling); by default the model's own."""

    def __post_init__(self) -> None:
        check_nonempty(self.question, "question", "IMAGE QUESTION")
        check_range("--max-tiles", self.max_tiles, 1, MAX_IMAGE_TILES)
        check_range("--max-new-tokens", self.max_new_tokens, 1)
        check_range("--temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_range("--top-p", self.top_p, 0, 1)
        check_range("--seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class ReconstructArguments(ModelArguments):
    """Encode and decode images with the unified tokenizer: spar reconstruct photo.png -o back.png"""

    image: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")]
    """Images, or folders of images."""
    output: OutputPath = None
    """PNG file, or a folder for several images; by default out.png, or out for several."""
    overwrite: Flag = False
    """Replace files that exist."""

    def __post_init__(self) -> None:
        check_nonempty(self.image, "image", "IMAGE")


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Show how an image was made, or what a folder of weights contains: spar info out.png

    Of an image it prints the metadata and the command that reproduces it. A folder is checked as in loading, by the
    headers of its files.
    """

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """A PNG written by spar, or a SPAR folder (of a model, or of a tokenizer alone)."""
    json: Flag = False
    """Print JSON."""
