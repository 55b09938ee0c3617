"""A SPAR model from UniLIP's public checkpoints: the same function, in a form from which full SPAR can be trained.

UniLIP has one stream and reads the LLM's last layer. Its stream becomes the semantic stream; the pixel stream is new,
and a residual fusion whose learned part starts at zero outputs z_s. The router outputs the last layer: "last" exactly,
"dtr" except for a weight of PICKED on each other layer, so that the gate can learn to select other layers.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from spar.checkpoints.formats import dcae, internvl, sana, unilip
from spar.checkpoints.formats.checkpoint_source import CheckpointSource, fetch
from spar.checkpoints.formats.foreign_config import ForeignConfig
from spar.checkpoints.formats.key_map import KeyMap, TensorReader
from spar.checkpoints.from_published import PUBLISHED, SOURCES, PublishedParts, build_from_tensors, finish, read_parts
from spar.checkpoints.model_header import check_latent_scale
from spar.checkpoints.spar_format import ModelBundle, SamplingConfig
from spar.common.errors import InputError
from spar.common.files import home_expanded
from spar.models.config import SparConfig
from spar.models.router import DynamicTokenRouter, Router

PICKED = 2e-5  # weight on each other layer of a dtr that selects the last layer
DEFAULTS = {"mllm": "mllm_hf_path", "autoencoder": "vae_path", "dit": "dit_path"}  # fields of a model's config.json

FROM_UNILIP = {internvl.ENCODER: "unilip", unilip.STREAM: "unilip", dcae.DECODER: "unilip"}
TOKENIZER = {**PUBLISHED, **FROM_UNILIP}
MODEL = {
    **TOKENIZER, internvl.LANGUAGE: "unilip", unilip.CONNECTOR: "unilip", f"{sana.DENOISER}.network": "unilip"
}  # fmt: skip


def convert_unilip(
    path: str,
    config: SparConfig,
    sampling: SamplingConfig,
    sources: dict[str, str | None],
    *,
    revisions: dict[str, str] | None = None,
    router: Literal["last", "dtr"] = "dtr",
    factor: float | None = None,
    seed: int = 0,
    recipe: str = "",
) -> ModelBundle:
    """Convert a checkpoint of UniLIP, a tokenizer or a whole model, to a SPAR model.

    Args:
        path: a model's folder or Hub id, or a file of tensors (.safetensors, .pt, .pth).
        config: of the parts that UniLIP lacks (the pixel stream).
        sources: of the published parts that it was built from (`from_published.SOURCES`): their configurations, the
            text tokenizer, E_p, and for a tokenizer also the LLM and the DiT. For a model, None means the one that its
            config.json names.
        router: the last layer exactly, or a DTR that starts from it.
        factor: scales the latent to unit variance; by default the model's own `unilip_factor`.

    Raises:
        InputError: as `build_from_published`, a file that is not a checkpoint of UniLIP, or an unknown factor.
    """
    source, files = _open(path)
    kind = unilip.checkpoint_kind(files)
    settings = ForeignConfig({}, path) if Path(home_expanded(path)).is_file() else source.config("config.json")
    revisions, named = revisions or {}, _named(sources, settings)
    parts = read_parts(config, named, revisions, llm=files if kind == "model" else None)
    real, scale = _sizes(config, parts, files, kind, router), _factor(settings, factor)
    keys, filled = _keys(parts, files, kind, tied=real.text.tied_head)
    model, pixel_encoder, origins = build_from_tensors(real, keys, filled, seed)
    init_fusion_to_identity(model.tokenizer.fusion)
    init_router_to_last(model.router)
    model.tokenizer.latent_scale.fill_(scale)
    origins |= {
        "tokenizer.fusion": "passes the semantic stream on: its learned part starts at zero",
        "router": f"passes the last layer on ({router})",
        "latent scale": "unilip",
    }
    found = {"unilip": source, **parts.sources}
    return finish(model, pixel_encoder, parts, config, sampling, origins, found, seed=seed, recipe=recipe)


def _open(path: str) -> tuple[CheckpointSource, TensorReader]:
    """Open the checkpoint and its tensors."""
    file = Path(home_expanded(path))
    if file.is_file():
        source = CheckpointSource.of_file(file)
        return source, source.tensors(file.name)
    source = fetch(path, ("*.json", "*.safetensors"), what="unilip")
    return source, source.weights("model")


def _factor(settings: ForeignConfig, factor: float | None) -> float:
    """Factor that scales UniLIP's latent to unit variance."""
    if factor is None and "unilip_factor" in settings:
        factor = settings.number("unilip_factor")
    return check_latent_scale(factor, "factor", "the scale of UniLIP's latent (10.6 in its scripts)")


def _named(sources: dict[str, str | None], settings: ForeignConfig) -> dict[str, str]:
    named = {name: sources.get(name) or settings.get(DEFAULTS[name], default=None) for name in SOURCES}
    if missing := [name for name, value in named.items() if not isinstance(value, str)]:
        raise InputError(f"expected a folder or Hub id for {', '.join(missing)}, got none")
    return named


def _sizes(
    config: SparConfig, parts: PublishedParts, files: TensorReader, kind: str, router: Literal["last", "dtr"]
) -> SparConfig:
    """UniLIP's sizes and forms; those that it lacks are from `config`."""
    connector = replace(
        config.connector, reference_positions=False, reference_scale="raw", reference="replaced", image_start=True
    )
    if kind == "model":
        layers = unilip.count_keys(files, r"llm_connector\.layers\.(\d+)\.")
        connector = replace(connector, queries=unilip.queries(files), layers=layers)
    streams = replace(
        config.streams, residual_blocks=unilip.count_keys(files, r"down_blocks\.(\d+)\."), semantic_stream=True,
        block_norm_eps=unilip.BLOCK_NORM_EPS, fusion="residual",
    )
    return SparConfig(
        vision=parts.vision,
        text=parts.text,
        autoencoder=parts.autoencoder,
        streams=streams,
        router=replace(config.router, kind=router, temperature=1.0, scale="last", norm=False),
        connector=connector,
        denoiser=replace(parts.denoiser, position_gain=0.0, reference_latent=False, reference_states=False),
        understanding=config.understanding,
    )


def _keys(parts: PublishedParts, files: TensorReader, kind: str, *, tied: bool) -> tuple[KeyMap, dict[str, str]]:
    """Every tensor under our names, and the parts that they fill."""
    keys, autoencoder = KeyMap(), parts.weights("autoencoder")
    keys.add(autoencoder, dcae.translate, [key for key in autoencoder.shapes if key.startswith("encoder.")])
    if kind == "model":
        keys.add(files, lambda key: unilip.translate_model(key, head=not tied))
        return keys, MODEL
    mllm, dit = parts.weights("mllm"), parts.weights("dit")
    keys.add(files, unilip.translate_tokenizer)
    llm = [key for key in mllm.shapes if "language_model" in key or "lm_head" in key]  # not its encoder
    keys.add(mllm, lambda key: internvl.translate(key, head=not tied), llm)
    keys.add(dit, sana.translate)
    return keys, TOKENIZER


@torch.no_grad()
def init_fusion_to_identity(fusion: nn.Sequential) -> None:
    """Zero the last layer of a residual fusion, so that it outputs the semantic stream exactly."""
    for parameter in fusion[-1].parameters():
        parameter.zero_()


@torch.no_grad()
def init_router_to_last(router: Router) -> None:
    """Make a router at the last state's scale output the last layer; a gate keeps PICKED for each other layer."""
    router.alpha.fill_(1.0)
    router.projection.weight.copy_(torch.eye(len(router.projection.weight)))
    router.projection.bias.zero_()
    if isinstance(router, DynamicTokenRouter):
        others = router.count - 1
        weight, bias = router.gate[-1].parameters()
        weight.zero_()
        bias.zero_()
        bias[-1] = math.log((1 - others * PICKED) / PICKED)

