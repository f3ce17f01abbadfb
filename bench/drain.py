"""What a reader notices when the node that serves half of the model leaves in the middle of an answer.

    python -m bench.drain [--leaves 4] [--contexts 400,2000] [--tokens 40] [--threads 1]

SmolLM2 through two nodes, with more that have the second half, too. An answer is generated behind a prompt of so many
tokens; after a random number of its tokens the node of the second half that is in use gets SIGTERM. Two ways in turn:

    copy      the node stays until the session has moved; another one copies its keys and values meanwhile
    replay    the node leaves at once (`--drain-timeout 0`); another one computes again what was sent to the first

The bump is the longest time between two tokens less the median one. The tokens are compared with those of an answer
that nothing happened to. The node is started again after each answer, and the client gets the time to hear of it.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from app.demo import find_model
from bench.answers import CACHE, MOST_ID, SETTLE_S, answer
from bench.failover import SPAN
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig, Swarm, open_text_model
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession
from swarm_protocol.identity import load_or_create_identity
from swarm_protocol.ids import PeerId

WAYS = {"copy": "60", "replay": "0"}
"""What the nodes of each way are given for `--drain-timeout`."""


class Holders:
    """Two nodes of the second half that leave in one way, and keep their peer ids when they start again."""

    def __init__(self, model: str, first: NodeProcess, folder: Path, way: str, options: tuple[str, ...]) -> None:
        self._start_with = (model, SPAN, [first.address], "--drain-timeout", WAYS[way], *options)
        self._paths = {
            load_or_create_identity(path).peer_id: path for path in (folder / f"{way}-{number}" for number in (1, 2))
        }
        self._nodes: dict[PeerId, NodeProcess] = {}
        for peer_id in self._paths:
            self._start(peer_id)
        for node in self._nodes.values():
            node.wait_until_online()

    @property
    def peer_ids(self) -> frozenset[PeerId]:
        """Who they are."""
        return frozenset(self._paths)

    def _start(self, peer_id: PeerId) -> NodeProcess:
        node = self._nodes[peer_id] = NodeProcess(*self._start_with, "--identity", str(self._paths[peer_id]))
        return node

    def leave(self, peer_id: PeerId) -> None:
        """Ask a node to leave."""
        os.kill(self._nodes[peer_id].pid, signal.SIGTERM)

    def start_again(self, peer_id: PeerId) -> None:
        """Start a node anew that was asked to leave, once it has."""
        self._nodes.pop(peer_id).stop()
        self._start(peer_id).wait_until_online()

    def close(self) -> None:
        """End both."""
        for node in self._nodes.values():
            node.kill()


@dataclass(slots=True)
class Row:
    """What came out for one way and length; times in seconds."""

    bumps: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    num_equal: int = 0
    num_moved: int = 0


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=4, help="of each way and length")
    parser.add_argument("--contexts", default="400,2000")
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--threads", default="1", help="of each node")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    path, rng = str(find_model()), random.Random(0)
    node_options = (*CACHE, "--threads", options.threads)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = stack.enter_context(NodeProcess(path, "0:15", (), *node_options)).wait_until_online()
        holders = {way: Holders(path, first, folder, way, node_options) for way in WAYS}
        models = {}
        for way, own in holders.items():
            stack.callback(own.close)
            others = frozenset().union(*(other.peer_ids for other in holders.values() if other is not own))
            config = ClientConfig((first.address,), host="127.0.0.1", relay=False, blocked_peers=others)
            swarm = Swarm.connect(config)
            stack.callback(swarm.close)
            models[way] = open_text_model(path, swarm=swarm)
        rows: dict[tuple[int, str], Row] = {}
        for length in (int(number) for number in options.contexts.split(",")):
            prompt = [1 + rng.randrange(MOST_ID) for _ in range(length)]
            wanted = {way: answer(models[way], prompt, options.tokens, None)[0] for way in WAYS}
            for number in range(options.leaves):
                after = rng.randrange(1, options.tokens // 2)
                for way in WAYS:
                    row = rows.setdefault((length, way), Row())
                    _leave(models[way], prompt, wanted[way], holders[way], after, row)
                    print(
                        f"{way} {number + 1} at {length} tokens: {1000 * row.bumps[-1]:.0f} ms at "
                        f"{1000 * row.medians[-1]:.0f} ms/token, {row.num_moved} moved, {row.num_equal} equal so far",
                        flush=True,
                    )
    print("\n| context, tokens | way | bump, ms, median | smallest–largest | usual, ms/token | moved | same tokens |")
    print("|---|---|---|---|---|---|---|")
    for (length, way), row in rows.items():
        spread = f"{1000 * min(row.bumps):.0f}–{1000 * max(row.bumps):.0f}"
        usual = 1000 * statistics.median(row.medians)
        print(
            f"| {length:,} | {way} | {1000 * statistics.median(row.bumps):.0f} | {spread} | {usual:.0f} "
            f"| {row.num_moved} of {len(row.bumps)} | {row.num_equal} of {len(row.bumps)} |"
        )


def _leave(
    model: DistributedTextModel, prompt: list[int], wanted: list[int], holders: Holders, after: int, row: Row
) -> None:
    """Measure one answer during which a node leaves after `after` tokens."""
    left: list[PeerId] = []

    def leave(session: DistributedTextSession) -> None:
        left.append(PeerId(_holder_of(session)))
        holders.leave(left[0])

    last: list[str] = []
    found, times = answer(model, prompt, len(wanted), (after, leave), lambda session: last.append(_holder_of(session)))
    row.bumps.append(max(times) - statistics.median(times))
    row.medians.append(statistics.median(times))
    row.num_equal += found == wanted
    row.num_moved += last[0] != left[0]
    holders.start_again(left[0])
    time.sleep(SETTLE_S)


def _holder_of(session: DistributedTextSession) -> str:
    return next(line.split()[-1] for line in session.route if line.startswith(SPAN))


if __name__ == "__main__":
    main()
