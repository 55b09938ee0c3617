"""Images judged by a vision-language model at any OpenAI-compatible endpoint: the scores of WISE and of ImgEdit.

What the judge is told is the benchmarks' own, which carries no licence: a file of the user's has it (`read_template`).
Facts of WISE (PKU-YuanGroup/WISE eb51174, of both versions) and ImgEdit (PKU-YuanGroup/ImgEdit 547185d).
"""

import base64
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from spar.common.errors import InputError
from spar.common.progress import Advance
from spar.evaluation.prompt_formats import Named
from spar.evaluation.results import Result, Score, mean_score
from spar.inference.prompt_files import SourceFile

MAX_REPLY_BYTES = 2**20
TRIES, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0  # seconds between tries, each twice the one before
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses after which a request is sent again
OF_ONE_QUESTION = (400, 413, 422)  # statuses by which an endpoint may refuse this question, and answer others
ALL_REFUSED = 8  # so many refusals and no answer: the endpoint refuses whatever it is asked
# Categories by the numbers of the prompts, and their weights: those of the version that most papers report, and of the
# verified one. Numbers 641 to 700 change their category between them.
WISE = {
    "culture": (1, 400, 0.4), "time": (401, 567, 0.167), "space": (568, 700, 0.133), "biology": (701, 800, 0.1),
    "physics": (801, 900, 0.1), "chemistry": (901, 1000, 0.1),
}  # fmt: skip
WISE_VERIFIED = {
    "culture": (1, 400, 0.4), "time": (401, 520, 0.12), "space": (521, 640, 0.12), "biology": (641, 760, 0.12),
    "physics": (761, 880, 0.12), "chemistry": (881, 1000, 0.12),
}  # fmt: skip
Ranges = Mapping[str, tuple[int, int, float]]
WISE_PARTS = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}


# ---- what a judge says -----------------------------------------------------------------------------------------------


def parse_wise(reply: str) -> float:
    """WiScore, 0 to 1, of a reply with three scores from 0 to 2: by their names, or as three bare lines.

    Raises:
        InputError: a score that is missing, said twice with two values, or none from 0 to 2.
    """
    named = [_named(reply, name) for name in WISE_PARTS]
    if not any(named):
        bare = [line.strip() for line in reply.strip().splitlines() if line.strip()]
        named = [{line} for line in bare] if len(bare) == len(WISE_PARTS) else named
    values = [_one(reply, found, 0, 2) for found in named]
    return float(np.dot(list(WISE_PARTS.values()), values)) / (2 * sum(WISE_PARTS.values()))


def parse_wise_verified(reply: str) -> float:
    """0 or 1 of a reply with `Score: 0` or `Score: 1`; errors as of `parse_wise`."""
    return float(_one(reply, _named(reply, "score"), 0, 1))


def parse_imgedit(reply: str) -> float:
    """The mean, rounded to two digits, of a reply's three lines `Name: SCORE`, 1 to 5; errors as of `parse_wise`."""
    line = rf"^\W*(?:\d+[.)]\W*)?([A-Za-z][A-Za-z &,-]*?)[*_\s]*{_SCALE}[*_\s]*:{_SIGNS}(-?\d+)[^\S\n]*\W*$"
    lines = re.findall(line, reply, re.MULTILINE)
    found: dict[str, set[str]] = {}
    for name, value in lines:
        found.setdefault(name.strip().lower(), set()).add(value)
    if len(found) != 3:
        raise InputError(f"expected three scores, each a line, got {len(found)}: {reply[:200]!r}")
    return round(float(np.mean([_one(reply, values, 1, 5) for values in found.values()])), 2)


# Between a name and its number: signs that are no minus of the number and open no bracket, and a scale in brackets,
# such as (0-2) or [0 or 1], which repeats what was asked.
_SIGNS = r"(?:[^\w(\[-]|-(?!\d))*"
_SCALE = r"(?:[(\[](?!\s*\d+\s*[)\]])[^()\[\]\n]*[)\]])?"


def _named(reply: str, name: str) -> set[str]:
    """The numbers that a reply has after a name."""
    words = name.replace(" ", "[ _]")
    return set(re.findall(rf"\b{words}\b{_SIGNS}{_SCALE}{_SIGNS}[(\[]?\s*(-?\d+(?:\.\d+)?)", reply, re.IGNORECASE))


def _one(reply: str, found: set[str], low: int, high: int) -> int:
    """The only number of a set, which is whole and in a range."""
    if len(found) != 1:
        raise InputError(f"expected each score once, got {sorted(found)}: {reply[:200]!r}")
    (text,) = found
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise InputError(f"expected scores from {low} to {high}, got {text!r}: {reply[:200]!r}")
    return int(text)


# ---- what it is asked ------------------------------------------------------------------------------------------------


class QuestionRefused(InputError):
    """An endpoint answers, but not this question."""


@dataclass(frozen=True)
class JudgeQuestion:
    """What a judge is asked about one image: the text, and the images after it."""

    key: str
    group: str  # the category, or kind of edit, whose mean is a score
    text: str
    images: tuple[Path, ...]

    def digest(self) -> str:
        """A hash of all that is sent."""
        parts = (self.text.encode(), *(path.read_bytes() for path in self.images))
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Rubric:
    """A benchmark's questions, scores, weights of groups (equal weights if empty), and least and highest score."""

    name: str
    parse: Callable[[str], float]
    ask: Callable[[Named, Path, str], Iterator[JudgeQuestion]]
    weights: Mapping[str, float] = field(default_factory=dict)
    scale: tuple[float, float] = (0.0, 1.0)
    max_tokens: int = 2000


def _wise_questions(ranges: Ranges) -> Callable[[Named, Path, str], Iterator[JudgeQuestion]]:
    def ask(given: Named, folder: Path, template: str) -> Iterator[JudgeQuestion]:
        for name, entry in zip(given.names, given.entries, strict=True):
            group = next((group for group, (low, high, _) in ranges.items() if low <= int(name) <= high), None)
            if group is None:
                raise InputError(f"expected prompts with numbers from 1 to 1000, got {name}")
            if not isinstance(entry.get("Explanation"), str):
                raise InputError(f"expected a text as Explanation of prompt {name}, got {entry.get('Explanation')!r}")
            text = template.replace("{prompt}", entry["Prompt"]).replace("{explanation}", entry["Explanation"])
            yield JudgeQuestion(name, group, text, (folder / f"{name}.png",))

    return ask


def _imgedit_questions(given: Named, folder: Path, template: str) -> Iterator[JudgeQuestion]:
    texts = json.loads(template)
    before = [source.path for source in given.sources if isinstance(source, SourceFile)]
    for name, entry, path in zip(given.names, given.entries, before, strict=True):
        kind = str(entry.get("edit_type"))
        if kind not in texts:
            raise InputError(f"expected instructions for edits of the kind {kind!r}, got those of {', '.join(texts)}")
        text = texts[kind].replace("<edit_prompt>", entry["prompt"])
        yield JudgeQuestion(name, kind, text, (path, folder / f"{name}.png"))


def _weights(ranges: Ranges) -> dict[str, float]:
    return {name: weight for name, (_, _, weight) in ranges.items()}


RUBRICS = {
    "wise": Rubric("wise", parse_wise, _wise_questions(WISE), _weights(WISE)),
    "wise-verified": Rubric(
        "wise-verified", parse_wise_verified, _wise_questions(WISE_VERIFIED), _weights(WISE_VERIFIED)
    ),
    "imgedit": Rubric("imgedit", parse_imgedit, _imgedit_questions, scale=(1.0, 5.0)),
}


def read_template(path: Path, rubric: Rubric) -> str:
    """What the judge is told: of WISE a text with {prompt} and {explanation}, of ImgEdit its own `prompts.json`, whose
    texts have <edit_prompt>.

    Raises:
        InputError: an unreadable file, or one without these places.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if rubric.parse is not parse_imgedit:
        if missing := [place for place in ("{prompt}", "{explanation}") if place not in text]:
            raise InputError(f"--template: expected {' and '.join(missing)} in {path}")
        return text
    try:
        kinds = json.loads(text)
    except ValueError:
        kinds = None
    if not isinstance(kinds, dict) or not kinds or not all("<edit_prompt>" in str(one) for one in kinds.values()):
        raise InputError(f"--template: expected ImgEdit's prompts.json with <edit_prompt> in each text, got {path}")
    return text


# ---- the endpoint ----------------------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint: its address up to /v1, the model there, and the variable that has the key."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    wait: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:  # a port that is no number, a bracket that is not closed
            known = False
        if not known or not self.url.isprintable() or " " in self.url:
            raise InputError(f"--endpoint: expected http:// or https:// and a host, got {self.url!r}")
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"{self.key_variable}: expected a key of printable ASCII characters")

    def ask(self, text: str, images: Sequence[Path], max_tokens: int) -> str:
        """The reply to a text with images, at temperature 0.

        Raises:
            InputError: an image that cannot be read, or an endpoint that refuses, fails again and again, or replies
                with something else; QuestionRefused where that may be about this question alone.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for path in images:
            try:
                data = base64.b64encode(path.read_bytes()).decode()
            except OSError as error:
                raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
            kind = "png" if path.suffix.lower() == ".png" else "jpeg"
            content.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}})
        body = {
            "model": self.model, "temperature": 0, "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": content}],
        }  # fmt: skip
        reply = self._send(json.dumps(body).encode())
        try:
            said = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            said = False
        if isinstance(said, str):
            return said
        refusal = QuestionRefused if said is None else InputError  # a chat's reply without a text
        raise refusal(f"{self.url}: expected a chat's reply, got {reply[:200]!r}")

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        opener = urllib.request.build_opener(_NoRedirect)
        pause = FIRST_WAIT
        for attempt in range(TRIES):
            try:
                with opener.open(request, timeout=self.timeout) as answer:
                    data: bytes = answer.read(MAX_REPLY_BYTES + 1)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read(500).decode(errors='replace').strip()}"
                if error.code not in AGAIN or attempt == TRIES - 1:
                    kind = QuestionRefused if error.code in OF_ONE_QUESTION else InputError
                    raise kind(f"{self.url} refuses: {reason[:300]}") from None
                told = error.headers.get("Retry-After", "")
                pause = max(pause, float(told)) if told.isdigit() else pause
            except (OSError, http.client.HTTPException) as error:  # no connection, or one lost, broken or too slow
                if attempt == TRIES - 1:
                    raise InputError(f"{self.url} cannot be reached: {error}") from None
            else:
                if len(data) > MAX_REPLY_BYTES:
                    raise InputError(f"{self.url}: expected a reply of at most {MAX_REPLY_BYTES >> 20} MiB")
                return data
            self.wait(min(pause, LONGEST_WAIT))
            pause *= 2
        raise AssertionError  # the last try returns or raises


# ---- scores ----------------------------------------------------------------------------------------------------------


def judge(
    rubric: Rubric, given: Named, folder: Path, template: str, endpoint: Endpoint, journal: Path, *, parallel: int = 4,
    advance: Advance | None = None,
) -> Result:  # fmt: skip
    """Have the images of a folder judged; replies are kept in `journal`, and what is there is not asked again.

    A question that the endpoint refuses is left without a score, like a reply without scores.

    Raises:
        InputError: an image that is missing, a journal of another judge, what `Endpoint.ask` raises, or an endpoint
            that refuses all of the first questions.
    """
    questions = list(rubric.ask(given, folder, template))
    if missing := [path for question in questions for path in question.images if not path.is_file()]:
        raise InputError(f"expected all images before a judge is asked, {len(missing)} are missing, first {missing[0]}")
    identity = {
        "benchmark": rubric.name, "judge": endpoint.model, "endpoint": urlsplit(endpoint.url).hostname,
        "template": hashlib.sha256(template.encode()).hexdigest(), "temperature": 0,
    }  # fmt: skip
    kept, unread = _read_journal(journal, identity, rubric), dict[str, str]()
    places = {question: (question.key, question.digest()) for question in questions}
    scores = {question: kept[place] for question, place in places.items() if place in kept}
    left = [question for question in questions if question not in scores]
    answered = len(scores)
    with journal.open("ab") as lines, ThreadPoolExecutor(parallel) as pool:
        if journal.stat().st_size == 0:
            lines.write(json.dumps(identity).encode() + b"\n")
        asked = {pool.submit(endpoint.ask, one.text, one.images, rubric.max_tokens): one for one in left}
        try:
            for done, future in enumerate(as_completed(asked), len(questions) - len(left) + 1):
                question = asked[future]
                try:
                    reply = future.result()
                    answered += 1
                    scores[question] = rubric.parse(reply)
                    key, digest = places[question]
                    lines.write(json.dumps({"key": key, "sent": digest, "reply": reply}).encode() + b"\n")
                    lines.flush()
                except QuestionRefused as error:
                    unread[question.key] = str(error)
                    if not answered and len(unread) >= ALL_REFUSED:
                        raise
                except InputError as error:
                    if future.exception() is not None:  # the endpoint's, not the reply's
                        raise
                    unread[question.key] = str(error)  # it is asked again by the next call
                if advance:
                    advance(done, len(questions))
        finally:  # what is under way is waited for, what is not is not begun
            pool.shutdown(wait=False, cancel_futures=True)
    return _result(rubric, questions, scores, unread, identity)


def _read_journal(path: Path, identity: Mapping[str, Any], rubric: Rubric) -> dict[tuple[str, str], float]:
    """The scores of a journal by question and the hash of what was sent; a last line that was broken off is none, and
    is ended.
    """
    if not path.is_file() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with path.open("ab") as lines:
            lines.write(b"\n")
    first, *rest = data.decode(errors="replace").split("\n")
    try:
        found = json.loads(first)
    except ValueError:
        found = None
    if found != identity:
        raise InputError(f"{path} has replies of something else: expected {found}, got {dict(identity)}")
    scores = {}
    for line in rest:
        try:
            row = json.loads(line)
            scores[row["key"], row["sent"]] = rubric.parse(row["reply"])
        except (ValueError, TypeError, KeyError):
            continue
    return scores


def _result(
    rubric: Rubric, questions: Sequence[JudgeQuestion], scores: Mapping[JudgeQuestion, float],
    unread: Mapping[str, str], identity: Mapping[str, Any],
) -> Result:  # fmt: skip
    """Means of the groups, and overall where every image has a score and every weighted group has images."""
    groups: dict[str, list[float]] = {}
    for question in questions:
        if (value := scores.get(question)) is not None:
            groups.setdefault(question.group, []).append(value)
    found: list[Score] = [mean_score(name, values, scale=rubric.scale) for name, values in groups.items()]
    names = list(rubric.weights) or list(groups)
    if not unread and set(names) == set(groups):
        weights = [rubric.weights[name] for name in names] if rubric.weights else None
        found.insert(
            0, mean_score("overall", *(groups[name] for name in names), weights=weights, scale=rubric.scale)
        )
    details = {"scores": {question.key: value for question, value in scores.items()}, "unread": dict(unread)}
    return Result(rubric.name, tuple(found), settings=dict(identity), details=details)
