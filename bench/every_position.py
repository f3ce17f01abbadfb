"""A kill in front of each token of an answer but the first: `python -m bench.failover --every-position`.

The model goes through two nodes. Several nodes hold the second half; in front of token n the one in use gets SIGKILL,
in a new session for each n, and a new node is started in its place. Nodes keep nothing of a prompt for later sessions.
An answer begins when two nodes have been online for some seconds, so that the client knows them. `bloom-560m` is that
model's shape with random weights.
"""

import contextlib
import random
import statistics
import tempfile
import time
from pathlib import Path

from app.demo import find_model
from bench.answers import CACHE, MOST_ID, SETTLE_S, answer
from bench.forked_nodes import ForkedNode, NodeNursery
from bench.shaped_model import save_bloom_560m
from swarm_client import ClientConfig, Swarm, open_text_model
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession

CUTS = {"smollm2": ("0:15", "15:30"), "bloom-560m": ("0:12", "12:24")}
CONTEXT_TOKENS = 100
NUM_HOLDERS = 4
"""Of the second half: one in use, one to take over, and two that start meanwhile."""


class Holders:
    """The nodes of the second half."""

    def __init__(self, nursery: NodeNursery, model: str, span: str, peer: str) -> None:
        self._start_with = (model, span, peer, *CACHE)
        self._nursery = nursery
        self._nodes = [self._start() for _ in range(NUM_HOLDERS)]
        self._known_s: dict[int, float] = {}

    def wait_until_known(self) -> None:
        """Return when the client has had the time to hear of two."""
        while self._num_known() < 2:
            time.sleep(0.1)

    def kill(self, session: DistributedTextSession) -> None:
        """Kill the one that the session uses."""
        peer_id = session.route[-1].split()[-1]
        node = next(node for node in self._nodes if node.peer_id == peer_id)
        node.kill()
        self._nodes.remove(node)

    def fill_up(self) -> None:
        """Start as many as were killed."""
        self._nodes += [self._start() for _ in range(NUM_HOLDERS - len(self._nodes))]

    def _start(self) -> ForkedNode:
        return self._nursery.start(*self._start_with)

    def _num_known(self) -> int:
        now_s = time.monotonic()
        since = [self._known_s.setdefault(node.pid, now_s) for node in self._nodes if node.address]
        return sum(now_s - online_s >= SETTLE_S for online_s in since)


def measure(name: str, num_tokens: int, step: int) -> None:
    """Measure and print the table."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = str(find_model() if name == "smollm2" else save_bloom_560m(folder / "bloom-560m-shape"))
        nursery = stack.enter_context(NodeNursery(folder))
        bootstrap = nursery.bootstrap().address
        first = nursery.start(source, CUTS[name][0], bootstrap, *CACHE)
        holders = Holders(nursery, source, CUTS[name][1], bootstrap)
        first.wait_until_online()
        swarm = Swarm.connect(ClientConfig((bootstrap,), host="127.0.0.1", relay=False, reuse_prefixes=False))
        stack.callback(swarm.close)
        model = open_text_model(source, swarm=swarm)
        _measure(name, model, holders, num_tokens, range(1, num_tokens, step))


def _measure(name: str, model: DistributedTextModel, holders: Holders, num_tokens: int, positions: range) -> None:
    rng = random.Random(0)
    prompt = [1 + rng.randrange(MOST_ID) for _ in range(CONTEXT_TOKENS)]
    holders.wait_until_known()
    wanted, usual = answer(model, prompt, num_tokens, None)
    stalls: list[float] = []
    num_equal = 0
    for position in positions:
        holders.wait_until_known()
        found, times = answer(model, prompt, num_tokens, (position, holders.kill))
        holders.fill_up()
        stalls.append(max(times) - statistics.median(times))
        num_equal += found == wanted
        print(f"{name}, killed after {position}: {stalls[-1]:.2f} s, {num_equal} of {len(stalls)} equal", flush=True)
    print(
        "\n| model | kills | same tokens | stall, s, median | 90 % | longest | usual, ms/token |\n" + "|---" * 7 + "|"
    )
    high = statistics.quantiles(stalls, n=10, method="inclusive")[-1] if len(stalls) > 1 else stalls[0]
    print(
        f"| {name} | {len(stalls)} | {num_equal} of {len(stalls)} | {statistics.median(stalls):.2f} | {high:.2f} "
        f"| {max(stalls):.2f} | {1000 * statistics.median(usual):.0f} |"
    )
