"""Tokens/s of several users at once through one node and through two, and the time per token that each of them sees.

    python -m bench.batching [--rounds 2] [--tokens 12] [--models smollm2,bloom-560m] [--worker-only]

Nodes are processes as volunteers start them; the users are threads of one client process, as in the chat site, each
with a text session of its own: prompts of 16 to 128 tokens, greedy, float32. The client has one thread for its head.
One node has two threads, two nodes have one each: the cores are shared by all of them. Rounds are interleaved, so that
a noisy machine disturbs all numbers of users alike; tables give medians, and ratios to one user of the same round.

`bloom-560m` is that model's shape with random weights. Two more tables: what open sessions that do nothing cost one
that decodes, and what one user's prefill of 1,500 tokens does to another user's tokens. `--worker-only` measures the
device thread of a node alone (bench/worker_batching.py), whose options it takes.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from app.demo import find_model
from bench import worker_batching
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from bench.shaped_model import save_bloom_560m
from bench.text_users import MAX_LENGTH, Together, User, decode_together
from server_node.compute.scheduler import BatchLimits
from swarm_client import AutoDistributedModelForCausalLM, ClientConfig, DistributedCausalLM
from swarm_client.generation.text_session import TextModel

USERS = (1, 2, 4, 8, 16)
IDLE_USERS = 32
PREFILL_TOKENS = 1500
CHUNK_TOKENS = BatchLimits().chunk_tokens
CUTS = {"smollm2": (("0:30",), ("0:15", "15:30")), "bloom-560m": (("0:24",), ("0:12", "12:24"))}
CLIENT = ClientConfig(host="127.0.0.1", relay=False)


def main() -> None:
    """Measure and print the tables."""
    if "--worker-only" in sys.argv:
        sys.argv.remove("--worker-only")
        worker_batching.main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12, help="decoded by each user and round")
    parser.add_argument("--models", default="smollm2,bloom-560m")
    parser.add_argument("--users", default=",".join(str(number) for number in USERS))
    parser.add_argument("--nodes", default="1,2")
    parser.add_argument("--no-more", action="store_true", help="leave out the tables of idle sessions and prefills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            source = str(find_model() if name == "smollm2" else save_bloom_560m(Path(folder) / "bloom-560m-shape"))
            for spans in CUTS[name]:
                if str(len(spans)) in options.nodes.split(","):
                    _measure(name, source, spans, options)


def _measure(name: str, source: str, spans: Sequence[str], options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        model = _serve(stack, source, spans)
        text = model.text_model()
        counts = [int(number) for number in options.users.split(",")]
        users = [User(text, 16 + 112 * (2 * number + 1) // (2 * max(counts)), number) for number in range(max(counts))]
        for user in users:
            stack.callback(user.session.close)
        found: dict[int, list[Together]] = {count: [] for count in counts}
        for number in range(options.rounds + 1):
            for count in counts:
                # Spread over all prompts, so that the lengths are alike for every number of users.
                chosen = users[(len(users) // count) // 2 :: len(users) // count][:count]
                together = decode_together(chosen, options.tokens if number else 3)
                if number:  # the first round warms up
                    found[count].append(together)
        _print_users(f"{name}, {len(spans)} node{'s' * (len(spans) > 1)}", found)
        if len(spans) == 1 and not options.no_more:
            for user in users:
                user.session.close()
            _print_idle(text, options)
            _print_prefill(model, text, options)


def _serve(stack: contextlib.ExitStack, source: str, spans: Sequence[str]) -> DistributedCausalLM:
    threads = 2 if len(spans) == 1 else 1
    common = ("--cache-tokens", "40000", "--threads", str(threads))
    first = stack.enter_context(NodeProcess(source, spans[0], (), *common)).wait_until_online()
    for span in spans[1:]:
        stack.enter_context(NodeProcess(source, span, [first.address], *common)).wait_until_online()
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=[first.address], config=CLIENT)
    stack.callback(model.close)
    return model


def _print_users(title: str, found: dict[int, list[Together]]) -> None:
    print(f"\n{title}\n")
    print(
        "| users | tokens/s, all | × one user, median of rounds | ms per token, median | 90 % |\n|---|---|---|---|---|"
    )
    for count, rounds in found.items():
        speed = statistics.median(each.tokens_per_s for each in rounds)
        alone = next(iter(found.values()))
        ratio = statistics.median(each.tokens_per_s / one.tokens_per_s for each, one in zip(rounds, alone, strict=True))
        times = sorted(seconds for each in rounds for seconds in each.token_s)
        print(
            f"| {count} | {speed:.1f} | {ratio:.2f} | {statistics.median(times) * 1e3:.0f} "
            f"| {times[len(times) * 9 // 10] * 1e3:.0f} |",
            flush=True,
        )


def _print_idle(model: TextModel, options: argparse.Namespace) -> None:
    active, ratios = User(model, 64, 0), []
    for _ in range(options.rounds):
        alone = decode_together([active], options.tokens).tokens_per_s
        idle = [User(model, 2, number) for number in range(IDLE_USERS)]
        ratios.append(decode_together([active], options.tokens).tokens_per_s / alone)
        for user in idle:
            user.session.close()
    active.session.close()
    spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
    print(f"\n{IDLE_USERS} open sessions that do nothing: {statistics.median(ratios):.2f} ({spread}) × one alone")


def _print_prefill(model: DistributedCausalLM, text: TextModel, options: argparse.Namespace) -> None:
    """One user decodes while another's prompt is computed."""
    user = User(text, 64, 0)
    alone, during, chunks = [], [], []
    for _ in range(options.rounds):
        user.start_again()
        alone += user.decode(options.tokens)
        found: list[float] = []
        is_done = threading.Event()
        thread = threading.Thread(target=_decode_until, args=(user, is_done, found))
        thread.start()
        chunks += _chunk_s(model)
        is_done.set()
        thread.join()
        during += found
    user.session.close()
    alone_s = statistics.median(alone)
    print(f"\na prefill of {PREFILL_TOKENS} tokens beside a user who decodes, ms per token of the latter:")
    print(f"alone {alone_s * 1e3:.0f}; beside it median {statistics.median(during) * 1e3:.0f}, ", end="")
    shortest_s, longest_s = min(chunks), max(chunks)
    print(
        f"longest {max(during) * 1e3:.0f}; a chunk of {CHUNK_TOKENS} of its tokens takes "
        f"{shortest_s * 1e3:.0f} to {longest_s * 1e3:.0f}",
        flush=True,
    )


def _decode_until(user: User, is_done: threading.Event, found: list[float]) -> None:
    found += user.decode(MAX_LENGTH // 2, is_done.is_set)


def _chunk_s(model: DistributedCausalLM) -> list[float]:
    """Let the node compute a prompt; return how long a chunk of it took, from its beginning to its end."""
    hidden_size = model.config.get_text_config().hidden_size
    times: list[float] = []
    with model.inference_session(max_length=PREFILL_TOKENS) as session, torch.inference_mode():
        for part in (torch.randn(1, PREFILL_TOKENS, hidden_size) * 0.1).split(CLIENT.step_tokens, dim=1):
            session.step(part)
            # A step is no longer than the client cuts it: two chunks.
            times.append(session.last_timings[0].compute_s * CHUNK_TOKENS / part.shape[1])
    return times


if __name__ == "__main__":
    main()
