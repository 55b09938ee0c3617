"""UniLIP's public checkpoints (arXiv 2507.23278; kanashi6/UniLIP, UniLIP-1B, UniLIP-3B): tensor names and facts.

A tokenizer has `encoder.` and `mlp1.` (InternVL's original layout), `down_blocks.` and `down_mlp.` (its one stream)
and `decoder.` (DC-AE). A model has the same under `vision_tower.`, `multi_modal_projector.` and `vae_decoder.`, and
also the LLM, `latent_queries`, `llm_connector.`, `projector.` and `dit.`. A residual block is `x + mlp(x)` with
an `mlp` of LayerNorm (epsilon 1e-6), Linear, GELU, Linear; `down_mlp` is LayerNorm (1e-5), Linear, GELU, Linear.
"""

import re
from typing import Literal

from spar.checkpoints.formats import dcae, internvl, sana
from spar.checkpoints.formats.key_map import TensorReader, TensorSlice
from spar.common.errors import InputError

STREAM, CONNECTOR = "tokenizer.semantic_stream", "connector"
BLOCK_NORM_EPS = 1e-6
_BLOCK = {"0": "norm", "1": "linear_1", "3": "linear_2"}
_RENAMED = {"llm_connector": CONNECTOR, "projector": f"{CONNECTOR}.projection", "dit": f"{sana.DENOISER}.network"}
_WITHIN_MODEL = re.compile(r"^model\.(?=\w+\.|latent_queries$)")


def checkpoint_kind(files: TensorReader) -> Literal["tokenizer", "model"]:
    """Detect whether a checkpoint is a tokenizer or a model."""
    keys = [_WITHIN_MODEL.sub("", key) for key in files.shapes]
    if any(key.startswith("vae_decoder.") for key in keys):
        return "model"
    if any(key.startswith("down_blocks.") for key in keys):
        return "tokenizer"
    raise InputError(
        f"{files.path}: expected a checkpoint of UniLIP, with down_blocks (a tokenizer) or vae_decoder (a model), "
        f"got {', '.join(sorted(keys)[:3])}, ..."
    )


def count_keys(files: TensorReader, pattern: str) -> int:
    """Count the different numbers in the first group of `pattern`."""
    found = (re.search(pattern, key) for key in files.shapes)
    return len({match[1] for match in found if match})


def queries(files: TensorReader) -> int:
    """Number of query embeddings of a model."""
    shape = next((value.shape for key, value in files.shapes.items() if key.endswith("latent_queries")), ())
    if len(shape) != 3 or shape[0] != 1:
        raise InputError(f"{files.path}: expected latent_queries of shape [1, Q, D], got {tuple(shape) or 'none'}")
    return shape[1]


def translate_tokenizer(key: str) -> tuple[TensorSlice, ...] | None:
    """Translate a name in a tokenizer checkpoint to ours."""
    part, _, rest = key.partition(".")
    if part == "encoder":
        return internvl.translate_vision(rest)
    if part == "mlp1":
        return internvl.translate_projector(rest)
    if "regressor" in key:  # a head of its training, which its own loader drops too
        return ()
    return _translate_decoder(key)


def translate_model(key: str, *, head: bool) -> tuple[TensorSlice, ...] | None:
    """Translate a name in a model checkpoint to ours; vision tower and projector may be in either InternVL layout."""
    key = _WITHIN_MODEL.sub("", key)
    part, _, rest = key.partition(".")
    if part == "vision_tower":
        return internvl.translate_vision(rest)
    if part == "multi_modal_projector":
        return internvl.translate_projector(rest) or internvl.translate(key, head=head)
    if part == "latent_queries":
        return (TensorSlice(f"{CONNECTOR}.queries", single=True),)
    if part in _RENAMED:
        return (TensorSlice(f"{_RENAMED[part]}.{rest}"),)
    if part == "vae_decoder":
        return _translate_decoder(rest)
    return internvl.translate(key, head=head)


def _translate_decoder(key: str) -> tuple[TensorSlice, ...] | None:
    """Translate the stream and DC-AE's decoder, which have the same names in both kinds of checkpoint."""
    if block := re.fullmatch(r"down_blocks\.(\d+)\.mlp\.([013])\.(weight|bias)", key):
        index, layer, kind = block.groups()
        return (TensorSlice(f"{STREAM}.blocks.{index}.{_BLOCK[layer]}.{kind}"),)
    if key.startswith("down_mlp."):
        return (TensorSlice(f"{STREAM}.projection.{key.removeprefix('down_mlp.')}"),)
    return dcae.translate(key) if key.startswith("decoder.") else None
