"""The lean loop behind chat: token ids in, text deltas out, one step of the swarm per token."""

from collections.abc import Callable, Iterator, Sequence

from swarm_client.generation.detokenizer import Detokenizer
from swarm_client.generation.stopping import StopScanner
from swarm_client.generation.text_session import FinishReason, SamplingParams, TextDelta
from swarm_protocol.errors import CancelledStepError


def stream_text(
    params: SamplingParams,
    next_token: Callable[[], int],
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
    pending: list[int] = []
    finish: FinishReason = "length"
    for _ in range(params.max_new_tokens):
        try:
            token_id = next_token()
        except CancelledStepError:
            finish = "cancelled"
            break
        pending.append(token_id)
        if params.stop_at_eos and token_id in end_tokens:
            finish = "stop"
            break
        text = scanner.feed(detokenizer.push(token_id))
        if scanner.is_stopped:
            yield TextDelta(text, tuple(pending), "stop")
            return
        if text:
            yield TextDelta(text, tuple(pending))
            pending = []
    rest = scanner.feed(detokenizer.flush())
    if scanner.is_stopped:
        finish = "stop"
    yield TextDelta(rest + scanner.flush(), tuple(pending), finish)
