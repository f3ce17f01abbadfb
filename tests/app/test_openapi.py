"""The site does what `/openapi.json` says of it, for requests that people would not think of."""

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from app.config import GenerationLimits, SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from tests.app.fake_swarm import FakeModel

MODEL = FakeModel(script=["Hello", " you", "</s>"])
APP = create_app(
    SiteConfig(generation=GenerationLimits(max_new_tokens=5)), ModelRegistry([ModelSource(MODEL.name, lambda: MODEL)])
)
site_of(APP).models.load()
SCHEMA = schemathesis.openapi.from_wsgi("/openapi.json", APP)

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
"""Not that whatever breaks the schema is refused: numbers may come as text, which forms have always sent."""


@SCHEMA.exclude(path_regex="^/api/v1/(?!generate)|^/static|^/api/v2").parametrize()
@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)
    assert MODEL.counts.open_sessions == 0


def test_every_path_of_the_site_is_described() -> None:
    described = {
        (path, method.upper())
        for path, methods in APP.test_client().get("/openapi.json").json["paths"].items()
        for method in methods
    }
    found = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method)
        for rule in APP.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert described == found


def test_fields_of_requests_are_described_with_their_ranges() -> None:
    schemas = APP.test_client().get("/openapi.json").json["components"]["schemas"]
    chat = schemas["ChatRequest"]["properties"]
    assert {"type": "number", "minimum": 0, "maximum": 10} in [
        {key: option.get(key) for key in ("type", "minimum", "maximum")} for option in chat["temperature"]["anyOf"]
    ]
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert schemas["ErrorObject"]["required"] == ["message", "type", "param", "code", "retryable", "request_id"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_are_described(path: str) -> None:
    content = APP.test_client().get("/openapi.json").json["paths"][path]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
