"""A SPAR model from published parts: InternVL3, DC-AE and SANA unchanged, the rest from seeded random weights.

The model is built on the meta device and gets the checkpoints' tensors one by one, in their stored types.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from spar.checkpoints.formats import dcae, internvl, sana
from spar.checkpoints.formats.checkpoint_source import CheckpointSource, fetch
from spar.checkpoints.formats.key_map import KeyMap, TensorReader
from spar.checkpoints.model_header import versions
from spar.checkpoints.sized_build import FRESH, outline
from spar.checkpoints.spar_format import TRAINING_PARTS, ModelBundle, SamplingConfig
from spar.common.config import differences
from spar.common.errors import InputError
from spar.models.autoencoder import PixelEncoder
from spar.models.config import AutoencoderConfig, DenoiserConfig, SparConfig, TextConfig, VisionConfig
from spar.models.spar import SparModel

SOURCES = ("mllm", "autoencoder", "dit")
PATTERNS = {"mllm": internvl.FILES, "autoencoder": dcae.FILES, "dit": sana.FILES}
WEIGHTS = {"mllm": ("model",), "autoencoder": (dcae.STEM,), "dit": (sana.STEM, sana.FOLDER)}
PUBLISHED = {
    internvl.ENCODER: "mllm",
    internvl.LANGUAGE: "mllm",
    dcae.DECODER: "autoencoder",
    dcae.PIXEL_ENCODER: "autoencoder",
    f"{sana.DENOISER}.network": "dit",
}
# The parts that no published checkpoint has, by their place in the model.
INIT_SOURCES = {
    "semantic stream": "tokenizer.semantic_stream",
    "pixel stream": "tokenizer.pixel_stream",
    "fusion": "tokenizer.fusion",
    "router": "router",
    "connector": "connector",
    "reference embedding": "denoiser.reference_embed",
}
ONES = ("alpha", "reference_gain")  # learned factors
QUERY_SIZE = 0.02


def build_from_published(
    config: SparConfig,
    sampling: SamplingConfig,
    sources: dict[str, str],
    *,
    revisions: dict[str, str] | None = None,
    seed: int = 0,
    recipe: str = "",
) -> ModelBundle:
    """Build a model from published parts; `differences` in its manifest are those of the checkpoints from the recipe.

    Args:
        config: settings that the checkpoints lack (streams, router, connector), and expected values of the others.
        sampling: as in the recipe; the shift is replaced by that of the DiT's own scheduler.
        sources: folder or Hub id of each of SOURCES.
        revisions: for any of them a commit, branch or tag of the Hub.
        seed: of the random weights.

    Raises:
        InputError: a missing source, an unsupported configuration, or weights that do not fit it: then with every
            missing, unexpected and misshapen tensor of all parts in one report.
    """
    parts = read_parts(config, sources, revisions or {})
    real = replace(
        config, vision=parts.vision, text=parts.text, autoencoder=parts.autoencoder, denoiser=parts.denoiser
    )
    files = {name: parts.weights(name) for name in SOURCES}
    keys = KeyMap()
    keys.add(files["mllm"], lambda key: internvl.translate(key, head=not real.text.tied_head))
    keys.add(files["autoencoder"], dcae.translate)
    keys.add(files["dit"], sana.translate)
    model, pixel_encoder, origins = build_from_tensors(real, keys, PUBLISHED, seed)
    model.tokenizer.latent_scale.fill_(parts.scaling_factor)
    origins["latent scale"] = "the autoencoder's scaling_factor, until a tokenizer stage measures it"
    return finish(model, pixel_encoder, parts, config, sampling, origins, parts.sources, seed=seed, recipe=recipe)


@dataclass(frozen=True)
class PublishedParts:
    """The published parts: their sources, sizes, and what else their configurations state.

    `scaling_factor` brings the autoencoder's latents to unit variance; `sampling_shift` is None without a scheduler.
    """

    sources: dict[str, CheckpointSource]
    text_tokenizer: Any
    vision: VisionConfig
    text: TextConfig
    autoencoder: AutoencoderConfig
    scaling_factor: float
    denoiser: DenoiserConfig
    sampling_shift: float | None

    def weights(self, name: str) -> TensorReader:
        """The tensors of one of SOURCES."""
        return self.sources[name].weights(*WEIGHTS[name])


def read_parts(
    config: SparConfig, sources: dict[str, str], revisions: dict[str, str], *, llm: TensorReader | None = None
) -> PublishedParts:
    """Find the published parts and read their configurations.

    Args:
        llm: the LLM's tensors if they are a whole model's; of the mllm and the DiT no weights are fetched then.

    Raises:
        InputError: as `build_from_published`, except for the weights.
    """
    if unknown := sorted(set(revisions) - set(SOURCES)):
        raise InputError(f"revision: expected parts of {', '.join(SOURCES)}, got {', '.join(unknown)}")
    found = {}
    for name in SOURCES:
        read = llm is None or name == "autoencoder"  # whose weights a whole model of UniLIP has not
        wanted = tuple(pattern for pattern in PATTERNS[name] if read or not pattern.endswith(".safetensors"))
        found[name] = fetch(sources[name], wanted, revision=revisions.get(name), what=name)
    text_tokenizer = internvl.read_text_tokenizer(found["mllm"])
    files = llm or found["mllm"].weights(*WEIGHTS["mllm"])
    vision, text = internvl.read_config(found["mllm"], files, text_tokenizer, own_vocabulary=llm is not None)
    autoencoder, scaling_factor = dcae.read_config(found["autoencoder"])
    grid = vision.image_size // (2 * vision.patch_size)
    denoiser, shift = sana.read_config(found["dit"], config.denoiser, autoencoder.latent_channels, grid)
    return PublishedParts(found, text_tokenizer, vision, text, autoencoder, scaling_factor, denoiser, shift)


def finish(
    model: SparModel,
    pixel_encoder: PixelEncoder,
    parts: PublishedParts,
    config: SparConfig,
    sampling: SamplingConfig,
    origins: dict[str, str],
    sources: dict[str, CheckpointSource],
    *,
    seed: int,
    recipe: str,
) -> ModelBundle:
    """Bundle the model with its tokenizer, sampling and manifest; `config` is the recipe's."""
    shift = parts.sampling_shift
    own_sampling = sampling if shift is None else replace(sampling, shift=shift)
    found = [*differences(config, model.config, "model"), *differences(sampling, own_sampling, "sampling")]
    manifest = {
        "recipe": recipe,
        "seed": seed,
        "versions": versions(),
        "sources": {name: one.record() for name, one in sources.items()},
        "parts": {**origins, "alignment head": "not in this folder: training starts it from random weights"},
        "differences": [f"{name}: the recipe expects {a!r}, the checkpoint has {b!r}" for name, a, b in found],
        "stages": {},
    }
    model, pixel_encoder = model.eval().requires_grad_(False), pixel_encoder.eval().requires_grad_(False)
    return ModelBundle(model, parts.text_tokenizer, own_sampling, manifest, pixel_encoder)


def build_from_tensors(
    config: SparConfig, keys: KeyMap, filled: dict[str, str], seed: int
) -> tuple[SparModel, PixelEncoder, dict[str, str]]:
    """Build a model of these sizes and E_p on the meta device, and fill them from foreign tensors.

    Args:
        keys: every tensor of the checkpoints under our names.
        filled: the parts that these must fill exactly, by the prefix of their names, and the source of each.
        seed: of the random weights of all other parts.

    Returns:
        The model, E_p, and the origin of each part.
    """

    def build() -> tuple[SparModel, PixelEncoder]:
        return SparModel(config), TRAINING_PARTS["pixel_encoder"](config)

    def parts_of(model: SparModel, encoder: PixelEncoder) -> dict[str, nn.Module]:
        return {name: encoder if name == dcae.PIXEL_ENCODER else model.get_submodule(name) for name in filled}

    keys.check(parts_of(*outline(build, config, keys.outlines().values(), "the checkpoints", FRESH)), filled)
    with init_empty_weights():
        model, pixel_encoder = build()
    for prefix, module in parts_of(model, pixel_encoder).items():
        module.load_state_dict(keys.tensors(prefix), assign=True)
    origins = dict(filled) | init_missing_weights(model, seed)
    if "connector" not in filled:
        model.connector.initialize_from(model.language)
        origins["connector"] += "; its layers are copies of the LLM's last"
    return model, pixel_encoder, origins


def init_missing_weights(model: SparModel, seed: int) -> dict[str, str]:
    """Give every part on the meta device seeded random weights, and return the origin of each.

    A part's weights depend only on the seed and the part's name. Linear maps start as in training from scratch
    (Xavier), norms and learned factors at one, the queries small, the embedding of a reference at zero.
    """
    origins = {}
    for name, place in INIT_SOURCES.items():
        module: Any = model
        for step in place.split("."):
            module = getattr(module, step, None)
        if module is None or not any(parameter.is_meta for parameter in module.parameters()):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for part in module.modules():
            for key, parameter in list(part.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = _start(part, key, torch.empty(parameter.shape), generator)
                    setattr(part, key, nn.Parameter(value))
        origins[place] = f"random weights of seed {seed}"
    if missing := [key for key, value in model.state_dict().items() if value.is_meta]:
        raise ValueError(f"expected weights for every part, got none for {', '.join(missing[:3])}")
    return origins


@torch.no_grad()
def _start(part: nn.Module, key: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Initial value of one parameter."""
    if isinstance(part, nn.Linear):
        return nn.init.xavier_uniform_(value, generator=generator) if key == "weight" else value.zero_()
    if isinstance(part, (nn.LayerNorm, Qwen2RMSNorm)):
        return value.fill_(1.0 if key == "weight" else 0.0)
    if key == "queries":
        return value.normal_(std=QUERY_SIZE, generator=generator)
    if key in ONES:
        return value.fill_(1.0)
    return value.zero_()  # a global router's logits, the embedding of a reference

