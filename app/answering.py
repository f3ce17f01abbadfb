"""The one way in which every API has a session generate: counted, told to the operator, and ended whatever happens."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from app.caller import Caller
from app.native_generation import AnswerMeter
from app.site import Site
from app.socket_link import SocketGoneError
from app.usage import Amount
from swarm_client.events import EventListener, Recovered, SessionEvent
from swarm_client.generation.text_session import ChatMessage, SamplingParams, TextDelta, TextSession
from swarm_client.generation_times import GenerationTimes
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)


WELL = ("stop", "length", "cancelled", "gone")
"""Outcomes that are no error."""


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """What is known of an answer before it begins."""

    api: str
    """`chat`, `legacy_socket`, `legacy_http`, `openai_chat`, `openai_completion`."""
    model: str
    prompt: str
    """What the client sent, or all of a conversation with the roles."""
    caller: Caller
    """Who asked."""


class _Record:
    """One answer, as it goes into the log and the metrics."""

    def __init__(self, site: Site, facts: AnswerFacts, prompt_tokens: int) -> None:
        self._site, self._facts, self._prompt_tokens = site, facts, prompt_tokens
        self._started_s = time.monotonic()
        self._meter = AnswerMeter(self._started_s)
        self._finish_reason: str | None = None
        self._text: list[str] | None = [] if site.config.operation.log_prompts else None

    def event(self, event: SessionEvent) -> None:
        if isinstance(event, Recovered):
            self._site.metrics.rebuilt(self._facts.model)

    def counted(self, deltas: Iterator[TextDelta]) -> Iterator[TextDelta]:
        for delta in deltas:
            self._meter.count(len(delta.token_ids), time.monotonic())
            self._finish_reason = delta.finish_reason or self._finish_reason
            if self._text is not None:
                self._text.append(delta.text)
            yield delta

    def end(self, error: BaseException | None, times: GenerationTimes) -> None:
        facts, metrics, timings = self._facts, self._site.metrics, self._meter.timings()
        # A stop sequence that is looked for behind the session ends the reading, without a reason in the last piece.
        outcome = self._finish_reason or "stop" if error is None else _outcome(error)
        metrics.answer(facts.api, facts.model, outcome, self._prompt_tokens, self._meter.num_tokens)
        metrics.speed(facts.model, timings.ttft_s, timings.tokens_per_s)
        metrics.guessed(facts.model, times.drafted_tokens, times.accepted_tokens)
        told = {
            "api": facts.api,
            "model": facts.model,
            "outcome": outcome,
            "prompt_tokens": self._prompt_tokens,
            "new_tokens": self._meter.num_tokens,
            "first_token_s": timings.ttft_s,
            "tokens_per_s": timings.tokens_per_s,
            "duration_s": round(time.monotonic() - self._started_s, 3),
            "key_id": facts.caller.key_id,
        }
        amount = Amount(1, self._prompt_tokens, self._meter.num_tokens, int(outcome not in WELL))
        self._site.usage.count(facts.caller.key_id, facts.model, amount)
        quota = self._site.quota(facts.caller)
        if quota is not None:
            self._site.key_usage.count_tokens(quota, self._meter.num_tokens)
        if self._text is not None:
            told |= {"prompt": facts.prompt, "answer": "".join(self._text)}
        logger.info("answer", extra={"fields": {name: value for name, value in told.items() if value is not None}})


def conversation_text(messages: Sequence[ChatMessage]) -> str:
    """Return a conversation as one text, each message behind its role."""
    return "\n".join(f"{message.role}: {message.content}" for message in messages)


def _outcome(error: BaseException) -> str:
    if isinstance(error, SwarmError):
        return error.code
    is_bug = isinstance(error, Exception) and not isinstance(error, SocketGoneError)
    return "internal_error" if is_bug else "gone"  # whoever closes a generator has nobody to read it


def _never() -> bool:
    return False


@contextmanager
def answering(
    site: Site,
    facts: AnswerFacts,
    session: TextSession,
    params: SamplingParams,
    on_event: EventListener | None = None,
    is_cancelled: Callable[[], bool] = _never,
) -> Iterator[Iterator[TextDelta]]:
    """Generate; on leaving, whatever is still running ends.

    `is_cancelled` tells of a cancel that came before: `generate` forgets those.
    Raises QuotaError where the caller's API key or address allows no answer now, RefusedError or ModerationFailedError
    where the site's moderation says so, and what `generate` raises.
    """
    quota = site.quota(facts.caller)
    if quota is not None:
        site.key_usage.ask(quota)
        params = _within(params, site.key_usage.left(quota))
    site.moderator.check_prompt(facts.prompt, facts.api, facts.model)
    record = _Record(site, facts, len(session.token_ids))

    def tell(event: SessionEvent) -> None:
        record.event(event)
        if on_event is not None:
            on_event(event)

    deltas = session.generate(params, tell)
    found: BaseException | None = None
    try:
        if is_cancelled():
            session.cancel()
        yield site.moderator.checked(record.counted(deltas), facts.api, facts.model)
    except BaseException as error:
        found = error
        raise
    finally:
        close = getattr(deltas, "close", None)
        if close is not None:
            close()
        record.end(found, session.times)


def _within(params: SamplingParams, left: int | None) -> SamplingParams:
    """Return the settings of an answer that ends when the day's tokens are used up."""
    if left is None:
        return params
    most = max(1, left)
    return replace(params, max_new_tokens=most if params.max_new_tokens is None else min(params.max_new_tokens, most))
