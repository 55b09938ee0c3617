"""A checkpoint's text tokenizer: transformers' own files, or Qwen2's vocabulary and merges."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.tokenization_utils_base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from spar.common.errors import InputError, first_line


def open_text_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer, as one file or as Qwen2's vocabulary and merges.

    No class that the folder names is looked up, so that no code of its own can run.
    """
    kind = _kind(folder)
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare Exception on a damaged file
        reason = first_line(error)
        raise InputError(f"{folder} holds no readable text tokenizer: {reason}") from error


def text_tokenizer_files(folder: Path) -> list[Path]:
    """The files that `open_text_tokenizer` reads: those that the library looks for, where they are."""
    names = (*_kind(folder).vocab_files_names.values(), TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE)
    files = [folder / name for name in (*names, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE)]
    return [*filter(Path.is_file, files), *(folder / CHAT_TEMPLATE_DIR).glob("*.jinja")]


def _kind(folder: Path) -> type[PreTrainedTokenizerFast] | type[Qwen2Tokenizer]:
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Qwen2Tokenizer
    raise InputError(f"{folder}: expected a text tokenizer, tokenizer.json or vocab.json and merges.txt, found none")
