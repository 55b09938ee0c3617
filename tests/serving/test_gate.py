"""What bounds all requests together: connections, places, the time of bodies, and memory; for API and page alike."""

import asyncio
import errno
import resource
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from io import BytesIO
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image
from starlette.requests import ClientDisconnect

from spar.serving import limits
from spar.serving.asgi import replay_body
from spar.serving.auth import FREE_GUESSES, GuessLimit
from spar.serving.errors import ApiError
from spar.serving.gate import Lease, MemoryBudget, RequestGate, read_body
from spar.serving.http import MAX_LOGGED, QUIET_SECONDS, HttpServer, max_connections
from spar.serving.image_io import Decoders, decode_image, read_image

HALF = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
PROMPT = {"prompt": "a red circle", "num_inference_steps": 1}


def connect(address: str, data: bytes = b"") -> socket.socket:
    where = urlsplit(address)
    connection = socket.create_connection((where.hostname, where.port), timeout=10)
    connection.sendall(data)
    return connection


def health(address: str) -> tuple[int, float]:
    start = time.monotonic()
    return httpx2.get(f"{address}/health", timeout=10).status_code, time.monotonic() - start


@pytest.mark.parametrize("data", [b"", b"GET /hea", HALF])
def test_more_waiting_clients_than_connections_keep_nobody_waiting(address, monkeypatch, data):
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    with ExitStack() as stack:
        held = [stack.enter_context(connect(address, data)) for _ in range(60)]
        for _ in range(3):
            status, seconds = health(address)
            assert status == 200 and seconds < 2
        held[0].settimeout(5)
        try:
            assert held[0].recv(100) == b""  # the first ones were disconnected
        except ConnectionError:
            pass
    assert httpx2.post(f"{address}/v1/images/generations", json=PROMPT, timeout=30).status_code == 200


def test_the_health_is_told_while_no_request_has_a_place(address, monkeypatch):
    monkeypatch.setattr(limits, "MAX_REQUESTS", 3)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(address, HALF))
        time.sleep(0.3)
        assert health(address)[0] == 200
        answer = httpx2.post(f"{address}/v1/images/generations", json=PROMPT, timeout=10)
        assert answer.status_code == 429 and answer.headers["Retry-After"]
    time.sleep(0.3)
    assert httpx2.post(f"{address}/v1/images/generations", json=PROMPT, timeout=30).status_code == 200


@pytest.mark.parametrize(("files", "most"), [(64, 32), (1024, 768), (100_000, limits.MAX_CONNECTIONS), (-1, 1024)])
def test_there_are_fewer_connections_than_file_handles(monkeypatch, files, most):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert max_connections() == most


def test_the_log_says_once_in_a_while_that_file_handles_ran_out(caplog, monkeypatch):
    server, told = HttpServer.__new__(HttpServer), []
    loop = type("Loop", (), {"default_exception_handler": lambda _self, context: told.append(context)})()
    for _ in range(1000):
        server._handle(loop, {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert caplog.text.count("no file handle is left") == 1 and told == []
    monkeypatch.setattr("spar.serving.http.QUIET_SECONDS", 0)
    server._handle(loop, {"exception": OSError(errno.ENFILE, "Too many open files")})
    assert caplog.text.count("no file handle is left") == 2 and QUIET_SECONDS >= 60
    for context in ({"message": "x"}, {"exception": OSError(errno.EIO, "x")}, {"exception": ValueError()}):
        server._handle(loop, context)
        assert told[-1] is context


def test_who_asks_for_another_protocol_writes_nothing_to_the_log(address, caplog):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connect(address, head) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_log_has_the_beginning_of_an_address_however_long_it_is(address, caplog):
    caplog.set_level("INFO", "uvicorn.access")
    with connect(address, b"GET /health?" + b"x" * 60_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    (line,) = [line for line in lines if "/health?xxx" in line]
    assert len(line) < 2 * MAX_LOGGED and '"GET /health?xxx' in line and line.endswith(" 200")


def scope(**headers: str) -> dict:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": "/", "headers": pairs}


def bodies(*parts: bytes, then: str = "wait"):
    """A `receive` of these parts, after which the client sends nothing more, or leaves."""
    left = list(parts)

    async def receive() -> dict:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or then != "end"}
        if then == "leave":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def test_a_body_is_timed_measured_and_leased(monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.1)

    async def read(*parts: bytes, most: int = 10, then: str = "end", **headers: str) -> tuple[list[bytes], int]:
        lease = Lease(MemoryBudget())
        return await read_body(scope(**headers), bodies(*parts, then=then), lease, most), lease.held

    assert asyncio.run(read(b"abc", b"", b"de")) == ([b"abc", b"de"], 5 * limits.JSON_COPIES)
    assert asyncio.run(read(b"abc", content_type="multipart/form-data; boundary=x"))[1] == 3 * limits.FORM_COPIES
    assert asyncio.run(read(b"")) == ([], 0)
    for parts, then, headers, status in (
        ((b"abc",), "wait", {}, 408), ((), "wait", {}, 408), ((b"x" * 11,), "end", {}, 413),
        ((b"x",), "end", {"content_length": "11"}, 413), ((b"x",), "end", {"content_length": "9" * 30}, 413),
    ):
        with pytest.raises(ApiError) as caught:
            asyncio.run(read(*parts, then=then, **headers))
        assert caught.value.status == status
    with pytest.raises(ClientDisconnect):
        asyncio.run(read(b"x", then="leave"))


def test_a_body_that_was_read_comes_in_its_parts_and_is_forgotten():
    async def replayed(*parts: bytes) -> list[tuple[bytes, bool]]:
        given, messages = list(parts), []
        receive = replay_body(given, bodies(then="leave"))
        while (message := await receive())["type"] == "http.request":
            messages.append((message["body"], message["more_body"]))
        assert given == []
        return messages

    assert asyncio.run(replayed(b"a", b"b", b"c")) == [(b"a", True), (b"b", True), (b"c", False)]
    assert asyncio.run(replayed(b"a")) == [(b"a", False)] and asyncio.run(replayed()) == [(b"", False)]


def test_memory_is_given_back_whatever_happens(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", 100)
    budget = MemoryBudget()
    api, page = RequestGate(budget), RequestGate(budget)
    with api.enter() as one, page.enter() as other:
        one.reserve(60)
        with pytest.raises(ApiError) as caught:
            other.reserve(50)
        assert caught.value.status == 429 and other.held == 0
        one.release(30), other.reserve(50)
        one.release(1000)
        assert budget.held == 50
    with pytest.raises(RuntimeError), api.enter() as one:
        one.reserve(100)
        raise RuntimeError
    assert budget.held == 0 and (api.requests, page.requests) == (0, 0)


def test_places_are_counted_for_each_application_and_given_back(monkeypatch):
    monkeypatch.setattr(limits, "MAX_REQUESTS", 2)
    api, page = RequestGate(), RequestGate()
    with api.enter(), api.enter(), page.enter(), api.enter(counted=False):
        with pytest.raises(ApiError) as caught, api.enter():
            pass
        assert caught.value.status == 429
    with api.enter(), api.enter():
        pass


def png(side: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_a_decoded_image_counts_as_what_it_takes(monkeypatch):
    data, pixels = png(100), 100 * 100
    most, held = limits.OPAQUE_BYTES * pixels + len(data), limits.PIXEL_BYTES * pixels

    async def read(limit: int, others: int = 0, body: int = 0) -> MemoryBudget:
        monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", limit)
        budget, decoders = MemoryBudget(), Decoders()
        Lease(budget).reserve(others)
        try:
            with budget.lease() as lease:
                lease.reserve(body)
                assert (await read_image(data, "image", lease, decoders)).size == (100, 100)
                assert lease.held == budget.held - others == held + body
        finally:
            decoders.stop()
            assert budget.held == others
        return budget

    asyncio.run(read(most))
    asyncio.run(read(most + 7, others=7))
    asyncio.run(read(most + 7, body=7))
    refused = [(most + 6, 7, 0, 429), (held, 1, 0, 413), (most - 1, 0, 0, 413), (most + 6, 0, 7, 413)]
    for limit, others, body, status in refused:
        with pytest.raises(ApiError) as caught:
            asyncio.run(read(limit, others, body))
        assert caught.value.status == status


def test_a_request_that_has_ended_takes_nothing_any_more(monkeypatch):
    """Its client left while a thread decoded its image: what the thread takes counts until the thread has ended."""
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", limits.OPAQUE_BYTES * 10_000 + 1000)
    budget, seen = MemoryBudget(), []
    with budget.lease() as lease:
        pass

    def read(_: bytes) -> Image.Image:
        lease.end()
        seen.append(budget.held)
        return Image.new("RGB", (100, 100))

    with pytest.raises(ClientDisconnect):
        decode_image(png(100), read, lease)
    assert (budget.held, seen) == (0, [])
    with budget.lease() as lease:
        decode_image(png(100), read, lease)
    assert seen == [(limits.OPAQUE_BYTES - limits.PIXEL_BYTES) * 10_000 + len(png(100))] and budget.held == 0


def test_threads_that_count_at_once_stay_below_the_limit(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", 10)
    budget, begin, most = MemoryBudget(), threading.Barrier(4), []

    def take() -> None:
        begin.wait()
        for _ in range(3000):
            with budget.lease() as lease, suppress(ApiError):
                lease.reserve(7)
                most.append(budget.held)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert max(most) == 7 and budget.held == 0


def test_a_lease_may_end_while_its_thread_takes_another():
    """As where the garbage collector closes a generator that nobody reads any more."""
    budget = MemoryBudget()
    lease = Lease(budget)
    lease.reserve(5)

    def collect() -> None:
        with budget.lock:
            lease.end()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and budget.held == 0


def test_a_client_that_leaves_leaves_nothing_in_the_queue_of_the_decoders():
    async def run() -> None:
        decoders, began = Decoders(), []

        def slow(data: bytes) -> bytes:
            began.append(data)
            time.sleep(0.2)
            return data

        jobs = [asyncio.ensure_future(decoders.run(slow, bytes([index]))) for index in range(20)]
        await asyncio.sleep(0.05)
        assert len(began) == limits.DECODE_THREADS == 2
        for job in jobs[:-1]:
            job.cancel()
        assert await asyncio.wait_for(jobs[-1], 2) == bytes([19])
        assert began == [b"\x00", b"\x01", b"\x13"]
        decoders.stop()

    asyncio.run(run())


def test_guesses_beyond_a_few_wait(monkeypatch):
    monkeypatch.setattr("spar.serving.auth.GUESS_SECONDS", 0.05)

    async def seconds(guesses: GuessLimit) -> float:
        start = time.monotonic()
        await guesses.wrong()
        return time.monotonic() - start

    async def run() -> None:
        guesses = GuessLimit()
        assert all([await seconds(guesses) < 0.04 for _ in range(FREE_GUESSES)])
        assert await seconds(guesses) >= 0.05
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
        assert await seconds(guesses) < 0.04

    asyncio.run(run())


def test_a_guess_that_waits_takes_no_place(pipe, serve, monkeypatch):
    monkeypatch.setattr(limits, "MAX_REQUESTS", 1)
    monkeypatch.setattr("spar.serving.auth.FREE_GUESSES", 1)
    monkeypatch.setattr("spar.serving.auth.GUESS_SECONDS", 4.0)
    token = "a-token-of-16-or-more"

    def models(given: str, timeout: float) -> int:
        headers = {"Authorization": f"Bearer {given}"}
        return httpx2.get(f"{address}/v1/models", headers=headers, timeout=timeout).status_code

    with serve(pipe, token=token) as address:
        assert models("wrong", 20) == 401
        slow = connect(address, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n\r\n")
        slow.settimeout(0.5)
        with slow, pytest.raises(TimeoutError):
            slow.recv(1)
        assert models(token, 20) == 200
