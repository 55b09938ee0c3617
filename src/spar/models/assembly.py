"""A SPAR folder from published parts: InternVL3, DC-AE and SANA as they are, the rest from seeded random weights.

The model is built on no memory and takes over the checkpoints' tensors one by one, in the types they are stored in.
"""

import dataclasses
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from spar.errors import InputError
from spar.models.adapters import dcae, internvl, sana
from spar.models.adapters.keys import KeyMap
from spar.models.adapters.sources import Source, fetch
from spar.models.autoencoder import PixelEncoder, build_autoencoder
from spar.models.checkpoint import Loaded, Sampling, versions
from spar.models.config import SparConfig
from spar.models.spar import SparModel

SOURCES = ("mllm", "autoencoder", "dit")
# The parts that no published checkpoint brings, by their place in the model.
FRESH = {
    "semantic stream": "tokenizer.semantic_stream",
    "pixel stream": "tokenizer.pixel_stream",
    "fusion": "tokenizer.fusion",
    "router": "router",
    "connector": "connector",
    "reference embedding": "denoiser.reference_embed",
}
ONES = ("alpha", "reference_gain")  # learned factors
QUERY_SIZE = 0.02


@dataclass(frozen=True)
class Assembled:
    """The model, ready to be saved, and where the checkpoints differ from what the recipe expected."""

    loaded: Loaded
    differences: tuple[str, ...]


def assemble(
    config: SparConfig,
    sampling: Sampling,
    sources: dict[str, str],
    *,
    revisions: dict[str, str] | None = None,
    seed: int = 0,
    recipe: str = "",
) -> Assembled:
    """Put a model together.

    Args:
        config: what the checkpoints do not say (streams, router, connector), and what is expected of what they do.
        sampling: as the recipe has it; the shift is replaced by that of the DiT's own scheduler.
        sources: folder or Hub id of each of SOURCES.
        revisions: for any of them a commit, branch or tag of the Hub.
        seed: of the random weights.

    Raises:
        InputError: a source that is not there, a configuration that we cannot express, or weights that do not fit it:
            then with every missing, unexpected and misshapen tensor of all parts in one report.
    """
    revisions = revisions or {}
    if unknown := sorted(set(revisions) - set(SOURCES)):
        raise InputError(f"revision: expected parts of {', '.join(SOURCES)}, got {', '.join(unknown)}")
    patterns = {"mllm": internvl.FILES, "autoencoder": dcae.FILES, "dit": sana.FILES}
    found = {
        part: fetch(sources[part], patterns[part], revision=revisions.get(part), what=part) for part in SOURCES
    }
    mllm_files = found["mllm"].weights("model")
    autoencoder_files = found["autoencoder"].weights(dcae.STEM)
    dit_files = found["dit"].weights(sana.STEM, sana.FOLDER)
    text_tokenizer = internvl.read_text_tokenizer(found["mllm"].folder)
    mllm = internvl.read_config(found["mllm"].folder, mllm_files, text_tokenizer)
    autoencoder, dit = dcae.read_config(found["autoencoder"]), sana.read_config(found["dit"], config.denoiser)
    if dit.channels != autoencoder.config.latent_channels:
        raise InputError(
            f"the DiT denoises {dit.channels} channels, the autoencoder has {autoencoder.config.latent_channels}; "
            "expected as many"
        )
    real = replace(
        config, vision=mllm.vision, text=mllm.text, autoencoder=autoencoder.config, denoiser=dit.config
    )
    given_sampling = sampling if dit.sampling_shift is None else replace(sampling, shift=dit.sampling_shift)
    differences = (*_differences(config, real), *_differences(sampling, given_sampling, "sampling"))

    keys = KeyMap()
    keys.add(mllm_files, lambda key: internvl.translate(key, head=not real.text.tied_head))
    keys.add(autoencoder_files, dcae.translate)
    keys.add(dit_files, sana.translate)
    with init_empty_weights():
        model = SparModel(real)
        pixel_encoder = PixelEncoder(build_autoencoder(real.autoencoder).encoder)
    parts = published(model, pixel_encoder)
    keys.check(parts, {prefix: _source_of(prefix) for prefix in parts})
    for prefix, module in parts.items():
        module.load_state_dict(keys.tensors(prefix), assign=True)
    origins = {prefix: _source_of(prefix) for prefix in parts}
    origins |= start_fresh(model, seed)
    model.connector.initialize_from(model.language)
    origins["connector"] += "; its layers are copies of the LLM's last"
    model.tokenizer.latent_scale.fill_(autoencoder.scaling_factor)
    read = {"mllm": mllm_files.files, "autoencoder": autoencoder_files.files, "dit": dit_files.files}
    manifest = {
        "recipe": recipe,
        "seed": seed,
        "versions": versions(),
        "sources": {part: found[part].record(_with_config(found[part], read[part])) for part in SOURCES},
        "parts": {
            **origins,
            "latent scale": "the autoencoder's scaling_factor, until a tokenizer stage measures it",
            "alignment head": "not in this folder: training starts it from random weights",
        },
        "differences": list(differences),
        "stages": {},
    }
    loaded = Loaded(
        model.eval().requires_grad_(False), text_tokenizer, given_sampling, manifest,
        pixel_encoder.eval().requires_grad_(False),
    )
    return Assembled(loaded, differences)


def published(model: SparModel, pixel_encoder: PixelEncoder | None) -> dict[str, nn.Module]:
    """The modules that published checkpoints fill, by the prefix of their weights' names."""
    parts = {
        internvl.ENCODER: model.tokenizer.encoder,
        internvl.LANGUAGE: model.language,
        dcae.DECODER: model.tokenizer.decoder,
        f"{sana.DENOISER}.network": model.denoiser.network,
    }
    return parts if pixel_encoder is None else {**parts, dcae.PIXEL_ENCODER: pixel_encoder}


def _source_of(prefix: str) -> str:
    if prefix in (dcae.DECODER, dcae.PIXEL_ENCODER):
        return "autoencoder"
    return "dit" if prefix.startswith(sana.DENOISER) else "mllm"


def _with_config(source: Source, files: list[Path]) -> list[Path]:
    """The files that were read, the configurations beside them included."""
    return [*files, *(path for folder in {file.parent for file in files} for path in folder.glob("*.json"))]


def _differences(expected: Any, given: Any, where: str = "model") -> list[str]:
    """One line for each field in which two configurations differ."""
    lines: list[str] = []
    for item in dataclasses.fields(expected):
        a, b = getattr(expected, item.name), getattr(given, item.name)
        if dataclasses.is_dataclass(a):
            lines += _differences(a, b, f"{where}.{item.name}")
        elif a != b:
            lines.append(f"{where}.{item.name}: the recipe expects {a!r}, the checkpoint has {b!r}")
    return lines


def start_fresh(model: SparModel, seed: int) -> dict[str, str]:
    """Give every part that is still without memory seeded random weights, and say of each where it comes from.

    A part's weights depend on the seed and the part's name alone. Linear maps start as in training from nothing
    (Xavier), norms and learned factors at one, the queries small, the embedding of a reference at zero.
    """
    told = {}
    for name, place in FRESH.items():
        module: Any = model
        for step in place.split("."):
            module = getattr(module, step, None)
        if module is None:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for part in module.modules():
            for key, parameter in list(part.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = _start(part, key, torch.empty(parameter.shape), generator)
                    setattr(part, key, nn.Parameter(value))
        told[place] = f"random weights of seed {seed}"
    forgotten = [key for key, value in model.state_dict().items() if value.is_meta]
    if forgotten:
        raise ValueError(f"expected weights for every part, got none for {', '.join(forgotten[:3])}")
    return told


@torch.no_grad()
def _start(part: nn.Module, key: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """The first value of one parameter."""
    if isinstance(part, nn.Linear):
        return nn.init.xavier_uniform_(value, generator=generator) if key == "weight" else value.zero_()
    if isinstance(part, (nn.LayerNorm, Qwen2RMSNorm)):
        return value.fill_(1.0 if key == "weight" else 0.0)
    if key == "queries":
        return value.normal_(std=QUERY_SIZE, generator=generator)
    if key in ONES:
        return value.fill_(1.0)
    return value.zero_()  # a global router's logits, the embedding of a reference

