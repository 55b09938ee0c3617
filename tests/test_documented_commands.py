"""Every `spar` command in the documents is one: the parser of its verb takes it, and of a recipe's flags a recipe is
built, whose stages are those that the command names.

Nothing is run here, since most of these commands train, serve or need a reader's files. What can be run is, document by
document, in other tests (README.md and use.md, data.md, serving.md, weights.md).
"""

import re
import shlex
from pathlib import Path

import pytest

from spar.cli import parsing, training
from spar.cli.completion import completion_script
from spar.cli.main import VERBS, dispatch
from spar.common.errors import InputError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("integrations/*/*.md"))
    if path.name not in ("log.md", "CHANGELOG.md")  # these keep the commands of their days
]  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


class Parsed(Exception):
    """The arguments of a command are right; it is not run."""


def in_blocks(text: str) -> list[str]:
    """The commands of a document's blocks, also those that a launcher starts, from the verb on."""
    blocks = (block for kind, block in BLOCK.findall(text) if kind in ("", "sh", "text"))
    lines = (re.split(" +# ", line)[0] for line in re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines())
    return [found[1] for line in lines if (found := re.fullmatch(r"(?:\S.* -- )?spar (.*)", line))]


def in_sentences(text: str) -> list[str]:
    """The same of the commands in a document's sentences."""
    text = BLOCK.sub("", text)
    return [" ".join(found.split()) for found in re.findall(r"`(?:torchrun [^`]* -- )?spar (\w[^`]*)`", text)]


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parse a command; InputError where an argument is wrong."""
    real, build = parsing.parse, training.build_recipe

    def parsed(*words, **keywords):
        real(*words, **keywords)
        raise Parsed

    def built(arguments, base):
        chosen = build(arguments, base)
        for name in getattr(arguments, "stage", ()):
            chosen.stage(name)
        raise Parsed

    monkeypatch.chdir(tmp_path)  # of what a command names, a recipe's file alone is there
    Path("own.yaml").write_text("recipe: shapes")
    monkeypatch.setattr(parsing, "parse", parsed)
    monkeypatch.setattr(training, "build_recipe", built)

    def check(command: str) -> None:
        with pytest.raises(Parsed):
            dispatch(shlex.split(command, comments=True))

    return check


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of each verb but those of a recipe's fields."""
    words = re.findall(r'^ +(\w+)\) words="(.*)" ;;$', completion_script("bash", VERBS), re.M)
    return {verb: {"--help", *own.split()} for verb, own in words}


GIVEN = sorted({command for path in DOCUMENTS for command in in_blocks(path.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", GIVEN)
def test_a_command_of_a_block_is_parsed(command, parse):
    parse(command)


def test_commands_are_found(parse):
    """Over several lines and after a launcher, and without what is no argument; and what is wrong is refused."""
    text = "```\nspar info \\\n  a.png  # of an image\n```\nand\n```sh\ntorchrun -m -- spar train tiny\nspar-x\n```\n"
    assert in_blocks(text) == ["info a.png", "train tiny"] and in_blocks("```python\nspar info a.png\n```\n") == []
    assert in_sentences(f"{text}as `spar info\nb.png`, by `spar.models`") == ["info b.png"]
    assert {"train", "serve", "eval", "build", "study"} <= {command.split()[0] for command in GIVEN} and len(GIVEN) > 60
    for wrong in ("info a.png --jsn", "train tiny --stage dot", "train tiny --stages.dot.steps 3", "inform a.png"):
        with pytest.raises(InputError):
            parse(wrong)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_command_of_a_sentence_has_a_verb_and_flags_that_there_are(path, parse, flags):
    """It may lack words; else it is parsed like those of blocks."""
    for command in in_sentences(path.read_text(encoding="utf-8")):
        verb, *words = command.split()
        assert verb in (*VERBS, "VERB"), command
        if verb != "VERB":
            try:
                parse(command)
            except (InputError, SystemExit):  # words are missing, or --help
                assert {word for word in words if word.startswith("--")} <= flags[verb], command
