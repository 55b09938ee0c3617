"""The error that a user can fix, the end of a task that was stopped, and the command that installs an optional part."""

from spar import DISTRIBUTION


class InputError(ValueError):
    """Bad input from the user: a file, a prompt, a setting.

    The message is one sentence with the expected and the given value. The CLI prints it and exits with status 2.
    """


def first_line(error: BaseException, message: str | None = None) -> str:
    """The first line of an error's message, or of a better one, to end a sentence; its class if there is none."""
    return (message or str(error)).strip().partition("\n")[0] or type(error).__name__


def install_command(extra: str) -> str:
    """The command that installs one of the extras of pyproject.toml."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class Cancelled(Exception):
    """Sampling was stopped by its callback; there is no result."""


class PeerFailure(RuntimeError):
    """Another process of the command has ended, so this one cannot go on; what was saved last is whole."""
