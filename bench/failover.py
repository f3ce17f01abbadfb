"""What a reader notices when the node that serves half of the model is killed or frozen in the middle of an answer.

    python -m bench.failover [--kills 4] [--contexts 400,2000] [--kinds kill,freeze] [--tokens 12] [--threads 1]
                             [--standby]
    python -m bench.failover --every-position [--step 1] [--tokens 64] [--model smollm2]
    python -m bench.failover --chaos MINUTES [--kill-every 2] [--spare] [--tokens 64]

SmolLM2 through two nodes, with a third one that has the second half, too. An answer is generated behind a prompt of so
many tokens; after a random number of its tokens the node of the second half that is in use gets SIGKILL or SIGSTOP. The
stall is the longest time between two tokens less the median one. The tokens are compared with those of an answer that
nothing happened to. Then another node is started in its place, and the client gets the time to hear of it.

With `--every-position` a node is killed in front of each token of an answer but the first (bench/every_position.py),
with `--chaos` a random one of a pool is, again and again, while others join (bench/chaos.py).
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import time

from app.demo import find_model
from bench import chaos, every_position
from bench.answers import CACHE, MOST_ID, SETTLE_S, answer
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig, Swarm, open_text_model
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession

SPAN = "15:30"
FOLLOW_S = 4.0
"""For what is cached to be copied to the node that stands by: an answer as short as these is over before."""


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
    parser.add_argument("--tokens", type=int, help="of each answer; 12, or 64 in the other modes")
    parser.add_argument("--threads", default="1", help="of each node")
    parser.add_argument("--standby", action="store_true", help="let a second node follow along")
    parser.add_argument("--every-position", action="store_true", help="kill in front of each token")
    parser.add_argument("--step", type=int, default=1, help="with --every-position: of which only every so many")
    parser.add_argument("--model", default="smollm2", choices=sorted(every_position.CUTS))
    parser.add_argument("--chaos", type=float, metavar="MINUTES", help="kill nodes of a pool for so long")
    parser.add_argument("--kill-every", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--spare", action="store_true", help="with --chaos: let one node of each span live")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    if options.every_position:
        every_position.measure(options.model, options.tokens or 64, options.step)
    elif options.chaos:
        chaos.measure(60 * options.chaos, options.kill_every, options.spare, options.tokens or 64)
    else:
        options.tokens = options.tokens or 12
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    main()
