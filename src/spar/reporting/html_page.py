"""Elements of an HTML page, and its style sheet."""

from __future__ import annotations

from spar.reporting import routing
from spar.reporting.markup import Child, Markup, join, tag


def table(head: list[Child], rows: list[list[Child]], numbers: frozenset[int] = frozenset()) -> Markup:
    """A table that scrolls sideways on a narrow screen; columns in `numbers` are aligned to the right."""

    def cells(name: str, row: list[Child], scope: str | None = None) -> Markup:
        kinds = ["number" if place in numbers else None for place in range(len(row))]
        return join(*(tag(name, cell, class_=kind, scope=scope) for cell, kind in zip(row, kinds, strict=True)))

    body = [tag("tr", cells("td", row)) for row in rows]
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", cells("th", head, "col"))), tag("tbody", *body)),
        class_="scroll", tabindex="0", role="region", aria_label="table",
    )


def facts(values: dict[str, object]) -> Markup:
    """A list of names and values; nested dictionaries become "name value" pairs."""

    def text(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(inner)}" for key, inner in value.items())
        if isinstance(value, (list, tuple)):
            return ", ".join(text(inner) for inner in value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    pairs = [tag("div", tag("dt", str(key)), tag("dd", text(value))) for key, value in values.items()]
    return tag("dl", *pairs, class_="facts")


def anchor(title: str) -> str:
    """The id of a section, for links within the page."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def section(title: str, *children: Child) -> Markup:
    """A titled part of the page."""
    return tag("section", tag("h2", title, id=anchor(title)), *children)


def document(title: str, *body: Child) -> str:
    """The whole page: nothing is loaded from elsewhere and nothing runs."""
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(STYLE + routing.STYLE)),
    )
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", tag("main", *body)), lang="en") + "\n"


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #ffffff; --ink: #17181a; --soft: #5b6068; --line: #e2e3e6;
  --accent: #2a62c9; --good: #17713f; --warn: #8a5a00; --bad: #b3261e; --track: #eceded; }
@media (prefers-color-scheme: dark) { :root { --ground: #121315; --card: #1a1c1f; --ink: #ececee; --soft: #a3a8b0;
  --line: #303338; --accent: #82aefc; --good: #6fce97; --warn: #e9b44f; --bad: #ff8f86; --track: #2a2d31; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 3rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { max-width: 70ch; margin: .25rem 0 1rem; }
.lead, figcaption, .note { color: var(--soft); }
.note { font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: .75rem 0; border-block: 1px solid var(--line); }
a { color: var(--accent); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(192px, 100%), 1fr)); gap: 1.25rem 1rem; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; image-rendering: pixelated; }
figcaption { font-size: .875rem; line-height: 1.4; margin-top: .4rem; }
figcaption strong { color: var(--ink); font-weight: 600; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.pair span { display: block; font-size: .75rem; color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: .5rem 2rem;
  margin: 0; }
.facts dt { font-size: .75rem; color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: .8rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.reached { color: var(--good); } .near { color: var(--warn); } .short { color: var(--bad); }
.reached, .near, .short { font-weight: 600; white-space: nowrap; }
details { border-top: 1px solid var(--line); padding: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
summary .note { font-weight: 400; }
svg { display: block; max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.scroll svg { max-width: none; }
svg text { fill: var(--soft); } svg .strong { fill: var(--ink); }
.axis { stroke: var(--line); stroke-width: 1; fill: none; }
.curve { stroke: var(--accent); stroke-width: 2; fill: none; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke: var(--accent); stroke-width: 1; fill: none; opacity: .35; }
.bar { fill: var(--accent); } .track { fill: var(--track); } .pale { fill-opacity: .5; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.goal { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 2; }
"""
