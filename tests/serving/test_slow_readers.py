"""Clients that ask for much and read it slowly or not at all: their answer ends, and what it held is free again."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from spar.serving import limits
from spar.serving.auth import UNSENT_BYTES, listen
from spar.serving.gate import RequestGate
from spar.serving.http import HttpServer, TimedH11Protocol, server_config

SIZE, PIECE = 2**24, 2**16  # of an answer: more than the buffers of both ends take
SMALL = 4096  # bytes of a connection's buffer, of which the system makes some more
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSE = GET[:-2] + b"Connection: close\r\n\r\n"


class LargeAnswer:
    """An application whose every answer has SIZE bytes, in pieces or at once, and a lease on memory."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.gate, self.piece = RequestGate(), SIZE if at_once else PIECE

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        with self.gate.enter() as lease:
            lease.reserve(1)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for end in range(self.piece, SIZE + 1, self.piece):
                await send({"type": "http.response.body", "body": b"x" * self.piece, "more_body": end < SIZE})


@contextmanager
def running(app: Any) -> Iterator[tuple[tuple[str, int], HttpServer]]:
    """The address of a server of an application, and the server."""
    listener = listen("127.0.0.1", 0)
    server = HttpServer(server_config(app, shutdown_seconds=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname(), server
    finally:
        server.should_exit = True
        thread.join()


def connect(address: tuple[str, int], data: bytes) -> socket.socket:
    """A connection that takes little before its client reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    connection.settimeout(60)
    connection.connect(address)
    connection.sendall(data)
    return connection


def comes(true: Callable[[], Any]) -> bool:
    """Whether something becomes true."""
    deadline = time.monotonic() + 60
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(now)


def test_a_client_that_reads_nothing_is_cut_off_and_holds_nothing(monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 0.3)
    app = LargeAnswer()
    with running(app) as (address, _), connect(address, GET) as client:
        assert comes(lambda: app.gate.budget.held == 1)
        assert comes(lambda: app.gate.budget.held == 0)
        assert left(client) < SIZE


def left(client: socket.socket) -> int:
    """The bytes that still come."""
    count = 0
    with suppress(ConnectionError):
        while part := client.recv(2**20):
            count += len(part)
    return count


def test_a_client_that_reads_on_but_too_slowly_is_cut_off(monkeypatch):
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 0.5)
    app, read = LargeAnswer(), 0
    with running(app) as (address, _), connect(address, GET) as client:
        assert comes(lambda: app.gate.budget.held == 1)
        with suppress(ConnectionError):
            while app.gate.budget.held and read < SIZE // 4:
                read += len(client.recv(100))
                time.sleep(0.001)
        assert comes(lambda: app.gate.budget.held == 0)
        assert read < SIZE // 4 and read + left(client) < SIZE


def test_a_slow_client_that_reads_on_gets_everything(monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 1.5)
    app, count, pauses = LargeAnswer(), 0, 0
    with running(app) as (address, _), connect(address, CLOSE) as client:
        start = time.monotonic()
        while part := client.recv(2**16):
            count += len(part)
            if pauses < 20 and count > pauses * (SIZE // 20):
                pauses += 1
                time.sleep(0.1)
        assert time.monotonic() - start > limits.READ_SECONDS  # longer than a client may read nothing
    assert count >= SIZE and comes(lambda: app.gate.budget.held == 0)


class Clock:
    """The loop of a connection: its time is set, and what waits for it is called then."""

    def __init__(self) -> None:
        self.now, self.calls = 1000.0, list[tuple[float, Callable[..., None], tuple[Any, ...]]]()

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, function: Callable[..., None], *values: Any) -> Any:
        call = (self.now + seconds, function, values)
        self.calls.append(call)
        return SimpleNamespace(cancel=lambda: call in self.calls and self.calls.remove(call))

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [call for call in self.calls if call[0] <= end]:
            call = min(due, key=lambda one: one[0])
            self.calls.remove(call)
            self.now = max(self.now, call[0])
            call[1](*call[2])
        self.now = end


class Connection:
    """A connection of the server at a clock, whose client reads as a test says."""

    def __init__(self) -> None:
        self.clock, self.unsent, self.cut = Clock(), 0, False
        protocol = self.protocol = TimedH11Protocol.__new__(TimedH11Protocol)
        protocol.loop, protocol.cycle = self.clock, object()
        protocol.flow = SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
        protocol.transport = SimpleNamespace(get_write_buffer_size=lambda: self.unsent, abort=self._abort)

    def _abort(self) -> None:
        self.cut = True

    def write(self, count: int) -> None:
        self.unsent = count
        self.protocol.pause_writing()

    def read(self, count: int) -> None:
        self.unsent -= count
        if self.unsent == 0:
            self.protocol.resume_writing()

    def behind(self, seconds: int, pieces: int = 10**6) -> bool:
        """Whether a client that reads one byte a second, of pieces of so many, gets on for these seconds."""
        for _ in range(seconds):
            if self.unsent == 0:
                self.write(pieces)
            self.clock.wait(1)
            if self.cut:
                return False
            self.read(1)
        return True


@pytest.mark.parametrize("pieces", [10**6, 100, 7])
def test_the_time_that_a_client_keeps_the_server_waiting_is_one_for_all_pieces(pieces):
    connection = Connection()
    assert connection.behind(limits.ANSWER_SECONDS - 1, pieces)
    assert not connection.behind(2, pieces)


def test_a_client_that_stops_is_cut_off_at_the_second_look():
    connection = Connection()
    connection.write(100)
    connection.clock.wait(limits.READ_SECONDS - 1)
    assert not connection.cut
    connection.read(1)
    connection.clock.wait(limits.READ_SECONDS)  # the first look found that it reads
    assert not connection.cut
    connection.clock.wait(limits.READ_SECONDS)
    assert connection.cut


def test_a_stream_lasts_as_long_as_its_client_mostly_keeps_up():
    connection = Connection()
    for _ in range(20):  # each time a sixth of what it may
        connection.write(50)
        assert connection.behind(50)
        connection.clock.wait(60)
    assert not connection.cut


def test_every_answer_of_a_connection_has_its_own_time():
    connection = Connection()
    for _ in range(5):
        connection.protocol.cycle = object()
        assert connection.behind(limits.ANSWER_SECONDS - 1, 10**6)
        connection.read(connection.unsent)
    assert not connection.cut


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="this system has no such limit")
def test_the_system_holds_little_of_what_a_client_does_not_read():
    """Else it holds megabytes of each answer that nobody counts, and a slow client seems to read nothing for long."""
    with listen("127.0.0.1", 0) as listener, connect(listener.getsockname(), b""):
        sender, taken = listener.accept()[0], 0
        with sender, suppress(BlockingIOError):
            sender.setblocking(False)
            while taken < SIZE:
                taken += sender.send(b"x" * 2**14)
    assert 0 < taken <= 2 * UNSENT_BYTES


def test_connections_whose_last_bytes_nobody_reads_are_no_more_than_others(monkeypatch):
    """They are closed as far as the server is concerned, and would keep their file handles."""
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    app, clients = LargeAnswer(at_once=True), []
    with running(app) as (address, server):
        try:
            for number in range(1, 25):
                clients.append(connect(address, CLOSE))
                assert clients[-1].recv(12) == b"HTTP/1.1 200" and comes(lambda: not app.gate.requests)
                assert comes(lambda: len(server.server_state.connections) <= 8), number
        finally:
            for client in clients:
                client.close()


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_buffers(monkeypatch) -> None:
    """The system keeps little of what the server sends."""

    def listen_small(host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # of its connections too
        return listener

    monkeypatch.setattr("spar.serving.auth.listen", listen_small)


def ask(address: str, path: str, body: str) -> socket.socket:
    where = urlsplit(address)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return connect((where.hostname, where.port), f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())


def test_an_answer_of_images_that_nobody_reads_is_freed(pipe, serve, small_buffers, monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 1)
    body = '{"prompt": "a red circle", "n": 8, "num_inference_steps": 1}'
    images = {"prompt": "a red circle", "n": 8, "num_inference_steps": 1}
    monkeypatch.setattr(limits, "MAX_BUFFERED_BYTES", 8 * 64 * 64 * 8 + 1000)  # of one such request
    with serve(pipe) as address, ask(address, "/v1/images/generations", body) as client:
        assert client.recv(12) == b"HTTP/1.1 200"
        asked = f"{address}/v1/images/generations"
        assert httpx2.post(asked, json=images, timeout=60).status_code == 429
        assert comes(lambda: httpx2.post(asked, json=images, timeout=60).status_code == 200)


def test_a_stream_that_nobody_reads_stops_its_work(pipe, serve, small_buffers, monkeypatch):
    monkeypatch.setattr(limits, "READ_SECONDS", 0.5)
    ended, over = threading.Event(), threading.Event()

    def chat(self: Any, messages: Any, **_: Any) -> Iterator[str]:
        try:
            while not over.is_set():  # it never ends by itself
                time.sleep(0.002)
                yield "red " * 100
        finally:
            ended.set()

    monkeypatch.setattr(type(pipe), "chat", chat)
    body = '{"stream": true, "messages": [{"role": "user", "content": "what is it ?"}]}'
    with serve(pipe) as address, ask(address, "/v1/chat/completions", body) as client:
        try:
            assert client.recv(12) == b"HTTP/1.1 200"
            assert ended.wait(50)  # the time of the request is 60 seconds
            assert comes(lambda: "spar_requests_running 1.0" in httpx2.get(f"{address}/metrics", timeout=60).text)
        finally:
            over.set()
