"""GradioGuardMiddleware: only the page's own routes, small requests, files of the cache, no URLs."""

import asyncio
import json

import pytest

pytest.importorskip("starlette", reason="the extra `ui` is not installed")

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from spar.serving import limits
from spar.ui.middleware import MAX_BOUNDARY, MAX_LOGIN, MAX_QUERY, MAX_REQUEST, MULTIPART, GradioGuardMiddleware

MAX_FILE = 1000


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "secret.png").write_text("secret")
    (tmp_path / "cache" / "own.png").write_text("own")
    return tmp_path / "cache"


@pytest.fixture(params=["", "/ui"])
def client(cache, request):
    """The middleware around an application that answers every route, at the root and mounted elsewhere."""
    inner = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    app = GradioGuardMiddleware(inner, cache, MAX_FILE)
    outer = Starlette(routes=[Mount(request.param, app)]) if request.param else app
    return TestClient(outer, base_url=f"http://testserver{request.param}")


def join(client, data):
    return client.post("gradio_api/queue/join", content=json.dumps(data).encode()).status_code


@pytest.mark.parametrize(
    "path",
    ["", "config", "theme.css", "assets/a.js", "gradio_api/queue/data?session_hash=a", "gradio_api/heartbeat/a1"],
)
def test_the_pages_own_routes_are_open_and_carry_the_policy(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/proxy=http://169.254.169.254/", "gradio_api/file=http://169.254.169.254/", "docs", "openapi.json",
        "gradio_api/file=/etc/passwd", "gradio_api/file=cache/own.png", "gradio_api/info", "gradio_api/call/generate",
        "gradio_api/stream/1", "gradio_api/component_server", "gradio_api/startup-events",
        "gradio_api/deep_link", "monitoring", "queue/join", "gradio_api/heartbeat/" + "a" * 65,
        "static/" + "a" * 300, "assets/" + "a" * 300, "static/%C3%A9", "assets/%00", "static/a%0Ab",
    ],
)  # fmt: skip
def test_all_else_is_shut(client, path):
    assert client.get(path).status_code == 404


def test_files_are_served_from_the_cache_alone(client, cache):
    assert client.get(f"gradio_api/file={cache}/own.png").status_code == 200
    assert client.get(f"gradio_api/file={cache.parent}/secret.png").status_code == 404
    assert client.get(f"gradio_api/file={cache}/%2e%2e/secret.png").status_code == 404
    (cache / "link.png").symlink_to(cache.parent / "secret.png")
    assert client.get(f"gradio_api/file={cache}/link.png").status_code == 404


def test_a_request_may_name_files_of_the_cache_and_no_others(client, cache):
    meta = {"_type": "gradio.FileData"}
    assert join(client, {"data": ["words", {"path": str(cache / "own.png"), "meta": meta}]}) == 200
    others = ("http://example.org/a.png", "https://10.0.0.1/", "/etc/passwd", f"{cache}/../secret.png", "a", 3)
    for path in others:
        assert join(client, {"data": [[{"value": {"path": path, "meta": meta}}]]}) == 400, path
    assert client.post("gradio_api/queue/join", content=b"not json").status_code == 400
    assert client.post("gradio_api/queue/join", content=b"[" * 100_000).status_code == 400
    assert client.post("gradio_api/run/predict", content=b'{"path": "http://a"}').status_code == 400


def test_the_body_that_was_looked_at_arrives_whole(client):
    body = json.dumps({"data": ["é" * 1000]}).encode()
    assert client.post("gradio_api/queue/join", content=body).content == body


def file(data=b"x", name="files", filename="a.png"):
    """The part of a form."""
    named = "" if filename is None else f'; filename="{filename}"'
    return f'Content-Disposition: form-data; name="{name}"{named}\r\nContent-Type: image/png'.encode(), data


def form(*parts, end=b"--\r\n"):
    """A form as browsers write it."""
    return b"".join(b"--edge\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + b"--edge" + end


def upload(client, body, *kinds):
    headers = [("content-type", kind) for kind in kinds or ("multipart/form-data; boundary=edge",)]
    return client.post("gradio_api/upload?upload_id=a1", content=body, headers=headers).status_code


def test_an_upload_is_a_form_of_one_file(client):
    """Gradio opens a file for each of up to a thousand, of the handles that all connections share."""
    assert upload(client, form(file(b"\r\n\r\nCONTENT-DISPOSITION: form-data; name=other"))) == 200
    assert upload(client, form(file(filename="b.png"), end=b"--")) == 200
    wrong = {
        "several": form(file(), file()), "none": form(), "a field": form(file(filename=None)), "empty": b"",
        "another name": form(file(name="other")), "unfinished": form(file(), end=b""), "no form": b"x" * 100,
        "two names": form((file(name="a")[0] + b"\r\n" + file()[0], b"x")), "before it": b"x" + form(file()),
        "no end of its head": form(file()).replace(b"\r\n\r\n", b"\r\n"),
    }  # fmt: skip
    assert {name: status for name, body in wrong.items() if (status := upload(client, body)) != 400} == {}
    for kinds in (("multipart/form-data",), ("multipart/form-data; boundary=",), ("application/json",)):
        assert upload(client, form(file()), *kinds) == 400
    for count, status in ((MAX_BOUNDARY, 200), (MAX_BOUNDARY + 1, 400)):
        edge = b"e" * count
        kind = f"multipart/form-data; boundary={edge.decode()}"
        assert upload(client, form(file()).replace(b"edge", edge), kind) == status
    assert upload(client, form(file()), "multipart/form-data; boundary=x", "multipart/form-data; boundary=edge") == 400


def test_an_upload_that_finds_the_cache_full_is_refused(client, cache, monkeypatch):
    body, held = form(file()), len("own")
    monkeypatch.setattr("spar.ui.middleware.MAX_FILES_BYTES", held + len(body))
    assert upload(client, body) == 200
    (cache / "deep" / "er").mkdir(parents=True)
    (cache / "deep" / "er" / "b.png").write_bytes(b"x")
    assert upload(client, body) == 429
    (cache / "deep" / "er" / "b.png").unlink()
    assert upload(client, body) == 200


def test_the_query_of_an_address_is_short(client):
    """Gradio keeps what a browser asks about here for ever."""
    path = "gradio_api/upload_progress?upload_id="
    most = MAX_QUERY - len("upload_id=")
    assert client.get(path + "a" * most).status_code == 200 and client.get(path + "a" * (most + 1)).status_code == 400


@pytest.mark.parametrize(
    ("value", "status"),
    [("bytes=0-", 200), ("bytes=0-1", 200), ("bytes=1-2,3-4", 400), ("bytes=a-b", 400), ("bytes=-", 400), ("x", 400)],
)
def test_a_range_is_one_of_bytes(client, cache, value, status):
    assert client.get(f"gradio_api/file={cache}/own.png", headers={"range": value}).status_code == status


@pytest.mark.parametrize("name", ["host", "x-forwarded-host"])
def test_the_servers_own_name_is_one(client, name):
    """Of others Gradio makes errors of the server, each of kilobytes in the log."""
    fit = ["spar.example", "spar.example:443", "127.0.0.1:8000", "[::1]:8000", "localhost", "a.example, b.example:1"]
    unfit = ["a:b:c", "a:65536", "999.1.1.1", "[::::]:1", "[1.2.3.4]", "\xe9", "a b", "a" * 300, "a/b"]
    for value in [*fit, *unfit]:
        asked = client.get("config", headers=[(name, value.encode("latin-1"))])
        assert (value, asked.status_code) == (value, 200 if value in fit else 400)
    assert client.get("config", headers={"x-gradio-server": "http://spar.example"}).status_code == 400


def test_a_stream_that_is_refused_late_ends(cache):
    """Else each such request writes seven kilobytes to the log."""

    async def refused():
        yield b"data: no\n\n"
        raise HTTPException(404)

    async def fails():
        yield b"data: no\n\n"
        raise RuntimeError("a fault of ours")

    for stream in (refused, fails):
        def answer(_: Request, stream=stream) -> StreamingResponse:
            return StreamingResponse(stream())

        inner = Starlette(routes=[Route("/{path:path}", answer)])
        client = TestClient(GradioGuardMiddleware(inner, cache, MAX_FILE))
        if stream is refused:
            assert client.get("/gradio_api/queue/data?session_hash=a").content == b"data: no\n\n"
        else:
            with pytest.raises(RuntimeError, match="ours"):
                client.get("/gradio_api/queue/data?session_hash=a")


def test_requests_are_small_but_for_uploads_of_one_image(client):
    post = client.post
    assert post("gradio_api/cancel", content=b"{}".ljust(MAX_REQUEST)).status_code == 200
    assert post("gradio_api/cancel", content=b"{}".ljust(MAX_REQUEST + 1)).status_code == 413
    around = len(form(file(b"")))
    for size, status in ((MAX_FILE + MULTIPART, 200), (MAX_FILE + MULTIPART + 1, 413)):
        assert upload(client, form(file(b"x" * (size - around)))) == status
    assert post("gradio_api/upload", content=iter([b"x"])).status_code == 411
    # Of a form of separators alone, 256 KiB took a fifth of a second. Strangers share the memory of who has logged in.
    for path in ("login", "login/", "config", "", "assets/a.js"):
        assert post(path, content=b"&" * MAX_LOGIN).status_code == 200
        assert post(path, content=b"&" * (MAX_LOGIN + 1)).status_code == 413


def test_a_page_from_elsewhere_cannot_post(client):
    own, other = {"origin": "http://testserver"}, {"origin": "http://evil.example"}
    assert client.post("gradio_api/cancel", content=b"{}", headers=own).status_code == 200
    assert client.post("gradio_api/cancel", content=b"{}", headers=other).status_code == 403
    assert client.post("gradio_api/cancel", content=b"{}", headers={"origin": "null"}).status_code == 403


def answered(guard: GradioGuardMiddleware, receive) -> int:
    """The status that a POST of a thousand bytes gets whose parts `receive` gives."""
    headers = [(b"host", b"localhost"), (b"content-length", b"1000"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": headers}
    statuses = []

    async def send(message) -> None:
        statuses.append(message.get("status"))

    asyncio.run(guard(scope, receive, send))
    return statuses[0]


def test_a_body_that_never_comes_is_given_up_and_its_place_is_free_again(cache, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)
    guard = GradioGuardMiddleware(Starlette(), cache, MAX_FILE)

    async def half() -> dict:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"{", "more_body": True}

    for _ in range(3):
        assert answered(guard, half) == 408
    assert (guard.gate.requests, guard.gate.budget.held) == (0, 0)
    monkeypatch.setattr(limits, "MAX_REQUESTS", 0)
    assert answered(guard, half) == 429


def test_who_has_not_logged_in_takes_no_place_of_who_has(cache, monkeypatch):
    monkeypatch.setattr(limits, "MAX_REQUESTS", 1)
    inner = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    guard = GradioGuardMiddleware(
        inner, cache, MAX_FILE, logged_in=lambda scope: (b"cookie", b"own") in scope["headers"]
    )

    async def ask(path, *headers, method="GET") -> list[int]:
        statuses = []

        async def send(message) -> None:
            statuses.append(message.get("status"))

        async def receive() -> dict:
            if method == "POST":
                await asyncio.Event().wait()  # its body never comes
            return {"type": "http.request", "body": b""}

        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await guard(scope, receive, send)
        return statuses

    async def run() -> None:
        slow = asyncio.ensure_future(ask("/login", (b"content-length", b"9"), method="POST"))
        await asyncio.sleep(0)
        while not guard.strangers.requests:
            await asyncio.sleep(0.001)
        assert (await ask("/config"))[0] == 429
        guard.app = PlainTextResponse("here")
        assert (await ask("/config", (b"cookie", b"own")))[0] == 200
        slow.cancel()

    asyncio.run(run())
    assert guard.strangers.budget is guard.gate.budget
