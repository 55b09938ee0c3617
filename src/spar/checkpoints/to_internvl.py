"""The understanding half of a SPAR model as a plain InternVL folder, in the layout of `OpenGVLab/InternVL3-*-hf`.

The tuned encoder and the LLM are the whole of what answers (SPAR section 3.3), so transformers' own class can load them
without SPAR. `build_from_published` reads such a folder back, to the last bit in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import InternVLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from spar.checkpoints.model_header import versions
from spar.checkpoints.safetensors_io import check_finite
from spar.checkpoints.spar_format import ModelBundle
from spar.common.config import write_json
from spar.common.files import atomic_directory
from spar.models.encoder import PIXEL_MEAN, PIXEL_STD, internvl_config
from spar.models.spar import SparModel

MARK = "spar-export.json"  # which an InternVL folder of others does not have

# Of the published folders; what transformers 5 adds to them is its own affair.
_IMAGE_PROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor",
    "crop_to_patches": False, "min_patches": 1, "max_patches": 12, "do_convert_rgb": True, "do_resize": True,
    "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD),
}  # fmt: skip


def internvl_model(model: SparModel, dtype: torch.dtype | None = None) -> InternVLForConditionalGeneration:
    """The library's own class with the weights of a SPAR model's encoder and LLM, in `dtype` if given.

    Raises:
        InputError: weights that are not finite, or not in `dtype`.
    """
    config = internvl_config(model.config.vision, model.config.text)
    with init_empty_weights():
        library = InternVLForConditionalGeneration(config)
    encoder, language = model.tokenizer.encoder, model.language
    parts = {
        "model.vision_tower": encoder.vision_tower, "model.multi_modal_projector": encoder.multi_modal_projector,
        "model.language_model": language.network,
    }  # fmt: skip
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    head = language.network.embed_tokens if language.head is None else language.head
    weights["lm_head.weight"] = head.weight
    cast = {key: value.detach().to("cpu", dtype) for key, value in weights.items()}
    check_finite(cast, "export")
    library.load_state_dict(cast, assign=True)
    library.tie_weights()
    return library.eval().requires_grad_(False)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bar of shards that transformers draws into any log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def export_internvl(bundle: ModelBundle, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the folder: weights, configuration, text tokenizer and the settings of transformers' processor.

    Raises:
        InputError: the folder cannot be written, or weights as in `internvl_model`.
    """
    config = bundle.model.config
    with atomic_directory(folder) as temporary:
        with _without_bars():
            internvl_model(bundle.model, dtype).save_pretrained(temporary)
        bundle.text_tokenizer.save_pretrained(temporary)
        side = {"height": config.image_size, "width": config.image_size}
        write_json(temporary / "preprocessor_config.json", {**_IMAGE_PROCESSOR, "size": side})
        processor = {"processor_class": "InternVLProcessor", "image_seq_length": config.grid**2}
        write_json(temporary / "processor_config.json", processor)
        write_json(temporary / MARK, {"format": "internvl", "versions": versions()})
