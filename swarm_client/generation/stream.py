"""The lean loop behind chat: token ids in, text deltas out, one step of the swarm per token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from swarm_client.generation.detokenizer import Detokenizer
from swarm_client.generation.stopping import StopScanner
from swarm_client.generation.text_session import FinishReason, SamplingParams, TextDelta, TokenLogprobs
from swarm_protocol.errors import CancelledStepError


@dataclass(frozen=True, slots=True)
class NextToken:
    """A token that was computed; `logprobs` where they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class _Pending:
    """The tokens that are not in a delta yet."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, token: NextToken) -> None:
        self.token_ids.append(token.token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)

    def delta(self, text: str, finish: FinishReason | None = None) -> TextDelta:
        """Return a delta with all of them, and forget them."""
        found = TextDelta(text, tuple(self.token_ids), finish, tuple(self.logprobs))
        self.token_ids, self.logprobs = [], []
        return found


def stream_text(
    params: SamplingParams,
    next_token: Callable[[], NextToken],
    decode: Callable[[Sequence[int]], str],
    context: Sequence[int],
    end_tokens: frozenset[int],
) -> Iterator[TextDelta]:
    """Yield the answer in deltas until `params` or an end token stop it.

    `next_token` computes and keeps the next token; when it raises CancelledStepError the answer ends as cancelled.
    `context` are the tokens before the first one. Raises whatever else `next_token` raises.
    """
    detokenizer = Detokenizer(decode, context)
    scanner = StopScanner(params.stop)
    pending = _Pending()
    finish: FinishReason = "length"
    for _ in range(params.max_new_tokens):
        try:
            token = next_token()
        except CancelledStepError:
            finish = "cancelled"
            break
        pending.add(token)
        if params.stop_at_eos and token.token_id in end_tokens:
            finish = "stop"
            break
        text = scanner.feed(detokenizer.push(token.token_id))
        if scanner.is_stopped:
            yield pending.delta(text, "stop")
            return
        if text:
            yield pending.delta(text)
    rest = scanner.feed(detokenizer.flush())
    if scanner.is_stopped:
        finish = "stop"
    yield pending.delta(rest + scanner.flush(), finish)
