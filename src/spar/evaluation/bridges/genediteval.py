"""SPAR as a model of GenEditEvalKit (commit 103b283), for its generation and its edit benchmarks.

The kit has no plug-in: its `infer/custom_models/load_model.py` needs one entry in `MODEL_SETTINGS["t2i"]` and one in
`MODEL_SETTINGS["edit"]`, whose module is this one and whose class is `SparGenEdit` (docs/bridges.md).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from spar.common.errors import InputError
from spar.common.limits import one_reference


class SparGenEdit:
    """A model as the kit calls it: `generate(prompt, seed=...)` and `generate(input_list, seed=...)`.

    Args:
        model_path: a folder, the name of a bundled model, or `hf://OWNER/NAME`.
        dtype: of matrix products; by default as in `SparPipeline.from_pretrained`, and so the device.
        device: of the model.
        num_inference_steps: by default the model's own.
        guidance_scale: as `num_inference_steps`.

    Attributes:
        model_name: the last part of the path.
        width: of a generated image, which the kit gives a blank image in place of one that failed; and `height`.
    """

    def __init__(
        self, model_path: str, dtype: str | None = None, device: str | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
    ) -> None:  # fmt: skip
        from spar.inference.loading import load_pipeline

        self.pipeline = load_pipeline(model_path, dtype=dtype, device=device, progress=False)
        self.model_name = Path(model_path).name
        self.height, self.width = self.pipeline.output_size()
        self.settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

    def generate(
        self, prompt: str | Sequence[str | Image.Image] | None = None,
        input_list: Sequence[str | Image.Image] | None = None, seed: int = 42,
    ) -> Image.Image:  # fmt: skip
        """An image of a prompt, or the edited image of a list of instructions and one image.

        The kit gives either as the first argument without its name; a list there is an `input_list`.

        Raises:
            InputError: not exactly one of the two, another number of images than one, or as the pipeline's tasks.
        """
        if prompt is not None and not isinstance(prompt, str) and input_list is None:
            prompt, input_list = None, prompt
        if isinstance(prompt, str) and input_list is None:
            return self.pipeline.generate(prompt, seed=seed, **self.settings).images[0]
        if prompt is not None or input_list is None:
            given = "neither" if prompt is None else "both"
            raise InputError(f"generate: expected a prompt or an input_list, got {given}")
        images = [item for item in input_list if not isinstance(item, str)]
        if len(images) != 1:
            raise InputError(f"input_list: {one_reference(len(images))}")
        instruction = " ".join(item for item in input_list if isinstance(item, str))
        return self.pipeline.edit(images[0], instruction, seed=seed, **self.settings).images[0]
