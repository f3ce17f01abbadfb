"""Tokens/s with tokens guessed ahead, against those without, over a made-up wide area network.

    python -m bench.speculation [--settings far lan] [--rounds 5] [--tokens 96] [--kinds chat …] [--no-ties]

SmolLM2 in float32 through three nodes, each a host of its own as in `bench.wan`, a thread each. Three ways take turns
with each prompt, in an order that changes with each round: nothing is guessed (`off`), prompt lookup (`ngram`), and
with a draft model, a copy of SmolLM2 whose blocks are packed in 4 bits (`draft`). What is compared is the time from the
first token of an answer to its last, prompt by prompt; the tokens must be the same.

The last table is how often in bfloat16 a token differs with the number of columns in which it is computed, which is
what is left of differences where logits of 16 bits tie. Needs root and a C compiler.
"""

import argparse
import signal
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch

from app.demo import find_model
from bench.machine import describe_machine
from bench.plain_text import TEXT
from bench.wan import SETTINGS, wan_swarm
from server_node.compute.block_loader import load_blocks
from swarm_protocol.model import load_ends, open_checkpoint
from swarm_protocol.spans import Span

WAYS = ("off", "ngram", "draft")

CHATS = (
    "How do I keep tomatoes from getting blight in a wet summer?",
    "Explain to a child why the sky is blue and sunsets are red.",
    "Write a short letter to my landlord about a broken heating.",
    "What should I see in Lisbon if I have only two days?",
)
PARAGRAPHS = [" ".join(TEXT.split()[start : start + 90]) for start in (0, 200, 400)]
REPEATING = [f"{text}\n\n{text}\n\n{' '.join(text.split()[:6])}" for text in PARAGRAPHS]
"""Texts that go on with what they have said before."""

KINDS: dict[str, tuple[tuple[str, ...], bool, dict[str, Any]]] = {
    "chat": (CHATS, True, {}),
    "chat, sampled": (CHATS, True, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 11}),
    "repeating": (tuple(REPEATING), False, {}),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["far", "lan"], choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--no-ties", action="store_true", help="leave out the last table")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # namespaces and nodes are ended
    print(f"{describe_machine()}\n", flush=True)
    with wan_swarm(str(find_model()), ["0:10", "10:20", "20:30"], "bench.speculation_client") as (hosts, client):
        for name in options.settings:
            setting = SETTINGS[name]
            print(f"3 nodes, {setting}, answers of {options.tokens} tokens\n", flush=True)
            print("| text | way | tokens/s | × off, median | smallest–largest | guessed right | same tokens |")
            print("|---|---|---|---|---|---|---|", flush=True)
            for kind in options.kinds:
                hosts.set_links(setting.round_trip_s / 2, setting.mbit_per_s)
                for row in _rows(client, kind, options.rounds, options.tokens):
                    print(row, flush=True)
                hosts.set_links(0.0, 0.0)
            print(flush=True)
    if not options.no_ties:
        _print_ties()


def _rows(client: Any, kind: str, rounds: int, tokens: int) -> Iterator[str]:
    """Yield a line of the table for each way."""
    prompts, is_chat, params = KINDS[kind]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        ways = WAYS[number % 3 :] + WAYS[: number % 3]
        for prompt in prompts:
            for way in ways if number % 2 else ways[::-1]:
                answer = client.ask(way=way, prompt=prompt, is_chat=is_chat, tokens=tokens, params=params)
                found[way].append(answer)
            print(f"{kind}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for way in WAYS:
        gains = [off["token_s"] / own["token_s"] for off, own in zip(found["off"], found[way], strict=True)]
        same = sum(off["ids"] == own["ids"] for off, own in zip(found["off"], found[way], strict=True))
        drafted, accepted = (sum(own[name] for own in found[way]) for name in ("drafted", "accepted"))
        speed = 1 / statistics.median(own["token_s"] for own in found[way])
        share = f"{accepted} of {drafted}" if drafted else "–"
        if way == "draft":
            share += f", {statistics.median(own['draft_token_s'] for own in found[way]) * 1e3:.0f} ms each"
        yield (
            f"| {kind} | {way} | {speed:.2f} | {statistics.median(gains):.2f} | {min(gains):.2f}–{max(gains):.2f} "
            f"| {share} | {same} of {len(gains)} |"
        )


@torch.inference_mode()
def _print_ties(columns: int = 8, num_tokens: int = 512) -> None:
    """Compare what is chosen for each token of a text in steps of one column and of several, in two dtypes."""
    checkpoint = open_checkpoint(str(find_model()))
    token_ids = torch.tensor([checkpoint.tokenizer().encode(TEXT)[:num_tokens]])
    whole = Span(0, checkpoint.num_blocks)
    print(f"{token_ids.shape[1]} tokens one by one and {columns} at a time\n")
    print("| dtype | another token | equal logits of the best two |\n|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        runner = load_blocks(checkpoint, whole, dtype=dtype, device=torch.device("cpu"))
        ends = load_ends(checkpoint, dtype=dtype, device=torch.device("cpu"))
        states = ends.embed(token_ids)
        logits = []
        for size in (1, columns):
            cache = runner.new_cache(1, token_ids.shape[1])
            pieces = [
                ends.logits(runner.run_step(cache, states[:, start : start + size], start, whole))
                for start in range(0, token_ids.shape[1], size)
            ]
            logits.append(torch.cat(pieces, dim=1)[0].float())
        others = int((logits[0].argmax(-1) != logits[1].argmax(-1)).sum())
        best = logits[0].topk(2).values
        ties = int((best[:, 0] == best[:, 1]).sum())
        total = token_ids.shape[1]
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {others}, {others / total:.2%} | {ties}, {ties / total:.2%} |", flush=True)


if __name__ == "__main__":
    main()
