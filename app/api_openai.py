"""The OpenAI-compatible API, mounted at `/v1` and `/api/v1`."""

import array
import base64
import logging
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

from flask import Flask, Response, request

from app.api_errors import current_request_id, make_report, openai_response
from app.caller import caller_of
from app.errors import ModelNotFoundError, OriginError, SiteDrainingError
from app.http_generation import Generation
from app.http_peer import HttpPeer, PeerGoneError
from app.json_body import json_body
from app.limits import session_length
from app.model_registry import ModelEntry
from app.openai_answer import AnswerForm, ChatForm, CompletionForm, ReplyHead
from app.openai_errors import openai_error, param_of
from app.openai_generation import Answers, Item, answer_prompts, prepare_prompts, text_of
from app.openai_replies import Embedding, EmbeddingList, EmbeddingUsage, ErrorBody, ModelList, ModelObject, Reply
from app.openai_requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    ParamError,
    TextOrIds,
    ignored_params,
    parse_openai,
)
from app.openai_stream import HEADERS, EventStream
from app.security import request_is_own
from app.site import Site
from app.slow_object import SlowObject
from app.usage import Amount
from swarm_client.generation.text_session import TextDelta, TextModel
from swarm_protocol.errors import MaxLengthError, SwarmError

logger = logging.getLogger(__name__)

PREFIXES = ("/v1", "/api/v1")

T = TypeVar("T")


def model_object(entry: ModelEntry, created: int) -> ModelObject:
    """Return a model in OpenAI's form."""
    return ModelObject(
        id=entry.name,
        object="model",
        created=created,
        owned_by="umbel",
        context_length=entry.context_length,
        max_model_len=entry.context_length,
        status=entry.status,
        missing_blocks=list(entry.missing),
    )


def _json(reply: Reply) -> Response:
    return Response(reply.as_json(), mimetype="application/json")


def _body(site: Site) -> dict[str, Any]:
    """Return the request's JSON. Raises SwarmError for what is none, and when the site takes no request."""
    security = site.config.security
    if not (security.public_api or request_is_own(request, security) or caller_of(request.environ).api_key):
        raise OriginError("the API")
    if site.drain.is_started:
        raise SiteDrainingError
    return json_body(request)


def _told(view: Callable[..., Response]) -> Callable[..., Response]:
    """Return `view` with its errors told in OpenAI's form."""

    @wraps(view)
    def told(**arguments: str) -> Response:
        try:
            return view(**arguments)
        except PeerGoneError:
            return Response(status=499)
        except SwarmError as error:
            return openai_response(error)

    return told


def _generate(site: Site, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
    """Answer a chat completion or a completion, streamed or not."""
    values = _body(site)
    command = parse_openai(kind, values)
    model = site.models.find(command.model)
    is_chat = isinstance(command, ChatRequest)
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
    head = ReplyHead(name, int(time.time()), command.model or model.name, model.token_bytes)
    form: AnswerForm = (ChatForm if is_chat else CompletionForm)(head, has_usage=command.has_usage)
    prompts = prepare_prompts(site, model, command)
    peer, answers = HttpPeer(request.environ), Answers(form, prompts, model)
    api = "openai_chat" if is_chat else "openai_completion"
    generation = answer_prompts(site, peer, prompts, api, model.name)
    if command.stream:
        stream = EventStream(site, peer, generation, answers, command, _late_teller(site))
        response = Response(stream, headers=HEADERS)
    else:

        def feed(item: Item) -> bool:
            answers.feed(item)
            return isinstance(item, TextDelta)

        response = _slow_json(site, peer, generation, feed, lambda: answers.whole().as_json())
    ignored = ignored_params(values)
    if ignored:
        response.headers["X-Ignored-Params"] = ", ".join(ignored)
    return response


def _slow_json(
    site: Site, peer: HttpPeer, generation: Generation[T], feed: Callable[[T], bool], whole: Callable[[], str]
) -> Response:
    """Return an object that is made of what `generation` gives."""
    interval_s = site.config.generation.sse_ping_interval_s
    slow = SlowObject(peer, generation, feed, whole, interval_s, _late_teller(site))
    return Response(slow.text() if slow.is_there else slow, mimetype="application/json")


def _late_teller(site: Site) -> Callable[[Exception], ErrorBody]:
    """Return what tells an error of a body, for which there is no request any more when it happens."""
    path, request_id = request.path, current_request_id()

    def tell(error: Exception) -> ErrorBody:
        report = make_report(error, path, request_id)
        site.metrics.error(report.code)
        return openai_error(report, param_of(error))

    return tell


def _embed(site: Site) -> Response:
    """Answer with a vector for each input."""
    command = parse_openai(EmbeddingsRequest, _body(site))
    model = site.models.find(command.model)
    texts = [_ids(model, text) for text in command.input]
    most = session_length(None, model.max_length, site.config.generation)
    for index, ids in enumerate(texts):
        if not ids:
            raise ParamError(f"input.{index}: a text without tokens has no embedding", f"input.{index}")
        if len(ids) > most:
            raise MaxLengthError(0, len(ids), most)
    embedder, peer = model.embedder(), HttpPeer(request.environ)
    vectors: list[list[float]] = []

    def work(generation: Generation[list[list[float]]]) -> None:
        quota = site.quota(peer.caller)
        if quota is not None:
            site.key_usage.ask(quota)
        for text, ids in zip(command.input, texts, strict=True):
            told = text if isinstance(text, str) else text_of(model, ids)
            site.moderator.check_prompt(told, "openai_embeddings", model.name)
        generation.put(embedder.embed(texts))
        site.usage.count(peer.caller.key_id, model.name, Amount(1, sum(map(len, texts))))

    def feed(found: list[list[float]]) -> bool:
        vectors.extend(found)
        return True

    def whole() -> str:
        return _embedding_list(command, model, vectors, sum(map(len, texts))).as_json()

    generation = Generation(site, peer, work, embedder.cancel, lambda: None)
    return _slow_json(site, peer, generation, feed, whole)


def _embedding_list(
    command: EmbeddingsRequest, model: TextModel, vectors: Sequence[Sequence[float]], num_tokens: int
) -> EmbeddingList:
    is_base64 = command.encoding_format == "base64"
    data = [
        Embedding(object="embedding", index=index, embedding=_base64(vector) if is_base64 else list(vector))
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingList(
        object="list",
        data=data,
        model=command.model or model.name,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


def _ids(model: TextModel, text: TextOrIds) -> list[int]:
    return model.encode(text) if isinstance(text, str) else text


def _base64(vector: Sequence[float]) -> str:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def register(app: Flask, site: Site) -> None:
    """Serve the API in `app`."""
    created = int(time.time())

    def list_models() -> Response:
        return _json(ModelList(object="list", data=[model_object(entry, created) for entry in site.models.entries()]))

    def get_model(model_id: str) -> Response:
        for entry in site.models.entries():
            if entry.name == model_id:
                return _json(model_object(entry, created))
        raise ModelNotFoundError(model_id, [entry.name for entry in site.models.entries()])

    def chat_completions() -> Response:
        return _generate(site, ChatRequest)

    def completions() -> Response:
        return _generate(site, CompletionRequest)

    def embeddings() -> Response:
        return _embed(site)

    views: list[tuple[str, str, Callable[..., Response]]] = [
        ("GET", "/models", list_models),
        ("GET", "/models/<path:model_id>", get_model),
        ("POST", "/chat/completions", chat_completions),
        ("POST", "/completions", completions),
        ("POST", "/embeddings", embeddings),
    ]
    for prefix in PREFIXES:
        for method, path, view in views:
            app.add_url_rule(f"{prefix}{path}", f"{view.__name__}{prefix}", _told(view), methods=[method])
