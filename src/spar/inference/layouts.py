"""Layouts: before a system draws, its LLM writes where everything lies, and the image is drawn of that. Of an edit it
writes what changes, and where.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spar.common import limits
from spar.common.errors import InputError
from spar.common.limits import check_range
from spar.common.seeds import list_seeds
from spar.inference.base import Pipeline
from spar.inference.inputs import broadcast
from spar.models.language import LanguageModel
from spar.models.sampling import TextSampling

# How layouts are drawn: places vary, and the improbable tail of words, which would be mistakes, is cut (docs/log.md).
LAYOUT_TEMPERATURE, LAYOUT_TOP_P = 1.0, 0.6
LAYOUT_STREAM = 1  # of an image's seed, whose own stream is its noise
HALVES = (torch.bfloat16, torch.float16)
Layout = bool | str | Sequence[str] | None
# Of prompts, or of instructions with `f_v` `[B, N, D]` of the images to edit, by the images' seeds.
LayoutWriter = Callable[[Sequence[str], Sequence[int], Tensor | None], list[str]]


class _Generator(nn.Module):
    """`LanguageModel.generate` as a forward pass, for which a call may lend it other parameters."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.language = language

    def forward(self, embeddings: Tensor, mask: Tensor, **keywords: Any) -> list[list[int]]:
        return self.language.generate(embeddings, mask, **keywords)


class LayoutPipeline(Pipeline):
    """A pipeline whose LLM may write layouts; `bundle.sampling` says whether it was taught to (`layout`, and of edits
    `edit_layout`).
    """

    def write_layouts(self, prompt: str | Sequence[str], *, seed: int | Sequence[int] | None = None) -> list[str]:
        """The layout that `generate` writes for one image of each prompt at the same seed: to read, or to change and
        give back as its `layout`. `prompt`, `seed` and errors as there.
        """
        prompts = self._texts(prompt, "prompt")
        check_range("prompts", len(prompts), 1, limits.MAX_IMAGES)
        with self._compute(len(prompts)):
            self._load_to_device("streams", "language", "router_and_connector")
            return self._write_layouts(prompts, list_seeds(seed, len(prompts)))

    def check_layout(self, layout: Layout, size: tuple[int, int]) -> None:
        """Refuse a layout with words that the model lacks, or at a size at which its LLM knows no places."""
        side = self.image_size
        if layout not in (None, False) and size != (side, side):
            raise InputError(f"layout: expected images of {side} x {side} pixels, got {size[1]} x {size[0]}")
        if layout is not None and not isinstance(layout, bool):
            self._texts(layout, "layout")

    def _layout_writer(
        self, layout: Layout, prompts: int, size: tuple[int, int], *, taught: bool
    ) -> LayoutWriter | None:
        """What makes a layout of the prompt of every image; None where images are drawn of the prompts themselves, by
        default where the model was not `taught` to write any.
        """
        self.check_layout(layout, size)
        if layout is None:
            layout = taught and size == (self.image_size, self.image_size)
        if isinstance(layout, bool):
            return self._write_layouts if layout else None
        given = broadcast(self._texts(layout, "layout"), prompts, "layout")
        return lambda texts, _seeds, _f_v: [given[i * prompts // len(texts)] for i in range(len(texts))]

    def _write_layouts(self, prompts: Sequence[str], seeds: Sequence[int], f_v: Tensor | None = None) -> list[str]:
        """A layout of each prompt, drawn with numbers of its seed that the image's noise does not have. In place of one
        that no user could give, such as an empty one, it is the prompt, and of an edit nothing.

        In float32, whatever the weights are held in: with rounded products a word would depend on the batch.
        """
        editing = f_v is not None
        tokens = self.prompts.layout_questions(prompts, edits=editing).to(self.device)
        own = tuple(int(np.random.SeedSequence((seed, LAYOUT_STREAM)).generate_state(1)[0]) for seed in seeds)
        left = self.model.config.text.max_seq_len - int(tokens.mask.sum(1).max())
        if editing:  # the layout is drawn of with its instruction and image: a line, an image's start, the queries
            left -= self.model.config.connector.queries + 2
        most = min(self.max_prompt_tokens, max(left, 1))
        language = self.model.language
        held = {f"language.{name}": one for name, one in language.named_parameters() if one.dtype in HALVES}
        exact = {} if self.weights == "int8" else {name: one.float() for name, one in held.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=len(exact) < len(held)):
            embedded = self.model.embed(tokens.ids, f_v)
            rows = torch.func.functional_call(
                _Generator(language), exact, (embedded if len(exact) < len(held) else embedded.float(), tokens.mask),
                {"max_new_tokens": most, "sampling": TextSampling(LAYOUT_TEMPERATURE, LAYOUT_TOP_P, own)},
            )  # fmt: skip
        texts = [self.bundle.text_tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        return [
            text if len(row) < most and self._may_be_given(text) else "" if editing else prompt
            for row, text, prompt in zip(rows, texts, prompts, strict=True)
        ]

    def _layout_turned_off(self, layout: Layout, *, taught: bool) -> dict[str, Any]:
        """Metadata of images that were drawn of the prompt itself though the model would have written a layout."""
        return {"no_layout": True} if layout is False and taught else {}

    def _may_be_given(self, text: str) -> bool:
        try:
            self.check_text(text, "layout")
        except InputError:
            return False
        return True
