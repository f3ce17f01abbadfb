"""Pure: the OpenAPI 3.1 description of every HTTP path of the site, made from the models that the paths use."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from app.openai_replies import (
    ChatChunk,
    ChatCompletion,
    Completion,
    EmbeddingList,
    ErrorBody,
    ModelList,
    ModelObject,
)
from app.openai_requests import ChatRequest, CompletionRequest, EmbeddingsRequest
from app.reports import ReportRequest
from app.request_models import OneShot
from app.swarm_replies import PetalsState, ReachReply, SwarmEvent, SwarmReply
from app.usage_replies import UsageReply

Schema = dict[str, Any]

PREFIXES = ("/v1", "/api/v1")


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SiteError(_Shape):
    """What went wrong, on paths that are not OpenAI's."""

    code: str
    message: str
    retryable: bool
    request_id: str | None = None


class SiteErrorBody(_Shape):
    """An error of a path that is not OpenAI's."""

    error: SiteError


class OneShotReply(_Shape):
    """The answer of `POST /api/v1/generate`, or its error: both have status 200 unless `strict` is asked for."""

    ok: bool
    outputs: str | None = None
    times: dict[str, Any] | None = None
    traceback: str | None = Field(default=None, title="Error", description="one line: the error's kind and message")
    error: SiteError | None = None


class Health(_Shape):
    """That the process lives."""

    status: str
    websockets: int


class Readiness(_Shape):
    """Whether visitors can be served, and the state of each model."""

    status: str
    models: dict[str, str]


class EmbedToken(_Shape):
    """By which an embedded chat opens its session; good for ten minutes."""

    token: str


REQUESTS = (ChatRequest, CompletionRequest, EmbeddingsRequest, OneShot, ReportRequest)
REPLIES = (
    ChatCompletion, ChatChunk, Completion, EmbeddingList, ModelList, ModelObject, ErrorBody, SiteErrorBody,
    OneShotReply, Health, Readiness, EmbedToken, PetalsState, ReachReply, SwarmEvent, SwarmReply, UsageReply,
)  # fmt: skip


def openapi_document(version: str) -> Schema:
    """Return the description; `version` is the site's."""
    _, found = models_json_schema(
        [*((model, "validation") for model in REQUESTS), *((model, "serialization") for model in REPLIES)],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Umbel",
            "version": version,
            "description": "A chat site in front of a model that volunteers run together. docs/api.md has the rest.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_openai_paths(), **_site_paths(), **_swarm_paths(), **_widget_paths()},
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "an API key of this site"}},
        },
        "security": [{}, {"key": []}],
    }


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _json(model: type[BaseModel], description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(model)}}}


def _text(description: str, kind: str = "text/plain") -> Schema:
    return {"description": description, "content": {kind: {"schema": {"type": "string"}}}}


def _operation(name: str, summary: str, responses: Mapping[str, Schema], **more: Any) -> Schema:
    return {"operationId": name, "summary": summary, **more, "responses": dict(responses)}


def _body(model: type[BaseModel], *kinds: str) -> Schema:
    schema = {"schema": _ref(model)}
    return {"required": True, "content": dict.fromkeys(("application/json", *kinds), schema)}


def _parameter(name: str, place: str, description: str, **schema: Any) -> Schema:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": description,
        "schema": schema or {"type": "string", "minLength": 1},
    }


_OPENAI_ERRORS = {
    "400": _json(ErrorBody, "a field is wrong, or asks for what is not done here; `param` names it"),
    "404": _json(ErrorBody, "there is no such model"),
    "429": _json(ErrorBody, "a limit of the nodes; `Retry-After` says when to come back"),
    "503": _json(ErrorBody, "no capacity, or blocks that nobody serves; `X-Should-Retry` says whether to try again"),
    "504": _json(ErrorBody, "a node took too long"),
    "default": _json(ErrorBody, "any other error"),
}


def _streamed(whole: type[BaseModel], chunk: type[BaseModel]) -> Schema:
    """Return the response of an operation that answers with an object, or with a stream of chunks."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(chunk), _ref(ErrorBody)]},
    }
    event = {
        "type": "object",
        "description": "one of the server-sent events; the last one's data is `[DONE]`, or an error",
        "properties": {"event": {"const": "message"}, "data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    return {
        "description": "the answer; with `stream`, as server-sent events",
        "content": {"application/json": {"schema": _ref(whole)}, "text/event-stream": {"schema": event}},
    }


def _openai_paths() -> Schema:
    paths: Schema = {}
    for prefix in PREFIXES:
        suffix = "" if prefix == "/v1" else "_api"
        model_id = _parameter("model_id", "path", "the id of a model; it may contain slashes")
        paths |= {
            f"{prefix}/models": {
                "get": _operation(
                    f"list_models{suffix}", "The models of the site",
                    {"200": _json(ModelList, "the models"), "default": _OPENAI_ERRORS["default"]},
                )
            },
            f"{prefix}/models/{{model_id}}": {
                "get": _operation(
                    f"get_model{suffix}", "One of them",
                    {"200": _json(ModelObject, "the model"), "404": _OPENAI_ERRORS["404"],
                     "default": _OPENAI_ERRORS["default"]},
                    parameters=[model_id],
                )
            },
            f"{prefix}/chat/completions": {
                "post": _operation(
                    f"chat_completions{suffix}", "The answer to a conversation",
                    {"200": _streamed(ChatCompletion, ChatChunk), **_OPENAI_ERRORS},
                    requestBody=_body(ChatRequest),
                )
            },
            f"{prefix}/completions": {
                "post": _operation(
                    f"completions{suffix}", "The continuation of texts",
                    {"200": _streamed(Completion, Completion), **_OPENAI_ERRORS},
                    requestBody=_body(CompletionRequest),
                )
            },
            f"{prefix}/embeddings": {
                "post": _operation(
                    f"embeddings{suffix}", "Texts as vectors",
                    {"200": _json(EmbeddingList, "the vectors"), **_OPENAI_ERRORS},
                    requestBody=_body(EmbeddingsRequest),
                )
            },
        }  # fmt: skip
    return paths


def _site_paths() -> Schema:
    site_error = _json(SiteErrorBody, "an error")
    plain_error = _text("an error, in one sentence")
    strict = _parameter("strict", "query", "`1` gives errors their status", type="string", enum=["1", "true"])
    forms = ("application/x-www-form-urlencoded", "multipart/form-data")
    return {
        "/api/v1/generate": {
            "post": _operation(
                "generate", "One continuation of one text, as Petals' chat had it",
                {"200": _json(OneShotReply, "the continuation, or an error"),
                 "default": _json(OneShotReply, "an error, with `strict`")},
                requestBody=_body(OneShot, *forms), parameters=[strict],
            )
        },
        "/api/v2/generate": {
            "get": _operation(
                "websocket", "The websocket of protocols 2 and 3; docs/api.md describes its frames",
                {"101": {"description": "the websocket is open"}, "default": site_error},
            )
        },
        "/api/v2/usage": {
            "get": _operation(
                "usage", "What the API key that asks has used",
                {"200": _json(UsageReply, "its usage"), "400": site_error,
                 "401": _json(SiteErrorBody, "no key was sent, or none in use"), "default": site_error},
                parameters=[_parameter("days", "query", "the last days, today among them", type="integer")],
            )
        },
        "/api/v2/reports": {
            "post": _operation(
                "report", "A reader's report of an answer; for the site's own pages, where it takes any",
                {"204": {"description": "it is kept"}, "default": site_error}, requestBody=_body(ReportRequest),
            )
        },
        **{
            path: {
                "get": _operation(
                    name, "Whether the process lives", {"200": _json(Health, "it does"), "default": plain_error}
                )
            }
            for path, name in (("/healthz", "healthz"), ("/health/live", "health_live"))
        },
        **{
            path: {
                "get": _operation(
                    name, "Whether visitors can be served",
                    {"200": _json(Readiness, "they can"), "503": _json(Readiness, "not now"),
                     "default": _OPENAI_ERRORS["default"] if "/v1/" in path else plain_error},
                )
            }
            for path, name in (
                ("/readyz", "readyz"), ("/health/ready", "health_ready"),
                ("/v1/health", "health"), ("/api/v1/health", "health_api"),
            )
        },
        "/openapi.json": {
            "get": _operation(
                "openapi", "This description",
                {"200": {"description": "it", "content": {"application/json": {"schema": {"type": "object"}}}},
                 "default": plain_error},
            )
        },
        "/": {
            "get": _operation(
                "chat_page", "The chat page", {"200": _text("the page", "text/html"), "default": plain_error}
            )
        },
        "/static/{build_name}/{name}": {
            "get": _operation(
                "static_file", "A file of the page, under a path that changes with the content of all",
                {"200": {"description": "the file", "content": {"*/*": {}}},
                 "304": {"description": "it has not changed"}, "404": plain_error, "default": plain_error},
                parameters=[
                    _parameter("build_name", "path", "the build that the page belongs to"),
                    _parameter("name", "path", "the path of the file; it may contain slashes"),
                ],
            )
        },
    }  # fmt: skip


def _widget_paths() -> Schema:
    plain_error = _text("an error, in one sentence")
    page = {"200": _text("the page", "text/html"), "default": plain_error}
    key = _parameter("name", "path", "a widget key")
    missing = {"404": _text("an empty page: the key is not in use", "text/html")}
    script = {"200": _text("the script", "text/javascript"), "404": plain_error, "default": plain_error}
    version = _parameter("version", "path", "`1` for the newest, or a version that never changes, such as `1.0.0`")
    return {
        "/widget": {"get": _operation("widget_page", "The page that writes the line to embed the chat", page)},
        "/widget/v{version}.js": {
            "get": _operation("loader", "The script that other pages load", script, parameters=[version])
        },
        "/embed/{name}": {
            "get": _operation("embed_page", "The chat in a frame, for a widget key", page | missing, parameters=[key])
        },
        "/embed/{name}/token": {
            "get": _operation(
                "embed_token", "A new token for that page",
                {"200": _json(EmbedToken, "the token"), "404": plain_error, "default": plain_error}, parameters=[key],
            )
        },
    }  # fmt: skip


def _swarm_paths() -> Schema:
    unchanged = {"description": "it is what `If-None-Match` names"}
    error = _json(SiteErrorBody, "an error")
    event = {
        "type": "object",
        "properties": {
            "event": {"const": "swarm"},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(SwarmEvent)},
        },
        "required": ["event", "data"],
    }
    model = _parameter("model", "query", "the id of a model; the first one without it")
    language = _parameter("lang", "query", "a language, such as `fr`; else what `Accept-Language` asks for")
    return {
        "/api/v2/swarm": {
            "get": _operation(
                "swarm", "Who serves which blocks, what is missing, and whether one can chat",
                {"200": _json(SwarmReply, "the state"), "304": unchanged, "default": error},
            )
        },
        "/api/v2/swarm/events": {
            "get": _operation(
                "swarm_events", "The state of the models, now and whenever it changes",
                {"200": {"description": "server-sent events", "content": {"text/event-stream": {"schema": event}}},
                 "503": _json(SiteErrorBody, "as many listen as may"), "default": error},
            )
        },
        "/api/v2/swarm/badge.svg": {
            "get": _operation(
                "swarm_badge", "A picture of a model's state, for other pages",
                {"200": _text("the picture", "image/svg+xml"), "304": unchanged,
                 "404": _json(SiteErrorBody, "there is no such model"), "default": error},
                parameters=[model],
            )
        },
        "/api/v1/state": {
            "get": _operation(
                "petals_state", "The state in the form of health.petals.dev",
                {"200": _json(PetalsState, "the state"), "304": unchanged, "default": error},
            )
        },
        "/api/v1/is_reachable/{peer_id}": {
            "get": _operation(
                "is_reachable", "Whether the site gets through to a peer",
                {"200": _json(ReachReply, "whether it does"), "400": _json(SiteErrorBody, "that is no peer id"),
                 "503": _json(SiteErrorBody, "too many are looked for"), "default": error},
                parameters=[_parameter("peer_id", "path", "the peer's id in base58")],
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics", "The swarm's state for Prometheus",
                {"200": _text("the gauges"), "default": _text("an error, in one sentence")},
            )
        },
        "/swarm": {
            "get": _operation(
                "swarm_page", "The status page",
                {"200": _text("the page", "text/html"), "default": _text("an error, in one sentence")},
                parameters=[language],
            )
        },
    }  # fmt: skip
