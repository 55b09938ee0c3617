"""Prompt templates and token rows: text to left-padded ids, with one template for training and inference.

The forms are the family's own (SPAR section 2): a generation prompt, an edit prompt with its reference image, and the
true unconditional prompts of classifier-free guidance. The chat template is ChatML without a system turn, as the `-hf`
InternVL3 checkpoints have it; an image is `<img>`, one `<IMG_CONTEXT>` per visual token, `</img>`.
"""

import difflib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spar.common.errors import InputError

IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
TEMPLATE_TOKENS = (IMAGE_START, IMAGE_TOKEN, IMAGE_END, TURN_START, TURN_END)
UNCONDITIONAL = "Generate an image."
UNCONDITIONAL_EDIT = "Edit the image.\n"
DESCRIBE = "describe the image"
MAX_CHARACTERS_PER_TOKEN = 32
MAX_CACHED_CHARACTERS = 2**20  # of texts whose ids are kept: at most some 40 MB
LIKENESS = 0.7  # of a known word that is named beside an unknown one: the share of letters that match in order
PackedRow = tuple[list[int], list[int], list[int], list[float]]  # ids, segments, positions, weights
ROLES = ("system", "user", "assistant")
SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]+|[^.!?\n]+")


@dataclass(frozen=True)
class TokenBatch:
    """`ids` `[B, T]`, padded on the left; `mask` `[B, T]`, 1 for real tokens."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class QuestionAnswer:
    """One question about an image and its answer, for packed training.

    `follows`: asked after the turn before it. `cut`: the answer goes on, so that no end of it is taught.
    """

    question: str
    answer: str
    weight: float = 1.0
    follows: bool = False
    cut: bool = False


@dataclass(frozen=True)
class PackedBatch:
    """Several turns about one image per row: `ids` `[B, T]`, `allowed` `[B, T, T]`, `positions` `[B, T]`, and
    `weights` `[B, T]`, the weight of the loss with which each token is predicted (0: not an answer).
    """

    ids: Tensor
    allowed: Tensor
    positions: Tensor
    weights: Tensor

    def to(self, device: torch.device | str) -> "PackedBatch":
        return PackedBatch(*(part.to(device) for part in (self.ids, self.allowed, self.positions, self.weights)))


def with_layout(instruction: str, layout: str) -> str:
    """The text of an edit whose layout, what it changes and where, is written; without one the instruction alone."""
    return f"{instruction}\n{layout}" if layout else instruction


def tower_tokens(tokenizer: Any, texts: Sequence[str | None], length: int) -> Tensor:
    """Texts for SigLIP's text tower, `[B, length]`: in lower case, with the tokenizer's own end, cut or padded on the
    right; None is an empty text.

    Raises:
        InputError: a tokenizer without a padding token.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("expected a text tower's tokenizer with a padding token, got none")
    written = [(text or "").lower() for text in texts]
    found = tokenizer(written, padding="max_length", max_length=length, truncation=True, padding_side="right")
    return torch.tensor(found["input_ids"])


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that no text may have, by their ids: those with a role, and those that the tokenizer's file calls
    special.
    """
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {number: str(one) for number, one in tokenizer.added_tokens_decoder.items() if one.special}


def check_rows(tokenizer: Any, rows: int, what: str) -> None:
    """Refuse a tokenizer of whose tokens some prompt may have one for which an embedding has no row.

    Control tokens that no template has may lie beyond it: InternVL3's tokenizer has `<video>` without a row.

    Raises:
        InputError: it names `what` has the rows, and a token without one.
    """
    if len(tokenizer) <= rows:
        return
    unused = {*control_tokens(tokenizer).values()} - {*TEMPLATE_TOKENS}
    beyond = {number: word for word, number in tokenizer.get_vocab().items() if number >= rows and word not in unused}
    if beyond:
        most, (number, word) = max(beyond) + 1, min(beyond.items())
        raise InputError(
            f"{what}: expected at least {most} for this tokenizer, got {rows}: its token {word!r} has number {number}"
        )


def known_words(tokenizer: Any) -> list[str]:
    """The words of a closed vocabulary, without marks, roles and control tokens."""
    special = {*control_tokens(tokenizer).values(), *ROLES}
    return sorted(word for word in tokenizer.get_vocab() if word.isalnum() and word not in special)


class PromptEncoder:
    """Encodes every prompt form with one tokenizer and a fixed number of visual tokens per image.

    With `image_start` a prompt for an image ends with the image's opening token (as in UniLIP). Such prompts are padded
    to a multiple of `multiple` tokens.
    """

    def __init__(self, tokenizer: Any, visual_tokens: int, *, image_start: bool = False, multiple: int = 1) -> None:
        self.tokenizer = tokenizer
        self.visual_tokens = visual_tokens
        self.image_start = image_start
        self.multiple = multiple
        self.control = control_tokens(tokenizer)
        self._cache: dict[str, list[int]] = {}
        self._cached = 0  # characters

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of template or text, without added special tokens; they are cached."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            self._cached += len(text)
            if self._cached > MAX_CACHED_CHARACTERS:
                self._cache, self._cached = {}, len(text)
            self._cache[text] = ids
        return ids

    def check(self, text: str, what: str, limit: int) -> None:
        """Refuse a prompt that is not text, empty, too long, or (for a closed vocabulary) has unknown words."""
        if not isinstance(text, str):
            raise InputError(f"{what}: expected text, got {type(text).__name__}")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"{what}: expected text in Unicode, got half of a surrogate pair")
        if not text.strip():
            raise InputError(f"{what}: expected some words, got an empty text")
        if len(text) > MAX_CHARACTERS_PER_TOKEN * limit:
            raise InputError(f"{what}: expected at most {limit} tokens, got a text of {len(text)} characters")
        ids, unknown = self._ids_and_unknown(text)
        if len(ids) > limit:
            raise InputError(f"{what}: expected at most {limit} tokens, got {len(ids)}")
        self._refuse_unknown(list(dict.fromkeys(text[start:end] for start, end in unknown)), what)
        if self.control.keys() & {*ids}:
            raise InputError(f"{what}: expected plain words, got one of the model's control tokens")

    def _ids_and_unknown(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without added special tokens, and where it has words that a closed vocabulary lacks."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        if self.tokenizer.unk_token_id is None:
            return ids, []
        unsaid = {*self.tokenizer.convert_tokens_to_ids([self.tokenizer.unk_token, *ROLES])}  # roles are no words
        return ids, [span for i, span in zip(ids, encoded["offset_mapping"], strict=True) if i in unsaid]

    def known_sentences(self, text: str) -> tuple[str, list[str]]:
        """A text without the sentences that have words outside a closed vocabulary, and these words.

        A sentence is left out whole: without its unknown words it may say the opposite.
        """
        if self.tokenizer.unk_token_id is None:
            return text, []
        unknown = self._ids_and_unknown(text)[1]
        if not unknown:
            return text, []
        kept = []
        for found in SENTENCE.finditer(text):
            after = bisect_right(unknown, found.start(), key=itemgetter(1))  # the first that ends in it or later
            overlaps = after < len(unknown) and unknown[after][0] < found.end()
            if not overlaps and any(letter.isalnum() for letter in found.group()):
                kept.append(found.group().strip())
        return " ".join(kept), list(dict.fromkeys(text[start:end] for start, end in unknown))

    def count_words(self, text: str) -> tuple[int, list[str]]:
        """The number of words of a text without control tokens (of its tokens, where the vocabulary is open), and the
        unknown ones.
        """
        text = self.plain(text)
        ids, unknown = self._ids_and_unknown(text)
        return len(ids), [text[start:end] for start, end in unknown]

    def plain(self, text: str) -> str:
        """A text without the model's control tokens."""
        for token in self.control.values():
            text = text.replace(token, " ")
        return text

    def _refuse_unknown(self, words: Sequence[str], what: str) -> None:
        """Name the words that a closed vocabulary lacks, each with the known one that is spelt most like it."""
        if not words:
            return
        known, shown = known_words(self.tokenizer), []
        for word in words[:10]:
            like = difflib.get_close_matches(word.lower(), known, 1, LIKENESS)
            name = word[:40] if word.isprintable() else ascii(word[:40])
            shown.append(f"{name} (perhaps {like[0]})" if like else name)
        raise InputError(f"{what}: unknown words {', '.join(shown)}; this model knows only {', '.join(known)}")

    def image(self, tokens: int | None = None) -> list[int]:
        """Ids of one image, by default with the fixed number of visual tokens."""
        context = self.encode(IMAGE_TOKEN)
        return self.encode(IMAGE_START) + context * (tokens or self.visual_tokens) + self.encode(IMAGE_END)

    def _user(self, content: list[int]) -> list[int]:
        """A user turn, then the start of the assistant's."""
        return self.encode(f"{TURN_START}user\n") + content + self.encode(f"{TURN_END}\n{TURN_START}assistant\n")

    def _image_prompts(self, contents: list[list[int]]) -> TokenBatch:
        """User turns whose answers are images."""
        start = self.encode(IMAGE_START) if self.image_start else []
        return self.pad_rows([self._user(content) + start for content in contents], self.multiple)

    def generation(self, prompts: Sequence[str | None]) -> TokenBatch:
        """`Generate an image: {prompt}`; None gives the unconditional prompt."""
        return self._image_prompts([self._generation(prompt) for prompt in prompts])

    def _generation(self, prompt: str | None) -> list[int]:
        return self.encode(UNCONDITIONAL if prompt is None else f"Generate an image: {prompt}")

    def layout_questions(self, prompts: Sequence[str], *, edits: bool = False) -> TokenBatch:
        """Prompts for images, or instructions with the references, and the start of an answer in words."""
        encode = self._edit if edits else self._generation
        return self.pad_rows([self._user(encode(prompt)) for prompt in prompts], self.multiple)

    def layout(self, layouts: Sequence[str | None]) -> TokenBatch:
        """`Generate an image: {layout}` and a blank canvas; None gives the unconditional prompt, canvas kept."""
        return self._image_prompts([self._layout(text) for text in layouts])

    def _layout(self, text: str | None) -> list[int]:
        return self._generation(text) + self.encode("\n") + self.image()

    def edit(self, instructions: Sequence[str | None], image_tokens: int | None = None) -> TokenBatch:
        """`Edit the image: {instruction}` and the reference; None gives the unconditional prompt, reference kept.

        `image_tokens`: visual tokens of each reference, if not the fixed number.
        """
        return self._image_prompts([self._edit(text, image_tokens) for text in instructions])

    def _edit(self, instruction: str | None, image_tokens: int | None = None) -> list[int]:
        text = UNCONDITIONAL_EDIT if instruction is None else f"Edit the image: {instruction}\n"
        return self.encode(text) + self.image(image_tokens)

    def question(self, questions: Sequence[str], tiles: Sequence[int] | None = None) -> TokenBatch:
        """The image, of one square or of so many `tiles` in each row, the question, and the start of the answer."""
        rows = []
        for question, count in zip(questions, tiles or [1] * len(questions), strict=True):
            content = self.image(count * self.visual_tokens) + self.encode("\n") + self.encode(question)
            rows.append(self._user(content))
        return self.pad_rows(rows)

    def conversation(self, messages: Sequence[tuple[str, Sequence[str | int]]]) -> TokenBatch:
        """Turns (role, parts) and the start of the assistant's answer, one row.

        A part is a text, or the number of an image's tiles. A newline follows an image, as in `question`, and separates
        two texts.
        """
        row: list[int] = []
        for role, parts in messages:
            row += self.encode(f"{TURN_START}{role}\n")
            for number, part in enumerate(parts):
                if isinstance(part, int):
                    row += self.image(part * self.visual_tokens) + self.encode("\n")
                else:
                    after_text = number > 0 and isinstance(parts[number - 1], str)
                    row += (self.encode("\n") if after_text else []) + self.encode(part)
            row += self.encode(f"{TURN_END}\n")
        return self.pad_rows([row + self.encode(f"{TURN_START}assistant\n")])

    def pack(self, rows: Sequence[Sequence[QuestionAnswer]]) -> PackedBatch:
        """Several conversations about one image, sharing the image's tokens.

        Each conversation attends to the image and to itself, never to others, at the positions that it would have
        alone: the packed loss is exactly the loss of separate conversations. A turn that `follows` goes on with the
        conversation of the turn before it.
        """
        prefix = self._image_first()
        return self._packed([self._pack_row(prefix, turns) for turns in rows])

    def _image_first(self) -> list[int]:
        """The start of a user turn, with the image that it is about."""
        return self.encode(f"{TURN_START}user\n") + self.image() + self.encode("\n")

    def packed_length(self, turns: Sequence[QuestionAnswer]) -> int:
        """Tokens of a row of `pack`."""
        return len(self._pack_row(self._image_first(), turns)[0])

    def pack_descriptions(self, prompts: Sequence[str], descriptions: Sequence[str], *, edits: bool) -> PackedBatch:
        """Prompts for images, as `generation` or `edit` writes them, each answered in words."""
        rows = []
        for prompt, description in zip(prompts, descriptions, strict=True):
            ids = self._user(self._edit(prompt) if edits else self._generation(prompt))
            answer = self.encode(description) + self.encode(TURN_END)
            length = len(ids) + len(answer)
            weights = [0.0] * len(ids) + [1.0] * len(answer)
            rows.append((ids + answer, [0] * length, list(range(length)), weights))
        return self._packed(rows)

    def pack_layouts(self, prompts: Sequence[str], layouts: Sequence[str], *, edits: bool = False) -> PackedBatch:
        """Prompts for images, each answered with a layout, and beside it the layout as a prompt with its canvas; of
        edits, the instruction with its layout and the reference, which the question has too.

        The two share a row and nothing else: each has the positions that it would have alone.
        """
        rows = []
        for prompt, text in zip(prompts, layouts, strict=True):
            asked = self._user(self._edit(prompt) if edits else self._generation(prompt))
            answer = self.encode(text) + self.encode(TURN_END)
            drawn = self._user(self._edit(with_layout(prompt, text)) if edits else self._layout(text))
            length = len(asked) + len(answer)
            rows.append((
                asked + answer + drawn,
                [1] * length + [2] * len(drawn),
                [*range(length), *range(len(drawn))],
                [0.0] * len(asked) + [1.0] * len(answer) + [0.0] * len(drawn),
            ))  # fmt: skip
        return self._packed(rows)

    def _packed(self, rows: Sequence[PackedRow]) -> PackedBatch:
        """Pad rows on the right; a token attends to what is before it in segment 0 and in its own segment."""
        columns = zip(*rows, strict=True)
        ids, segments, positions, weights = (
            pad_sequence([torch.tensor(row) for row in column], batch_first=True, padding_value=padding)
            for column, padding in zip(columns, (self.tokenizer.pad_token_id, -1, 0, 0.0), strict=True)
        )
        length = ids.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        allowed = (same | (segments[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        return PackedBatch(ids, allowed, positions, weights)

    def _pack_row(self, prefix: list[int], turns: Sequence[QuestionAnswer]) -> PackedRow:
        ids, segments, weights = list(prefix), [0] * len(prefix), [0.0] * len(prefix)
        positions, number = list(range(len(prefix))), 0
        for turn in turns:
            goes_on = turn.follows and number > 0
            number += not goes_on
            question = self.encode(f"\n{TURN_START}user\n") if goes_on else []
            question = question + self.encode(turn.question) + self.encode(f"{TURN_END}\n{TURN_START}assistant\n")
            answer = self.encode(turn.answer) + ([] if turn.cut else self.encode(TURN_END))
            start = positions[-1] + 1 if goes_on else len(prefix)
            ids += question + answer
            segments += [number] * (len(question) + len(answer))
            positions += range(start, start + len(question) + len(answer))
            weights += [0.0] * len(question) + [turn.weight] * len(answer)
        return ids, segments, positions, weights

    def pad_rows(self, rows: Sequence[list[int]], multiple: int = 1) -> TokenBatch:
        """Left-pad to the longest row, rounded up to a multiple of `multiple`."""
        length = -(-max(len(row) for row in rows) // multiple) * multiple
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return TokenBatch(ids, mask)
