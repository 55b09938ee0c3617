"""Where API and page listen and what token they ask for; light, so that what is wrong is said before a model loads."""

import ipaddress
import os
import socket
from importlib.util import find_spec
from pathlib import Path

from spar.common.errors import InputError, install_command
from spar.serving.limits import MIN_TOKEN_CHARACTERS, TOKEN_VARIABLE

BACKLOG = 512
EXTRAS = {
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "ui": ("gradio", "fastapi", "uvicorn"),
}


def read_token(file: Path | None) -> str | None:
    """The token from a file or else from the environment; never from the command line, which others can see.

    Raises:
        InputError: a file that cannot be read, or a token that is too short or is no plain text.
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
            raise InputError(f"{source}: expected a file of plain text, which can be read") from error
    if len(token) < MIN_TOKEN_CHARACTERS or not all("!" <= letter <= "~" for letter in token):
        raise InputError(
            f"{source}: expected at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without spaces, "
            f"got {len(token)} characters (python -c 'import secrets; print(secrets.token_urlsafe())' makes one)"
        )
    return token


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(host: str, token: str | None, extra: str = "serve") -> None:
    """Refuse to be reached by other machines without a token, or to start without an extra, `serve` or `ui`."""
    if not is_local(host) and token is None:
        raise InputError(
            f"--host {host}: other machines can reach this address, which needs a token: "
            f"put one in {TOKEN_VARIABLE} or name a --token-file"
        )
    missing = [name for name in EXTRAS[extra] if not find_spec(name)]
    if missing:
        raise InputError(f"this needs {', '.join(missing)}: {install_command(extra)}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: an address that is not this machine's, or a port that is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named, since asyncio sends small answers at once (TCP_NODELAY) only where it is
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error
    return listener
