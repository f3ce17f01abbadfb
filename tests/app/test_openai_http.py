"""The OpenAI-compatible API through Flask's own client: forms, fields, refusals, errors."""

import base64
import json
import struct
import threading
import time

import pytest

from app.config import GenerationLimits, SecurityConfig, SiteConfig
from app.errors import SiteDrainingError
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from swarm_protocol.errors import CacheFullError, LimitExceededError, MissingBlocksError, StepTimeoutError
from swarm_protocol.spans import Span
from tests.app.fake_swarm import EOS, FakeModel, TalkingModel, scripted_reply

MODEL = "umbel/fake-1b"
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi there"}]}


def until(condition):
    """Wait for something that is to happen soon."""
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def model():
    return FakeModel(script=["Hello", " you", EOS])


def client_of(model, config=None):
    app = create_app(config or SiteConfig(), ModelRegistry([ModelSource(model.name, lambda: model)]))
    site_of(app).models.load()
    return app.test_client()


@pytest.fixture
def client(model):
    yield client_of(model)
    assert model.counts.open_sessions == 0


def events_of(response):
    """Return the objects of a stream, and whether it ended as a whole one does."""
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    is_done = lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in (lines[:-1] if is_done else lines)], is_done


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_a_chat_completion_is_one_object(client, prefix):
    found = client.post(f"{prefix}/chat/completions", json={"model": MODEL, **HELLO})
    assert found.status_code == 200
    body = found.json
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"], type(body["created"])) == ("chat.completion", MODEL, int)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello you", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == usage["prompt_tokens"] + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert body["timings"]["predicted_n"] == 3
    assert found.headers["X-Request-ID"]


def test_a_stream_has_one_shape_from_its_first_chunk_to_its_last(client):
    chunks, is_done = events_of(client.post(CHAT, json={**HELLO, "stream": True}))
    assert is_done
    assert {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], MODEL, "chat.completion.chunk")
    }
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:]] == [{"content": "Hello"}, {"content": " you"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["timings"]["predicted_n"] == 3


def test_usage_comes_in_a_chunk_of_its_own_where_it_is_asked_for(client, model):
    model.cached_tokens = 4
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks, is_done = events_of(client.post(CHAT, json={**HELLO, **options}))
    assert is_done
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert chunks[-2]["timings"]["cache_n"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_reaches_its_length_says_so(client, stream):
    fields = {**HELLO, "max_tokens": 9, "max_completion_tokens": 1, "stream": stream}
    response = client.post(CHAT, json=fields)
    last = events_of(response)[0][-1] if stream else response.json
    assert last["choices"][0]["finish_reason"] == "length"


def test_sampling_reaches_the_client_library_and_defaults_are_the_sites(model):
    limits = GenerationLimits(temperature=0.3, top_p=0.7, max_new_tokens=50)
    client = client_of(model, SiteConfig(generation=limits))
    sampling = {"temperature": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": -4}
    client.post(CHAT, json={**HELLO, **sampling, "stop": ["###", ""], "max_tokens": 99999})
    client.post(CHAT, json={**HELLO, "temperature": 0, "stop": None, "seed": None, "user": "me", "unknown": 1})
    client.post(CHAT, json={**HELLO, "stop": ""})
    given, greedy, silent = model.seen_params
    for name, value in sampling.items():
        assert getattr(given, name) == value
    assert (given.do_sample, given.stop, given.max_new_tokens) == (True, ("###",), 50)
    assert (greedy.do_sample, greedy.stop, greedy.seed) == (False, (), None)
    assert (silent.do_sample, silent.temperature, silent.top_p, silent.stop) == (True, 0.3, 0.7, ())


def test_messages_of_every_role_and_form_reach_the_model(client, model):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "T", "tool_call_id": "1"},
    ]
    assert client.post(CHAT, json={"messages": messages}).status_code == 200
    text = model.sessions[-1].text
    assert text.startswith(f"<system>D{EOS}<user>a\nb{EOS}<assistant>{EOS}<user>T{EOS}<assistant>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"n": 2}, "n"),
        ({"temperature": 11}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"model": "other"}, "model"),
        ({"model": "\ud800"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, fields, param):
    found = client.post(CHAT, json={**HELLO, **fields})
    error = found.json["error"]
    assert found.status_code == (404 if param == "model" else 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["code"] == ("model_not_found" if param == "model" else "invalid_request")
    assert found.headers["X-Should-Retry"] == "false"
    assert error["request_id"] == found.headers["X-Request-ID"]


def test_wishes_that_are_not_granted_are_named_in_a_header(client):
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = client.post(CHAT, json={**HELLO, "tools": tools, "presence_penalty": 0.5, "frequency_penalty": 0, "n": 1})
    assert found.status_code == 200
    assert found.headers["X-Ignored-Params"] == "tools, presence_penalty"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_are_those_of_what_is_shown(client, model, stream):
    model.script = ["Hello", " wörld", EOS]
    response = client.post(CHAT, json={**HELLO, "logprobs": True, "top_logprobs": 2, "stream": stream})
    objects = events_of(response)[0] if stream else [response.json]
    found = [choice["logprobs"]["content"] for o in objects for choice in o["choices"] if choice["logprobs"]]
    tokens = [token for content in found for token in content]
    assert [token["token"] for token in tokens] == ["Hello", " wörld"]  # not the end of the turn
    assert bytes(tokens[1]["bytes"]).decode() == " wörld"
    assert all(token["logprob"] == -0.5 and len(token["top_logprobs"]) == 2 for token in tokens)
    assert tokens[0]["top_logprobs"][0] == {"token": "Hello", "logprob": -0.5, "bytes": list(b"Hello")}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions_have_offsets(client, stream):
    response = client.post("/v1/completions", json={"prompt": "x", "logprobs": 1, "stream": stream})
    objects = events_of(response)[0] if stream else [response.json]
    found = [choice["logprobs"] for o in objects for choice in o["choices"] if choice["logprobs"]]
    assert [token for part in found for token in part["tokens"]] == ["Hello", " you"]
    assert [offset for part in found for offset in part["text_offset"]] == [0, 5]
    assert [top for part in found for top in part["top_logprobs"]] == [{"Hello": -0.5}, {" you": -0.5}]
    assert [value for part in found for value in part["token_logprobs"]] == [-0.5, -0.5]


def test_prompts_of_one_request_are_continued_each_by_itself(client, model):
    ids = model.encode("some words")
    found = client.post("/v1/completions", json={"prompt": ["a", ids], "max_tokens": 2}).json
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    assert [(c["index"], c["text"], c["finish_reason"]) for c in found["choices"]] == [
        (0, "Hello you", "length"),
        (1, "", "stop"),
    ]
    assert found["usage"]["prompt_tokens"] == 1 + len(ids)
    chunks, is_done = events_of(client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True}))
    assert is_done
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "Hello you", 1: "Hello you"}
    assert [c["choices"][0]["finish_reason"] for c in chunks].count("stop") == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [["x"]]}, "prompt.0"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["x"] * 21}, "prompt"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "echo": True}, "echo"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ],
)
def test_completions_refuse_by_name(client, fields, param):
    found = client.post("/v1/completions", json=fields)
    assert (found.status_code, found.json["error"]["param"]) == (400, param)


def test_embeddings_come_as_numbers_and_as_base64(client, model):
    ids = model.encode("three")
    body = client.post("/v1/embeddings", json={"input": ["one", "two three", ids], "model": MODEL}).json
    assert (body["object"], body["model"]) == ("list", MODEL)
    assert [(e["object"], e["index"], len(e["embedding"])) for e in body["data"]] == [
        ("embedding", i, 4) for i in range(3)
    ]
    assert body["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    packed = client.post("/v1/embeddings", json={"input": "one", "encoding_format": "base64"}).json["data"][0]
    assert struct.unpack("<4f", base64.b64decode(packed["embedding"])) == pytest.approx(body["data"][0]["embedding"])
    single = client.post("/api/v1/embeddings", json={"input": ids}).json["data"]
    assert single == [{**body["data"][2], "index": 0}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x", ""]}, "input.1"),
        ({"input": "x", "dimensions": 2}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "model": "other"}, "model"),
    ],
)
def test_embeddings_refuse_by_name(client, fields, param):
    found = client.post("/v1/embeddings", json=fields)
    assert (found.status_code, found.json["error"]["param"]) == (404 if param == "model" else 400, param)


ERRORS = [
    (CacheFullError(9, 1), 503, "capacity_exceeded", "true"),
    (MissingBlocksError(MODEL, [Span(1, 2)]), 503, "no_servers_for_blocks", "false"),
    (StepTimeoutError("too slow"), 504, "swarm_timeout", "true"),
    (LimitExceededError("too many"), 429, "rate_limit_exceeded", "true"),
    (ZeroDivisionError("secret"), 500, "internal_error", "true"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "retry"), ERRORS, ids=[code for _, _, code, _ in ERRORS])
def test_an_error_before_the_answer_has_its_status(client, model, error, status, code, retry, stream):
    model.error_at = (0, error)
    found = client.post(CHAT, json={**HELLO, "stream": stream})
    assert found.status_code == status
    assert found.json["error"]["code"] == code
    assert found.headers["X-Should-Retry"] == retry
    assert found.headers["Retry-After"] == "30"
    assert "secret" not in found.text
    model.error_at = (0, error)
    embedding = client.post("/v1/embeddings", json={"input": "x"})
    assert (embedding.status_code, embedding.json["error"]["code"]) == (status, code)


@pytest.mark.parametrize(("error", "status", "code", "retry"), ERRORS, ids=[code for _, _, code, _ in ERRORS])
def test_an_error_in_a_stream_is_its_last_event(client, model, error, status, code, retry):
    model.error_at = (1, error)
    chunks, is_done = events_of(client.post(CHAT, json={**HELLO, "stream": True}))
    assert not is_done
    assert chunks[-2]["choices"][0]["delta"] == {"content": "Hello"}
    assert chunks[-1]["error"]["code"] == code
    assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1])
    assert "secret" not in json.dumps(chunks)


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
def test_an_answer_that_takes_long_begins_with_white_space(model, monkeypatch, path):
    monkeypatch.setattr("app.slow_object.WAIT_S", 0.0)
    monkeypatch.setattr("app.slow_object.BEGUN_WAIT_S", 0.0)
    model.delay_s = 0.25
    client = client_of(model, SiteConfig(generation=GenerationLimits(sse_ping_interval_s=0.0)))
    found = client.post(path, json={**HELLO, "input": "x"})
    assert found.status_code == 200
    assert found.data.startswith(b"  ")
    assert found.json["object"] in ("chat.completion", "list")
    model.error_at = (0, ZeroDivisionError("secret"))
    broken = client.post(path, json={**HELLO, "input": "x"})
    assert broken.data.strip() == b""  # and the connection is broken off
    model.wait_until_closed()


def test_a_slow_answer_that_nobody_reads_is_ended(model, monkeypatch):
    monkeypatch.setattr("app.slow_object.WAIT_S", 0.0)
    model.delay_s = 20.0
    client = client_of(model)
    client.post(CHAT, json=HELLO).close()
    model.wait_until_closed()


def test_a_prompt_that_is_too_long_is_refused_as_such(client):
    found = client.post(CHAT, json={"messages": [{"role": "user", "content": "word " * 3000}]})
    assert (found.status_code, found.json["error"]["code"]) == (400, "context_length_exceeded")
    for path in ("completions", "embeddings"):
        found = client.post(f"/v1/{path}", json={"prompt": "word " * 3000, "input": "word " * 3000})
        assert (found.status_code, found.json["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/api/v1/completions"])
def test_bodies_that_are_none_get_an_error_in_the_right_form(client, path):
    for data in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000):
        found = client.post(path, data=data, content_type="application/json")
        assert (found.status_code, found.json["error"]["type"]) == (400, "invalid_request_error")
    found = client.post(path, data=b" " * 2_000_000, content_type="application/json")
    assert (found.status_code, found.json["error"]["code"]) == (413, "http_413")
    found = client.get(path)
    assert (found.status_code, found.json["error"]["code"]) == (405, "http_405")
    assert client.get("/v1/nothing").json["error"]["param"] is None


def test_a_draining_site_and_a_private_one_refuse(model):
    client = client_of(model)
    site_of(client.application).drain._started.set()
    found = client.post(CHAT, json=HELLO)
    assert (found.status_code, found.json["error"]["code"]) == (503, SiteDrainingError.code)
    private = client_of(model, SiteConfig(security=SecurityConfig(public_api=False)))
    for path in (CHAT, "/v1/completions", "/v1/embeddings"):
        found = private.post(path, json=HELLO)
        assert (found.status_code, found.json["error"]["type"]) == (403, "permission_error")
        assert private.post(path, json={}, headers={"Origin": "http://localhost"}).status_code == 400


def test_all_places_taken_is_told_and_given_back(model):
    client = client_of(model, SiteConfig(generation=GenerationLimits(http_max=1)))
    with site_of(client.application).http_generations.take():
        found = client.post(CHAT, json=HELLO)
        assert (found.status_code, found.json["error"]["code"]) == (503, "capacity_exceeded")
    for _ in range(3):
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert client.post(CHAT, json={**HELLO, "stream": True}).text.endswith("[DONE]\n\n")
    assert model.counts.open_sessions == 0


def test_events_are_comments_or_chunks_that_clients_ignore():
    model = TalkingModel(reply=scripted_reply)
    client = client_of(model)
    fields = {"messages": [{"role": "user", "content": "replaced"}], "stream": True}
    plain = client.post(CHAT, json=fields)
    assert "\n: waiting blocks 12–15 have no node; waiting 30 s more\n" in plain.text
    assert "umbel_event" not in plain.text
    chunks, is_done = events_of(client.post(CHAT, json={**fields, "stream_options": {"include_events": True}}))
    assert is_done
    told = [chunk["umbel_event"] for chunk in chunks if "umbel_event" in chunk]
    assert [event["type"] for event in told] == ["route_changed", *["waiting"] * 3, "route_changed", "recovered"]
    assert all(chunk["choices"][0]["delta"] == {} for chunk in chunks if "umbel_event" in chunk)


@pytest.mark.parametrize("has_events", [False, True])
def test_the_place_in_the_queue_is_told(has_events):
    client = client_of(TalkingModel(reply=scripted_reply), SiteConfig(generation=GenerationLimits(running_max=1)))
    queue, found = site_of(client.application).queue, []
    fields = {**HELLO, "stream": True, "stream_options": {"include_events": has_events}}

    def ask():
        found.append(client.post(CHAT, json=fields).text)

    asking = threading.Thread(target=ask)
    with queue.turn(lambda _: None):
        asking.start()
        until(lambda: queue.num_waiting == 1)
    asking.join(10)
    (text,) = found
    assert text.endswith("[DONE]\n\n")
    if has_events:
        lines = [line for line in text.split("\n\n") if line.startswith("data: {")]
        events = [json.loads(line[6:]).get("umbel_event") for line in lines]
        assert [event for event in events if event and event["type"] == "queued"] == [
            {"type": "queued", "position": 1},
            {"type": "queued", "position": 0},
        ]
    else:
        assert text.index("\n: queued position 1\n") < text.index("\n: queued its turn has come\n")
        assert "umbel_event" not in text


def test_an_answer_that_was_begun_is_continued(client):
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Hello"}]
    found = client.post(CHAT, json={"messages": messages, "continue_final_message": True})
    assert found.json["choices"][0]["message"]["content"] == " you"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        (
            {
                "messages": [*HELLO["messages"], {"role": "assistant", "content": "I"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_by_name(client, fields, param):
    found = client.post(CHAT, json={**HELLO, **fields})
    assert (found.status_code, found.json["error"]["param"]) == (400, param)


def test_pages_of_other_origins_may_send_the_headers_of_openais_library(client):
    asked = "authorization, content-type, x-stainless-os, openai-organization, cookie-like"
    found = client.options(CHAT, headers={"Origin": "https://a.example", "Access-Control-Request-Headers": asked})
    allowed = found.headers["Access-Control-Allow-Headers"].lower()
    assert "x-stainless-os" in allowed
    assert "openai-organization" in allowed
    assert "cookie-like" not in allowed
