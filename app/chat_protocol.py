"""Pure: websocket frames to commands, and events to frames, for the predecessor's protocol 2 and for protocol 3.

A socket speaks the protocol that its first frame opens, and keeps to it:

    protocol 2   open_inference_session → {ok}; generate → {ok, outputs, stop, token_count} …; an error ends the socket
    protocol 3   {type: open, protocol: 3} → opened; generate → started, progress …, delta …, done; cancel; ping → pong;
                 rewind → rewound; bye; error; queued, route_changed, waiting, recovered as it happens; resume → resumed

Every frame of a generation has a `seq`, which counts them from 0 on; a heartbeat has none, for it says nothing new.

Frames may be sent ahead of the answers. In protocol 2 a generate waits for the one before it; in protocol 3 it is
refused as `busy` while another runs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.answer_log import Refusal
from app.errors import ErrorReport, retry_after_s
from app.request_models import (
    Bye,
    Cancel,
    Fields,
    Generate,
    LegacyGenerate,
    LegacyOpen,
    Open,
    Ping,
    Resume,
    Rewind,
    parse_fields,
)
from swarm_client.events import Prefilled, Recovered, RouteChanged, RoutePart, SessionEvent, Waiting
from swarm_client.generation.text_session import FinishReason
from swarm_protocol.errors import InvalidRequestError, MalformedFrameError
from swarm_protocol.ids import short_peer

ProtocolVersion = Literal[2, 3]

Command = LegacyOpen | LegacyGenerate | Open | Resume | Generate | Rewind | Cancel | Ping | Bye

_COMMANDS: dict[tuple[ProtocolVersion | None, str], type[Fields]] = {
    (None, "open_inference_session"): LegacyOpen,
    (None, "open"): Open,
    (None, "resume"): Resume,
    (2, "generate"): LegacyGenerate,
    (3, "open"): Open,
    (3, "generate"): Generate,
    (3, "cancel"): Cancel,
    (3, "rewind"): Rewind,
    (3, "ping"): Ping,
    (3, "bye"): Bye,
}


def decode_object(frame: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a text frame. Raises MalformedFrameError."""
    if isinstance(frame, bytes):
        raise MalformedFrameError("binary frames are not understood here; send JSON as text")
    try:
        value = json.loads(frame)
    except (ValueError, RecursionError):
        raise MalformedFrameError("the frame is not valid JSON") from None
    if not isinstance(value, dict):
        raise MalformedFrameError(f"a JSON object is expected, not {type(value).__name__}")
    return value


def request_id_of(values: dict[str, Any]) -> str | None:
    """Return the `id` by which a client knows its request, if it sent a usable one."""
    found = values.get("id")
    return found if isinstance(found, str) and len(found) <= 64 else None


def parse_command(values: dict[str, Any], protocol: ProtocolVersion | None) -> Command:
    """Return the command in a frame's object; `protocol` is None until the socket is opened.

    Raises InvalidRequestError for a type that is unknown or out of order, and for a field out of its range.
    """
    found = values.get("type")
    kind = _COMMANDS.get((protocol, found)) if isinstance(found, str) else None
    if kind is None:
        allowed = ", ".join(name for version, name in _COMMANDS if version == protocol)
        raise InvalidRequestError(f"type {str(found)[:40]!r} is not understood here; expected: {allowed}")
    if kind is Open and values.get("protocol") != 3:
        raise InvalidRequestError('open needs "protocol": 3; the older protocol starts with open_inference_session')
    return parse_fields(kind, values)  # type: ignore[return-value]


def parse_frame(frame: str | bytes, protocol: ProtocolVersion | None) -> Command:
    """Return the command in a frame. Raises MalformedFrameError or InvalidRequestError, and nothing else."""
    return parse_command(decode_object(frame), protocol)


@dataclass(frozen=True, slots=True)
class LegacyReply:
    """A piece of an answer in protocol 2; `outputs` includes the stop sequence."""

    outputs: str
    stop: bool
    token_count: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What a protocol 3 session offers: told by `opened`, and again by `resumed`."""

    session_id: str
    model: str
    max_length: int
    limits: dict[str, int]
    defaults: dict[str, float | int | None]
    route: tuple[RoutePart, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one generation; the cached ones are part of the prompt and were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Times of one generation as the site saw them; None where there was no token to time."""

    ttft_s: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer in protocol 3; `tokens` is the number of tokens behind the text."""

    id: str
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer in protocol 3; `times` is the report of `GenerationTimes` where it was asked for."""

    id: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    route: tuple[RoutePart, ...] = ()
    times: dict[str, Any] | None = None


def _dump(**values: object) -> str:
    return json.dumps(values, separators=(",", ":"))


def _dump_legacy(**values: object) -> str:
    return json.dumps(values)  # with the predecessor's spaces, for clients that compare text


def legacy_opened_frame() -> str:
    """Return the answer to `open_inference_session`: clients know it by the missing `outputs`."""
    return _dump_legacy(ok=True)


def legacy_reply_frame(reply: LegacyReply) -> str:
    """Return a protocol 2 piece of an answer."""
    return _dump_legacy(ok=True, outputs=reply.outputs, stop=reply.stop, token_count=reply.token_count)


def legacy_error(report: ErrorReport) -> dict[str, object]:
    """Return the object that tells an error in protocol 2 and in `POST /api/v1/generate`."""
    return {"ok": False, "traceback": report.one_line, "error": error_object(report)}


def legacy_error_frame(report: ErrorReport) -> str:
    """Return a protocol 2 error."""
    return _dump_legacy(**legacy_error(report))


def error_object(report: ErrorReport) -> dict[str, object]:
    """Return the fields that every way of telling an error shares."""
    return {
        "code": report.code,
        "message": report.message,
        "retryable": report.retryable,
        "request_id": report.request_id,
    }


def served_by(route: Sequence[RoutePart]) -> dict[str, object] | None:
    """Return who runs the blocks of a session; None before it has a route."""
    if not route:
        return None
    shown = [{"peer": short_peer(part.peer_id), "blocks": str(part.span)} for part in route]
    return {"num_nodes": len({part.peer_id for part in route}), "route": shown}


def _offered(offer: Offer) -> dict[str, object]:
    return {
        "session_id": offer.session_id,
        "model": {"id": offer.model, "context_length": offer.max_length},
        "limits": offer.limits,
        "defaults": offer.defaults,
        "served_by": served_by(offer.route),
    }


def opened_frame(offer: Offer, resume_token: str | None = None) -> str:
    """Return the answer to `open`; a token where a break of the connection can be resumed."""
    token = {} if resume_token is None else {"resume_token": resume_token}
    return _dump(type="opened", protocol=3, **_offered(offer), **token)


def resumed_frame(offer: Offer, generation_id: str, from_seq: int) -> str:
    """Return the answer to a `resume` that the frames of the generation from `from_seq` on follow."""
    return _dump(type="resumed", resumed=True, **_offered(offer), id=generation_id, from_seq=from_seq)


def not_resumed_frame(reason: Refusal) -> str:
    """Return the answer to a `resume` that came to nothing."""
    return _dump(type="resumed", resumed=False, reason=reason)


def started_frame(generation_id: str, seq: int, position: int) -> str:
    """Return the note that a generation was accepted, and how many go first."""
    return _dump(type="started", id=generation_id, seq=seq, queue_position=position)


def queued_frame(generation_id: str, seq: int, position: int) -> str:
    """Return a new position in the queue; 0 when the generation runs."""
    return _dump(type="queued", id=generation_id, seq=seq, position=position)


def delta_frame(event: Delta, seq: int) -> str:
    """Return a piece of an answer."""
    return _dump(type="delta", id=event.id, seq=seq, text=event.text, tokens=event.tokens)


def event_frame(event: SessionEvent, generation_id: str, seq: int) -> str:
    """Return what happened to the route, or how far the prompt is, while an answer is made."""
    match event:
        case RouteChanged():
            return _dump(type="route_changed", id=generation_id, seq=seq, **event.as_json())
        case Waiting():
            return _dump(type="waiting", id=generation_id, seq=seq, **event.as_json())
        case Recovered():
            return _dump(type="recovered", id=generation_id, seq=seq, **event.as_json())
        case Prefilled():
            return _dump(type="progress", id=generation_id, seq=seq, **event.as_json())


def heartbeat_frame(generation_id: str) -> str:
    """Return the sign that a generation lives though it has nothing to tell."""
    return _dump(type="heartbeat", id=generation_id)


def rewound_frame(position: int) -> str:
    """Return the answer to `rewind`: how many tokens the session keeps."""
    return _dump(type="rewound", position=position)


def done_frame(event: Done, seq: int) -> str:
    """Return the end of an answer."""
    usage, timings = event.usage, event.timings
    times = {} if event.times is None else {"times": event.times}
    return _dump(
        type="done",
        id=event.id,
        seq=seq,
        finish_reason=event.finish_reason,
        usage={
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        timings={"ttft_s": timings.ttft_s, "tokens_per_s": timings.tokens_per_s},
        served_by=served_by(event.route),
        **times,
    )


def error_frame(report: ErrorReport, generation_id: str | None, seq: int | None = None) -> str:
    """Return a protocol 3 error; `generation_id` None when it belongs to no request, `seq` to no generation."""
    number = {} if seq is None else {"seq": seq}
    return _dump(type="error", id=generation_id, **number, **error_object(report), retry_after=retry_after_s(report))


def pong_frame(ping: Ping) -> str:
    """Return the answer to a ping."""
    return _dump(type="pong") if ping.id is None else _dump(type="pong", id=ping.id)


def bye_frame(reason: str) -> str:
    """Return the last frame before the site closes a protocol 3 socket of its own will."""
    return _dump(type="bye", reason=reason)
