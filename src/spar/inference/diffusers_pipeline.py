"""SPAR as a pipeline of diffusers: a thin face of `SparPipeline` with diffusers' conventions.

`from spar import SparDiffusionPipeline` also tells diffusers of the class, so that `DiffusionPipeline.from_pretrained`
then opens a SPAR folder by its `model_index.json`. Its images are those of `SparPipeline` at the same seed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from spar.checkpoints.hub import model_folder
from spar.checkpoints.spar_format import ModelBundle, load_model, save_model
from spar.common.device import read_move
from spar.common.errors import InputError
from spar.inference.base import read_dtype
from spar.inference.diffusers_call import draw
from spar.inference.diffusers_keywords import refuse_keywords, with_revision
from spar.inference.layouts import Layout
from spar.inference.pipeline import SparPipeline
from spar.processing.images import ImageSource


class SparNetwork(ModelMixin, ConfigMixin):
    """All weights of a SPAR folder as diffusers' one component; matrix products have the type `dtype`."""

    config_name = "config.json"  # type: ignore[assignment]  # the base class says None, and means a name

    def __init__(self, bundle: ModelBundle, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.bundle, self.model, self.compute_dtype = bundle, bundle.model, dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **keywords: Any) -> "SparNetwork":
        """Load a SPAR folder; of diffusers' keywords `torch_dtype` (or `dtype`) is used."""
        dtype = keywords.get("torch_dtype") or keywords.get("dtype") or torch.float32
        return cls(load_model(model_folder(pretrained_model_name_or_path)), read_dtype(dtype))

    def to(self, *args: Any, **keywords: Any) -> "SparNetwork":  # type: ignore[override]  # a wrapped one
        """Move the weights; a type is that of matrix products, and leaves the stored weights as they are."""
        device, dtype = read_move(*args, **keywords)
        if device is not None:
            self.model.to(device)
        self.compute_dtype = self.compute_dtype if dtype is None else read_dtype(dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype


class SparDiffusionPipeline(DiffusionPipeline):
    """Generates from a prompt, and edits when it is given an image."""

    network: SparNetwork

    def __init__(self, network: SparNetwork) -> None:
        super().__init__()
        self.register_modules(network=network)
        self._made: SparPipeline | None = None
        self._offload_to: torch.device | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None, revision: str | None = None, network: SparNetwork | None = None,
        **keywords: Any,
    ) -> "SparDiffusionPipeline":  # fmt: skip
        """Load a SPAR folder, a bundled model by its name, `hf://OWNER/NAME`, or OWNER/NAME on the Hub.

        Args:
            pretrained_model_name_or_path: the folder or the name.
            torch_dtype: type of matrix products, float32 by default.
            dtype: the same.
            revision: of a repository on the Hub.
            network: a ready one, in place of the folder's.
            keywords: diffusers' others, of which those that change nothing here are accepted.

        Raises:
            InputError: a keyword that would have no effect, two types, or what `load_model` refuses.
        """
        own = {"torch_dtype": torch_dtype, "dtype": dtype, "revision": revision}
        if network is not None:
            refuse_keywords({**own, **keywords}, "whose network is given")
            return cls(network)
        refuse_keywords(keywords, pretrained_model_name_or_path)
        if dtype is not None and torch_dtype is not None:
            raise InputError(f"torch_dtype: expected it or dtype, which are the same, got {torch_dtype} and {dtype}")
        name = with_revision(pretrained_model_name_or_path, revision)
        return cls(SparNetwork.from_pretrained(name, torch_dtype=torch_dtype, dtype=dtype))

    def save_pretrained(self, save_directory: Any, *others: Any, **keywords: Any) -> None:
        """Write the whole SPAR folder, with `model_index.json`; `spar push` sends one to the Hub.

        Raises:
            InputError: a further argument, none of which would have an effect.
        """
        given = [name for name, value in keywords.items() if (name, value) != ("safe_serialization", True)]
        if given := [*map(repr, others), *given]:
            raise InputError(f"save_pretrained: expected a folder alone, got {', '.join(given)}")
        save_model(self.network.bundle, Path(save_directory))

    def to(self, *args: Any, **keywords: Any) -> "SparDiffusionPipeline":
        """As diffusers' own; a device ends offloading."""
        if read_move(*args, **keywords)[0] is not None:
            self._forget()
            self._offload_to = None
        return super().to(*args, **keywords)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = "cuda") -> None:
        """Keep the weights on the CPU, and each part on the device while it computes (`SparPipeline`'s `offload`)."""
        where = torch.device(device)
        self._forget()
        self._offload_to = torch.device(where.type, gpu_id if gpu_id is not None else where.index or 0)

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Refused: the parts of SPAR compute by more ways than `forward`, which its hooks watch."""
        raise InputError("enable_sequential_cpu_offload is not for this pipeline: use enable_model_cpu_offload")

    def enable_group_offload(self, *_: Any, **__: Any) -> None:
        """Refused, as `enable_sequential_cpu_offload`."""
        raise InputError("enable_group_offload is not for this pipeline: use enable_model_cpu_offload")

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        """Refused: `spar push` checks what it sends, and sends it to a private repository."""
        raise InputError("push_to_hub is not for this pipeline: save_pretrained, then `spar push FOLDER OWNER/NAME`")

    def _forget(self) -> None:
        """Drop the pipeline, with all weights on the CPU."""
        self._made = None
        self.network.model.to("cpu")

    def __call__(
        self, prompt: str | Sequence[str], image: ImageSource | Sequence[ImageSource] | None = None,
        negative_prompt: str | Sequence[str] | None = None, height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, output_type: str = "pil",
        return_dict: bool = True, callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",), layout: Layout = None,
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Generate images, or edit `image` by the instruction in `prompt`.

        Args:
            prompt: one or several; further arguments are those of `SparPipeline.generate` and `edit`.
            image: the image to edit, or one for each instruction; `height` and `width` are then its own.
            negative_prompt: as in `SparPipeline.generate`, or "", which asks for nothing.
            generator: one, or one for each image. The images of a fresh one are those of its seed, which counts up; one
                that was used before gives others.
            output_type: "pil", "np" `[B, H, W, 3]` or "pt" `[B, 3, H, W]` in [0, 1], of the 8-bit images, or "latent",
                normalised `[B, D_p, h, w]`.
            return_dict: whether to return diffusers' output, or a tuple.
            callback_on_step_end: called as `f(pipe, step, step, {"latents": estimate})`; it may stop the sampler by
                setting `pipe._interrupt`, but not change the latents.
            layout: as in `SparPipeline.generate` and `SparPipeline.edit`.

        Raises:
            InputError: what `SparPipeline` refuses, another `output_type`, or tensors that
                the callback may not have.
        """
        return draw(
            self, self._pipeline(), prompt, image, negative_prompt=negative_prompt, height=height, width=width,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt, generator=generator, output_type=output_type,
            return_dict=return_dict, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, layout=layout,
        )  # fmt: skip

    def _pipeline(self) -> SparPipeline:
        """The pipeline on the device and in the type of now."""
        network, away = self.network, self._offload_to
        where = next(network.model.parameters()).device if away is None else away
        if self._made is None:
            self._made = SparPipeline(network.bundle, network.compute_dtype, where, offload=away is not None)
        made = self._made
        made.dtype, made.device = network.compute_dtype, where
        made.progress = not getattr(self, "_progress_bar_config", {}).get("disable", False)
        return made


# Where `DiffusionPipeline.from_pretrained` looks for the class.
setattr(diffusers, "SparDiffusionPipeline", SparDiffusionPipeline)  # noqa: B010  # the module does not declare it
