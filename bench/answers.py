"""Answers through nodes to which something happens meanwhile."""

import time
from collections.abc import Callable

from swarm_client import SamplingParams
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession

CACHE = ("--cache-tokens", "16384")
MOST_ID = 40_000
SETTLE_S = 7.0
"""Until the client has read the directory again, so that it knows the new node as it would know any spare one."""


def answer(
    model: DistributedTextModel,
    prompt: list[int],
    num_tokens: int,
    event: tuple[int, Callable[[DistributedTextSession], None]] | None,
    at_end: Callable[[DistributedTextSession], None] = lambda _: None,
) -> tuple[list[int], list[float]]:
    """Return the tokens of an answer and the seconds between them; `event` is what to do after so many tokens."""
    session = model.open_session(len(prompt) + num_tokens)
    session.replace_tail(0, prompt)
    tokens: list[int] = []
    times: list[float] = []
    last_s: float | None = None
    for delta in session.generate(SamplingParams(num_tokens, stop_at_eos=False)):
        now_s = time.perf_counter()
        if last_s is not None and delta.token_ids:
            times += [(now_s - last_s) / len(delta.token_ids)] * len(delta.token_ids)
        if delta.token_ids:
            last_s = now_s
        tokens += delta.token_ids
        if event and len(tokens) >= event[0]:
            event[1](session)
            event, last_s = None, time.perf_counter()
    at_end(session)
    session.close()
    return tokens, times
