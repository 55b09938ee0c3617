"""Arguments of the four tasks and of `spar info`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
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


def parse_interval(text: str | None) -> list[float] | None:
    """The times of FIRST:LAST; InputError for anything else."""
    if text is None:
        return None
    try:
        first, last = map(float, text.split(":"))
    except ValueError:
        first, last = 1.0, 0.0
    if not 0 <= first <= last <= 1:
        raise InputError(f"--guidance-interval: expected FIRST:LAST, 0 <= FIRST <= LAST <= 1, got {text!r}")
    return [first, last]


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
    guidance_interval: str | None = None
    """Of a SPAR model: the times FIRST:LAST, of 0 to 1 (noise), at which guidance applies, such as 0.2:0.9; elsewhere
    half the work is saved."""
    step_cache: float = 0.0
    """Of a SPAR model: above 0, such as 0.1, steps that would change the DiT's blocks by less take from the one before;
    saves work, and changes the image somewhat."""
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
        check_range("--step-cache", self.step_cache, 0, 1)
        parse_interval(self.guidance_interval)
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
        own = {
            "sampler": self.sampler, "step_cache": self.step_cache,
            "guidance_interval": parse_interval(self.guidance_interval),
        }  # fmt: skip
        own = {name: value for name, value in own.items() if value}
        return {**{name: getattr(self, name) for name in names}, **own}


@dataclass(frozen=True, kw_only=True)
class PromptFileArguments(SamplingArguments, ABC):
    """Sampling of one call, or of a whole file into a folder."""

    prompts: Path | None = None
    """In place of the words above: a file with a prompt a line, or of JSON objects with a "prompt" a line (.jsonl; for
    edits with an "image" too), drawn into the folder of -o. The same call goes on with a folder, and under torchrun
    processes share the work."""
    batch: int | None = None
    """Images drawn together, 16 by default; it changes time and memory alone."""
    check: Flag = False
    """Of --prompts: draw nothing, and say what the folder of -o lacks or has wrong."""
    layout: str | None = None
    """Of a model that writes layouts: where everything lies, of an edit what changes, in words, in place of its own."""
    no_layout: Flag = False
    """Of such a model: draw of the prompt or instruction itself, without a layout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.no_layout and self.layout is not None:
            raise InputError("expected one of --layout and --no-layout, got both")
        check_utf8(self.layout, "--layout")

    def keywords(self) -> dict[str, Any]:
        layout = False if self.no_layout else self.layout
        return {**super().keywords(), **({} if layout is None else {"layout": layout})}

    def check_file(self, given: Mapping[str, bool]) -> None:
        """Refuse what does not go with --prompts, or is for it alone; `given` says which of the verb's words and own
        flags were, the words first.
        """
        check_range("--batch", self.batch, 1, MAX_IMAGES)
        words, *flags = given
        if self.prompts is None:
            alone = {"--check": self.check, **{flag: given[flag] for flag in flags}}
            if used := [name for name, value in alone.items() if value]:
                raise InputError(f"{', '.join(used)}: expected --prompts FILE beside it, got none")
            return
        refused = {words: given[words], "--grid": self.grid, "--save-steps": self.save_steps}
        if used := [name for name, value in refused.items() if value]:
            raise InputError(f"--prompts: expected none of {words}, --grid and --save-steps, got {', '.join(used)}")
        if self.overwrite:
            raise InputError("--prompts: expected no --overwrite: a folder goes on, or is refused")


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(PromptFileArguments):
    """Generate images from prompts: spar generate "a large red circle on a gray background" -o out.png"""

    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT")] = ()
    """What to generate; several prompts give several images."""
    format: Literal["plain", "geneval", "geneval2", "wise", "dpg", "genai"] = "plain"
    """Of --prompts: a benchmark's own prompt file (WISE: or folder, DPG: folder), and the layout that its scorer
    reads."""
    height: int | None = None
    """Pixels; by default the side of the training images."""
    width: int | None = None
    """Pixels; by default the side of the training images."""
    temperature: float | None = None
    """Of a DualToken model: of the codes that are drawn, 0 for the likeliest; by default the model's own."""
    top_k: int | None = None
    """Of a DualToken model: draw from so many of the likeliest codes, 0 for all."""
    top_p: float | None = None
    """Of a DualToken model: draw from the likeliest codes that together have this probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_file({"PROMPT": bool(self.prompt), "--format": self.format != "plain"})
        if self.prompts is None:
            check_nonempty(self.prompt, "prompt", "PROMPT")
        check_range("--temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_range("--top-k", self.top_k, 0, MAX_TOP_K)
        check_range("--top-p", self.top_p, 0, 1)
        if self.prompts is None:
            self.check_count()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompt

    def keywords(self) -> dict[str, Any]:
        """Keywords of `generate`; those of one system alone where they are given."""
        own: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        given = {name: value for name, value in own.items() if value is not None}
        return {"height": self.height, "width": self.width, **super().keywords(), **given}


@dataclass(frozen=True, kw_only=True)
class EditArguments(PromptFileArguments):
    """Edit an image by instruction: spar edit photo.png "remove the red circle" -o edited.png"""

    image: Annotated[Positional[Path | None], arg(metavar="IMAGE")] = None
    """The image to edit."""
    instruction: Annotated[Positional[tuple[str, ...]], arg(metavar="INSTRUCTION")] = ()
    """What to change; several instructions give several images."""
    format: Literal["plain", "imgedit", "gedit", "gedit-en"] = "plain"
    """Of --prompts: ImgEdit's own file of instructions, or GEdit-Bench's parquet file or their folder (gedit-en: its
    English instructions alone), and the layout that its scorer reads."""
    images: Path | None = None
    """Of --prompts: the folder of the images that the file names; by default its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        flags = {"--format": self.format != "plain", "--images": self.images is not None}
        self.check_file({"IMAGE": self.image is not None, **flags})
        if self.images is not None and self.format.startswith("gedit"):
            raise InputError(f"--images: expected none with --format {self.format}, whose images are in its files")
        if self.prompts is None and self.source:
            check_nonempty(self.instruction, "instruction", "IMAGE INSTRUCTION")
            self.check_count()

    @property
    def source(self) -> Path:
        """The image to edit where there is no file of edits; InputError without one."""
        if self.image is None:
            raise InputError("expected IMAGE, got nothing")
        return self.image

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
