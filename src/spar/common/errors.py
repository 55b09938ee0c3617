"""The one error for the user to fix, and the command that installs an optional part."""

from spar import DISTRIBUTION


class InputError(ValueError):
    """Bad input from the user: a file, a prompt, a setting.

    The message is one sentence that says what was expected and what came. The CLI prints it and exits with status 2.
    """


def install_command(extra: str) -> str:
    """The command that installs one of the extras of pyproject.toml."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
