"""`spar serve` as a process: what is refused at the start, and how it ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from spar.cli.main import main
from spar.serving.auth import check_access, is_local, listen, read_token
from spar.serving.worker import Worker

TOKEN = "a-token-for-the-tests-0123456789"


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("SPAR_API_TOKEN", raising=False)


@pytest.fixture
def no_load(monkeypatch):
    monkeypatch.setattr("spar.cli.loading.load_pipeline", lambda args: pytest.fail("the model was loaded"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org", ""])
def test_other_machines_need_a_token(host, capsys, no_load):
    assert main(["serve", f"--host={host}", "--port", "0"]) == 2
    assert "token" in capsys.readouterr().err
    check_access(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert is_local(host)
    check_access(host, None)


def test_a_token_comes_from_the_environment_or_a_file(monkeypatch, tmp_path):
    assert read_token(None) is None
    monkeypatch.setenv("SPAR_API_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    file = tmp_path / "token"
    file.write_text(TOKEN[::-1] + "\n")
    assert read_token(file) == TOKEN[::-1]


WEAK = [b"short", b"", b"\xff" * 32, b"with a space in between", b"a" * 20 + b"\n" + b"b" * 20]


@pytest.mark.parametrize("content", WEAK)
def test_a_weak_or_broken_token_is_refused(content, tmp_path, capsys, no_load):
    file = tmp_path / "token"
    file.write_bytes(content)
    assert main(["serve", "--token-file", str(file)]) == 2
    output = capsys.readouterr().err
    assert "--token-file" in output and content.decode("latin-1").strip()[:16] not in output or not content
    assert main(["serve", "--token-file", str(tmp_path / "none")]) == 2


def test_a_taken_port_is_reported_before_the_model_loads(capsys, no_load):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--port", "70000"], ["--max-batch", "0"], ["--max-queue", "0"], ["--timeout", "0"]])
def test_wrong_numbers_are_refused(words, capsys, no_load):
    assert main(["serve", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys, no_load):
    monkeypatch.setattr("spar.serving.auth.find_spec", lambda name: None)
    assert main(["serve", "--port", "0"]) == 2
    assert "spar-unified[serve]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_ends_it_when_what_runs_is_done(how, status):
    environment = {**os.environ, "SPAR_API_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    command = [str(Path(sys.executable).with_name("python")), "-m", "spar", "serve", "--port", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        address = server.stdout.readline().split()[-1]
        got = []
        body = {"prompt": "a blue star", "n": 8, "num_inference_steps": 40}

        def ask() -> None:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            got.append(httpx2.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        running = {"Authorization": f"Bearer {TOKEN}"}
        while "spar_requests_running 2.0" not in httpx2.get(f"{address}/metrics", headers=running).text:
            pass
        server.send_signal(how)
        thread.join()
        output = server.communicate(timeout=60)[1]
    finally:
        server.kill()
    assert got[0].status_code == 200 and len(got[0].json()["data"]) == 8
    assert server.returncode == status
    assert TOKEN not in output and "blue star" not in output and "Traceback" not in output


def test_small_answers_are_sent_at_once():
    """Without TCP_NODELAY each answer of two pieces waits some 40 ms for the client's acknowledgement."""
    found = []

    async def serve_one() -> None:
        listener = listen("127.0.0.1", 0)
        closed = asyncio.Event()

        def came(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            closed.set()

        async with await asyncio.start_server(came, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            await closed.wait()
            writer.close()

    asyncio.run(serve_one())
    assert found and found[0] != 0


def test_the_worker_computes_on_the_thread_that_loaded_the_pipeline():
    threads = []
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: threads.append(threading.get_ident())).result()
        worker = Worker(object(), thread=thread)
        worker.start()
        worker.call(lambda _: threads.append(threading.get_ident())).result(10)
        worker.stop()
    assert threads[0] == threads[1] and not worker.alive
