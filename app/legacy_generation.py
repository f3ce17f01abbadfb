"""One `generate` of protocol 2 or of `POST /api/v1/generate`, run on a session."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from app.chat_protocol import LegacyReply
from app.legacy_answer import LegacyAnswer, StopRules, TailChange
from app.request_models import LegacyGenerate
from swarm_client.generation.text_session import SamplingParams, TextDelta, TextModel, TextSession
from swarm_protocol.errors import InvalidRequestError, MaxLengthError


@dataclass(frozen=True, slots=True)
class LegacyPlan:
    """How many tokens may be generated, and how many go into a reply; None for one reply at the end."""

    max_new_tokens: int
    reply_tokens: int | None


def plan_answer(request: LegacyGenerate, position: int, session_max: int) -> LegacyPlan:
    """Return the lengths that the predecessor's loop around `generate` came to.

    Raises MaxLengthError when not even the first reply fits, InvalidRequestError when no length was given.
    """
    if request.max_new_tokens is None and request.max_length is None:
        raise InvalidRequestError("max_new_tokens or max_length is needed")
    if request.max_new_tokens is None:
        total = (request.max_length or 0) - position
        if total < 1:
            raise InvalidRequestError(f"max_length {request.max_length} leaves no room behind {position} tokens")
        return LegacyPlan(total, None)
    if request.stop_sequence is None:
        return LegacyPlan(request.max_new_tokens, None)
    left = session_max - position
    if request.max_new_tokens > left:
        raise MaxLengthError(position, request.max_new_tokens, session_max)
    return LegacyPlan(left - left % request.max_new_tokens, request.max_new_tokens)


def legacy_sampling(request: LegacyGenerate, max_new_tokens: int) -> SamplingParams:
    """Return the request's sampling in the client library's terms; stops are the caller's business."""
    do_sample = request.do_sample and request.temperature != 0
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=request.temperature if do_sample else None,
        top_k=request.top_k or None,
        top_p=request.top_p or None,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
    )


Generate = Callable[[TextSession, SamplingParams], AbstractContextManager[Iterator[TextDelta]]]
"""Starts a generation, and ends it on leaving: `app.answering`, with all but these two filled in."""


def legacy_replies(
    model: TextModel, session: TextSession, request: LegacyGenerate, generate: Generate
) -> Iterator[LegacyReply | None]:
    """Yield the replies to a request, and None for each piece that makes none; ends early when cancelled.

    Raises SwarmError.
    """
    if request.inputs:
        session.append_text(request.inputs)
    if not session.token_ids:
        raise InvalidRequestError("inputs is needed in the first generate of a session")
    start = len(session.token_ids)
    plan = plan_answer(request, start, session.max_length)
    answer = LegacyAnswer(_stop_rules(model, request), plan.reply_tokens)
    num_tokens = 0
    with generate(session, legacy_sampling(request, plan.max_new_tokens)) as deltas:
        for delta in deltas:
            num_tokens += len(delta.token_ids)
            step = answer.feed(delta)
            if step.tail is not None:
                break
            yield step.reply
            if step.is_end or delta.finish_reason == "cancelled":
                return
        else:
            if plan.reply_tokens is not None:  # the predecessor's next `generate` found no room
                raise MaxLengthError(start + num_tokens, plan.reply_tokens, session.max_length)
            return
    _change_tail(session, step.tail, surplus=len(session.token_ids) - start - num_tokens)
    yield step.reply


def _stop_rules(model: TextModel, request: LegacyGenerate) -> StopRules:
    stop = request.stop_sequence
    stop_ids = () if stop is None else tuple(model.encode(stop))
    return StopRules(stop, tuple(request.extra_stop_sequences), stop_ids, model.encode)


def _change_tail(session: TextSession, change: TailChange, surplus: int) -> None:
    """Make the session end where the answer ends; `surplus` tokens were generated that nobody saw."""
    num_tokens = change.num_tokens + max(0, surplus)
    try:
        session.replace_tail(num_tokens, change.token_ids)
    except MaxLengthError:
        session.replace_tail(num_tokens, change.token_ids[:num_tokens])
