"""Arguments of the command line: one frozen dataclass per verb. No heavy library is imported here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from spar.common.errors import InputError
from spar.common.limits import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MAX_WORKERS,
    check_range,
)
from spar.data.samples import Format

MAX_ANIMATIONS = 64  # images whose steps are kept in memory
Flag = FlagCreatePairsOff[bool]
OutputPath = Annotated[Path | None, arg(aliases=["-o"])]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Benchmark = Literal[
    "shapes-gen", "shapes-edit", "shapes-vqa", "shapes-recon", "shapes-gen-bind", "shapes-edit-bind", "shapes-vqa-bind",
    "shapes-paraphrase", "shapes-chat", "shapes-zero-shot", "shapes-codes", "all",
]  # fmt: skip
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
    """PNG file, or a folder for several images, named by number and seed; by default out.png, or out for several."""
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
        if self.save_steps:
            check_range("number of images with --save-steps", self.count, 1, MAX_ANIMATIONS)
        _check_utf8(self.negative_prompt, "--negative-prompt")

    @property
    def texts(self) -> tuple[str, ...]:
        """What each image or group of images is made of."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.texts) * self.num_images_per_prompt

    def keywords(self) -> dict[str, Any]:
        """Keywords of the pipeline's sampling tasks; the seeds of all images come beside them."""
        names = ("negative_prompt", "num_inference_steps", "guidance_scale", "num_images_per_prompt")
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
    temperature: float | None = None
    """Of a DualToken model: of the codes that are drawn, 0 for the likeliest; by default the model's own."""
    top_k: int | None = None
    """Of a DualToken model: draw from so many of the likeliest codes, 0 for all."""
    top_p: float | None = None
    """Of a DualToken model: draw from the likeliest codes that together have this probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_nonempty(self.prompt, "prompt", "PROMPT")
        check_range("--temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_range("--top-k", self.top_k, 0, MAX_TOP_K)
        check_range("--top-p", self.top_p, 0, 1)
        check_range("number of images", self.count, 1, MAX_IMAGES)

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompt

    def keywords(self) -> dict[str, Any]:
        """Keywords of `generate`; those of one system alone where they are given."""
        own = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
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
        _check_nonempty(self.instruction, "instruction", "IMAGE INSTRUCTION")
        check_range("number of images", self.count, 1, MAX_IMAGES)

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
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""
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
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of matrix products, as in the training that will read the features."""


BUILD_PARTS = ("mllm", "autoencoder", "dit", "vision", "llm")


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
            if part not in BUILD_PARTS or not commit:
                raise InputError(f"--revision: expected PART=COMMIT of {', '.join(BUILD_PARTS)}, got {text!r}")
        return {part: commit for part, _, commit in pairs}


@dataclass(frozen=True, kw_only=True)
class BuildArguments(AssemblyArguments):
    """Build a model from published parts: spar build spar-1b --mllm OpenGVLab/InternVL3-1B-hf
    --autoencoder mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers --dit Efficient-Large-Model/Sana_600M_512px_diffusers -o
    spar-1b

    Each part is a folder or a Hub id. Weights that no part has start random; the manifest lists them.
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """The recipe that defines the model (spar-1b, spar-3b, dualtoken-3b)."""
    mllm: str | None = None
    """For SPAR: InternVL3, in transformers' layout (its name ends in -hf) or the original."""
    autoencoder: str | None = None
    """For SPAR: DC-AE, in diffusers' layout."""
    dit: str | None = None
    """For SPAR: SANA, in diffusers' layout."""
    vision: str | None = None
    """For DualToken: SigLIP or SigLIP 2 of a fixed size, in transformers' layout."""
    llm: str | None = None
    """For DualToken: Qwen2 or Qwen2.5, in transformers' layout."""


@dataclass(frozen=True, kw_only=True)
class ConvertArguments(AssemblyArguments):
    """Convert a public checkpoint to a model: spar convert unilip kanashi6/UniLIP-1B -o unilip-1b

    The model computes the same function as the checkpoint, and full SPAR can be trained from it. A tokenizer's file
    (.pth) also needs the published parts and --factor; a model names its own.
    """

    format: Annotated[Positional[Literal["unilip", "dualtoken"]], arg(metavar="FORMAT")]
    """Format of the checkpoint: unilip, or dualtoken for the public tokenizer of that system."""
    path: Annotated[Positional[str], arg(metavar="PATH")]
    """A model's folder or Hub id, or a file of tensors (.safetensors, .pt, .pth)."""
    mllm: str | None = None
    """InternVL3: folder or Hub id, in either layout."""
    autoencoder: str | None = None
    """DC-AE, in diffusers' layout."""
    dit: str | None = None
    """SANA, in diffusers' layout."""
    router: Literal["dtr", "last"] | None = None
    """For unilip: dtr, the default, starts within a thousandth and can learn; last reproduces it exactly."""
    factor: float | None = None
    """Factor that scales the latent to unit variance; by default the model's own."""
    vision: str | None = None
    """For dualtoken: the SigLIP that the tokenizer was made of: its sizes and its words."""
    llm: str | None = None
    """For dualtoken: Qwen2 or Qwen2.5, in transformers' layout."""
    settings: str | None = None
    """For dualtoken: the checkpoint's config.json, by default the one beside it."""
    recipe: str | None = None
    """The recipe of the settings that the checkpoint lacks; by default spar-1b, or dualtoken-3b."""


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
    """One of shapes-gen, shapes-edit, shapes-vqa, shapes-recon,
    shapes-gen-bind, shapes-edit-bind, shapes-vqa-bind, shapes-paraphrase, shapes-chat,
    shapes-zero-shot and shapes-codes (DualToken alone), or all that the model's system defines."""
    output: OutputPath = None
    """Results file (for all: folder); by default BENCHMARK.json (for all: results)."""
    overwrite: Flag = False
    """Replace results that exist."""
    limit: int | None = None
    """Prompts of each task (questions of each kind, conversations); by default all of them."""
    seed: int | None = None
    """Seed of the images and of the bootstrap; by default 0."""
    num_inference_steps: Steps = None
    """Sampling steps; by default the model's own."""
    guidance_scale: Guidance = None
    """Classifier-free guidance; by default the model's own."""
    images_per_prompt: int | None = None
    """Images for each prompt of shapes-gen and shapes-gen-bind; by default 4."""
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
