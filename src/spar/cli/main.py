"""The command line: one table from verb to function.

A user's error is one line on stderr and exit status 2, a failure of the machine one and 1, Ctrl-C one and 130. All
libraries but tyro, which takes a twentieth of a second, are imported inside the verbs, so that help and errors are
immediate and `main` handles Ctrl-C.
"""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from spar import __version__
from spar.cli.completion import completion_script
from spar.cli.console import BROKEN_PIPE, INTERRUPTED, check_table, fail, new_console, progress_bar, show_table
from spar.cli.datasets import data
from spar.cli.failures import explain
from spar.cli.help_arguments import CompletionArguments, DoctorArguments
from spar.cli.listing import list_all
from spar.cli.parsing import Verb, takes
from spar.cli.results import compare, demo, evaluate, judge, report, study
from spar.cli.servers import serve, ui
from spar.cli.tasks import edit, generate, info, reconstruct, understand
from spar.cli.training import cache, plan, train
from spar.cli.weights import build, convert, export, push
from spar.common.errors import InputError
from spar.common.threads import limit_spinning


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    limit_spinning()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = dispatch(argv)
        sys.stdout.flush()
        if "torch.distributed" in sys.modules:  # else nobody was met, and torch need not be imported
            from spar.common.process_group import leave_processes

            leave_processes()
        return status
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except InputError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print("spar: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe; the flush at exit must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        line = explain(error, argv[0])
        if line is None:
            raise
        fail(line)
        return 1


def dispatch(argv: list[str]) -> int:
    """Call the verb with its arguments."""
    if not argv:
        raise InputError(f"expected a verb, one of {', '.join(VERBS)} (see spar --help), got nothing")
    verb, rest = argv[0], argv[1:]
    if verb in ("-h", "--help"):
        print(overview())
    elif verb in ("-V", "--version"):
        print(f"spar {__version__}")
    elif verb in VERBS:
        return VERBS[verb](rest)
    else:
        near = get_close_matches(verb, VERBS, 1)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        raise InputError(f"expected a verb, one of {', '.join(VERBS)}, got {verb!r}{hint}")
    return 0


def overview() -> str:
    """Text of `spar --help`: every verb with its docstring."""
    lines = [f"  {verb:<13}{function.__doc__}" for verb, function in VERBS.items()]
    head = ["usage: spar VERB ...", "", "SPAR: one model that understands, generates, edits and reconstructs images."]
    tail = ["spar VERB --help lists a verb's arguments; spar --version prints the version."]
    return "\n".join([*head, "", *lines, "", *tail])


@takes(DoctorArguments, "spar doctor")
def doctor(_: DoctorArguments) -> int:
    """Check the installation: what is wrong, and how to fix it."""
    from spar.cli.doctor import run_checks

    with progress_bar("checking"):
        checks = run_checks()
    show_table(new_console(), check_table(checks))
    return 1 if any(check.ok is False for check in checks) else 0


@takes(CompletionArguments, "spar completion")
def completion(args: CompletionArguments) -> int:
    """Print a script that completes verbs, flags and names in a shell."""
    print(completion_script(args.shell, VERBS), end="")
    return 0


VERBS: dict[str, Verb] = {
    "train": train,
    "plan": plan,
    "cache": cache,
    "build": build,
    "convert": convert,
    "export": export,
    "push": push,
    "generate": generate,
    "edit": edit,
    "understand": understand,
    "reconstruct": reconstruct,
    "info": info,
    "eval": evaluate,
    "judge": judge,
    "compare": compare,
    "study": study,
    "report": report,
    "demo": demo,
    "serve": serve,
    "ui": ui,
    "data": data,
    "list": list_all,
    "doctor": doctor,
    "completion": completion,
}
