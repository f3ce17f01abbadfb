"""The client of `bench.speculation`, in a process of its own since it lives on a host of its own.

    python -m bench.speculation_client ADDRESS MODEL HOST

Takes an order a line, as JSON, `{"way": …, "prompt": …, "tokens": …, "params": …}`, and answers each with a line.
"""

import json
import sys
import time
from typing import Any

import torch

from swarm_client import AutoDistributedModelForCausalLM, ChatMessage, ClientConfig, SamplingParams
from swarm_client.generation.text_model import DistributedTextModel


def main() -> None:
    """Serve the orders of the standard input."""
    peer, source, host = sys.argv[1:]
    torch.set_num_threads(1)
    config = ClientConfig(host=host, relay=False, draft_model=source)
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=[peer], config=config)
    text_model = model.text_model()
    text_model.draft_model()
    try:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(text_model, **json.loads(line))), flush=True)
    finally:
        model.close()


def _answer(model: DistributedTextModel, way: str, prompt: str, is_chat: bool, tokens: int, params: Any) -> Any:
    """Return the ids of an answer of so many tokens, what they took behind the first one, and what guesses came to."""
    session = model.open_session(model.max_length, speculation=way)
    try:
        if is_chat:
            session.set_messages([ChatMessage("user", prompt)])
        else:
            session.append_text(prompt)
        start = len(session.token_ids)
        deltas = iter(session.generate(SamplingParams(tokens, stop_at_eos=False, **params)))
        while len(session.token_ids) == start:
            next(deltas)
        started_s = time.perf_counter()
        for _ in deltas:
            pass
        seconds = time.perf_counter() - started_s
        times = session.times
        return {
            "ids": list(session.token_ids[start:]),
            "token_s": seconds / (len(session.token_ids) - start - 1),
            "drafted": times.drafted_tokens,
            "accepted": times.accepted_tokens,
            "draft_token_s": model.draft_model().token_s,
        }
    finally:
        session.close()


if __name__ == "__main__":
    main()
