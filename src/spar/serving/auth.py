"""Address and token of API and page; imports little, so that mistakes are reported before a model loads."""

import asyncio
import ipaddress
import os
import socket
import time
from collections import deque
from importlib.util import find_spec
from pathlib import Path

from spar.common.errors import InputError, install_command
from spar.serving.limits import MIN_TOKEN_CHARACTERS, TOKEN_VARIABLE

BACKLOG = 512
UNSENT_BYTES = 128 * 2**10  # of a connection that the system holds, of up to 4 MiB: nobody counts them
FREE_GUESSES = 32
GUESS_SECONDS = 1.0
EXTRAS = {
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "ui": ("gradio", "fastapi", "uvicorn"),
}


def read_token(file: Path | None) -> str | None:
    """Read the token from a file or else from the environment; never from the command line, which is public.

    Raises:
        InputError: the file cannot be read, or the token is too short or not plain text.
    """
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token:
            return None
    else:
        source = f"--token-file {str(file)!r}"
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source}: expected a readable file of plain text") from error
    if len(token) < MIN_TOKEN_CHARACTERS or not all("!" <= letter <= "~" for letter in token):
        raise InputError(
            f"{source}: expected at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without spaces, "
            f"got {len(token)} characters (python -c 'import secrets; print(secrets.token_urlsafe())' makes one)"
        )
    return token


class GuessLimit:
    """Slows guesses at the token: of those in a minute beyond FREE_GUESSES each waits GUESS_SECONDS for its answer.

    The right token is never kept waiting, so that nobody can lock others out.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=FREE_GUESSES)

    async def wrong(self) -> None:
        """Wait as a wrong guess must."""
        now = time.monotonic()
        late = len(self._times) == FREE_GUESSES and now - self._times[0] < 60
        self._times.append(now)
        if late:
            await asyncio.sleep(GUESS_SECONDS)


def is_local(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_names(host: str) -> frozenset[str] | None:
    """Names that the header Host may have at an address that only this machine reaches; None, any, at another."""
    return frozenset({"localhost", "127.0.0.1", "[::1]", host}) if is_local(host) else None


def check_access(host: str, token: str | None, extra: str = "serve") -> None:
    """Require a token for an address that other machines can reach, and the packages of an extra (`serve`, `ui`)."""
    if not is_local(host) and token is None:
        raise InputError(
            f"--host {host}: other machines can reach this address, which needs a token: "
            f"put one in {TOKEN_VARIABLE} or name a --token-file"
        )
    missing = [name for name in EXTRAS[extra] if not find_spec(name)]
    if missing:
        raise InputError(f"this needs {', '.join(missing)}: {install_command(extra)}")


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        InputError: the address is not this machine's, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small answers at once (TCP_NODELAY) only if the protocol is given
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # so that it is also soon seen that a slow client reads on
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    return listener
