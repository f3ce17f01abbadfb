"""Time to the first token of prompts that begin alike: the first session of a site, and those that come after it.

    python -m bench.prefix [--rounds 5] [--shared 1000] [--own 16]

Every round makes a new beginning of `--shared` tokens and sends it three times through two nodes on this machine, each
time with other tokens behind it: to nodes that do not know it; while the first session is still open; and after it was
closed. The table gives medians, the spread, and the ratio to the first time in the same round.
"""

import argparse
import contextlib
import random
import statistics
import time

from app.demo import find_model
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig, SamplingParams, Swarm, open_text_model
from swarm_client.generation.text_session import TextModel, TextSession

WAYS = ("unknown", "known, first session open", "known, first session closed")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", type=int, default=1000, help="tokens that the prompts have in common")
    parser.add_argument("--own", type=int, default=16, help="tokens behind them that differ")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    model_path = str(find_model())
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(NodeProcess(model_path, "0:15", (), "--cache-tokens", "32768")).wait_until_online()
        second = NodeProcess(model_path, "15:30", [first.address], "--cache-tokens", "32768")
        stack.enter_context(second).wait_until_online()
        swarm = Swarm.connect(ClientConfig((first.address,), host="127.0.0.1", relay=False))
        stack.callback(swarm.close)
        model = open_text_model(model_path, swarm=swarm)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        rng = random.Random(0)
        for number in range(options.rounds + 1):
            found = _round(model, rng, options.shared, options.own)
            if number:  # the first round warms up
                for way, taken_s in zip(WAYS, found, strict=True):
                    times[way].append(taken_s)
                print(f"round {number} of {options.rounds}", flush=True)
    print(f"\n{options.shared} tokens in common, {options.own} behind them, two nodes of one thread each, float32\n")
    print("| prefix | first token, s, median | smallest–largest | sooner, median of rounds |\n|---|---|---|---|")
    for way, values in times.items():
        ratio = statistics.median(before / after for before, after in zip(times[WAYS[0]], values, strict=True))
        spread = f"{min(values):.2f}–{max(values):.2f}"
        print(f"| {way} | {statistics.median(values):.2f} | {spread} | {ratio:.1f} × |")


def _round(model: TextModel, rng: random.Random, num_shared: int, num_own: int) -> list[float]:
    shared = _tokens(rng, num_shared)
    times = []
    sessions: list[TextSession] = []
    for way in WAYS:
        if way == WAYS[2]:
            for session in sessions:
                session.close()
        session = model.open_session(num_shared + num_own + 8)
        sessions.append(session)
        session.replace_tail(0, shared + _tokens(rng, num_own))
        started_s = time.perf_counter()
        for _ in session.generate(SamplingParams(1)):
            pass
        times.append(time.perf_counter() - started_s)
    sessions[-1].close()
    return times


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1000, 40_000) for _ in range(count)]


if __name__ == "__main__":
    main()
