"""The OpenAPI document: random requests get the declared answers, and every limit is listed."""

from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

from spar.serving import limits

OPERATIONS = {
    "/v1/images/generations": "POST", "/v1/images/edits": "POST", "/v1/chat/completions": "POST",
    "/v1/responses": "POST", "/v1/reconstruct": "POST", "/v1/models": "GET", "/v1/models/{name}": "GET",
    "/health": "GET", "/metrics": "GET",
}  # fmt: skip


@pytest.fixture(scope="module")
def document(address) -> Any:
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "mode"),
    [(path, mode) for path, method in OPERATIONS.items() for mode in GenerationMode
     if mode is GenerationMode.POSITIVE or method == "POST"],
)  # fmt: skip
def test_requests_by_chance_get_what_the_document_says(document, path, mode):
    operation = document[path][OPERATIONS[path]]

    @settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # Words by chance are none that the bundled model knows: a body that fits the schema may well be refused.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


def test_the_document_has_every_route_and_the_limits(address):
    document = httpx2.get(f"{address}/openapi.json").json()
    assert set(document["paths"]) == set(OPERATIONS)
    fields = document["components"]["schemas"]["GenerationRequest"]["properties"]
    maxima = {name: fields[name]["anyOf"][0]["maximum"] for name in ("n", "num_inference_steps", "guidance_scale")}
    assert maxima == {"n": limits.MAX_N, "num_inference_steps": limits.MAX_STEPS, "guidance_scale": limits.MAX_GUIDANCE}


def test_help_tells_every_limit(capsys):
    from spar.cli.main import main

    assert main(["serve", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    names = [name for name in vars(limits) if name.startswith("MAX_") or name.endswith("_SECONDS")]
    unlisted = {"RETRY_SECONDS", "GATHER_SECONDS", "MAX_NEW_TOKENS"}
    assert {name for name, *_ in limits.LIMITS} == set(names) - unlisted
    for name, value, what in limits.LIMITS:
        assert f"{name} = {value}: {what}" in shown
