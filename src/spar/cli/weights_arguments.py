"""Arguments of the verbs that make and upload weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from spar.cli.arguments import Flag, check_utf8
from spar.common.errors import InputError
from spar.common.limits import MAX_SEED, check_range

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
        check_utf8(str(self.output), "--output")  # safetensors writes to no other name
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
class ExportArguments:
    """Write a part of a SPAR model in a format of other programs: spar export internvl MODEL -o OUT

    internvl: the tuned encoder and the LLM as a plain InternVL folder, as transformers' own model class has it.
    """

    format: Annotated[Positional[Literal["internvl"]], arg(metavar="FORMAT")]
    """Format to write."""
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """SPAR folder, hf://OWNER/NAME[@REVISION], or a bundled model by name."""
    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in the folder."""
    overwrite: Flag = False
    """Replace an earlier export."""

    def __post_init__(self) -> None:
        check_utf8(str(self.output), "--output")


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
