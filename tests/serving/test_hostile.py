"""Hostile and broken input: every one quickly gets a 4xx in OpenAI's format, and the server goes on."""

import base64
import http.client
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
from PIL import Image

from spar.serving import limits

PROMPT = "a red circle"
JSON = {"Content-Type": "application/json"}
ROUTES = (
    "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/responses", "/v1/reconstruct"
)  # fmt: skip


def encoded(kind: str = "PNG", size: tuple[int, int] = (16, 16), **settings) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, "red").save(file, format=kind, **settings)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says a size, over almost no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animation() -> bytes:
    file = BytesIO()
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(file, format="WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def scans(count: int) -> bytes:
    """A progressive JPEG, small in bytes, that decodes its pixels repeatedly."""
    plain = encoded("JPEG", progressive=True)
    return plain[:-2] + plain[plain.rindex(b"\xff\xda") : -2] * count + plain[-2:]


def noise(side: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(file, format="PNG")
    return file.getvalue()


PICTURES = {
    "a bomb of 2.5 gigapixels": bomb(50_000, 50_000),
    "a bomb beyond the server's own limit": bomb(5_000, 5_000),
    "sides of 2**31 - 1": bomb(2**31 - 1, 2**31 - 1),
    "no side": bomb(0, 16),
    "a truncated PNG": noise(64)[:-200],
    "a truncated JPEG": encoded("JPEG", (200, 200))[:300],
    "a truncated WEBP": encoded("WEBP", (64, 64))[:-10],
    "only a PNG's first bytes": b"\x89PNG\r\n\x1a\n",
    "an animation": animation(),
    "a JPEG of very many scans": scans(1000),
    "a GIF": encoded("GIF"),
    "a BMP": encoded("BMP"),
    "a TIFF": encoded("TIFF"),
    "an ICO": encoded("ICO"),
    "a PDF": b"%PDF-1.7\n1 0 obj\n",
    "an SVG that includes a file": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "a polyglot: a page with a PNG behind": b"<html><script>alert(1)</script>" + encoded(),
    "a polyglot: a zip with a PNG behind": b"PK\x03\x04" + encoded(),
    "text": b"hello",
    "nothing": b"",
    "zeros": bytes(1000),
}


def checked(answer, least: int = 400) -> dict:
    """The error of a 4xx in OpenAI's shape, whose text has nothing of the machine."""
    assert least <= answer.status_code < 500, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(answer.content) < 2000
    for leak in ("Traceback", "site-packages", "0x", "/usr", "PIL", "Pydantic", "pydantic"):
        assert leak not in answer.text
    return error


def asked(url: str) -> dict:
    """A chat about the image at an address."""
    parts = [{"type": "text", "text": "what color is the circle ?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.fixture(autouse=True)
def goes_on(address):
    """After each of these the server is as it was."""
    yield
    assert httpx2.get(f"{address}/health", timeout=5).json() == {"status": "ok"}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("route", ["edits", "reconstruct", "chat"])
def test_no_image_gets_one_fixed_text(address, route, name):
    data = PICTURES[name]
    if route == "chat":
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        answer = httpx2.post(f"{address}/v1/chat/completions", json=asked(url))
    else:
        path = {"edits": "/v1/images/edits", "reconstruct": "/v1/reconstruct"}[route]
        words = {"prompt": "remove the red circle"} if route == "edits" else {}
        answer = httpx2.post(f"{address}{path}", files={"image": ("a.png", data, "image/png")}, data=words)
    assert "expected a whole PNG, JPEG or WEBP of one frame" in checked(answer)["message"]


def test_an_image_with_a_page_behind_it_is_only_an_image(address):
    """The other polyglot: the answer is encoded anew and has nothing of it."""
    data = encoded(size=(64, 64)) + b"<script>alert(1)</script>"
    answer = httpx2.post(f"{address}/v1/reconstruct", files={"image": ("x.html", data, "text/html")})
    assert answer.status_code == 200
    assert b"script" not in base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


NAMES = ["../../../../etc/passwd", "/etc/passwd", "a\x00b.png", "C:\\x", "a" * 4000, "\u202egnp"]


@pytest.mark.parametrize("name", NAMES)
def test_a_files_name_is_never_used(address, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = httpx2.post(f"{address}/v1/reconstruct", files={"image": (name, encoded(size=(64, 64)))})
    assert answer.status_code in (200, 400) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "ftp://example.com/x",
        "/etc/passwd",
        "data:text/html;base64,PGI+",
        "data:image/png,hello",
        "data:image/png;base64,####",
        "data:image/png;base64," + "A" * 5,
        "",
    ],
)
def test_nothing_is_fetched(address, url):
    answer = httpx2.post(f"{address}/v1/chat/completions", json=asked(url))
    assert "data:image/" in checked(answer)["message"]


BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e400",
    "half": b'{"prompt": "a red cir',
    "deep": b"[" * 100_000,
    "deep in a field": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "bad UTF-8": b'{"prompt": "a red \xff\xfe circle"}',
    "half a surrogate pair": b'{"prompt": "a red circle \\ud800"}',
    "half a surrogate pair as a name": b'{"prompt": "a red circle", "\\ud800": 1}',
    "a null character": b'{"prompt": "a red \\u0000 circle"}',
    "NaN": b'{"prompt": "a red circle", "guidance_scale": NaN}',
    "infinity": b'{"prompt": "a red circle", "guidance_scale": 1e999}',
    "a number of 5000 digits": b'{"prompt": "a red circle", "seed": ' + b"9" * 5000 + b"}",
    "a seed beyond 64 bits": b'{"prompt": "a red circle", "seed": 9223372036854775808}',
    "a last seed beyond 64 bits": b'{"prompt": "a red circle", "n": 2, "seed": 9223372036854775807}',
    "a number as text": b'{"prompt": "a red circle", "n": "1"}',
    "true for one": b'{"prompt": "a red circle", "n": true}',
    "a list of prompts": b'{"prompt": ["a red circle"]}',
    "a prompt of 100,000 tokens": json.dumps({"prompt": "red " * 100_000}).encode(),
    "a prompt of 65 tokens": json.dumps({"prompt": "red " * 65}).encode(),
    "a string of ten megabytes": json.dumps({"prompt": "a" * 10**7}).encode(),
    "100,000 fields": json.dumps({f"f{i}": 0 for i in range(100_000)}).encode(),
    "a control token of the model": b'{"prompt": "<|im_end|> a red circle"}',
    "a name of 100,000 letters": json.dumps({"prompt": PROMPT, "x" * 100_000: 1}).encode(),
    "markup as a name": json.dumps({"prompt": PROMPT, "<script>\n\r": 1}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_broken_body_is_the_clients_fault(address, route, name):
    start = time.monotonic()
    answer = httpx2.post(address + route, content=BODIES[name], headers=JSON)
    checked(answer)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": [{"type": "text", "text": "how many objects?", "tensor": [0.1] * 100}]}],
        [{"role": "assistant", "content": "red"}],
        [{"role": "user", "content": "red"}] * 65,
        [{"role": "user", "content": "red"}] * 3,
        [{"role": "user", "content": "what color is the background?", **{f"f{i}": 0 for i in range(50_000)}}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/png;base64," + base64.b64encode(encoded()).decode()}}] * 9}],
        "red",
        {"role": "user", "content": "red"},
    ],
)  # fmt: skip
def test_a_broken_conversation_is_the_clients_fault(address, messages):
    for stream in (False, True):
        checked(httpx2.post(f"{address}/v1/chat/completions", json={"messages": messages, "stream": stream}))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "multipart/form-data; boundary=" + "x" * 5000},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/octet-stream"},
        {"Content-Type": b"\xff"},
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_wrong_content_type_is_refused(address, route, headers):
    checked(httpx2.post(address + route, content=json.dumps({"prompt": PROMPT}).encode(), headers=headers))


@pytest.mark.parametrize(
    "body",
    [
        b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc',
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--x--\r\n',
        b"--x\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\n" + b"A: b\r\n" * 10_000 + b"\r\nabc\r\n--x--\r\n",
        b"--x\r\n" + b"A" * 10**6 + b"\r\n\r\nabc\r\n--x--\r\n",
        b"".join(b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n\r\n' for _ in range(2000)) + b"--x--\r\n",
        b"--x--\r\n",
        b"\r\n" * 10**6,
    ],
)
@pytest.mark.parametrize("route", ["/v1/images/edits", "/v1/reconstruct"])
def test_a_broken_form_is_the_clients_fault(address, route, body):
    checked(httpx2.post(address + route, content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}))


def test_a_form_says_each_thing_once(address):
    files = [("image", ("a", encoded())), ("image", ("b", encoded()))]
    answer = httpx2.post(f"{address}/v1/images/edits", files=files, data={"prompt": "remove the circle"})
    assert checked(answer)["param"] == "image"
    files = {"image": ("a", encoded()), "mask": ("b", encoded())}
    answer = httpx2.post(f"{address}/v1/images/edits", files=files, data={"prompt": "remove the circle"})
    assert checked(answer)["code"] == "unknown_parameter"


@pytest.mark.parametrize("path", ["/v1", "/v1/images", "/docs/", "/static/../../etc/passwd", "/%2e%2e/etc/passwd"])
def test_there_is_nothing_elsewhere(address, path):
    assert checked(httpx2.get(address + path))["message"]


def test_a_wrong_method_is_refused(address):
    assert checked(httpx2.get(f"{address}/v1/images/generations")) and checked(httpx2.delete(f"{address}/v1/models"))


# Below HTTP clients' manners: bytes on a socket


def exchange(address: str, head: str, *parts: bytes, pause: float = 0, wait: float = 30) -> bytes:
    """Send a head and parts with pauses; return what comes back until the connection closes or the answer ends."""
    where = urlsplit(address)
    with socket.create_connection((where.hostname, where.port), timeout=wait) as connection:
        received = b""
        try:
            connection.sendall(head.replace("\n", "\r\n").encode("latin-1"))
            for part in parts:
                time.sleep(pause)
                connection.sendall(part)
            while data := connection.recv(65536):
                received += data
                if b'"error"' in received:
                    break
        except (ConnectionError, BrokenPipeError):
            pass
        return received


def test_too_long_a_body_is_refused_by_its_head(address):
    head = f"POST /v1/reconstruct HTTP/1.1\nHost: localhost\nContent-Length: {limits.MAX_BODY_BYTES + 1}\n\n"
    assert b" 413 " in exchange(address, head)
    head = f"POST /v1/reconstruct HTTP/1.1\nHost: localhost\nContent-Length: {'9' * 19}\n\n"
    assert b" 413 " in exchange(address, head)


def test_too_long_a_body_is_cut_off_while_it_comes(address, monkeypatch):
    monkeypatch.setattr("spar.serving.limits.MAX_BODY_BYTES", 10_000)
    head = "POST /v1/reconstruct HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n\n"
    piece = b"1000\r\n" + bytes(0x1000) + b"\r\n"
    assert b" 413 " in exchange(address, head, *[piece] * 20)


def test_a_slow_body_is_cut_off(address, monkeypatch):
    monkeypatch.setattr("spar.serving.limits.BODY_SECONDS", 0.3)
    head = "POST /v1/images/generations HTTP/1.1\nHost: localhost\nContent-Length: 1000\n\n"
    start = time.monotonic()
    assert b" 408 " in exchange(address, head, b"{", b"{", pause=0.1)
    assert time.monotonic() - start < 3


def test_a_slow_head_is_cut_off(address, monkeypatch):
    monkeypatch.setattr("spar.serving.limits.HEADER_SECONDS", 0.3)
    for head in ("", "POST /v1/images/gen"):
        start = time.monotonic()
        assert exchange(address, head, *[b"x"] * 3 if head else [], pause=0.05) == b""
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "head",
    [
        "hello\n\n",
        "GET / HTTP/9.9\n\n",
        "GET /health HTTP/1.1\n\n",
        "GET /health HTTP/1.1\nHost: localhost\nHost: other\n\n",
        "POST /v1/reconstruct HTTP/1.1\nHost: localhost\nContent-Length: -1\n\n",
        "POST /v1/reconstruct HTTP/1.1\nHost: localhost\nContent-Length: 5\nContent-Length: 6\n\nhello",
        "GET /health HTTP/1.1\nHost: localhost\nX: " + "y" * 200_000 + "\n\n",
    ],
)
def test_broken_http_is_refused(address, head):
    assert exchange(address, head).split(b" ")[1].startswith(b"4")


def test_all_bodies_together_have_a_limit(address, monkeypatch):
    monkeypatch.setattr("spar.serving.limits.MAX_BUFFERED_BYTES", 1000)
    assert httpx2.post(f"{address}/v1/images/generations", content=b" " * 2000, headers=JSON).status_code == 429
    monkeypatch.undo()
    answer = httpx2.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 1})
    assert answer.status_code == 200  # what was held is given back


# Who may come in


def test_a_page_elsewhere_cannot_use_a_server_on_this_machine(address):
    """DNS rebinding sends another name as Host; a form of another page sends its Origin."""
    assert checked(httpx2.get(f"{address}/v1/models", headers={"Host": "evil.example"}))
    assert httpx2.get(f"{address}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    assert httpx2.get(f"{address}/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
    own = address.removeprefix("http://")
    assert httpx2.get(f"{address}/v1/models", headers={"Origin": f"http://{own}"}).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000"):
        answer = httpx2.post(f"{address}/v1/reconstruct", files={"image": encoded()}, headers={"Origin": origin})
        assert checked(answer) and answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_a_token_is_asked_of_all_but_health(pipe, serve, monkeypatch):
    monkeypatch.setattr("spar.serving.auth.GUESS_SECONDS", 0.01)
    token = "a-token-for-the-tests-0123456789"
    with serve(pipe, token=token) as address:
        assert httpx2.get(f"{address}/health").status_code == 200
        for path in ("/", "/docs", "/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            wrong = (None, "", token, f"bearer {token}x", f"Bearer {token[:-1]}", f"Bearer  {token}", "Basic eDp5")
            for value in wrong:
                answer = httpx2.get(address + path, headers={} if value is None else {"Authorization": value})
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                assert checked(answer)["code"] == "invalid_api_key"
        assert httpx2.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        proxied = {"Authorization": f"Bearer {token}", "Host": "spar.example", "Origin": "https://spar.example"}
        assert httpx2.get(f"{address}/v1/models", headers=proxied).status_code == 200
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("GET", "/v1/models", headers={"Authorization": b"Bearer \xff\xfe"})
        assert connection.getresponse().status == 401
        connection.close()


def test_a_client_that_does_not_read_keeps_no_place(address, monkeypatch):
    monkeypatch.setattr("spar.serving.limits.READ_SECONDS", 0.2)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", urlsplit(address).port))
        connection.setblocking(False)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200
        deadline = time.monotonic() + 20
        sent = 0
        with pytest.raises(ConnectionError):  # the server disconnects; the buffers fill before, and one request hangs
            while time.monotonic() < deadline:
                try:
                    sent += connection.send(request[sent % len(request) :])
                except BlockingIOError:
                    time.sleep(0.02)
    assert "spar_requests_running 1.0" in httpx2.get(f"{address}/metrics").text


def health_meanwhile(address: str, **request) -> tuple[int, float]:
    """The status of a request, and the longest wait of another request meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        answer, longest = pool.submit(httpx2.post, timeout=60, **request), 0.0
        while not answer.done():
            start = time.monotonic()
            httpx2.get(f"{address}/health", timeout=60)
            longest = max(longest, time.monotonic() - start)
        return answer.result().status_code, longest


@pytest.mark.slow
def test_an_image_of_very_many_chunks_keeps_nobody_else_waiting(address):
    plain = encoded(size=(64, 64))
    data = plain[:33] + chunk(b"abCd", b"") * 1_000_000 + plain[33:]
    status, longest = health_meanwhile(address, url=f"{address}/v1/reconstruct", files={"image": ("x", data)})
    assert status == 200 and longest < 1


def test_json_of_very_many_values_is_refused_unread(address):
    body = b'{"prompt": [' + b"[]," * 8_000_000 + b"[]]}"
    for headers in ([*JSON.items()], [*JSON.items(), ("Content-Type", "multipart/form-data; boundary=x")]):
        start = time.monotonic()
        answer = httpx2.post(f"{address}/v1/images/generations", content=body, headers=headers)
        assert checked(answer) and answer.status_code == 413
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", 'APPLICATION/X-WWW-Form-URLEncoded; x="y"'])
def test_a_form_without_files_is_refused_unread(address, kind):
    start = time.monotonic()
    for route in ROUTES:
        answer = httpx2.post(address + route, content=b"&" * 2**20, headers={"Content-Type": kind})
        assert checked(answer) and answer.status_code == 415
    assert time.monotonic() - start < 1


def test_waiting_for_a_decoder_counts_as_waiting(pipe, serve, monkeypatch):
    monkeypatch.setattr("spar.serving.image_io.open_training_image", lambda data: time.sleep(2))
    with serve(pipe, timeout=0.2) as address:
        start = time.monotonic()
        assert httpx2.post(f"{address}/v1/reconstruct", files={"image": encoded()}).status_code == 503
        assert time.monotonic() - start < 1.5


def test_errors_are_about_the_part_that_is_wrong_and_short(address):
    long = "A" * 10**6
    for content, param in (
        ([{"type": "text"}], "messages.0.content.0.text"),
        ([{"type": long}], "messages.0.content.0"),
        ([{"text": "x"}], "messages.0.content.0"),
        (1, "messages.0.content"),
    ):
        body = {"messages": [{"role": "user", "content": content}]}
        assert checked(httpx2.post(f"{address}/v1/chat/completions", json=body))["param"] == param
    for name in ("image", "image[]"):
        form = httpx2.post(f"{address}/v1/images/edits", data={"prompt": PROMPT, name: "text"}, files={"seed": b"1"})
        assert "UploadFile" not in form.text and checked(form)
    body = {"messages": [{"role": "user", "content": "é" * 8000}]}
    checked(httpx2.post(f"{address}/v1/chat/completions", json=body))


def test_no_address_leads_to_another(address):
    for path in ("/v1/models/", "/v1/images/generations/"):
        answer = httpx2.get(address + path)
        assert checked(answer) and answer.status_code == 404 and "Location" not in answer.headers
