"""Scripts that make a shell complete the verbs and their words: what `spar completion` prints."""

import contextlib
import io
import os
import re
from typing import TYPE_CHECKING, get_args

from spar.cli.result_arguments import Benchmark

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spar.cli.parsing import Verb

# A flag begins a line of `--help`, after the frame: "│ -o PATH, --output PATH".
_FLAG_LINE = re.compile(r"^[^\w-]*(-.*)$", re.MULTILINE)
_FLAG = re.compile(r"(?:^|, )(--?[a-z][\w-]*)")

BASH = """# Completion of spar, made by `spar completion {shell}`.
_spar() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [ "$COMP_CWORD" -eq 2 ] || [ "${{word:0:1}}" = - ]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
    if [ "${{#COMPREPLY[@]}}" -eq 0 ]; then
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _spar spar
"""


def completion_script(shell: str, verbs: "Mapping[str, Verb]") -> str:
    """The script of a shell: the words that may follow each verb, and files everywhere."""
    words = {verb: [*_names(verb), *_flags(function)] for verb, function in verbs.items()}
    if shell == "fish":
        lines = [f"# Completion of spar, made by `spar completion {shell}`."]
        lines.append(f'complete -c spar -n __fish_use_subcommand -a "{" ".join(words)}"')
        for verb, own in words.items():
            lines.append(f'complete -c spar -n "__fish_seen_subcommand_from {verb}" -a "{" ".join(own)}"')
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'        {verb}) words="{" ".join(own)}" ;;' for verb, own in words.items())
    script = BASH.format(shell=shell, verbs=" ".join(words), cases=cases)
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def _names(verb: str) -> list[str]:
    """Words that a verb may begin with."""
    if verb in ("train", "plan", "cache", "build"):
        from spar.recipes import RECIPES

        return [*RECIPES]
    if verb == "study":
        from spar.evaluation.study import bundled_studies

        return bundled_studies()
    return {
        "eval": [*get_args(Benchmark)], "data": ["check", "convert"], "completion": ["bash", "zsh", "fish"],
        "convert": ["unilip", "dualtoken"], "export": ["internvl"],
    }.get(verb, [])  # fmt: skip


def _flags(verb: "Verb") -> list[str]:
    """The flags of a verb, as its own help lists them; those of a recipe's fields are too many."""
    output, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "200"
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            verb(["--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    lines = _FLAG_LINE.findall(re.sub(r"\x1b\[[\d;]*m", "", output.getvalue()))
    return [flag for flag in dict.fromkeys(flag for line in lines for flag in _FLAG.findall(line)) if flag != "-h"]
