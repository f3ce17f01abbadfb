"""The sessions behind a request of the OpenAI-compatible API, and what comes out of them."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from app.answering import AnswerFacts, answering, conversation_text
from app.http_generation import Generation
from app.http_peer import HttpPeer
from app.limits import answer_length, session_length
from app.native_generation import site_sampling
from app.openai_answer import AnswerForm, OneAnswer, usage
from app.openai_replies import Reply, Usage
from app.openai_requests import ChatRequest, CompletionRequest, ParamError, TextOrIds
from app.site import Site
from swarm_client.events import SessionEvent
from swarm_client.generation.text_session import SamplingParams, TextDelta, TextModel, TextSession
from swarm_protocol.errors import CancelledStepError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in its session, ready to be answered."""

    session: TextSession
    params: SamplingParams
    num_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Queued:
    """The request has a new position in the site's queue: 1 for the next one, 0 once its turn has come."""

    kind: ClassVar[str] = "queued"

    position: int

    @property
    def message(self) -> str:
        """The sentence for people."""
        return f"position {self.position}" if self.position else "its turn has come"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as the APIs show them."""
        return {"position": self.position}


@dataclass(frozen=True, slots=True)
class Begins:
    """The answer to prompt `index` is generated from now on."""

    index: int


@dataclass(frozen=True, slots=True)
class Ends:
    """The answer to prompt `index` is whole; `cached_tokens` of the prompt were not computed again."""

    index: int
    cached_tokens: int


Item = Queued | Begins | TextDelta | Ends | SessionEvent


def prepare_prompts(site: Site, model: TextModel, request: ChatRequest | CompletionRequest) -> list[Prompt]:
    """Return the prompts of a request, each in a session of its own; nothing has gone to the swarm yet.

    Raises SwarmError, and then no session is left open.
    """
    texts: Sequence[TextOrIds | None] = [None] if isinstance(request, ChatRequest) else request.prompt
    with ExitStack() as stack:
        found = []
        for text in texts:
            session = model.open_session(session_length(None, model.max_length, site.config.generation))
            stack.callback(session.close)
            _fill(session, request, text)
            found.append(_prompt(site, session, request, _prompt_text(model, request, text)))
        stack.pop_all()
    return found


def _fill(session: TextSession, request: ChatRequest | CompletionRequest, text: TextOrIds | None) -> None:
    if isinstance(request, ChatRequest):
        session.set_messages(request.chat_messages(), continue_last=request.continue_final_message)
    elif isinstance(text, str):
        session.append_text(text)
    else:
        session.replace_tail(0, text or [])
    if not session.token_ids:
        raise ParamError("prompt: a text without tokens cannot be continued", "prompt")


def _prompt_text(model: TextModel, request: ChatRequest | CompletionRequest, text: TextOrIds | None) -> str:
    if isinstance(request, ChatRequest):
        return conversation_text(request.chat_messages())
    return text if isinstance(text, str) else text_of(model, text or [])


def text_of(model: TextModel, token_ids: Sequence[int]) -> str:
    """Return tokens that a client sent as the text that they stand for."""
    return b"".join(map(model.token_bytes, token_ids)).decode(errors="replace")


def _prompt(site: Site, session: TextSession, request: ChatRequest | CompletionRequest, text: str) -> Prompt:
    limits, num_tokens = site.config.generation, len(session.token_ids)
    most = answer_length(request.max_new_tokens, num_tokens, session.max_length, limits)
    params = site_sampling(request, request.stop, most, limits)
    return Prompt(session, replace(params, logprobs=request.num_top_logprobs), num_tokens, text)


def answer_prompts(site: Site, peer: HttpPeer, prompts: Sequence[Prompt], api: str, model: str) -> Generation[Item]:
    """Return the generation of the answers to `prompts`, one after the other; it closes their sessions."""

    def work(generation: Generation[Item]) -> None:
        for index, prompt in enumerate(prompts):
            generation.put(Begins(index))
            params, session = prompt.params, prompt.session
            facts = AnswerFacts(api, model, prompt.text, peer.caller)
            with answering(site, facts, session, params, generation.put, lambda: generation.is_cancelled) as deltas:
                for delta in deltas:
                    generation.put(delta)
                    if delta.finish_reason == "cancelled":
                        return
            generation.put(Ends(index, session.cached_tokens))
            session.close()

    def cancel() -> None:
        for prompt in prompts:
            prompt.session.cancel()

    def close() -> None:
        for prompt in prompts:
            prompt.session.close()

    return Generation(site, peer, work, cancel, close, lambda found, position: found.put(Queued(position)))


class Answers:
    """The answers to the prompts of one request, as far as they are there."""

    def __init__(self, form: AnswerForm, prompts: Sequence[Prompt], model: TextModel) -> None:
        self._form, self._prompts, self._model = form, prompts, model
        self._answers: list[OneAnswer] = []

    def check_whole(self) -> None:
        """Raise CancelledStepError unless every prompt has its answer: an end without a reason passes for success."""
        if len(self._answers) < len(self._prompts) or self._answers[-1].finish_reason is None:
            raise CancelledStepError("the answer was cancelled")

    def whole(self) -> Reply:
        """Return all answers as one object. Raises CancelledStepError if there is none for a prompt."""
        self.check_whole()
        return self._form.whole(self._answers)

    def total(self) -> Reply:
        """Return the chunk with the usage."""
        return self._form.total(self._answers)

    @property
    def usage(self) -> Usage:
        """The tokens until now."""
        return usage(self._answers)

    def begin(self) -> Reply | None:
        """Return the chunk that a stream begins with, if there is one."""
        return self._form.begin()

    def feed(self, item: Item, *, has_events: bool = False) -> Reply | str | None:
        """Take what came; return the chunk that tells it in a stream, or the text of a comment."""
        index = len(self._answers) - 1
        match item:
            case Begins():
                prompt = self._prompts[item.index]
                has_logprobs = prompt.params.logprobs is not None
                self._answers.append(OneAnswer(prompt.num_tokens, time.monotonic(), has_logprobs))
                return None
            case TextDelta():
                answer = self._answers[index]
                offset = len(answer.text)
                tokens = answer.feed(item, time.monotonic(), self._model.token_bytes)
                if not item.text and not tokens:
                    return None
                return self._form.piece(index, item.text, tokens if answer.wants_logprobs else None, offset)
            case Ends():
                self._answers[index].cached_tokens = item.cached_tokens
                return self._form.finish(index, self._answers)
            case _:
                if has_events:
                    return self._form.event({"type": item.kind, **item.as_json()})
                return f"{item.kind} {' '.join(item.message.split())}"
