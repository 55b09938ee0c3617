"""Arguments of the verbs that show what a model does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from spar.cli.arguments import Flag, Guidance, ModelArguments, OutputPath, Steps
from spar.common.errors import InputError
from spar.common.limits import MAX_GUIDANCE, MAX_IMAGES, MAX_SEED, MAX_STEPS, check_range

Benchmark = Literal[
    "shapes-gen", "shapes-edit", "shapes-vqa", "shapes-recon", "shapes-gen-bind", "shapes-edit-bind", "shapes-vqa-bind",
    "shapes-paraphrase", "shapes-chat", "shapes-robust", "shapes-zero-shot", "shapes-codes", "shapes-agreement",
    "zero-shot", "recon", "all",
]  # fmt: skip
MAX_RECONSTRUCTED = 10**7  # images of recon
MAX_COMPARED = 16
# Flags of single benchmarks.
OWN_FLAGS = {
    "images": ("zero-shot", "recon"), "class_names": ("zero-shot",), "template": ("zero-shot",),
    "features": ("recon",), "pairs": ("recon",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalArguments(ModelArguments):
    """Score a model with the detector of the shapes world: spar eval shapes-gen -o shapes-gen.json"""

    benchmark: Annotated[Positional[Benchmark], arg(metavar="BENCHMARK")]
    """One of shapes-gen, shapes-edit, shapes-vqa, shapes-recon,
    shapes-gen-bind, shapes-edit-bind, shapes-vqa-bind, shapes-paraphrase, shapes-chat, shapes-robust,
    shapes-zero-shot, shapes-codes and shapes-agreement (DualToken alone), zero-shot (DualToken) and recon on
    images of --images, or all of the shapes world that the model's system defines."""
    output: OutputPath = None
    """Results file (for all: folder); by default BENCHMARK.json (for all: results)."""
    overwrite: Flag = False
    """Replace results that exist."""
    limit: int | None = None
    """Prompts of each task (questions of each kind, conversations), images of recon, of zero-shot images of each class;
    by default all of them."""
    seed: int | None = None
    """Seed of the images and of the bootstrap; by default 0."""
    num_inference_steps: Steps = None
    """Sampling steps; by default the model's own."""
    guidance_scale: Guidance = None
    """Classifier-free guidance; by default the model's own."""
    images_per_prompt: int | None = None
    """Images for each prompt of shapes-gen and shapes-gen-bind; by default 4."""
    no_layout: Flag = False
    """Of a model that writes layouts: draw of the prompts and instructions themselves."""
    batch: int | None = None
    """Images per batch: changes the time, never the scores."""
    combinations: Literal["seen", "held_out"] = "seen"
    """Combinations of colour and shape that training contains, or those that it holds out."""
    images: Path | None = None
    """Folder of recon's images, or of zero-shot with a subfolder of images for each class."""
    features: Path | None = None
    """Of recon's Fréchet distance: the file of Inception's weights (for rFID, pt_inception-2015-12-05-6726825d.pth)
    or the folder of an image encoder of transformers; by default fixed random features."""
    pairs: Path | None = None
    """New folder for recon's images as they were compared, gt/00000.png and recon/00000.png."""
    class_names: Path | None = None
    """JSON file {subfolder: name} of the classes of zero-shot; by default the subfolders' own names."""
    template: str | None = None
    """Text of a label of zero-shot, {} where the class goes; by default "a photo of a {}."."""
    label: str | None = None
    """Label in the results, to distinguish two models."""

    @property
    def layout(self) -> bool | None:
        return False if self.no_layout else None

    def __post_init__(self) -> None:
        check_range("--seed", self.seed, 0, MAX_SEED)
        check_range("--steps", self.num_inference_steps, 1, MAX_STEPS)
        check_range("--guidance", self.guidance_scale, 0, MAX_GUIDANCE)
        for name in ("limit", "images_per_prompt", "batch"):
            most = MAX_RECONSTRUCTED if (self.benchmark, name) == ("recon", "limit") else MAX_IMAGES
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1, most)
        if self.benchmark == "zero-shot" and self.images is None:
            raise InputError("zero-shot: expected --images FOLDER, with a subfolder of images for each class")
        if self.benchmark == "recon" and self.images is None:
            raise InputError("recon: expected --images FOLDER")
        for flag, owners in OWN_FLAGS.items():
            if self.benchmark not in owners and getattr(self, flag) is not None:
                shown = " and ".join(owners)
                raise InputError(f"--{flag.replace('_', '-')} belongs to {shown}, got {self.benchmark}")


@dataclass(frozen=True, kw_only=True)
class JudgeArguments:
    """Have images judged by a model at an OpenAI-compatible endpoint: spar judge wise drawn --prompts wise/data ...

    The images are those of spar generate --format wise, or of spar edit --format imgedit. The key is read from a
    variable of the environment. Replies are kept beside the results, and are not asked for again.
    """

    benchmark: Annotated[Positional[Literal["wise", "wise-verified", "imgedit"]], arg(metavar="BENCHMARK")]
    """One of wise, wise-verified (the version of 2026, whose scores are others) and imgedit."""
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Folder of the images."""
    prompts: Path
    """The benchmark's own file of prompts (WISE: or folder)."""
    template: Path
    """What the judge is told: of WISE a text with {prompt} and {explanation}, of ImgEdit its prompts.json."""
    judge: str
    """Name of the judging model at the endpoint."""
    endpoint: str = "https://api.openai.com/v1"
    """Address of the endpoint, up to /v1."""
    key_variable: str = "OPENAI_API_KEY"
    """Variable of the environment with the key; without it none is sent."""
    images: Path | None = None
    """Of imgedit: the folder of the pictures before the edits; by default that of --prompts."""
    parallel: int = 4
    """Requests at a time."""
    output: OutputPath = None
    """Results file; by default BENCHMARK.json. The replies are in a file of its name that ends in .replies.jsonl."""
    overwrite: Flag = False
    """Replace results that exist; replies are kept."""

    def __post_init__(self) -> None:
        check_range("--parallel", self.parallel, 1, 64)
        if self.images is not None and self.benchmark != "imgedit":
            raise InputError(f"--images belongs to imgedit, got {self.benchmark}")


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Compare models on the same prompts: spar compare results/spar results/dualtoken

    Each score's difference (another model's minus the first's) is paired by prompt, with its 95 % interval: the main
    score (of reconstructions PSNR, of conversations the last turn) and each task's.
    """

    first: Annotated[Positional[Path], arg(metavar="FIRST")]
    """Results file of `spar eval`, or a folder of such files."""
    second: Annotated[Positional[Path], arg(metavar="SECOND")]
    """The same of another model; of folders the files of the same name are compared."""
    more: Annotated[Positional[tuple[Path, ...]], arg(metavar="MORE")] = ()
    """The same of further models, each compared with the first."""
    json: Flag = False
    """Print JSON."""
    html: Path | None = None
    """HTML page to write: the table with its intervals drawn."""
    draw: UseAppendAction[tuple[str, ...]] = ()
    """Model of each results, in their order (repeatable): the page shows what all draw of four prompts at seed 0."""
    overwrite: Flag = False
    """Replace the page of --html if it exists."""

    @property
    def results(self) -> tuple[Path, ...]:
        return (self.first, self.second, *self.more)

    def __post_init__(self) -> None:
        if len(self.results) > MAX_COMPARED:
            raise InputError(f"compare: expected at most {MAX_COMPARED} results, got {len(self.results)}")
        if len(set(self.results)) < len(self.results):
            raise InputError("compare: expected results that differ, got some twice")
        if self.draw and (self.html is None or len(self.draw) != len(self.results)):
            raise InputError(f"--draw: expected --html, and a model for each of {len(self.results)} results in order")


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Train and compare variants of a recipe: spar study routing -o studies/routing

    A study is a YAML or JSON file, or a bundled one by its name (spar list). What is done is not done again: the same
    command goes on after a stop. At the end the folder has results.json and report.html.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """File of the study, or the name of a bundled one."""
    output: OutputPath = None
    """Folder of the study; by default studies/NAME."""
    init_from: Path | None = None
    """What the first stage starts from, as in spar train; by default what the study names."""
    seeds: int | None = None
    """Only the first so many seeds of the study; a later call may go on with more."""
    reuse: tuple[Path, ...] = ()
    """Folders of other studies: what they have trained alike is not trained again."""
    device: str | None = None
    """cpu, cuda, cuda:1 ...; by default CUDA if available."""

    def __post_init__(self) -> None:
        check_range("--seeds", self.seeds, 1, 64)


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
