"""`POST /api/v1/generate`, the predecessor's one-shot API, and the probes."""

from functools import partial
from typing import Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from app.answering import AnswerFacts, answering
from app.api_errors import error_response
from app.caller import caller_of
from app.chat_protocol import LegacyReply
from app.errors import OriginError, SiteDrainingError
from app.health import live_reply, ready_reply
from app.http_generation import Generation
from app.http_peer import HttpPeer, PeerGoneError
from app.json_body import json_body
from app.legacy_generation import legacy_replies
from app.limits import session_length
from app.request_models import OneShot, parse_fields
from app.security import request_is_own
from app.site import Site
from swarm_protocol.errors import InvalidRequestError

EXTRA_TOKENS = 16  # special tokens that are added to a prompt, and a margin
FIELDS = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    "times",
)  # fmt: skip


def register(app: Flask, site: Site) -> None:
    """Serve the one-shot API and the probes in `app`."""

    @app.post("/api/v1/generate")
    def generate() -> Response:
        try:
            security = site.config.security
            if not (security.public_api or request_is_own(request, security) or caller_of(request.environ).api_key):
                raise OriginError("the API")
            answer = _generate(site, _arguments())
        except PeerGoneError:
            return Response(status=499)
        except HTTPException as error:
            return _told(InvalidRequestError(error.description or error.name), error.code)
        except Exception as error:  # the outermost place of a request: whatever went wrong, the client is told
            return _told(error, None)
        return jsonify(ok=True, **answer)

    @app.get("/health/live", endpoint="health_live")
    @app.get("/healthz")
    def healthz() -> Response:
        return _probe(live_reply(site))

    @app.get("/v1/health", endpoint="health_v1")
    @app.get("/api/v1/health", endpoint="health_api_v1")
    @app.get("/health/ready", endpoint="health_ready")
    @app.get("/readyz")
    def readyz() -> Response:
        return _probe(ready_reply(site))


def _probe(reply: tuple[int, dict[str, object]]) -> Response:
    status, values = reply
    response = jsonify(values)
    response.status_code = status
    return response


def _told(error: Exception, status: int | None) -> Response:
    """Return an error as 200, since clients of the predecessor read the body alone; `?strict=1` gets its status."""
    is_strict = request.args.get("strict") in ("1", "true")
    return error_response(error, status=status if is_strict else 200)


def _arguments() -> dict[str, Any]:
    """Return the request's fields from its query, form or JSON; empty strings in a form mean absent."""
    if request.is_json:
        return {**request.args.to_dict(), **json_body(request)}
    found: dict[str, Any] = request.values.to_dict()
    return {name: value for name, value in found.items() if not (name in FIELDS and value == "")}


def _generate(site: Site, values: dict[str, Any]) -> dict[str, Any]:
    """Return the continuation of `inputs`, without the prompt, from a session of its own; its times if asked for."""
    if site.drain.is_started:
        raise SiteDrainingError
    command = parse_fields(OneShot, values).model_copy(update={"stop_sequence": None, "extra_stop_sequences": []})
    if not command.inputs:
        raise InvalidRequestError("inputs: a text to continue is needed")
    name = values.get("model")
    model = site.models.find(None if name is None else str(name))
    num_tokens = len(model.encode(command.inputs)) + EXTRA_TOKENS
    asked = num_tokens + command.max_new_tokens if command.max_new_tokens else command.max_length
    session = model.open_session(session_length(asked, model.max_length, site.config.generation))

    peer = HttpPeer(request.environ)

    def work(generation: Generation[LegacyReply]) -> None:
        facts = AnswerFacts("legacy_http", model.name, command.inputs or "", peer.caller)
        generate = partial(answering, site, facts, is_cancelled=lambda: generation.is_cancelled)
        for reply in legacy_replies(model, session, command, generate):
            if reply is not None:
                generation.put(reply)

    generation = Generation(site, peer, work, session.cancel, session.close)
    outputs = "".join(reply.outputs for reply in generation.items() if reply is not None)
    return {"outputs": outputs, "times": session.times.as_json()} if command.times else {"outputs": outputs}
