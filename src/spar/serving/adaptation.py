"""What clients send by default and the model cannot follow: left out, with a note in a header of the answer."""

import itertools
from collections.abc import Iterable, Sequence

from spar.inference.base import Pipeline
from spar.serving.schema import Message, SamplingRequest, TextPart

NOTES_HEADER, SEED_HEADER = "Spar-Notes", "Spar-Seed"
MAX_SHOWN_WORDS = 8
MAX_SHOWN_LETTERS = 32


def note_header(notes: Iterable[str]) -> dict[str, str]:
    """The header that holds notes, each at most once; no header without any."""
    joined = "; ".join(dict.fromkeys(notes))
    return {NOTES_HEADER: joined} if joined else {}


def seed_header(seed: int | None) -> dict[str, str]:
    """The header that says by which seed an answer was drawn; none of an answer that was not."""
    return {} if seed is None else {SEED_HEADER: str(seed)}


def sampling_notes(request: SamplingRequest) -> list[str]:
    """What of a request for images has no effect."""
    chosen = request.quality not in (None, "auto", "standard")
    return [f"quality: {request.quality} has no effect, this model has one quality"] if chosen else []


def adapt_messages(pipe: Pipeline, messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """A conversation as the model can take it, message by message, and notes on what was left out.

    Emptied are: a greeting, which is an assistant's message before the user's first; of a closed vocabulary the
    sentences of a system message that have unknown words; and system messages before another one, which takes their
    text. An empty text beside other parts of a message is removed.
    """
    adapted, notes = [_without_empty_parts(message) for message in messages], []
    first = next((index for index, message in enumerate(adapted) if message.role == "user"), 0)
    for index, message in enumerate(adapted):
        if _is_system(message):
            known = [pipe.prompts.known_sentences(text) for text in message.texts]
            words = [word for _, unknown in known for word in unknown]
            if words:
                adapted[index] = _said(message, [text for text, _ in known])
                notes.append(f"messages[{index}]: left out the sentences with unknown words {_shown(words)}")
        elif index < first and any(text.strip() for text in message.texts):
            adapted[index] = _said(message, [])
            notes.append(f"messages[{index}]: left out a greeting, since the user's message is the first")
    for before, index in itertools.pairwise(range(len(adapted))):
        if _is_system(adapted[before]) and _is_system(adapted[index]):
            adapted[index] = _said(adapted[index], [*adapted[before].texts, *adapted[index].texts])
            adapted[before] = _said(adapted[before], [])
    return adapted, notes


def _is_system(message: Message) -> bool:
    return message.role in ("system", "developer")


def _said(message: Message, texts: Sequence[str]) -> Message:
    """The message with other words, of which empty ones are dropped."""
    return message.model_copy(update={"content": "\n".join(text for text in texts if text.strip())})


def _without_empty_parts(message: Message) -> Message:
    """The message without parts of empty text, if it has other parts."""
    if isinstance(message.content, str):
        return message
    full = [part for part in message.content if not isinstance(part, TextPart) or part.text.strip()]
    return message.model_copy(update={"content": full}) if full else message


def _shown(words: Sequence[str]) -> str:
    """The first words, as a header can hold them."""
    unique = list(dict.fromkeys(words))
    shown = ", ".join(ascii(word[:MAX_SHOWN_LETTERS])[1:-1] for word in unique[:MAX_SHOWN_WORDS])
    return f"{shown} and {len(unique) - MAX_SHOWN_WORDS} more" if len(unique) > MAX_SHOWN_WORDS else shown
