"""Write the tables of docs/evidence.md from the results of studies in docs/results/studies: python docs/evidence.py

A study's file there is the `results.json` that `spar study` wrote. The claims, what the papers report for them and what
would support each are below; the verdicts come from the files alone. The table of early exit is that of
benchmarks/early_exit.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spar.common.config import read_json

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs" / "results" / "studies"
EARLY_EXIT = ROOT / "benchmarks" / "results" / "early_exit.json"
DOCUMENT = ROOT / "docs" / "evidence.md"
A_A = "again"


@dataclass(frozen=True)
class Expected:
    """An arm and an endpoint of a study, and on which side of the reference the claim has it; "same" is on neither."""

    arm: str
    endpoint: str
    side: Literal["lower", "higher", "same"]


@dataclass(frozen=True)
class Claim:
    """What a paper says, what it reports for that, and the comparisons that would show it in our world."""

    number: str
    words: str
    paper: str
    study: str
    expected: tuple[Expected, ...]


def _worse(arms: tuple[str, ...]) -> tuple[Expected, ...]:
    """Arms whose flow loss is higher, whose words are worth less, and whose drawings are farther from the world's."""
    sides: tuple[tuple[str, Literal["lower", "higher"]], ...] = (
        ("shapes-loss", "higher"), ("shapes-loss, margin", "lower"), ("shapes-frechet", "higher")
    )  # fmt: skip
    return tuple(Expected(arm, endpoint, side) for arm in arms for endpoint, side in sides)


CLAIMS = (
    Claim(
        "E1", "the pixel stream lifts reconstruction", "PSNR 24.62 without it, 26.65 with it", "tokenizer",
        (
            Expected("no-pixel-stream", "shapes-recon", "lower"),
            Expected("no-pixel-stream", "shapes-recon, psnr_high", "lower"),
        ),
    ),
    Claim(
        "E2", "the semantic stream and its loss keep understanding", "MME-P 709 without both, 1500 with them",
        "tokenizer",
        (
            Expected("no-semantics", "shapes-probe", "lower"),
            Expected("no-semantic-loss", "shapes-probe", "lower"),
        ),
    ),
    Claim(
        "E3", "training the encoder too (stage III) is needed", "PSNR 16.26 without it, 26.65 with it", "tokenizer",
        (
            Expected("frozen-encoder", "shapes-recon", "lower"),
            Expected("no-stage-3", "shapes-recon", "lower"),
        ),
    ),
    Claim(
        "E4", "routing beats the last layer and one mixture for all", "GenEval 0.86 with the last layer, 0.89 routed",
        "routing", _worse(("last", "average", "global")),
    ),
    Claim(
        "E5", "self-alignment beats none", "GenEval 0.86 without it, 0.89 with it", "alignment", _worse(("none",)),
    ),
    Claim(
        "E5", "self-alignment teaches as well as an external encoder", "not reported", "alignment",
        tuple(Expected("external", name, "same") for name in ("shapes-loss", "shapes-loss, margin", "shapes-frechet")),
    ),
    Claim(
        "E6", "understanding survives that the encoder is trained to reconstruct, for the semantic loss",
        "MME-P 1500 with them, 709 without semantic stream and loss", "swap",
        (
            Expected("before", "shapes-vqa", "same"),
            Expected("no-semantic-loss", "shapes-vqa", "lower"),
        ),
    ),
    Claim(
        "E7", "two codebooks beat one; shallow pixel and deep semantic features are the right ones",
        "zero-shot 72.3 with both deep, 82.0", "dualtoken",
        tuple(
            Expected(arm, endpoint, "lower")
            for arm in ("one-codebook", "both-deep", "both-shallow")
            for endpoint in ("shapes-recon", "shapes-zero-shot")
        ),
    ),
    Claim(
        "E7", "the LLM gains from reading both vocabularies", "not looked up",
        "dualtoken-reading",
        (
            Expected("pixel-only", "shapes-vqa", "lower"),
            Expected("semantic-only", "shapes-vqa", "lower"),
            Expected("pixel-only", "shapes-loss", "higher"),
            Expected("semantic-only", "shapes-loss", "higher"),
        ),
    ),
)  # fmt: skip


def verdict(expected: Expected, found: Mapping[str, Any]) -> str:
    """What a difference says about a claim."""
    words = str(found["verdict"])
    if expected.side == "same":
        if words.startswith("undecided"):
            return words if "one seed" in words else words.replace("undecided", "no difference seen")
        return "contradicts it: the arm is better" if words.endswith("better") else "supports it: the arm is worse"
    if words.startswith("undecided"):
        return words
    return "supports it" if words.startswith(expected.side) else "contradicts it"


def rows(claim: Claim) -> Iterator[tuple[str, ...]]:
    """The table's rows of a claim."""
    path = STUDIES / f"{claim.study}.json"
    if not path.is_file():
        yield claim.number, claim.words, claim.paper, f"study `{claim.study}`", "", "not run"
        return
    values = read_json(path)
    differences = {(one["arm"], one["endpoint"]): one for one in values["differences"]}
    head = (claim.number, claim.words, claim.paper)
    for expected in claim.expected:
        one = differences.get((expected.arm, expected.endpoint))
        what = f"`{expected.arm}`, {expected.endpoint}"
        if one is None:
            yield *head, what, "", "not measured"
        else:
            shown = f"{one['value']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})"
            decided = verdict(expected, one)
            again = differences.get((A_A, expected.endpoint))
            if not one["main"] and not one["verdict"].startswith("undecided"):
                decided += " (p not corrected)"
            if again is not None and not again["low"] <= 0 <= again["high"]:
                decided += "; the A/A arm does not hold"
            yield *head, what, shown, decided
        head = ("", "", "")


def a_a_rows() -> Iterator[str]:
    """Of each study that was run, whether its A/A arm holds, its seeds and its circumstances."""
    for path in sorted(STUDIES.glob("*.json")):
        values = read_json(path)
        machine, seeds = values["machine"], len(values["study"]["seeds"])
        seconds = sum(values["seconds"].values()) * seeds
        own = [one for one in values["differences"] if one["arm"] == A_A]
        outside = [one["endpoint"] for one in own if not one["low"] <= 0 <= one["high"]]
        holds = "contains 0" if not outside else f"does not contain 0 in {', '.join(outside)}"
        yield (
            f"| `{path.stem}` | {seeds} | {seconds / 60:.0f} | {holds} | {machine['cores']} cores of {machine['cpu']}, "
            f"torch {values['versions']['torch']} |"
        )


def words_rows() -> Iterator[str]:
    """What each kind of word reads in the arms of studies whose routers were read (docs/routing_by_word.py)."""
    for path in sorted((STUDIES / "words").glob("*.json")):
        arms = read_json(path)["arms"]
        names = list(next(iter(arms.values()))["weights"])
        arms = {arm: one for arm, one in arms.items() if len(set(map(str, one["weights"].values()))) > 1}
        yield f"Mean weights of the routed layers in study `{path.stem}`, by kind of token, where these differ:"
        yield ""
        yield f"| arm | layers | entropy, nats | {' | '.join(names)} |"
        yield "| --- " * (3 + len(names)) + "|"
        for arm, one in arms.items():
            cells = (" ".join(f"{weight:.2f}" for weight in one["weights"][name]) for name in names)
            layers = ", ".join(map(str, one["layers"]))
            yield f"| `{arm}` | {layers} | {one['entropy']:.2f} | {' | '.join(cells)} |"
        yield ""


def claims() -> str:
    """Claims and studies as Markdown."""
    lines = ["| | claim | paper | arm and endpoint | arm less reference (95 %) | verdict |", "| --- " * 6 + "|"]
    lines += ["| " + " | ".join(row) + " |" for claim in CLAIMS for row in rows(claim)]
    studies = [*a_a_rows()]
    if studies:
        lines += ["", "| study | seeds | minutes of training | interval of the A/A arm | where |", "| --- " * 5 + "|"]
        lines += studies
    if words := [*words_rows()]:
        lines += ["", *words[:-1]]
    return "\n".join(lines) + "\n"


def early_exit() -> str:
    """What each way of leaving saves of the LLM's operations, and what it costs."""
    if not EARLY_EXIT.is_file():
        return "Not run.\n"
    values = read_json(EARLY_EXIT)
    layers = list(next(iter(values["results"].values()))["left_after"])
    lines = [
        f"| way | operations saved | error of the condition | leave after {', '.join(layers[:-1])} | time | "
        "Shapes-Gen | less that of 0 | verdict |",
        "| ---: | ---: | ---: | --- | ---: | --- | --- | --- |",
    ]
    for name, one in values["results"].items():
        change = one.get("difference")
        cells = (
            name, f"{one['saved']:.1%}", f"{one['error']:.1%}",
            ", ".join(f"{one['left_after'][layer]:.0%}" for layer in layers[:-1]),
            f"{1 / one['condition_times_faster']:.2f} times",
            f"{one['score']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
            f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})" if change else "",
            change["verdict"] if change else "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    shares, settings, machine = values["llm_share"], values["settings"], values["machine"]
    lines += [
        "",
        f"{values['images']} images, one a prompt, of the same layouts and seeds, {settings['steps']} steps, "
        f"{values['dtype']}; maps fitted to {settings['fit']} layouts.",
        f"{machine['cores']} cores, {machine['processor']}; torch {values['versions']['torch']}. Of the operations of "
        "LLM and guided DiT for an image of 20 steps",
        f"the LLM's are {shares['shapes']:.1%} here and {shares['spar-1b']:.1%} in spar-1b.",
    ]
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """By mark."""
    return {"claims": claims(), "early exit": early_exit()}


def main() -> None:
    text = DOCUMENT.read_text("utf-8")
    for mark, table in tables().items():
        begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
        text = text.split(begin)[0] + begin + table + end + text.split(end)[1]
    DOCUMENT.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
