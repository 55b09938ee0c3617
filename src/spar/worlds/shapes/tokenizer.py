"""The closed vocabulary of the shapes world, the check of a user's words, and the tokenizer.

The tokenizer has InternVL's special tokens and its ChatML template, without a system turn; one word is one token.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from spar.common.errors import InputError
from spar.worlds.shapes.forms import form_words
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS = ("zero", "one", "two", "three", "four")
ORDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
MAX_WORDS = 64
SHOWN_UNKNOWN = 10

_GLUE = (
    "a an the and on to of with is are there what how many object objects background color shape image "
    "left right above below yes no generate edit describe recolor make change remove delete add replace"
)
_MORE_GLUE = "larger smaller move up down at bottom some something"
_PLACES = "middle center corner upper lower"
VOCABULARY = tuple(
    dict.fromkeys(
        [
            *SHAPES, *PLURALS.values(), *COLORS, *SIZES, *BACKGROUNDS, *NUMBERS, *_GLUE.split(), ",", ".", "?", ":",
            "where", "column", "row", *ORDINALS, "from",
            *_MORE_GLUE.split(), "!", *form_words(), *_PLACES.split(),  # of version 2
        ]
    )
)
_KNOWN = frozenset(VOCABULARY)


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, with the marks `, . ? ! :` separate: the tokenizer's tokens, except newlines."""
    return re.findall(r"[,.?!:]|[^\s,.?!:]+", text.lower())


def check_words(text: str) -> list[str]:
    """Split a text and check that the world's models know its words.

    Raises:
        InputError: no text, more than 64 words, or a word outside VOCABULARY.
    """
    if not isinstance(text, str):
        raise InputError(f"expected text, got {type(text).__name__}")
    words = split_words(text)
    if not words:
        raise InputError("expected some text, got none")
    if len(words) > MAX_WORDS:
        raise InputError(f"expected at most {MAX_WORDS} words, got {len(words)}")
    unknown = list(dict.fromkeys(word for word in words if word not in _KNOWN))
    if unknown:
        shown = ", ".join(repr(word[:40]) for word in unknown[:SHOWN_UNKNOWN])
        more = f" and {len(unknown) - SHOWN_UNKNOWN} more" if len(unknown) > SHOWN_UNKNOWN else ""
        raise InputError(f"unknown words: {shown}{more}; the known words are: {' '.join(VOCABULARY)}")
    return words


def look_text(shape: str, color: str | None, size: str | None) -> str:
    """Size, colour and shape in English order, without those that are None."""
    return " ".join(word for word in (size, color, shape) if word is not None)


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# ---- tokenizer ------------------------------------------------------------------------------------------------------

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIALS = (PAD, START, END, IMAGE_START, IMAGE_END, IMAGE_CONTEXT, UNKNOWN)
ROLES = ("system", "user", "assistant")

# ChatML without a system turn; an image is one context token, which the processor repeats as needed.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<img><IMG_CONTEXT></img>\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the world's tokenizer: one token per word, mark or newline, lower-cased; decoding gives clean text."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, "\n", *ROLES, *VOCABULARY]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(r"[,.?!:\n]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),  # joins the words with spaces
            decoders.Fuse(),
            decoders.Replace(Regex(r" +([:])"), ":"),
            decoders.Replace(Regex(r" *\n *"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=[START, IMAGE_START, IMAGE_END, IMAGE_CONTEXT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
