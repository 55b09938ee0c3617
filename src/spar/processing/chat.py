"""Conversations: validation of messages, loading of their images, and the text of a streamed answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from spar.common.errors import InputError
from spar.common.limits import MAX_CHAT_IMAGES, MAX_MESSAGES, MAX_PARTS
from spar.processing.images import open_image
from spar.processing.prompts import ROLES


@dataclass(frozen=True)
class ChatMessage:
    """One turn: its role, and in order its texts, and its images as the RGB squares that are read of each; `name` is
    the message's in errors.
    """

    role: str
    parts: tuple[str | tuple[Image.Image, ...], ...]
    name: str = field(default="messages", compare=False)

    @property
    def images(self) -> list[Image.Image]:
        """All squares."""
        return [square for part in self.parts if not isinstance(part, str) for square in part]


Squares = Callable[[Image.Image], Sequence[Image.Image]]


def read_messages(messages: Sequence[Mapping[str, Any]], squares: Squares) -> list[ChatMessage]:
    """Convert messages `{"role": ..., "content": ...}` to turns; images are opened one by one, and cut by `squares`.

    A content is text, or a list of parts `{"type": "text", "text": str}` and `{"type": "image", "image": ImageSource}`.
    One system message may come first; then user and assistant alternate, and the user's messages are first and last.
    An empty system message, and an assistant's empty one before the user's first, says nothing and is left out. Only
    the user's messages may have images. Within a turn, images are moved before the text: that is the order of the
    training data, and an answer to the other order is close to a guess (22 of 120 right against 120).

    Raises:
        InputError: naming the message, the expected and the given value.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InputError(f"messages: expected 1 to {MAX_MESSAGES}, got {len(messages)}")
    named = [(name := f"messages[{index}]", *_content(message, name)) for index, message in enumerate(messages)]
    first = next((index for index, (_, role, _) in enumerate(named) if role == "user"), 0)
    turns = [turn for index, turn in enumerate(named) if not _says_nothing(*turn[1:], before_user=index < first)]
    _check_order([(name, role) for name, role, _ in turns or named])
    images = sum(part["type"] == "image" for _, _, parts in turns for part in parts)
    if images > MAX_CHAT_IMAGES:
        raise InputError(f"messages: expected at most {MAX_CHAT_IMAGES} images, got {images}")
    ordered = [(name, role, sorted(parts, key=lambda part: part["type"] != "image")) for name, role, parts in turns]
    return [ChatMessage(role, tuple(_open(part, squares) for part in parts), name) for name, role, parts in ordered]


def _says_nothing(role: str, parts: Sequence[Mapping[str, Any]], *, before_user: bool) -> bool:
    """Whether a message can be left out: one of the system, or of the assistant before the user's first, is empty."""
    empty = all(part["type"] == "text" and not part["text"].strip() for part in parts)
    return empty and (role == "system" or (role == "assistant" and before_user))


def _open(part: Mapping[str, Any], squares: Squares) -> str | tuple[Image.Image, ...]:
    return part["text"] if part["type"] == "text" else tuple(squares(open_image(part["image"])))


def _content(message: object, name: str) -> tuple[str, list[Mapping[str, Any]]]:
    """Role and parts of one message, each part of a known type with its own keys."""
    fields = _check_keys(message, ("role", "content"), name)
    role, content = fields["role"], fields["content"]
    if role not in ROLES:
        raise InputError(f"{name}.role: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {role!r}")
    if isinstance(content, str):
        return role, [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise InputError(f"{name}.content: expected text or a list of parts, got {type(content).__name__}")
    if not 1 <= len(content) <= MAX_PARTS:
        raise InputError(f"{name}.content: expected 1 to {MAX_PARTS} parts, got {len(content)}")
    for index, part in enumerate(content):
        where = f"{name}.content[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            shown = f"type {kind!r}" if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"{where}: expected a part of type text or image, got {shown}")
        _check_keys(part, ("type", kind), where)
        if kind == "text" and not isinstance(part["text"], str):
            raise InputError(f"{where}: expected text, got {type(part['text']).__name__}")
        if kind == "image" and role != "user":
            raise InputError(f"{where}: expected an image from the user only, got one from the {role}")
    return role, list(content)


def _check_keys(value: object, keys: tuple[str, str], name: str) -> Mapping[str, Any]:
    """The object with exactly these keys."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name}: expected {keys[0]} and {keys[1]}, got {type(value).__name__}")
    if set(value) != set(keys):
        raise InputError(f"{name}: expected {keys[0]} and {keys[1]}, got {', '.join(map(str, value)) or 'nothing'}")
    return value


def _check_order(turns: Sequence[tuple[str, str]]) -> None:
    """Refuse names and roles of messages that do not alternate after a system message at the start."""
    first = int(turns[0][1] == "system")
    for index, (name, role) in enumerate(turns[first:]):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise InputError(f"{name}.role: expected {expected}, got {role}")
    if turns[-1][1] != "user":
        raise InputError(f"messages: expected the last message from the user, got {turns[-1][1]}")


class TextStream:
    """Decodes streamed tokens to pieces of whole characters that join to the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0

    def add_token(self, token: int) -> str:
        """Add a token and return the new text; empty while a character is incomplete."""
        self._ids.append(token)
        return self._new(self._text().rstrip("\ufffd"))

    def flush(self) -> str:
        """Return the rest, with incomplete characters."""
        return self._new(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _new(self, text: str) -> str:
        start, self._sent = self._sent, max(self._sent, len(text))
        return text[start:]
