"""Frames to commands and events to frames, rule by rule."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.chat_protocol import (
    Delta,
    Done,
    LegacyReply,
    Offer,
    Timings,
    Usage,
    bye_frame,
    delta_frame,
    done_frame,
    error_frame,
    event_frame,
    heartbeat_frame,
    legacy_error_frame,
    legacy_opened_frame,
    legacy_reply_frame,
    not_resumed_frame,
    opened_frame,
    parse_frame,
    pong_frame,
    queued_frame,
    resumed_frame,
    rewound_frame,
    started_frame,
)
from app.errors import ModelNotFoundError, SessionExpiredError, http_status, report_error
from app.request_models import (
    Bye,
    Cancel,
    Generate,
    LegacyGenerate,
    LegacyOpen,
    Open,
    Ping,
    Resume,
    Rewind,
    parse_fields,
)
from swarm_client.events import Prefilled, RoutePart
from swarm_protocol.errors import CacheFullError, InvalidRequestError, MalformedFrameError, MaxLengthError, SwarmError
from swarm_protocol.ids import PeerId
from swarm_protocol.spans import Span

OFFER = Offer(
    "s", "m", 512, {"max_length": 512}, {"temperature": 0.6}, (RoutePart(Span(0, 12), PeerId("12D3KooWfirst1")),)
)
OFFERED = {
    "session_id": "s",
    "model": {"id": "m", "context_length": 512},
    "limits": {"max_length": 512},
    "defaults": {"temperature": 0.6},
    "served_by": {"num_nodes": 1, "route": [{"peer": "…first1", "blocks": "0:12"}]},
}
GENERATE = {"type": "generate", "id": "a", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("protocol", "frame", "command"),
    [
        (None, {"type": "open_inference_session", "max_length": 512}, LegacyOpen(max_length=512)),
        (None, {"type": "open_inference_session", "model": "m", "x": 1}, LegacyOpen(model="m")),
        (None, {"type": "open_inference_session", "model": None, "max_length": None}, LegacyOpen()),
        (None, {"type": "open", "protocol": 3, "model": "m", "resume": True, "x": "k"}, Open(model="m", resume=True)),
        (None, {"type": "resume", "token": "t", "id": "a", "from_seq": 3}, Resume(token="t", id="a", from_seq=3)),
        (3, {"type": "rewind", "messages": 2}, Rewind(messages=2)),
        (3, {"type": "bye"}, Bye()),
        (3, {"type": "open", "protocol": 3}, Open()),
        (3, {"type": "cancel", "id": "a"}, Cancel(id="a")),
        (3, {"type": "cancel"}, Cancel()),
        (3, {"type": "ping", "t": 5}, Ping()),
        (2, {"type": "generate", "max_new_tokens": 1}, LegacyGenerate(max_new_tokens=1)),
        (2, {"type": "generate", "do_sample": 1, "temperature": 0.5}, LegacyGenerate(do_sample=True, temperature=0.5)),
        (2, {"type": "generate", "do_sample": "true"}, LegacyGenerate(do_sample=True)),
        (
            2,
            {"type": "generate", "inputs": None, "do_sample": None, "top_k": None, "top_p": None, "temperature": None,
             "repetition_penalty": None, "max_length": None, "stop_sequence": None, "extra_stop_sequences": None,
             "model": "again"},
            LegacyGenerate(),
        ),
        (2, {"type": "generate", "stop_sequence": ""}, LegacyGenerate()),
        (2, {"type": "generate", "inputs": "a\ud800"}, LegacyGenerate(inputs="a\ufffd")),
        (2, {"type": "generate", "inputs": "\U0001f33c"}, LegacyGenerate(inputs="\U0001f33c")),
        (2, {"type": "generate", "extra_stop_sequences": "\n"}, LegacyGenerate(extra_stop_sequences=["\n"])),
    ],
)  # fmt: skip
def test_frames_become_commands(protocol, frame, command):
    assert parse_frame(json.dumps(frame), protocol) == command


def test_native_generate_ignores_unknown_fields_and_keeps_messages_in_order():
    frame = {
        **GENERATE,
        "params": {"max_tokens": 7, "temperature": 0, "user": "x", "stream_options": {}},
        "stop": "END",
        "logprobs": True,
    }
    command = parse_frame(json.dumps(frame), 3)
    assert isinstance(command, Generate)
    assert (command.params.max_new_tokens, command.params.temperature, command.stop) == (7, 0, ["END"])
    assert [message.content for message in command.chat_messages()] == ["hi"]


@pytest.mark.parametrize("params", [{}, None])
def test_native_generate_needs_no_params(params):
    assert isinstance(parse_frame(json.dumps({**GENERATE, "params": params}), 3), Generate)


@pytest.mark.parametrize(
    ("protocol", "frame", "error"),
    [
        (None, "no JSON", MalformedFrameError),
        (None, "[1]", MalformedFrameError),
        (None, "NaN", MalformedFrameError),
        (None, "[" * 100_000, MalformedFrameError),
        (None, "9" * 10_000, MalformedFrameError),
        (None, b"\x00\x01", MalformedFrameError),
        (None, "{}", InvalidRequestError),
        (None, '{"type": "generate", "inputs": "hi"}', InvalidRequestError),
        (None, '{"type": "open"}', InvalidRequestError),
        (None, '{"type": ["open"]}', InvalidRequestError),
        (None, '{"type": "open_inference_session", "max_length": 0}', InvalidRequestError),
        (None, '{"type": "open_inference_session", "max_length": "many"}', InvalidRequestError),
        (2, '{"type": "open_inference_session"}', InvalidRequestError),
        (2, '{"type": "cancel"}', InvalidRequestError),
        (2, '{"type": "generate", "temperature": -1}', InvalidRequestError),
        (2, '{"type": "generate", "temperature": NaN}', InvalidRequestError),
        (2, '{"type": "generate", "top_p": 1.5}', InvalidRequestError),
        (2, '{"type": "generate", "repetition_penalty": 0}', InvalidRequestError),
        (2, '{"type": "generate", "max_new_tokens": -4}', InvalidRequestError),
        (2, '{"type": "generate", "extra_stop_sequences": [""]}', InvalidRequestError),
        (3, '{"type": "generate", "id": "a"}', InvalidRequestError),
        (3, '{"type": "generate", "id": "a", "messages": []}', InvalidRequestError),
        (3, '{"type": "generate", "id": "a", "messages": [{"role": "tool", "content": ""}]}', InvalidRequestError),
        (3, '{"type": "generate", "messages": [{"role": "user", "content": ""}]}', InvalidRequestError),
        (3, '{"type": "open_inference_session"}', InvalidRequestError),
    ],
)
def test_bad_frames_are_refused_with_a_typed_error(protocol, frame, error):
    with pytest.raises(error) as caught:
        parse_frame(frame, protocol)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner)
    | st.dictionaries(st.text(), inner), max_leaves=8,
)  # fmt: skip
names = st.sampled_from(
    ["type", "protocol", "id", "model", "max_length", "messages", "params", "stop", "inputs", "max_new_tokens",
     "do_sample", "temperature", "stop_sequence", "extra_stop_sequences"]
)  # fmt: skip
kinds = st.sampled_from(["open", "open_inference_session", "generate", "cancel", "ping"])
frames = st.one_of(
    st.text(),
    st.binary(),
    json_values.map(json.dumps),
    st.tuples(kinds, st.dictionaries(names, json_values)).map(lambda pair: json.dumps({**pair[1], "type": pair[0]})),
    st.dictionaries(names, json_values).map(lambda fields: json.dumps({**GENERATE, **fields, "type": "generate"})),
)


@given(frames, st.sampled_from([None, 2, 3]))
def test_any_frame_is_a_command_or_a_typed_error(frame, protocol):
    try:
        command = parse_frame(frame, protocol)
    except SwarmError as error:
        report = report_error(error, "r")
        assert json.loads(legacy_error_frame(report))["ok"] is False
        assert json.loads(error_frame(report, None))["code"] in ("malformed_frame", "invalid_request")
    else:
        assert isinstance(
            command, LegacyOpen | LegacyGenerate | Open | Resume | Generate | Rewind | Cancel | Ping | Bye
        )


@pytest.mark.parametrize(
    ("frame", "fields"),
    [
        (legacy_opened_frame(), {"ok": True}),
        (
            legacy_reply_frame(LegacyReply(" hé\n", True, 2)),
            {"ok": True, "outputs": " hé\n", "stop": True, "token_count": 2},
        ),
        (started_frame("a", 0, 2), {"type": "started", "id": "a", "seq": 0, "queue_position": 2}),
        (queued_frame("a", 1, 1), {"type": "queued", "id": "a", "seq": 1, "position": 1}),
        (
            event_frame(Prefilled(3, 9), "a", 2),
            {"type": "progress", "id": "a", "seq": 2, "prefill_done": 3, "prefill_total": 9},
        ),
        (heartbeat_frame("a"), {"type": "heartbeat", "id": "a"}),
        (rewound_frame(7), {"type": "rewound", "position": 7}),
        (not_resumed_frame("expired"), {"type": "resumed", "resumed": False, "reason": "expired"}),
        (resumed_frame(OFFER, "a", 4), {"type": "resumed", "resumed": True, **OFFERED, "id": "a", "from_seq": 4}),
        (delta_frame(Delta("a", "x", 1), 3), {"type": "delta", "id": "a", "seq": 3, "text": "x", "tokens": 1}),
        (pong_frame(Ping()), {"type": "pong"}),
        (pong_frame(Ping(id="p")), {"type": "pong", "id": "p"}),
        (bye_frame("draining"), {"type": "bye", "reason": "draining"}),
        (
            opened_frame(OFFER, "ab12"),
            {"type": "opened", "protocol": 3, **OFFERED, "resume_token": "ab12"},
        ),
        (
            done_frame(Done("a", "stop", Usage(5, 2, 3), Timings(0.1, None), OFFER.route), 9),
            {"type": "done", "id": "a", "seq": 9, "served_by": OFFERED["served_by"], "finish_reason": "stop",
             "usage": {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 3},
             "timings": {"ttft_s": 0.1, "tokens_per_s": None}},
        ),
        (
            error_frame(report_error(CacheFullError(9, 1), "r1"), "a", 5),
            {"type": "error", "id": "a", "seq": 5, "retry_after": 15,
             "code": "cache_full", "retryable": True, "request_id": "r1",
             "message": "attention cache is full: 9 tokens needed, 1 free"},
        ),
    ],
)  # fmt: skip
def test_events_become_frames(frame, fields):
    assert json.loads(frame) == fields


def test_legacy_errors_keep_the_wording_that_clients_match_on():
    long = json.loads(legacy_error_frame(report_error(MaxLengthError(500, 30, 512), "r")))
    assert long["ok"] is False
    assert long["traceback"].endswith(
        "Maximum length exceeded: prefix 500 + current 30 exceeds pre-allocated maximum 512"
    )
    assert long["error"]["code"] == "max_length_exceeded"
    full = json.loads(legacy_error_frame(report_error(CacheFullError(9, 1), "r")))
    assert "attention cache is full" in full["traceback"]
    expired = json.loads(legacy_error_frame(report_error(SessionExpiredError("ab12", 300), "r")))
    assert "Session ab12 expired" in expired["traceback"]
    assert "\n" not in expired["traceback"]


def test_unknown_exceptions_tell_nothing_but_a_request_id():
    report = report_error(ZeroDivisionError("secret path /root"), "r77")
    assert (report.code, report.retryable) == ("internal_error", True)
    assert "secret" not in legacy_error_frame(report)
    assert "r77" in report.one_line


def test_http_statuses_follow_the_codes():
    assert http_status(report_error(ModelNotFoundError("m", []), "")) == 404
    assert http_status(report_error(CacheFullError(1, 0), "")) == 503
    assert http_status(report_error(MaxLengthError(1, 1, 1), "")) == 400
    assert http_status(report_error(KeyError(), "")) == 500


def test_form_values_are_read_like_json():
    fields = {"inputs": "a", "max_new_tokens": "3", "do_sample": "1", "temperature": "0.7", "x": "y"}
    command = parse_fields(LegacyGenerate, fields)
    assert command == LegacyGenerate(inputs="a", max_new_tokens=3, do_sample=True, temperature=0.7)


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "resume", "token": "t", "id": "a", "from_seq": -1},
        {"type": "resume", "id": "a"},
        {"type": "resume", "token": "t" * 65, "id": "a"},
    ],
)
def test_a_resume_is_checked(frame):
    with pytest.raises(InvalidRequestError):
        parse_frame(json.dumps(frame), None)


def test_a_client_says_that_an_answer_is_to_go_on():
    assert not parse_frame(json.dumps(GENERATE), 3).is_continued
    assert parse_frame(json.dumps({**GENERATE, "continue": True}), 3).is_continued
    assert not parse_frame(json.dumps({**GENERATE, "continue": None}), 3).is_continued
