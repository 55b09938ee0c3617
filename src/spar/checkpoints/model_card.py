"""The model card of a folder, written only from the folder's own files."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from spar.models.config import SparConfig, TextConfig
from spar.models.dualtoken.config import DualTokenConfig

TASKS = ("text-to-image", "image-to-image", "image-text-to-text")
CELL = 2000  # characters of a manifest's value that a table shows

USE = """from spar import SparPipeline

pipe = SparPipeline.from_pretrained(".")
image = pipe.generate("a red circle", seed=0).images[0]
edited = pipe.edit(image, "remove the red circle", seed=0).images[0]
answer = pipe.understand(edited, "what color is the background?").texts[0]
again = pipe.reconstruct(edited).images[0]
"""
DUALTOKEN_USE = """from spar.inference.loading import load_pipeline

pipe = load_pipeline(".")
image = pipe.generate("a red circle", seed=0).images[0]
answer = pipe.understand(image, "what color is the background?").texts[0]
again = pipe.reconstruct(image).images[0]
"""


@dataclass(frozen=True)
class SystemTexts:
    """What the cards of a system's models say alike: its name, its paper's arXiv number, tasks, use, abilities."""

    title: str
    paper: str
    tasks: tuple[str, ...]
    use: str
    able: str


SPAR = SystemTexts("SPAR", "2606.23041", TASKS, USE, "understand, generate, edit and reconstruct images")
DUALTOKEN = SystemTexts(
    "DualToken", "2503.14324", ("text-to-image", "image-text-to-text"), DUALTOKEN_USE,
    "understand, generate and reconstruct images",
)  # fmt: skip


def model_card(
    config: SparConfig, manifest: dict[str, Any], parameters: dict[str, int], *, prompt: int, words: int | None
) -> str:
    """The card of a SPAR model, Markdown after a YAML head, as the Hub expects it.

    Args:
        manifest: origin of the weights; its `license` is the card's, "unknown" without one.
        parameters: number of parameters by part.
        prompt: tokens of the longest prompt.
        words: size of a closed vocabulary; None if any text can be encoded.
    """
    side = config.image_size
    limits = (
        f"Made for images of {side} x {side} pixels; other sides are multiples of {config.token_stride}.",
        _lengths(prompt, config.text),
        *_closed(words),
        "An edit has one reference image.",
    )
    return _card(SPAR, manifest, parameters, limits)


def dualtoken_card(
    config: DualTokenConfig, manifest: dict[str, Any], parameters: dict[str, int], *, prompt: int, words: int | None
) -> str:
    """The card of a DualToken model; arguments as in `model_card`."""
    side = config.image_size
    limits = (
        f"Made for images of {side} x {side} pixels alone.",
        _lengths(prompt, config.text),
        *_closed(words),
        "It does not edit images.",
    )
    return _card(DUALTOKEN, manifest, parameters, limits)


def _card(system: SystemTexts, manifest: dict[str, Any], parameters: dict[str, int], limits: Iterable[str]) -> str:
    license = manifest.get("license")
    license = license if isinstance(license, str) else "unknown"
    data = ModelCardData(
        library_name="spar", license=license, pipeline_tag="any-to-any", tags=["spar", *system.tasks],
        base_model=_published(manifest) or None,
    )
    sizes = {**parameters, "all": sum(parameters.values())}
    sections = {
        "Use": f"In this folder, with the package `spar` installed:\n\n```python\n{system.use}```",
        "Sizes": _table(("part", "parameters"), [(name, f"{n:,}") for name, n in sizes.items()]),
        "Origin": _origin(manifest),
        "Scores": _scores(manifest),
        "Limits": "\n".join(f"- {line}" for line in (*_untrained(manifest), *limits, *_duties(license))),
    }
    recipe = f", recipe {_cell(manifest['recipe'])}" if "recipe" in manifest else ""
    head = (
        f"Weights of the {system.title} design ([arXiv {system.paper}](https://arxiv.org/abs/{system.paper})): one "
        f"model to {system.able}. Scores lists its quality where it was measured. "
        "This card was written from the folder's own files; anything else is unknown."
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {system.title}{recipe}\n\n{head}\n\n{body}\n"


def recorded_scores(manifest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The manifest's scores by benchmark; values that are not numbers are dropped."""
    return {
        name: {score: value for score, value in table.items() if type(value) in (int, float)}
        for name, table in _fields(manifest, "scores").items()
        if isinstance(table, dict)
    }


def _fields(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key of a manifest, which may be untrusted; empty if it is none."""
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _published(manifest: dict[str, Any]) -> list[str]:
    """Hub ids of the parts from the Hub, which have a commit."""
    records = _fields(manifest, "sources").values()
    return [one["source"] for one in records if isinstance(one, dict) and one.get("source") and one.get("commit")]


def _origin(manifest: dict[str, Any]) -> str:
    stages = ((name, one.get("steps")) for name, one in _fields(manifest, "stages").items() if isinstance(one, dict))
    rows: dict[str, Any] = {
        **{key: manifest[key] for key in ("recipe", "seed", "commit", "storage") if key in manifest},
        **_fields(manifest, "parts"),
        "stages": ", ".join(f"{name} ({steps} steps)" for name, steps in stages),
        "trained on from": "an earlier model, see `origin`" if _fields(manifest, "origin") else "",
    }
    for key in ("versions", "machine"):
        rows[key] = ", ".join(f"{name} {value}" for name, value in _fields(manifest, key).items())
    rows = {key: value for key, value in rows.items() if value != ""}
    if not rows:
        return "`manifest.json` does not record it."
    return f"{_table(('key', 'value'), rows.items())}\n\n`manifest.json` has the full record."


def _scores(manifest: dict[str, Any]) -> str:
    tables = recorded_scores(manifest)
    rows = [(name, score, f"{value:g}") for name, table in tables.items() for score, value in table.items()]
    if not rows:
        return "None are recorded."
    return f"As recorded in `manifest.json`.\n\n{_table(('benchmark', 'score', 'value'), rows)}"


def _untrained(manifest: dict[str, Any]) -> Iterable[str]:
    if any(str(origin).startswith("random weights") for origin in _fields(manifest, "parts").values()):
        yield "Some parts have untrained random weights (above): the output is meaningless before they are trained."


def _lengths(prompt: int, text: TextConfig) -> str:
    return f"A prompt has at most {prompt} tokens; prompt, images and answer together {text.max_seq_len}."


def _closed(words: int | None) -> Iterable[str]:
    if words is not None:
        yield f"It has a closed vocabulary of {words} words and refuses any other."


def _duties(license: str) -> Iterable[str]:
    yield "spar filters neither prompts nor images."
    if license == "unknown":
        yield "The license is not recorded (`license` in `manifest.json`); the licenses of all parts apply."


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """One line of plain text, since a manifest may be untrusted."""
    line = "".join(c if c.isprintable() else " " for c in str(value))[:CELL]
    return line.translate({ord(c): f"\\{c}" for c in "\\|<["})
