"""A stage is data: what trains, for how long, on what mixture, with which losses (SPAR, tables of sections 1 and 2)."""

import fnmatch
import re
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from spar.checkpoints.lora import LoraConfig, is_lora_key
from spar.common.errors import InputError
from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.config import SparConfig
from spar.worlds.shapes.questions import CURRICULUM_KINDS, QUESTION_KINDS
from spar.worlds.shapes.scene import KINDS

StepKind = Literal["encoder", "mllm", "autoencoder", "dit", "tokenizer", "unified"]

# Which loss weights each step can read: any other that is set would be an argument without effect.
LOSS_WEIGHTS_BY_STEP: dict[str, tuple[str, ...]] = {
    "encoder": ("dense", "pixel"),
    "mllm": (),
    "autoencoder": ("mse", "latent_penalty", "latent_noise"),
    "dit": (),
    "tokenizer": (
        "mse", "perceptual", "native", "native_fused", "semantic", "gan", "lecam", "gan_start", "latent_penalty",
        "latent_noise",
    ),
    "unified": ("align",),
}


@dataclass(frozen=True)
class LossWeights:
    """Weights of the named terms; 0 switches a term off.

    native is lambda_p, semantic lambda_s, align lambda_a; `gan_start` is the step from which the adversarial term
    counts. Departures for the small setting: `native_fused` holds `z_f`, not only `z_p`, near the autoencoder's own
    latents; `latent_penalty` weighs the square of the latent; `latent_noise` is the standard deviation of noise on the
    latent before decoding, relative to the latent's own.
    """

    dense: float = 0.0
    pixel: float = 0.0
    mse: float = 0.0
    perceptual: float = 0.0
    native: float = 0.0
    native_fused: float = 0.0
    semantic: float = 0.0
    gan: float = 0.0
    lecam: float = 0.0
    gan_start: int = 0
    latent_penalty: float = 0.0
    latent_noise: float = 0.0
    align: float = 0.0


@dataclass(frozen=True)
class StageConfig:
    """One training stage. `trainable` are fnmatch patterns over the training modules' parameter names.

    The learning rate rises over exactly `warmup` steps, then falls from `lr` to `lr_end`. `questions` are the kinds
    that an mllm step asks of each image, in this order, beside its description. `places` is the share of captions of
    a dit or unified step that are lessons on places ("a red circle on column two row three to the left of a star"),
    `scenes` the kinds of scenes that it draws, one named twice twice as often (all alike when empty).
    `batch` is the number of images that one step of the optimizer sees, over all devices together. `image_size` is
    the side of the images in pixels where a tokenizer stage is trained at another than the model's.
    """

    name: str
    step: StepKind
    trainable: tuple[str, ...]
    steps: int
    batch: int = 32
    lr: float = 1e-3
    lr_end: float = 1e-5
    warmup: int = 100
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    ema: float = 0.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    losses: LossWeights = field(default_factory=LossWeights)
    noise_samples: int = 1
    edit_share: float = 0.0
    position_captions: float = 0.0
    scene_kinds: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "noise_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"stage {self.name}: {name} must be at least 1, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise InputError(f"stage {self.name}: max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.lr <= 0 or not 0 <= self.lr_end <= self.lr:
            raise InputError(f"stage {self.name}: expected lr > 0 and 0 <= lr_end <= lr, got {self.lr}, {self.lr_end}")
        if not 0 <= self.ema < 1:
            raise InputError(f"stage {self.name}: ema must be in [0, 1), got {self.ema}")
        for name in ("edit_share", "position_captions"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"stage {self.name}: {name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.warmup <= self.steps:
            raise InputError(f"stage {self.name}: expected warmup from 0 to steps {self.steps}, got {self.warmup}")
        if not set(self.scene_kinds) <= set(KINDS):
            raise InputError(
                f"stage {self.name}: expected scenes of the kinds {', '.join(KINDS)}, got {', '.join(self.scene_kinds)}"
            )
        unknown = sorted(set(self.questions) - {*QUESTION_KINDS, *CURRICULUM_KINDS})
        if unknown:
            raise InputError(
                f"stage {self.name}: expected questions of the kinds "
                f"{', '.join((*QUESTION_KINDS, *CURRICULUM_KINDS))}, got {', '.join(unknown)}"
            )
        self._check_unused_settings()

    def _check_unused_settings(self) -> None:
        """Refuse settings without an effect: what the step does not read, and half of an adversary."""
        flows = ("dit", "unified")
        readers = {
            "noise_samples": flows,
            "position_captions": flows,
            "scene_kinds": flows,
            "edit_share": ("unified",),
            "questions": ("mllm",),
            "image_size": ("tokenizer",),
        }
        for name, steps in readers.items():
            if self.step not in steps and getattr(self, name) != getattr(type(self), name):
                raise InputError(
                    f"stage {self.name}: only a {' or '.join(steps)} step reads {name}, got {getattr(self, name)} "
                    f"for a {self.step} step"
                )
        idle = [
            name
            for name, default in vars(LossWeights()).items()
            if getattr(self.losses, name) != default and name not in LOSS_WEIGHTS_BY_STEP[self.step]
        ]
        if idle:
            raise InputError(
                f"stage {self.name}: a {self.step} step has no use for {', '.join(idle)}; "
                f"it reads {', '.join(LOSS_WEIGHTS_BY_STEP[self.step]) or 'no loss weights'}"
            )
        if not self.losses.gan and (self.losses.lecam or self.losses.gan_start):
            raise InputError(f"stage {self.name}: lecam and gan_start belong to an adversary, but gan is 0")
        if self.losses.gan and not any(fnmatch.fnmatchcase("discriminator.", p) for p in self.trainable):
            raise InputError(f"stage {self.name}: gan is on, expected discriminator.* among trainable")


@dataclass(frozen=True)
class AlignmentConfig:
    """The teacher of the denoiser: the tokenizer's own encoder, none, or an external image encoder.

    `center` compares with the teacher less its mean, which is what trains in the small setting (a large common mean
    makes the plain cosine of the paper start near 1); both are logged. `external` is a folder or Hub id.
    """

    teacher: Literal["self", "none", "external"] = "self"
    center: bool = True
    hidden: int = 256
    external: str | None = None

    def __post_init__(self) -> None:
        if (self.teacher == "external") != (self.external is not None):
            raise InputError("alignment: teacher 'external' and the field external (a folder or id) go together")


@dataclass(frozen=True)
class PerceptualConfig:
    """The frozen networks of L_perc and their weights in it; `losses.perceptual` weighs their sum.

    `autoencoder`: LPIPS' form on the features of the run's own E_p, which needs no download. `lpips`: LPIPS on VGG16,
    from the extra `gpu`. `convnext`: logits of the classifier in `classifier`, a folder or Hub id of transformers'
    ConvNeXt.
    """

    autoencoder: float = 1.0
    lpips: float = 0.0
    convnext: float = 0.0
    classifier: str = "facebook/convnext-small-224"

    def __post_init__(self) -> None:
        weights = (self.autoencoder, self.lpips, self.convnext)
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
            raise InputError(f"perceptual: expected weights of at least 0, one of them above it, got {weights}")


@dataclass(frozen=True)
class FlowConfig:
    """Training times (logit-normal), both shifts (never taken from a scheduler's file), and the sampler's defaults."""

    time_mean: float = 0.0
    time_std: float = 1.0
    training_shift: float = 1.0
    sampling_shift: float = 1.0
    sampling_steps: int = 20
    guidance: float = 4.5
    unconditional_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("time_std", "training_shift", "sampling_shift", "sampling_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"flow.{name}: expected above 0, got {getattr(self, name)}")
        if not 0 <= self.unconditional_share <= 1:
            raise InputError(f"flow.unconditional_share: expected 0 to 1, got {self.unconditional_share}")
        if not self.guidance >= 0:
            raise InputError(f"flow.guidance: expected at least 0, got {self.guidance}")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from.

    `source` shapes: of the shapes world `scenes` train, and `edits` of them carry an edit. files: `sets` are paths of
    data sets, "PATH" or "WEIGHT=PATH" (spar.data.sources says which formats), decoded by `workers` processes of each
    training process; a share of bad samples above `bad_share` ends the run; `max_aspect` cuts a tokenizer stage's
    images to several proportions; `cache` is a folder of features (spar cache) that unified stages read in place of
    images. none: the recipe can be planned, not trained.
    """

    source: Literal["shapes", "files", "none"] = "shapes"
    scenes: int = 32768
    edits: int = 16384
    sets: tuple[str, ...] = ()
    workers: int = 4
    bad_share: float = 0.01
    max_aspect: float = 1.0
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("scenes", "edits"):
            if getattr(self, name) < 1:
                raise InputError(f"data.{name}: expected at least 1, got {getattr(self, name)}")
        if self.edits > self.scenes:
            raise InputError(f"data.edits: expected at most one for each of {self.scenes} scenes, got {self.edits}")
        if self.workers < 0:
            raise InputError(f"data.workers: expected at least 0, got {self.workers}")
        if not 0 <= self.bad_share <= 1:
            raise InputError(f"data.bad_share: expected 0 to 1, got {self.bad_share}")
        if self.max_aspect < 1:
            raise InputError(f"data.max_aspect: expected at least 1, got {self.max_aspect}")
        if (self.source == "files") != bool(self.sets):
            raise InputError("data: source files and the field sets (paths of data sets) go together")
        if self.cache is not None and self.source != "files":
            raise InputError(f"data.cache: only data sets are cached (data.source files), got source {self.source}")
        weighted_sets(self.sets)


def weighted_sets(sets: tuple[str, ...]) -> list[tuple[float, str]]:
    """(weight, path) of data sets written "PATH" or "WEIGHT=PATH"; InputError for a weight that is none."""
    found = []
    for one in sets:
        weight, sign, path = one.partition("=")
        if not sign or not re.fullmatch(r"[\d.eE+-]+", weight):  # a path may hold the sign too
            weight, path = "1", one
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf") or not path:
            raise InputError(f"data.sets: expected PATH or WEIGHT=PATH with a weight above 0, got {one!r}")
        found.append((value, path))
    return found


@dataclass(frozen=True)
class Recipe:
    """A complete configuration of a training run.

    `word_embeddings` says where the words of the encoder's tags start: "tags" copies the tags' read-out vectors, so
    that a word begins where the encoder already points; "random" leaves them as they are. Published LLMs know their
    words before they see an image. `published` names the parts whose weights come from published checkpoints: a run
    that would start them from random ones is refused unless that is asked for. `max_prompt_tokens` is the longest
    prompt that the finished model takes.
    """

    name: str
    stages: tuple[StageConfig, ...]
    model: SparConfig = field(default_factory=SparConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig(width=32, layers=2)
    published: tuple[str, ...] = ()
    max_prompt_tokens: int = 64
    word_embeddings: Literal["tags", "random"] = "tags"
    seed: int = 0
    log_every: int = 20
    save_minutes: float = 5.0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed: expected at least 0, got {self.seed}")
        for name in ("log_every", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for stage in self.stages:
            if stage.image_size is not None and (stage.image_size < 1 or stage.image_size % self.model.token_stride):
                raise InputError(
                    f"stage {stage.name}: expected image_size as a multiple of {self.model.token_stride}, "
                    f"got {stage.image_size}"
                )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise InputError(f"recipe {self.name}: expected stages of different names, got {', '.join(names)}")
        if self.data.cache is not None and self.alignment.teacher == "external":
            raise InputError("data.cache: an external teacher reads pictures, which a run from a cache does not have")
        native = [stage.name for stage in self.stages if stage.losses.native]
        if native and not self.model.streams.pixel_stream:
            raise InputError(
                f"recipe {self.name}: losses.native is about the pixel stream, which model.streams.pixel_stream "
                f"switches off; expected 0 in {', '.join(native)}"
            )
        captions, width = self.model.denoiser.caption_channels, self.model.text.hidden_size
        if captions != width and any(stage.step == "dit" for stage in self.stages):
            raise InputError(
                f"recipe {self.name}: a dit step reads the LLM directly, expected model.denoiser.caption_channels "
                f"{width} (text.hidden_size), got {captions}"
            )

    def alignment_weight(self, stage: StageConfig) -> float:
        """lambda_a of a stage: 0 where the recipe has no teacher."""
        return 0.0 if self.alignment.teacher == "none" else stage.losses.align

    def stage(self, name: str) -> StageConfig:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(f"recipe {self.name} has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")


def freeze(module: nn.Module, stage: StageConfig) -> list[str]:
    """Declare what trains: set `requires_grad` by the stage's patterns and return the trainable names.

    A pattern that matches nothing raises, so that a renamed part cannot silently stay frozen. Of a model with LoRA its
    additions train and all else in it is frozen.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in (*stage.trainable, *(pattern for pattern, _ in stage.lr_multipliers)):
        if not fnmatch.filter(names, pattern):
            raise InputError(f"stage {stage.name}: pattern {pattern!r} matches no parameter")
    trainable, adapted = [], any(map(is_lora_key, names))
    for name, parameter in module.named_parameters():
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in stage.trainable)
        if adapted and name.startswith("model."):
            wanted = is_lora_key(name)
        parameter.requires_grad_(wanted)
        if wanted:
            trainable.append(name)
    return trainable


def freezing_table(module: nn.Module, depth: int = 2) -> list[tuple[str, int, int]]:
    """(part, trainable parameters, frozen parameters) for each part, named to `depth` levels."""
    table: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        row = table.setdefault(".".join(name.split(".")[:depth]), [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    return [(part, row[0], row[1]) for part, row in table.items()]
