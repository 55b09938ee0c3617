"""A DualToken model from published parts: SigLIP, a Qwen2 LLM, and the public tokenizer's checkpoint.

`build_dualtoken` takes SigLIP's towers and an LLM unchanged, all else from seeded random weights; `convert_dualtoken`
takes the whole tokenizer from a checkpoint in the public code's format. Nothing was published of the unified model: the
embedder and the depth heads start from random weights in both.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from spar.checkpoints.dualtoken_format import DualTokenBundle
from spar.checkpoints.formats import dualtoken_public, internvl, siglip
from spar.checkpoints.formats.checkpoint_source import CheckpointSource, fetch
from spar.checkpoints.formats.key_map import KeyMap, TensorReader, TensorSlice
from spar.checkpoints.model_header import versions
from spar.checkpoints.sized_build import FRESH, outline
from spar.common.config import differences
from spar.common.errors import InputError
from spar.common.files import home_expanded
from spar.common.generators import cpu_generator
from spar.models.config import TextConfig
from spar.models.dualtoken.config import DualTokenConfig
from spar.models.dualtoken.model import DualTokenModel
from spar.models.dualtoken.sampling import CodeSampling
from spar.processing.prompts import IMAGE_END, IMAGE_START, IMAGE_TOKEN, TURN_END, check_rows

SOURCES = ("vision", "llm")
LANGUAGE = "language"
TOWERS = {"tokenizer.encoder": "vision", "tokenizer.text_tower": "vision"}


def build_dualtoken(
    config: DualTokenConfig, sampling: CodeSampling, sources: dict[str, str | None], *,
    revisions: dict[str, str] | None = None, seed: int = 0, recipe: str = "", max_prompt_tokens: int = 64,
) -> DualTokenBundle:  # fmt: skip
    """Build a model from SigLIP and an LLM.

    Args:
        config: settings that the checkpoints lack (quantisers, decoder, heads), and expected values of the others.
        sources: folder or Hub id of each of SOURCES.
        revisions: for any of them a commit, branch or tag of the Hub.
        seed: of the random weights.

    Raises:
        InputError: a missing source, an unsupported configuration, or weights that do not fit it.
    """
    parts = _Parts.read(sources, revisions or {})
    taps = config.vision
    vision = replace(
        parts.vision, shortcut_layer=taps.shortcut_layer, pixel_layer=taps.pixel_layer,
        semantic_layer=taps.semantic_layer,
    )
    real = replace(config, vision=vision, text_tower=parts.text_tower, text=parts.text)
    keys = KeyMap()
    keys.add(parts.weights("vision"), siglip.translate)
    filled = {**TOWERS, LANGUAGE: "llm"}
    return _finish(config, real, sampling, parts, keys, filled, parts.sources, seed, recipe, max_prompt_tokens)


def convert_dualtoken(
    path: str, config: DualTokenConfig, sampling: CodeSampling, sources: dict[str, str | None], *,
    settings: str | None = None, revisions: dict[str, str] | None = None, seed: int = 0, recipe: str = "",
    max_prompt_tokens: int = 64,
) -> DualTokenBundle:  # fmt: skip
    """Convert a checkpoint of the public tokenizer, which computes the same codes, features and images.

    Args:
        path: a file of tensors (.safetensors, .pt, .pth), or a folder with one.
        settings: its config.json, by default the one in the file's folder.
        sources: as in `build_dualtoken`; SigLIP's folder gives sizes and the text tower's words.

    Raises:
        InputError: as `build_dualtoken`, and a file that is no such checkpoint.
    """
    source, files = _open(path)
    parts = _Parts.read(sources, revisions or {})
    beside = CheckpointSource.of_file(Path(home_expanded(settings)) if settings else source.folder / "config.json")
    given = beside.config(beside.name).inner("rqvaesiglip")
    pixel, semantic = (dualtoken_public.quantizer_config(given.inner(name)) for name in ("vq_pix", "vq_sem"))
    taps = {
        "shortcut_layer": given.whole("layer_shortcut"), "pixel_layer": given.whole("layer_recon"),
        "semantic_layer": given.whole("layer_sem"),
    }  # fmt: skip
    real = replace(
        config, vision=replace(parts.vision, **taps), text_tower=parts.text_tower, text=parts.text, pixel=pixel,
        semantic=semantic, shortcut=given.number("weight_shortcut"), decoder=dualtoken_public.decoder_config(given),
    )
    entries = {"pixel_quantizer": pixel.entries, "semantic_quantizer": semantic.entries}
    keys = KeyMap()
    keys.add(files, lambda key: dualtoken_public.translate(key, len(real.decoder.channels), entries))
    filled = {"tokenizer": "dualtoken", LANGUAGE: "llm"}
    found = {"dualtoken": source, "settings": beside, **parts.sources}
    bundle = _finish(config, real, sampling, parts, keys, filled, found, seed, recipe, max_prompt_tokens)
    dualtoken_public.check_forms(files)
    return bundle


def _open(path: str) -> tuple[CheckpointSource, TensorReader]:
    """A checkpoint and its tensors."""
    file = Path(home_expanded(path))
    if file.is_dir():
        found = [one for one in sorted(file.iterdir()) if one.suffix in (".safetensors", ".pt", ".pth")]
        if len(found) != 1:
            raise InputError(f"{file}: expected one file of tensors (.safetensors, .pt, .pth), got {len(found)}")
        (file,) = found
    if not file.is_file():
        raise InputError(f"expected a checkpoint of DualToken's tokenizer, got {path}, which does not exist")
    source = CheckpointSource.of_file(file)
    return source, source.tensors(file.name)


class _Parts:
    """The published parts: sources, sizes, tokenizers."""

    def __init__(self, found: dict[str, CheckpointSource]) -> None:
        self.sources = found
        vision, llm = found["vision"], found["llm"]
        self.vision, self.text_tower = siglip.read_config(vision.config("config.json"))
        self.tower_tokenizer = vision.text_tokenizer()
        self.text_tokenizer = with_image_tokens(llm.text_tokenizer(), llm.folder)
        self.text = self._text(llm)

    @classmethod
    def read(cls, sources: dict[str, str | None], revisions: dict[str, str]) -> "_Parts":
        """Find the parts; InputError names a missing one."""
        if missing := [name for name in SOURCES if not sources.get(name)]:
            raise InputError(f"expected a folder or Hub id for {', '.join(missing)}, got none")
        if unknown := sorted(set(revisions) - set(SOURCES)):
            raise InputError(f"revision: expected parts of {', '.join(SOURCES)}, got {', '.join(unknown)}")
        named = {name: str(sources[name]) for name in SOURCES}
        return cls(
            {name: fetch(named[name], internvl.FILES, revision=revisions.get(name), what=name) for name in SOURCES}
        )

    def weights(self, name: str) -> TensorReader:
        return self.sources[name].weights("model")

    def _text(self, llm: CheckpointSource) -> TextConfig:
        config, files = llm.config("config.json"), self.weights("llm")
        tied = internvl.is_tied(files, stated=bool(config.get("tie_word_embeddings", default=False)))
        text = internvl.read_text_config(config, config, tied, self.text_tokenizer)
        check_rows(self.text_tokenizer, text.vocab_size, f"{llm.folder}: rows of word embeddings")
        return text


def with_image_tokens(tokenizer: Any, folder: Path) -> Any:
    """An LLM's tokenizer with the image tokens; Qwen2.5's word matrices have rows to spare for them.

    Raises:
        InputError: a tokenizer without ChatML's turns or a padding token.
    """
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [IMAGE_START, IMAGE_TOKEN, IMAGE_END]}, replace_extra_special_tokens=False
    )
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END)
    if turn_end in (None, tokenizer.unk_token_id) or tokenizer.pad_token_id is None:
        raise InputError(f"{folder}: expected a tokenizer with {TURN_END} and a padding token")
    tokenizer.eos_token = TURN_END
    return tokenizer


def translate_llm(key: str, *, head: bool) -> tuple[TensorSlice, ...] | None:
    """A name in `Qwen2ForCausalLM` as ours."""
    if key == "lm_head.weight":
        return (TensorSlice(f"{LANGUAGE}.head.weight"),) if head else ()
    if key.startswith("model."):
        return (TensorSlice(f"{LANGUAGE}.network.{key.removeprefix('model.')}"),)
    return None


def _finish(
    expected: DualTokenConfig, real: DualTokenConfig, sampling: CodeSampling, parts: _Parts, keys: KeyMap,
    filled: dict[str, str], sources: dict[str, CheckpointSource], seed: int, recipe: str, max_prompt_tokens: int,
) -> DualTokenBundle:  # fmt: skip
    """Build the model on the meta device, fill it, and bundle it with its tokenizers and origins."""
    llm = parts.weights("llm")
    keys.add(llm, lambda key: translate_llm(key, head=not real.text.tied_head))
    sketch = outline(lambda: DualTokenModel(real), real, keys.outlines().values(), "the checkpoints", FRESH)
    keys.check({prefix: sketch.get_submodule(prefix) for prefix in filled}, filled)
    with init_empty_weights(include_buffers=False):
        model = DualTokenModel(real)
    for prefix in filled:
        module: nn.Module = model.get_submodule(prefix)
        module.load_state_dict(keys.tensors(prefix), assign=True)
    origins = {**filled, **init_missing(model, seed)}
    found = differences(expected, real, "model")
    manifest = {
        "recipe": recipe, "seed": seed, "versions": versions(), "parts": origins, "stages": {},
        "sources": {name: one.record() for name, one in sources.items()},
        "differences": [f"{name}: the recipe expects {a!r}, the checkpoint has {b!r}" for name, a, b in found],
    }  # fmt: skip
    return DualTokenBundle(
        model.eval().requires_grad_(False), parts.text_tokenizer, sampling, max_prompt_tokens, manifest,
        parts.tower_tokenizer,
    )  # fmt: skip


@torch.no_grad()
def init_missing(model: DualTokenModel, seed: int) -> dict[str, str]:
    """Give every part on the meta device seeded random weights, and return the origin of each."""
    origins = {}
    for name, module in (*model.tokenizer.named_children(), *model.named_children()):
        place = f"tokenizer.{name}" if name in dict(model.tokenizer.named_children()) else name
        if not any(parameter.is_meta for parameter in module.parameters()):
            continue
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(cpu_generator(seed).get_state())
            for part in module.modules():
                for key, parameter in list(part.named_parameters(recurse=False)):
                    if parameter.is_meta:
                        setattr(part, key, nn.Parameter(_start(part, key, torch.empty(parameter.shape))))
        origins[place] = f"random weights of seed {seed}"
    return origins


def _start(part: nn.Module, key: str, value: torch.Tensor) -> torch.Tensor:
    """The initial value of one parameter: Xavier for maps, ones for norms, zeros for biases and positions."""
    if value.dim() > 1 and key == "weight":
        return nn.init.xavier_uniform_(value.view(len(value), -1)).view_as(value)
    norm = isinstance(part, nn.LayerNorm | nn.GroupNorm)
    return value.fill_(1.0 if norm and key == "weight" else 0.0)
