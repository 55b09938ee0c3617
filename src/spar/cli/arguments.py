"""Arguments of the command line: one frozen dataclass per verb, parsed by tyro, and the flags of a recipe.

tyro prints its errors as boxes; `parse` converts them to one `InputError`. No heavy library is imported here.
"""

import contextlib
import dataclasses
import io
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import DisallowNone, FlagConversionOff, FlagCreatePairsOff, Positional, UseAppendAction, arg

from spar.common.errors import InputError
from spar.common.limits import MAX_GUIDANCE, MAX_IMAGES, MAX_SEED, MAX_STEPS, MAX_WORKERS, check_range
from spar.data.samples import Format
from spar.serving.limits import DEFAULT_HOST, DEFAULT_PORT, MAX_BATCH, MAX_QUEUE, REQUEST_SECONDS, format_limits

if TYPE_CHECKING:
    from spar.training.config import Recipe, StageConfig
    from spar.training.data import DataConfig

T = TypeVar("T")

Flag = FlagCreatePairsOff[bool]
OutputPath = Annotated[Path | None, arg(aliases=["-o"])]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Benchmark = Literal["shapes-gen", "shapes-edit", "shapes-vqa", "shapes-recon", "all"]
Steps = Annotated[int | None, arg(name="steps", aliases=["--num-inference-steps"])]
Guidance = Annotated[float | None, arg(name="guidance", aliases=["--guidance-scale"])]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The weights, and how they run."""

    model: Path | None = None
    """Model folder, or hf://OWNER/NAME[@REVISION]; by default the bundled weights."""
    adapter: Path | None = None
    """Folder of LoRA weights (RUN/adapter) to merge into the model."""
    decode_tile: int | None = None
    """Visual tokens per side above which images are decoded in tiles: less memory, a slightly different image."""
    weights: Literal["float32", "dtype", "int8"] = "dtype"
    """Type of weights in memory: float32, dtype (that of --dtype, with the same results) or int8 (other results)."""
    offload: Flag = False
    """Keep idle parts in the CPU's memory: less of the device's memory, more time."""
    compile: Flag = False
    """Compile repeated layers with torch.compile: the first result takes a minute or so, later ones less time."""
    dtype: Dtype = "auto"
    """Type of matrix products; auto is bfloat16 if the device has it in hardware."""
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(ModelArguments):
    """Sampling and output of images."""

    output: OutputPath = None
    """PNG file, or a folder for several images; by default out.png, or out for several."""
    overwrite: Flag = False
    """Replace files that exist."""
    seed: int | None = None
    """Image i uses seed + i; random by default."""
    num_inference_steps: Steps = None
    """Sampling steps; by default the model's own."""
    guidance_scale: Guidance = None
    """Classifier-free guidance, 1 for none; by default the model's own."""
    num_images_per_prompt: Annotated[int, arg(aliases=["-n"])] = 1
    """Images for each prompt."""
    negative_prompt: str | None = None
    """What the images should not show."""

    def __post_init__(self) -> None:
        check_range("--seed", self.seed, 0, MAX_SEED)
        check_range("--steps", self.num_inference_steps, 1, MAX_STEPS)
        check_range("--guidance", self.guidance_scale, 0, MAX_GUIDANCE)
        check_range("--num-images-per-prompt", self.num_images_per_prompt, 1, MAX_IMAGES)
        _check_utf8(self.negative_prompt, "--negative-prompt")

    def keywords(self) -> dict[str, Any]:
        """Keywords of the pipeline's sampling tasks."""
        names = ("negative_prompt", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(SamplingArguments):
    """Generate images from prompts: spar generate "a large red circle on a gray background" -o out.png"""

    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT")]
    """What to generate; several prompts give several images."""
    height: int | None = None
    """Pixels; by default the side of the training images."""
    width: int | None = None
    """Pixels; by default the side of the training images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_nonempty(self.prompt, "prompt", "PROMPT")
        check_range("number of images", len(self.prompt) * self.num_images_per_prompt, 1, MAX_IMAGES)


@dataclass(frozen=True, kw_only=True)
class EditArguments(SamplingArguments):
    """Edit an image by instruction: spar edit photo.png "remove the red circle" -o edited.png"""

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """The image to edit."""
    instruction: Annotated[Positional[tuple[str, ...]], arg(metavar="INSTRUCTION")]
    """What to change; several instructions give several images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_nonempty(self.instruction, "instruction", "IMAGE INSTRUCTION")
        check_range("number of images", len(self.instruction) * self.num_images_per_prompt, 1, MAX_IMAGES)


@dataclass(frozen=True, kw_only=True)
class UnderstandArguments(ModelArguments):
    """Answer questions about an image: spar understand photo.png "how many objects are there?\""""

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """The image."""
    question: Annotated[Positional[tuple[str, ...]], arg(metavar="QUESTION")]
    """What to ask; one line is printed for each question."""
    max_new_tokens: int = 48
    """Tokens of the longest answer; more than 256 is cut to that."""

    def __post_init__(self) -> None:
        _check_nonempty(self.question, "question", "IMAGE QUESTION")
        check_range("--max-new-tokens", self.max_new_tokens, 1)


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
        _check_nonempty(self.image, "image", "IMAGE")


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


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a recipe: spar train tiny --run runs/tiny

    Every field of the recipe is a flag, stages by their names: --seed 3 --model.denoiser.layers 4
    --stages.unified-2.steps 100. `spar train RECIPE --help` lists them all.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name (tiny, shapes, ...); it comes first."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Train only this stage; of several, each starts from the end of the previous one."""
    run: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    resume: str = "never"
    """never: refuse a folder that contains a run. auto: resume it from its last state. A folder: resume that run."""
    init_from: Path | None = None
    """Start the first stage from the weights of a finished stage (RUN/STAGE/done) or of a SPAR folder."""
    teacher: Path | None = None
    """SPAR folder whose encoder is the tokenizer's semantic teacher, where the starting weights keep none."""
    from_scratch: Flag = False
    """Use random weights for the parts that the recipe expects from published checkpoints."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""
    dry_run: Flag = False
    """Print the plan of each stage (weights, data, what is prepared and removed, memory, time) and stop."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Estimate the cost of a recipe on given GPUs, before any training: spar plan spar-1b --gpus 64 --gpu h200

    It prints memory of one GPU, operations, images a second and days of each stage, and warns of what does not fit.
    Every field of the recipe is a flag, as in `spar train`: --stages.unified-2.batch 1024.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name (spar-1b, spar-3b); it comes first."""
    stage: UseAppendAction[tuple[str, ...]] = ()
    """Plan only this stage."""
    gpus: int = 8
    """Number of GPUs."""
    gpu: str = "h200"
    """Type of GPU: rtx4090, a100-40, a100, h100, h200 or b200."""
    mfu: float = 0.4
    """Assumed share of the GPU's peak."""
    strategy: Literal["fsdp", "ddp"] = "fsdp"
    """fsdp shards weights, gradients and optimizer; ddp replicates them."""
    grad_accum_steps: int = 1
    """Micro-steps of a GPU's share of a batch."""
    activation_checkpointing: Flag = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    """Compute the frozen features of data sets once: spar cache RECIPE --init-from MODEL --data.source files ...

    Unified stages then read the folder instead of images: spar train RECIPE ... --data.cache FOLDER. Every field of the
    recipe is a flag, as in `spar train`. An interrupted cache resumes from its last state.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe's name; it comes first."""
    init_from: Path
    """SPAR folder whose tokenizer computes the features."""
    output: Annotated[Path, arg(aliases=["-o"])] = Path("features")
    """Folder to write."""
    batch: int = 32
    """Images in one batch."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of matrix products, as in the training that will read the features."""


@dataclass(frozen=True, kw_only=True)
class AssemblyArguments:
    """Parts of a new model, and its folder."""

    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder to write."""
    revision: UseAppendAction[tuple[str, ...]] = ()
    """PART=COMMIT, for a part from the Hub; by default the newest."""
    seed: int = 0
    """Seed of the random weights."""
    overwrite: Flag = False
    """Replace an earlier model."""

    def __post_init__(self) -> None:
        check_range("--seed", self.seed, 0, MAX_SEED)
        self.revisions()

    def revisions(self) -> dict[str, str]:
        """Commit by part."""
        pairs = [text.partition("=") for text in self.revision]
        for text, (part, _, commit) in zip(self.revision, pairs, strict=True):
            if part not in ("mllm", "autoencoder", "dit") or not commit:
                raise InputError(f"--revision: expected mllm=COMMIT, autoencoder=COMMIT or dit=COMMIT, got {text!r}")
        return {part: commit for part, _, commit in pairs}


@dataclass(frozen=True, kw_only=True)
class BuildArguments(AssemblyArguments):
    """Build a model from published parts: spar build spar-1b --mllm OpenGVLab/InternVL3-1B-hf
    --autoencoder mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers --dit Efficient-Large-Model/Sana_600M_512px_diffusers -o
    spar-1b

    Each part is a folder or a Hub id. Weights that no part has start random; the manifest lists them.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe that defines the model (spar-1b, spar-3b)."""
    mllm: str
    """InternVL3, in transformers' layout (its name ends in -hf) or the original."""
    autoencoder: str
    """DC-AE, in diffusers' layout."""
    dit: str
    """SANA, in diffusers' layout."""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments(AssemblyArguments):
    """Convert a public checkpoint to a SPAR model: spar convert unilip kanashi6/UniLIP-1B -o unilip-1b

    The model computes the same function as the checkpoint, and full SPAR can be trained from it. A tokenizer's file
    (.pth) also needs the published parts and --factor; a model names its own.
    """

    format: Annotated[Positional[Literal["unilip"]], arg(metavar="FORMAT")]
    """Format of the checkpoint: unilip."""
    path: Annotated[Positional[str], arg(metavar="PATH")]
    """A model's folder or Hub id, or a file of tensors (.safetensors, .pt, .pth)."""
    mllm: str | None = None
    """InternVL3: folder or Hub id, in either layout."""
    autoencoder: str | None = None
    """DC-AE, in diffusers' layout."""
    dit: str | None = None
    """SANA, in diffusers' layout."""
    router: Literal["dtr", "last"] = "dtr"
    """last reproduces the checkpoint exactly; dtr starts within a thousandth of it and can learn."""
    factor: float | None = None
    """Factor that scales the latent to unit variance; by default the model's own."""
    recipe: str = "spar-1b"
    """The recipe of the settings that the checkpoint lacks."""


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Upload a folder of weights to the Hub: spar push runs/shapes/model OWNER/NAME --dry-run

    The folder is checked first, and only its own files are uploaded, in one commit. A missing repository is created,
    private unless --public. Authentication is huggingface_hub's: hf auth login, or HF_TOKEN.
    """

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """SPAR folder, of a model or of a tokenizer alone."""
    repository: Annotated[Positional[str], arg(metavar="REPO_ID")]
    """OWNER/NAME."""
    public: Flag = False
    """Make a new repository public."""
    message: str = "Weights of SPAR"
    """Message of the commit."""
    dry_run: Flag = False
    """Print what would be uploaded, and stop."""


@dataclass(frozen=True, kw_only=True)
class EvalArguments(ModelArguments):
    """Score a model with the detector of the shapes world: spar eval shapes-gen -o shapes-gen.json"""

    benchmark: Annotated[Positional[Benchmark], arg(metavar="BENCHMARK")]
    """One of shapes-gen, shapes-edit, shapes-vqa, shapes-recon, or all."""
    output: OutputPath = None
    """Results file (for all: folder); by default BENCHMARK.json (for all: results)."""
    overwrite: Flag = False
    """Replace results that exist."""
    limit: int | None = None
    """Prompts of each task; by default all of them."""
    seed: int | None = None
    """Seed of the images and of the bootstrap; by default 0."""
    num_inference_steps: Steps = None
    """Sampling steps; by default the model's own."""
    guidance_scale: Guidance = None
    """Classifier-free guidance; by default the model's own."""
    images_per_prompt: int | None = None
    """Images for each prompt of shapes-gen; by default 4."""
    batch: int | None = None
    """Images per batch: changes the time, never the scores."""
    combinations: Literal["seen", "held_out"] = "seen"
    """Combinations of colour and shape that training contains, or those that it holds out."""
    label: str | None = None
    """Label in the results, to distinguish two models."""

    def __post_init__(self) -> None:
        check_range("--seed", self.seed, 0, MAX_SEED)
        check_range("--steps", self.num_inference_steps, 1, MAX_STEPS)
        check_range("--guidance", self.guidance_scale, 0, MAX_GUIDANCE)
        for name in ("limit", "images_per_prompt", "batch"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1, MAX_IMAGES)

    def keywords(self) -> dict[str, Any]:
        """The given fields of EvalOptions; the others keep their defaults."""
        names = ("limit", "seed", "num_inference_steps", "guidance_scale", "images_per_prompt", "batch")
        values = {name: getattr(self, name) for name in (*names, "combinations", "label")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write a run's training curves and results as one HTML page: spar report runs/shapes"""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run."""
    output: OutputPath = None
    """HTML file; by default RUN/report.html, which is replaced."""
    overwrite: Flag = False
    """Replace the file of --output if it exists."""


@dataclass(frozen=True, kw_only=True)
class DemoArguments(ModelArguments):
    """Write a page with all four tasks: images, edits, answers, reconstructions and a small sample of the scores."""

    output: Annotated[Path, arg(aliases=["-o"])] = Path("demo")
    """Folder to write."""
    overwrite: Flag = False
    """Replace an earlier demo."""
    images: Path | None = None
    """Folder of images to reconstruct; by default images of the shapes world."""
    limit: int = 4
    """Prompts of each benchmark task."""

    def __post_init__(self) -> None:
        check_range("--limit", self.limit, 1, MAX_IMAGES)


@dataclass(frozen=True, kw_only=True)
class ListenArguments(ModelArguments):
    """Address and access of a server."""

    host: str = DEFAULT_HOST
    """Address to listen on; any but this machine's own needs a token."""
    port: int = DEFAULT_PORT
    """Port; 0 takes a free one."""
    token_file: Path | None = None
    """File with the required token; by default the variable SPAR_API_TOKEN, if set."""

    def __post_init__(self) -> None:
        check_range("--port", self.port, 0, 65535)


@dataclass(frozen=True, kw_only=True)
class ServeArguments(ListenArguments):  # noqa: D101  # its help names the limits: below
    max_batch: int = MAX_BATCH
    """Images of the model's own size in one batch."""
    max_queue: int = MAX_QUEUE
    """Images and chats that may wait; more are answered with 429."""
    timeout: int = REQUEST_SECONDS
    """Seconds that a request may wait and run."""
    ui: Flag = False
    """Serve the web page too, at /page (extra `ui`)."""

    def __post_init__(self) -> None:
        ListenArguments.__post_init__(self)
        check_range("--max-batch", self.max_batch, 1, MAX_IMAGES)
        check_range("--max-queue", self.max_queue, 1, MAX_IMAGES)
        check_range("--timeout", self.timeout, 1, 3600)


ServeArguments.__doc__ = f"""Serve the four tasks over HTTP, in the format of OpenAI's API: spar serve --port 8000

Paths: /v1/images/generations, /v1/images/edits, /v1/chat/completions, /v1/models, /v1/reconstruct, /health, /metrics,
/openapi.json. Limits of one request and of all requests together:

{format_limits()}
"""


@dataclass(frozen=True, kw_only=True)
class UiArguments(ListenArguments):
    """Serve the web page: spar ui"""

    port: int = 7860
    """Port; 0 takes a free one."""


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The data set, and how to read it."""

    path: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH")]
    """Shards by name, {0000..2175}, glob or hf://datasets/...; a folder of shards, of parquet files or with
    metadata.jsonl; a ShareGPT-4o-Image list (.json); a GPT-Image-Edit index (.txt)."""
    format: Format = "auto"
    """Format of PATH; auto derives it from the name."""
    cache: Path | None = None
    """Folder of shard indexes; by default they are built each time."""
    workers: int = 4
    """Processes."""

    def __post_init__(self) -> None:
        _check_nonempty(self.path, "data set", "PATH")
        check_range("--workers", self.workers, 1, MAX_WORKERS)


@dataclass(frozen=True, kw_only=True)
class DataCheckArguments(DataArguments):
    """Read and decode every sample and report what is wrong: spar data check "shards/*.tar"

    The exit status is 1 if anything is wrong.
    """

    limit: int | None = None
    """Samples to check, evenly spread; by default all."""
    max_characters: int = 4096
    """Longest caption."""
    json: Flag = False
    """Print the findings as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--limit", self.limit, 1, MAX_SEED)
        check_range("--max-characters", self.max_characters, 1, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class DataConvertArguments(DataArguments):
    """Write a data set as webdataset shards: spar data convert data.txt -o shards

    Complete images are copied byte by byte; the others are left out and listed in dropped.jsonl.
    """

    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder to write."""
    overwrite: Flag = False
    """Replace an earlier conversion."""
    shard_size: int = 10_000
    """Samples per shard."""
    bad_share: float = 0.01
    """Share of bad samples above which nothing is written, measured from 1000 samples on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--shard-size", self.shard_size, 1, 10**6)
        check_range("--bad-share", self.bad_share, 0, 1)


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Check the installation: versions, devices, optional parts, what is wrong and how to fix it."""


def _check_nonempty(values: Sequence[object], what: str, usage: str) -> None:
    if not values:
        raise InputError(f"expected at least one {what} ({usage}), got none")
    for value in values:
        if isinstance(value, str):
            _check_utf8(value, what)


def _check_utf8(text: str | None, what: str) -> None:
    """Refuse a shell's bytes that are not text in its encoding: Python keeps them as lone surrogates."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise InputError(f"{what}: expected text in UTF-8, got {text!r}") from None


def chosen_source(
    base: "Recipe", argv: Sequence[str], sources: "Mapping[str, type[DataConfig]]"
) -> "type[DataConfig]":
    """The class of the source that `--data.source` names, by default the recipe's; what is no source is tyro's to say.

    Raises:
        InputError: a flag that belongs to another source.
    """
    flags = [word.partition("=") for word in argv if word.startswith("--data.")]
    after = dict(pairwise(argv))
    kind = base.data.kind
    for flag, sign, value in flags:
        if flag == "--data.source":
            kind = value if sign else after.get(flag, kind)
    source = sources.get(kind, type(base.data))
    for flag, _, _ in flags:
        name = flag.removeprefix("--data.").replace("-", "_")
        others = [other for other, cls in sources.items() if name in _field_names(cls)]
        if name not in _field_names(source) and others:
            raise InputError(f"{flag} belongs to --data.source {' or '.join(others)}, got source {source.kind}")
    return source


def _field_names(cls: type) -> set[str]:
    return {item.name for item in dataclasses.fields(cls)}


def recipe_arguments(
    base: "Recipe", kind: type[T], sources: "Mapping[str, type[DataConfig]]", argv: Sequence[str]
) -> type[T]:
    """Extend `kind` by a flag for every field of a recipe, stages by name, and for training those of ParallelismConfig.

    The defaults are the values of `base`; its data's are those of the source that `argv` chooses. Booleans take a value
    (`--model.streams.pixel-stream False`).
    """
    from spar.training.distributed import ParallelismConfig

    source = chosen_source(base, argv, sources)
    stages = _flags(
        "Stages",
        {f"stage_{index}": _stage_flags(replace(stage, data=source.nearest(stage.data)))
         for index, stage in enumerate(base.stages)},
        {f"stage_{index}": stage.name for index, stage in enumerate(base.stages)},
    )
    values = {item.name: getattr(base, item.name) for item in dataclasses.fields(base)}
    hints: dict[str, Any] = {**typing.get_type_hints(type(base)), "stages": type(stages), "data": source}
    annotation: Any = FlagConversionOff
    values["stages"] = stages
    if source is not type(base.data):
        values["data"] = source() if not _required(source) else dataclasses.MISSING
    fields: list[tuple[str, Any, Any]] = [
        (name, annotation[hints[name]], field(default=value) if value is not dataclasses.MISSING else field())
        for name, value in values.items()
    ]
    known: Any = Literal[tuple(sources)]
    fields.append(("data_source", Annotated[known, arg(name="data.source")], field(default=source.kind)))
    if kind is TrainArguments:
        fields.append(("parallelism", FlagConversionOff[ParallelismConfig], field(default=ParallelismConfig())))
    names = {f"stage-{index}": stage.name for index, stage in enumerate(base.stages)}
    return make_dataclass(
        kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True,
        namespace={"__doc__": kind.__doc__, "stage_names": names},
    )  # fmt: skip


def _required(cls: type) -> bool:
    """Whether a dataclass has a field without a default."""
    missing = dataclasses.MISSING
    return any(item.default is missing and item.default_factory is missing for item in dataclasses.fields(cls))


def _stage_flags(stage: "StageConfig") -> Any:
    """A stage as a dataclass whose objective and data have their own classes, not the bases that they extend."""
    hints = typing.get_type_hints(type(stage))
    values = {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage)}
    hints |= {name: type(values[name]) for name in ("objective", "data")}
    fields = [(name, hints[name], field(default=value)) for name, value in values.items()]
    return make_dataclass("Stage", fields, frozen=True, namespace={"__doc__": type(stage).__doc__})()


def _flags(name: str, values: dict[str, Any], names: dict[str, str]) -> Any:
    """An instance of a dataclass of the values, whose flags have the `names`."""
    fields = [
        (key, Annotated[type(value), arg(name=names[key])], field(default=value)) for key, value in values.items()
    ]
    return make_dataclass(name, fields, frozen=True)()


def build_recipe(arguments: Any, base: "Recipe") -> "Recipe":
    """Build the recipe from the parsed flags."""
    values = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(base)}
    stages = values.pop("stages")
    kind = type(base.stages[0])
    built = (kind(**vars(getattr(stages, item.name))) for item in dataclasses.fields(stages))
    return type(base)(stages=tuple(built), **values)


def parse(kind: type[T], argv: Sequence[str], prog: str, *, none: bool = False) -> T:
    """Parse a verb's arguments; `--help` prints and raises SystemExit(0).

    Args:
        none: whether a flag accepts the value None, as for an optional field of a recipe.

    Raises:
        InputError: tyro or the dataclasses refuse an argument; the message is one sentence.
    """
    output = io.StringIO()
    helped = bool({"-h", "--help"} & set(argv))
    try:
        with contextlib.nullcontext() if helped else _capture_errors(output):
            return tyro.cli(kind, args=list(argv), prog=prog, config=() if none else (DisallowNone,))
    except SystemExit as stop:
        if not stop.code:
            raise
    sentence = _sentence(output.getvalue(), prog)
    for key, name in getattr(kind, "stage_names", {}).items():
        sentence = sentence.replace(f"stages.{key}.", f"stages.{name}.")
    raise InputError(sentence)


@contextlib.contextmanager
def _capture_errors(output: io.StringIO) -> Iterator[None]:
    """Redirect tyro's errors to `output`, in ASCII, without colours and without line breaks."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


# Messages of tyro and Python, and our replacements.
_ERROR_PATTERNS = (
    (r"^Error parsing (-\S+):\s*", r"\1: "),
    (r"^Error parsing (stages\.\S+):\s*", r"\1: "),
    (r"^Error parsing [^-\s]\S*:\s*", ""),
    (r"no type matching .* could be instantiated from .*Got errors:.*- <class '[^']*'>: ", ""),
    (r"invalid literal for int\(\) with base 10: ", "expected a whole number, got "),
    (r"could not convert string to float: ", "expected a number, got "),
    (r"^Missing value for argument '(.*?)'\. Expected 1 values?\..*", r"\1: expected a value, got none"),
    (r"^Missing value for argument '(.*?)'\. Expected (\d+) values\..*", r"\1: expected \2 values, got fewer"),
    (r"^invalid choice (.*?) for argument '(.*?)'\. Expected one of \((.*?),?\)\.", r"\2: expected one of \3, got \1"),
)


def _sentence(box: str, prog: str) -> str:
    """Convert tyro's box (a title, the error, hints, separated by rules) to one line."""
    sections = re.split(r"^\s*-+\s*$", box, flags=re.MULTILINE)
    sentence = " ".join(sections[min(1, len(sections) - 1)].split())
    if unknown := re.fullmatch(r"Unrecognized options?: (.*)", sentence):
        near = [part for part in sections[2:] if "Perhaps you meant" in part]
        meant = [flag.rstrip(",") for flag in re.findall(r"^\s*(--\S+)", near[0], re.MULTILINE)] if near else []
        hint = f"; perhaps you meant {' or '.join(meant)}" if meant else ""
        return f"unknown arguments: {unknown[1]}{hint} ({prog} --help lists all)"
    if missing := re.match(r"Missing from [^:]*: (\S+)", sentence):
        return f"expected {missing[1]}, got nothing ({prog} --help lists all)"
    for pattern, ours in _ERROR_PATTERNS:
        sentence = re.sub(pattern, ours, sentence)
    return sentence.rstrip(".")
