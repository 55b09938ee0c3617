"""The overview that a person finds at `/` and `/docs`: every path, the models and the limits, with nothing from
elsewhere.
"""

from collections.abc import Iterable
from html import escape
from typing import Any

from fastapi.responses import HTMLResponse

from spar.serving.limits import LIMITS, PAGE_PATH

POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>SPAR</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
td {{ padding: .1rem 1rem .1rem 0; vertical-align: top }} code {{ white-space: nowrap }}</style>
<h1>SPAR {version}</h1>
<p>An API in OpenAI's format, for the base address <code>/v1</code> of a client. Models: {models}.{page}</p>
<h2>Paths</h2><table>{paths}</table>
<p><a href="openapi.json">openapi.json</a> has every field, for programs.</p>
<h2>Limits</h2><table>{limits}</table>
</html>
"""


def overview(document: dict[str, Any], models: Iterable[str], *, page: bool) -> HTMLResponse:
    """The overview of an API.

    Args:
        document: its OpenAPI document.
        models: names of the served models.
        page: whether the web page is served too.
    """
    routes = [
        (f"{method.upper()} {path}", route.get("description", ""))
        for path, methods in document["paths"].items() for method, route in methods.items()
    ]  # fmt: skip
    limits = [(name, f"{value}: {what}") for name, value, what in LIMITS]
    text = PAGE.format(
        version=escape(document["info"]["version"]), models=", ".join(map(escape, models)), paths=_rows(routes),
        limits=_rows(limits), page=f' The web page is at <a href=".{PAGE_PATH}">{PAGE_PATH}</a>.' if page else "",
    )  # fmt: skip
    return HTMLResponse(text, headers=POLICY)


def _rows(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<tr><td><code>{escape(one)}</code></td><td>{escape(other)}</td></tr>" for one, other in pairs)
