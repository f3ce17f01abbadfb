"""What a reader notices when the node that serves half of the model is killed or frozen in the middle of an answer.

    python -m bench.failover [--kills 4] [--contexts 400,2000] [--kinds kill,freeze] [--tokens 12] [--threads 1]
                             [--standby]

SmolLM2 through two nodes, with a third one that has the second half, too. An answer is generated behind a prompt of so
many tokens; after a random number of its tokens the node of the second half that is in use gets SIGKILL or SIGSTOP. The
stall is the longest time between two tokens less the median one. The tokens are compared with those of an answer that
nothing happened to. Then another node is started in its place, and the client gets the time to hear of it.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import time
from collections.abc import Callable

from app.demo import find_model
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig, SamplingParams, Swarm, open_text_model
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession

SPAN = "15:30"
CACHE = ("--cache-tokens", "16384")
MOST_ID = 40_000
FOLLOW_S = 4.0
"""For what is cached to be copied to the node that stands by: an answer as short as these is over before."""

SETTLE_S = 7.0
"""Until the client has read the directory again, so that it knows the new node as it would know any spare one."""


class Pair:
    """The two nodes of the second half, by peer id."""

    def __init__(self, model: str, first: NodeProcess, *options: str) -> None:
        self._model = model
        self._first = first
        self._options = options
        self._nodes: dict[str, NodeProcess] = {}
        for _ in range(2):
            self.start()

    def start(self) -> None:
        """Start a node and wait until it is online."""
        node = NodeProcess(self._model, SPAN, [self._first.address], *self._options).wait_until_online()
        self._nodes[node.address.rsplit("/", 1)[-1]] = node

    def end(self, peer_id: str, kind: str) -> None:
        """Kill or freeze a node."""
        node = self._nodes[peer_id]
        os.kill(node.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    def replace(self, peer_id: str) -> None:
        """Start another node in the place of one that was ended."""
        self._nodes.pop(peer_id).kill()
        self.start()

    def close(self) -> None:
        """End both."""
        for node in self._nodes.values():
            node.kill()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4, help="of each kind and length")
    parser.add_argument("--contexts", default="400,2000")
    parser.add_argument("--kinds", default="kill,freeze")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--threads", default="1", help="of each node")
    parser.add_argument("--standby", action="store_true", help="let a second node follow along")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    path, rng = str(find_model()), random.Random(0)
    node_options = (*CACHE, "--threads", options.threads)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(NodeProcess(path, "0:15", (), *node_options)).wait_until_online()
        pair = Pair(path, first, *node_options)
        stack.callback(pair.close)
        swarm = Swarm.connect(ClientConfig((first.address,), host="127.0.0.1", relay=False, standby=options.standby))
        stack.callback(swarm.close)
        model = open_text_model(path, swarm=swarm)
        rows = []
        for length in (int(number) for number in options.contexts.split(",")):
            prompt = [1 + rng.randrange(MOST_ID) for _ in range(length)]
            wanted, _ = answer(model, prompt, options.tokens, None)
            for kind in options.kinds.split(","):
                stalls, num_equal = [], 0
                for number in range(options.kills):
                    after, follow_s = rng.randrange(1, options.tokens - 3), FOLLOW_S if options.standby else 0.0
                    stall_s, is_equal = _disturbed(model, prompt, wanted, pair, kind, after, follow_s)
                    stalls.append(stall_s)
                    num_equal += is_equal
                    print(f"{kind} {number + 1} of {options.kills} at {length} tokens: {stall_s:.2f} s", flush=True)
                rows.append((kind, length, stalls, num_equal))
    print("\n| what | context, tokens | stall, s, median | smallest–largest | same tokens |\n|---|---|---|---|---|")
    for kind, length, stalls, num_equal in rows:
        spread = f"{min(stalls):.2f}–{max(stalls):.2f}"
        print(f"| {kind} | {length:,} | {statistics.median(stalls):.2f} | {spread} | {num_equal} of {len(stalls)} |")


def _disturbed(
    model: DistributedTextModel,
    prompt: list[int],
    wanted: list[int],
    pair: Pair,
    kind: str,
    after: int,
    follow_s: float,
) -> tuple[float, bool]:
    """Return the stall in seconds, and whether the answer was the undisturbed one.

    The reader pauses for `follow_s` before it happens.
    """
    ended: list[str] = []

    def end(session: DistributedTextSession) -> None:
        time.sleep(follow_s)
        peer_id = next(line.split()[-1] for line in session.route if line.startswith(SPAN))
        pair.end(peer_id, kind)
        ended.append(peer_id)

    found, times = answer(model, prompt, len(wanted), (after, end))
    pair.replace(ended[0])
    time.sleep(SETTLE_S)
    return max(times) - statistics.median(times), found == wanted


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


if __name__ == "__main__":
    main()
