"""Pure: an answer of the client library, put into the objects of the OpenAI-compatible API."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.openai_replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    ChunkDelta,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    PromptDetails,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from swarm_client.generation.text_session import TextDelta, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""For a probability of 0, since JSON has no infinity; what OpenAI shows."""

TokenBytes = Callable[[int], bytes]


@dataclass(slots=True)
class OneAnswer:
    """Collects the answer to one prompt; `started_s` is when its generation began."""

    prompt_tokens: int
    started_s: float
    wants_logprobs: bool = False
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    cached_tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    first_tokens: int = 0

    def feed(self, delta: TextDelta, now_s: float, token_bytes: TokenBytes) -> list[TokenLogprobs]:
        """Take the next piece; return the log-probabilities of those of its tokens that the text shows."""
        if delta.token_ids:
            if self.first_s is None:
                self.first_s, self.first_tokens = now_s, len(delta.token_ids)
            self.last_s = now_s
            self.num_tokens += len(delta.token_ids)
        shown = list(delta.logprobs)
        if delta.finish_reason == "stop":
            shown = _shown(shown, delta.text, token_bytes)
        if delta.finish_reason in ("stop", "length"):
            self.finish_reason = delta.finish_reason
        self.text += delta.text
        self.logprobs += shown
        return shown


def _shown(tokens: Sequence[TokenLogprobs], text: str, token_bytes: TokenBytes) -> list[TokenLogprobs]:
    """Return those of the last tokens that `text` has something of: not the end of a turn, nor a stop sequence."""
    size, end, found = 0, len(text.encode()), []
    for token in tokens:
        if size >= end:
            break
        found.append(token)
        size += len(token_bytes(token.token_id))
    return found


def usage(answers: Sequence[OneAnswer]) -> Usage:
    """Return the tokens of a request's answers."""
    prompt, new = (sum(answer.prompt_tokens for answer in answers), sum(answer.num_tokens for answer in answers))
    cached = sum(answer.cached_tokens for answer in answers)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )


def timings(answers: Sequence[OneAnswer]) -> Timings:
    """Return the times of a request's answers: the prompt's is that to the first token, the answer's is the rest."""
    prompt_n = sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)
    later = sum(answer.num_tokens - answer.first_tokens for answer in answers)
    timed = [answer for answer in answers if answer.first_s is not None]
    prompt_ms = sum(1000 * ((answer.first_s or 0.0) - answer.started_s) for answer in timed)
    predicted_ms = sum(1000 * (answer.last_s - (answer.first_s or 0.0)) for answer in timed)
    return Timings(
        cache_n=sum(answer.cached_tokens for answer in answers),
        prompt_n=prompt_n,
        prompt_ms=round(prompt_ms, 3) if timed else None,
        prompt_per_second=_per_second(prompt_n, prompt_ms),
        predicted_n=sum(answer.num_tokens for answer in answers),
        predicted_ms=round(predicted_ms, 3) if timed else None,
        predicted_per_second=_per_second(later, predicted_ms),
    )


def _per_second(count: int, elapsed_ms: float) -> float | None:
    return round(1000 * count / elapsed_ms, 3) if count and elapsed_ms > 0 else None


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What all objects of one request have in common."""

    id: str
    created: int
    model: str
    token_bytes: TokenBytes


class ChatForm:
    """Chat completions."""

    def __init__(self, head: ReplyHead, *, has_usage: bool) -> None:
        self._head, self._has_usage = head, has_usage

    def whole(self, answers: Sequence[OneAnswer]) -> ChatCompletion:
        """Return the answer as one object."""
        head, (answer,) = self._head, answers
        assert answer.finish_reason is not None
        message = AssistantMessage(role="assistant", content=answer.text, refusal=None)
        logprobs = self._logprobs(answer.logprobs) if answer.wants_logprobs else None
        choice = ChatChoice(index=0, message=message, logprobs=logprobs, finish_reason=answer.finish_reason)
        return ChatCompletion(
            id=head.id, object="chat.completion", created=head.created, model=head.model, choices=[choice],
            usage=usage(answers), timings=timings(answers),
        )  # fmt: skip

    def begin(self) -> ChatChunk | None:
        """Return the first chunk, which has no text."""
        return self._chunk(ChunkDelta(role="assistant", content=""))

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprobs] | None, offset: int) -> ChatChunk:
        """Return a chunk with a piece of the answer; `offset` is where it is in the text."""
        return self._chunk(ChunkDelta(content=text), None if tokens is None else self._logprobs(tokens))

    def finish(self, index: int, answers: Sequence[OneAnswer]) -> ChatChunk:
        """Return the chunk that says why the answer `index`, the last of `answers`, ended."""
        return self._chunk(ChunkDelta(), None, answers[-1].finish_reason, timings=timings(answers))

    def event(self, event: Mapping[str, Any]) -> ChatChunk:
        """Return what happened, to the route or in the queue, in a chunk that adds nothing."""
        return self._chunk(ChunkDelta(), umbel_event=dict(event))

    def total(self, answers: Sequence[OneAnswer]) -> ChatChunk:
        """Return the chunk with the usage, which has no choice."""
        head = self._head
        return ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=[],
            usage=usage(answers),
        )  # fmt: skip

    def _chunk(
        self,
        delta: ChunkDelta,
        logprobs: ChatLogprobs | None = None,
        reason: FinishReason | None = None,
        **extra: Any,
    ) -> ChatChunk:
        head, choice = self._head, ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=reason)
        extra |= {"usage": None} if self._has_usage else {}
        return ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=[choice],
            **extra,
        )  # fmt: skip

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs:
        content = [
            TokenLogprob(
                **self._token(token.token_id, token.logprob),
                top_logprobs=[TopLogprob(**self._token(*alternative)) for alternative in token.top],
            )
            for token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        found = self._head.token_bytes(token_id)
        text = found.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(found)}


class CompletionForm:
    """Completions, in which each prompt has a choice of its own."""

    def __init__(self, head: ReplyHead, *, has_usage: bool) -> None:
        self._head, self._has_usage = head, has_usage

    def whole(self, answers: Sequence[OneAnswer]) -> Completion:
        """Return the answers as one object."""
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._logprobs(answer.logprobs, 0) if answer.wants_logprobs else None,
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        return self._object(choices, usage=usage(answers), timings=timings(answers))

    def begin(self) -> Completion | None:
        """There is no chunk without text at the beginning."""
        return None

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprobs] | None, offset: int) -> Completion:
        """Return a chunk with a piece of the answer `index`; `offset` is where it is in the text."""
        return self._chunk(index, text, None if tokens is None else self._logprobs(tokens, offset))

    def finish(self, index: int, answers: Sequence[OneAnswer]) -> Completion:
        """Return the chunk that says why the answer `index`, the last of `answers`, ended."""
        return self._chunk(index, "", None, answers[-1].finish_reason, timings=timings(answers))

    def event(self, event: Mapping[str, Any]) -> Completion:
        """Return what happened, to the route or in the queue, in a chunk that adds nothing."""
        return self._chunk(0, "", umbel_event=dict(event))

    def total(self, answers: Sequence[OneAnswer]) -> Completion:
        """Return the chunk with the usage, which has no choice."""
        return self._object([], usage=usage(answers))

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: CompletionLogprobs | None = None,
        reason: FinishReason | None = None,
        **extra: Any,
    ) -> Completion:
        extra |= {"usage": None} if self._has_usage else {}
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        return self._object([choice], **extra)

    def _object(self, choices: list[CompletionChoice], **extra: Any) -> Completion:
        head = self._head
        return Completion(
            id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices, **extra
        )

    def _logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs:
        texts = [self._text(token.token_id) for token in tokens]
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[max(token.logprob, LEAST_LOGPROB) for token in tokens],
            top_logprobs=[
                {self._text(token_id): max(logprob, LEAST_LOGPROB) for token_id, logprob in reversed(token.top)}
                for token in tokens
            ],
            text_offset=[offset + sum(map(len, texts[:index])) for index in range(len(texts))],
        )

    def _text(self, token_id: int) -> str:
        return self._head.token_bytes(token_id).decode(errors="replace")


AnswerForm = ChatForm | CompletionForm
