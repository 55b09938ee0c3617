"""Arguments of the verbs that help: what is there, what is wrong, completion of the shell."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spar.cli.arguments import Flag

Shell = Literal["bash", "zsh", "fish"]


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """List the recipes, the bundled models and the benchmarks: spar list"""

    json: Flag = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class CompletionArguments:
    """Print a script that completes verbs, flags and names in a shell: spar completion bash

    bash: add `source <(spar completion bash)` to ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after compinit. fish:
    spar completion fish > ~/.config/fish/completions/spar.fish
    """

    shell: Annotated[Positional[Shell], arg(metavar="SHELL")]
    """bash, zsh or fish."""


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Check the installation: versions, devices, optional parts, what is wrong and how to fix it."""
