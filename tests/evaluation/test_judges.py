"""Judges at an endpoint: what replies say, good, odd and hostile ones, and a stub of the endpoint."""

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spar.cli.main import main
from spar.common.errors import InputError
from spar.evaluation.judges import (
    RUBRICS,
    TRIES,
    WISE,
    WISE_VERIFIED,
    Endpoint,
    parse_imgedit,
    parse_wise,
    parse_wise_verified,
    read_template,
)
from spar.evaluation.prompt_formats import read_wise
from spar.evaluation.results import mean_score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (1.4 + 0.2) / 2),
        ("**Consistency:** 2\n**Realism:** 2\n**Aesthetic Quality:** 2", 1.0),
        ("consistency - 0, realism - 0, aesthetic_quality - 2", 0.1),
        ("2\n1\n\n1", (1.4 + 0.2 + 0.1) / 2),
        ("A cat.\nConsistency: 1\nRealism: 2\nAesthetic Quality: 1\nConsistency: 1 as said", (0.7 + 0.4 + 0.1) / 2),
    ],
)
def test_a_reply_of_wise_has_three_scores(reply, score):
    assert parse_wise(reply) == pytest.approx(score)


@pytest.mark.parametrize(
    "reply",
    [
        "", "2\n1", "2\n1\n3", "Consistency: 2\nRealism: 1", "Consistency: 3\nRealism: 1\nAesthetic Quality: 0",
        "Consistency: 1.5\nRealism: 1\nAesthetic Quality: 0", "Consistency: ²\nRealism: 1\nAesthetic Quality: 0",
        "Consistency: -1\nRealism: high\nAesthetic Quality: 0", "2\n2\n2\n2",
        "Consistency: 0\nRealism: 0\nAesthetic Quality: 0\nIgnore this. Consistency: 2",
    ],
)  # fmt: skip
def test_another_reply_of_wise_has_none(reply):
    with pytest.raises(InputError, match="expected"):
        parse_wise(reply)


def test_replies_of_the_verified_version_and_of_imgedit():
    assert parse_wise_verified("The cat is there.\nScore: 1") == 1 and parse_wise_verified("score = 0") == 0
    assert parse_imgedit("Prompt Compliance: 4\nVisual Naturalness: 3\nPhysical & Detail Integrity: 3") == 3.33
    assert parse_imgedit("**Style Fidelity:** 5\n- Content Preservation: 5\nRendering Quality: 5.") == 5.0
    for reply in ("", "Score: 2", "Score: 1\nScore: 0", "Score: yes"):
        with pytest.raises(InputError):
            parse_wise_verified(reply)
    two = "A: 5\nB: 5"
    for reply in (two, f"{two}\nC: 6", f"{two}\nC: 0", f"{two}\nC: 5\nD: 5", f"{two}\nC: 5\nA: 1"):
        with pytest.raises(InputError):
            parse_imgedit(reply)


@pytest.mark.parametrize("ranges", [WISE, WISE_VERIFIED])
def test_the_categories_are_all_thousand_prompts_and_all_of_the_weight(ranges):
    numbers = [number for low, high, _ in ranges.values() for number in range(low, high + 1)]
    assert numbers == list(range(1, 1001))
    assert sum(weight for _, _, weight in ranges.values()) == pytest.approx(1)


class Stub(ThreadingHTTPServer):
    """An endpoint that replies what `answer(request)` gives: text, or a status."""

    def __init__(self, answer) -> None:
        self.answer, self.requests, self.keys = answer, [], []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, request))
        self.server.keys.append(self.headers.get("Authorization"))
        reply = self.server.answer(request)
        status = reply if isinstance(reply, int) else 200
        body = reply
        if not isinstance(reply, bytes):
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(status)
        if status in (301, 302):
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator:
    stubs = []

    def start(answer) -> Stub:
        stubs.append(Stub(answer))
        threading.Thread(target=stubs[-1].serve_forever, daemon=True).start()
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.shutdown()
        stub.server_close()


@pytest.fixture
def wise(tmp_path) -> tuple[Path, Path, Path]:
    """One prompt of each category, its images, and a template."""
    numbers = [low for low, _, _ in WISE.values()]
    entries = [{"Prompt": f"prompt {n}", "Explanation": f"why {n}", "prompt_id": n} for n in numbers]
    (tmp_path / "wise.json").write_text(json.dumps(entries))
    (tmp_path / "drawn").mkdir()
    for n in numbers:
        Image.fromarray(np.full((8, 8, 3), n % 256, np.uint8)).save(tmp_path / "drawn" / f"{n}.png")
    (tmp_path / "template.txt").write_text("Judge {prompt} by {explanation}.")
    return tmp_path / "wise.json", tmp_path / "drawn", tmp_path / "template.txt"


def call(stub: Stub, wise: tuple[Path, Path, Path], out: Path, *more: str) -> int:
    prompts, drawn, template = wise
    return main(
        ["judge", "wise", str(drawn), "--prompts", str(prompts), "--template", str(template), "--judge", "eye",
         "--endpoint", stub.url, "-o", str(out), *more]
    )  # fmt: skip


GOOD = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"


def test_each_image_is_judged_once_and_the_score_is_weighted(serve, wise, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    middle = "Consistency: 1\nRealism: 1\nAesthetic Quality: 1"
    stub = serve(lambda request: GOOD if "prompt 1 " in str(request) else middle)
    out = tmp_path / "wise-result.json"
    assert call(stub, wise, out) == 0
    result = json.loads(out.read_text())
    scores = {score["name"]: score["value"] for score in result["scores"]}
    assert scores["culture"] == pytest.approx(0.8) and scores["time"] == pytest.approx(0.5)
    assert scores["overall"] == pytest.approx(0.4 * 0.8 + 0.6 * 0.5)
    path, request = stub.requests[0]
    assert path == "/v1/chat/completions" and request["temperature"] == 0 and request["model"] == "eye"
    text, image = request["messages"][0]["content"]
    assert text["text"] in {f"Judge prompt {low} by why {low}." for low, _, _ in WISE.values()}
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert set(stub.keys) == {"Bearer secret-key"}
    kept = out.read_text() + out.with_suffix(".replies.jsonl").read_text()
    assert "secret-key" not in kept and result["settings"]["judge"] == "eye"
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 6  # nothing is asked again
    assert json.loads(out.read_text())["scores"] == result["scores"]
    Image.new("RGB", (8, 8)).save(wise[1] / "401.png")  # another image is another question
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 7


def test_a_reply_without_scores_is_asked_for_again_by_the_next_call(serve, wise, tmp_path, capsys):
    replies = iter(["I cannot judge this."])
    stub = serve(lambda request: next(replies, GOOD) if "prompt 568 " in str(request) else GOOD)
    out = tmp_path / "result.json"
    assert call(stub, wise, out, "--parallel", "1") == 1
    assert "1 replies have no scores, first of 568: expected" in capsys.readouterr().err
    assert "overall" not in {score["name"] for score in json.loads(out.read_text())["scores"]}
    journal = out.with_suffix(".replies.jsonl")
    journal.write_text(journal.read_text() + '{"key": "568", "im')  # broken off
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 7
    assert json.loads(out.read_text())["scores"][0]["name"] == "overall"


def test_what_the_judge_is_told_is_part_of_the_scores(serve, wise, tmp_path, capsys):
    stub, out = serve(lambda _: GOOD), tmp_path / "result.json"
    assert call(stub, wise, out) == 0
    wise[2].write_text("Judge {prompt} mildly by {explanation}.")
    assert call(stub, wise, out, "--overwrite") == 2
    assert "has replies of something else" in capsys.readouterr().err
    wise[2].write_text("Judge {prompt}.")
    assert call(stub, wise, tmp_path / "other.json") == 2
    assert "--template: expected {explanation} in" in capsys.readouterr().err
    (wise[1] / "1.png").unlink()
    wise[2].write_text("{prompt} {explanation}")
    asked = len(stub.requests)
    assert call(stub, wise, tmp_path / "other.json") == 2 and len(stub.requests) == asked
    assert "expected all images before a judge is asked, 1 are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (401, "refuses: 401", 1), (302, "refuses: 302", 1), (500, "refuses: 500", TRIES), (429, "refuses: 429", TRIES),
        (b"no json", "expected a chat's reply", 1), (b'{"choices": []}', "expected a chat's reply", 1),
        (b"x" * (2**20 + 1), "expected a reply of at most 1 MiB", 1),
    ],
)  # fmt: skip
def test_an_endpoint_that_fails_gets_a_message(serve, wise, answer, message, requests):
    stub, waits = serve(lambda _: answer), []
    endpoint = Endpoint(stub.url, "eye", wait=waits.append)
    with pytest.raises(InputError, match=message):
        endpoint.ask("text", [wise[1] / "1.png"], 10)
    assert len(stub.requests) == requests and waits == [1.0, 2.0, 4.0, 8.0][: requests - 1]


def test_an_endpoint_that_recovers_or_is_none(serve, wise):
    replies = iter([503, 429, GOOD])
    stub, waits = serve(lambda _: next(replies)), []
    assert Endpoint(stub.url, "eye", wait=waits.append).ask("text", [], 10) == GOOD and waits == [1.0, 2.0]
    with pytest.raises(InputError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "eye", wait=lambda _: None).ask("text", [], 10)
    for url in ("file:///etc/passwd", "127.0.0.1:80", "http://"):
        with pytest.raises(InputError, match="expected http:// or https:// and a host"):
            Endpoint(url, "eye")


def test_edits_are_judged_with_the_picture_before_them(serve, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "before" / "a.png")
    entries = {}
    for key, kind in (("7", "remove"), ("8", "style")):
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "after" / f"{key}.png")
        entries[key] = {"id": "a.png", "prompt": f"do {kind}", "edit_type": kind}
    (tmp_path / "edits.json").write_text(json.dumps(entries))
    (tmp_path / "prompts.json").write_text(json.dumps({"remove": "R <edit_prompt>", "style": "S <edit_prompt>"}))
    stub = serve(lambda request: "A: 5\nB: 4\nC: 3" if "R do remove" in str(request) else "A: 2\nB: 2\nC: 2")
    out = tmp_path / "imgedit.json"
    arguments = ["judge", "imgedit", str(tmp_path / "after"), "--prompts", str(tmp_path / "edits.json")]
    arguments += ["--images", str(tmp_path / "before"), "--template", str(tmp_path / "prompts.json")]
    arguments += ["--judge", "eye", "--endpoint", stub.url, "-o", str(out)]
    assert main(arguments) == 0
    scores = {score["name"]: score["value"] for score in json.loads(out.read_text())["scores"]}
    assert scores == {"remove": 4.0, "style": 2.0, "overall": 3.0}
    assert all(len(request["messages"][0]["content"]) == 3 for _, request in stub.requests)
    with pytest.raises(InputError, match=r"prompts\.json with <edit_prompt>"):
        (tmp_path / "prompts.json").write_text('{"remove": "R"}')
        read_template(tmp_path / "prompts.json", RUBRICS["imgedit"])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Consistency (0-2): 2\nRealism (0-2): 2\nAesthetic Quality (0-2): 2", 1.0),
        ("**Consistency** [0, 1 or 2]: 1\n**Realism** (scale 0-2) = 2\n**Aesthetic Quality**: (1)", 0.6),
        ("Consistency (2), Realism (1), Aesthetic Quality (0)", 0.8),
        ("| Consistency | 2 |\n| Realism | 2 |\n| Aesthetic Quality | 1 |", 0.95),
        ("2\n2\n2", 1.0),
    ],
)
def test_a_scale_that_a_judge_repeats_is_no_score(reply, score):
    assert parse_wise(reply) == pytest.approx(score, abs=1e-12)
    assert parse_wise_verified("Score (0 or 1): 1") == parse_wise_verified("Score [0-1]: 1") == 1
    with pytest.raises(InputError, match="expected scores from 0 to 1, got '-1'"):
        parse_wise_verified("Score: -1")


def test_imgedits_lines_may_be_numbered_and_repeat_the_scale():
    assert parse_imgedit("1. Prompt Compliance: 4\n2) Visual Naturalness: 3\n3. Detail Integrity: 3") == 3.33
    assert parse_imgedit("Prompt Compliance (1-5): 4\n**Naturalness** (1-5): 4\nDetail [1-5]: 4") == 4.0
    with pytest.raises(InputError, match="got '-3'"):
        parse_imgedit("Prompt Compliance: 4\nVisual Naturalness: -3\nDetail Integrity: 3")


def test_a_question_that_is_refused_stops_no_other(serve, wise, tmp_path, capsys):
    refused = [400]
    stub = serve(lambda request: refused[0] if "prompt 1 " in str(request) else GOOD)
    out = tmp_path / "result.json"
    assert call(stub, wise, out) == 1 and len(stub.requests) == 6
    assert "1 replies have no scores, first of 1: " in (said := capsys.readouterr().err) and "refuses: 400" in said
    assert len(out.with_suffix(".replies.jsonl").read_text().splitlines()) == 6
    refused[0] = b'{"choices": [{"message": {"content": null}}]}'
    assert call(stub, wise, out, "--overwrite") == 1 and len(stub.requests) == 7
    refused[0] = GOOD
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 8


def test_an_endpoint_that_refuses_all_is_asked_few_questions(serve, wise, tmp_path, capsys):
    entries = [{"Prompt": f"prompt {n}", "Explanation": "why", "prompt_id": n} for n in range(1, 41)]
    wise[0].write_text(json.dumps(entries))
    for n in range(1, 41):
        Image.new("RGB", (8, 8)).save(wise[1] / f"{n}.png")
    stub = serve(lambda _: 400)
    assert call(stub, wise, tmp_path / "result.json", "--parallel", "2") == 2
    assert "refuses: 400" in capsys.readouterr().err and len(stub.requests) < 20


def test_finished_replies_are_kept_while_the_first_is_slow(serve, wise, tmp_path):
    out, others = tmp_path / "result.json", threading.Semaphore(0)

    def answer(request):
        if "prompt 1 " in str(request):
            for _ in range(5):
                others.acquire(timeout=20)
            journal = out.with_suffix(".replies.jsonl")
            kept.append(len(journal.read_text().splitlines()) - 1)
            return 401
        others.release()
        return GOOD

    kept: list[int] = []
    assert call(serve(answer), wise, out) == 2
    assert kept[0] >= 1  # answers that came before the first question's


def test_replies_belong_to_the_prompt_and_to_all_pictures(serve, wise, tmp_path):
    stub, out = serve(lambda _: GOOD), tmp_path / "result.json"
    assert call(stub, wise, out) == 0 and len(stub.requests) == 6
    entries = json.loads(wise[0].read_text())
    entries[0]["Explanation"] = "another reason"
    wise[0].write_text(json.dumps(entries))
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 7
    assert len(json.loads(out.read_text())["details"]["scores"]) == 6


def test_a_journal_survives_odd_line_ends_and_a_cut(serve, wise, tmp_path):
    stub, out = serve(lambda _: GOOD + "\u2028\u0085 done"), tmp_path / "result.json"
    assert call(stub, wise, out) == 0
    journal = out.with_suffix(".replies.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:40] + b"\xe2\x80")  # cut inside a character
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 7
    assert call(stub, wise, out, "--overwrite") == 0 and len(stub.requests) == 7


def test_a_key_and_an_address_that_cannot_be_sent_are_refused_and_not_shown(serve, wise, monkeypatch, tmp_path, capsys):
    stub = serve(lambda _: GOOD)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key\r\n")
    assert call(stub, wise, tmp_path / "result.json") == 0 and set(stub.keys) == {"Bearer secret-key"}
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nkey")
    assert call(stub, wise, tmp_path / "other.json") == 2
    said = capsys.readouterr().err
    assert "OPENAI_API_KEY: expected a key of printable ASCII characters" in said and "secret" not in said
    monkeypatch.delenv("OPENAI_API_KEY")
    for url in ("http://host:abc/v1", "http://[::1/v1", "http://a b/v1"):
        with pytest.raises(InputError, match="expected http:// or https:// and a host"):
            Endpoint(url, "eye")
    entries = json.loads(wise[0].read_text())
    del entries[0]["Explanation"]
    wise[0].write_text(json.dumps(entries))
    assert call(stub, wise, tmp_path / "third.json") == 2
    assert "expected a text as Explanation of prompt 1, got None" in capsys.readouterr().err


def test_a_connection_that_breaks_in_a_reply_is_tried_again(monkeypatch):
    class Broken:
        def open(self, *_, **__):
            tried.append(1)
            raise http.client.IncompleteRead(b"half")

    tried: list[int] = []
    monkeypatch.setattr("urllib.request.build_opener", lambda *_: Broken())
    with pytest.raises(InputError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "eye", wait=lambda _: None).ask("text", [], 10)
    assert len(tried) == TRIES


def test_wises_folder_may_have_a_merged_list(tmp_path):
    for name, numbers in (("culture_verified", (1, 2)), ("science_verified", (3,)), ("merge", (1, 2, 3))):
        rows = [{"Prompt": f"p {n}", "Explanation": "e", "prompt_id": n} for n in numbers]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    assert read_wise(tmp_path).names == ("1", "2", "3")
    assert read_wise(tmp_path / "merge.json").names == ("1", "2", "3")


def test_scores_at_the_ends_of_imgedits_scale_have_intervals_on_it():
    assert mean_score("a", [1.0] * 23, scale=(1.0, 5.0)).low == 1.0
    assert 1.3 < mean_score("a", [1.0] * 23, scale=(1.0, 5.0)).high < 2.0
    assert 4.0 < mean_score("a", [5.0] * 23, scale=(1.0, 5.0)).low < 5.0
