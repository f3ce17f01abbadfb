"""Tokens/s over a made-up wide area network, against the ideal, by the ring and through the client.

    python -m bench.wan [--nodes 3 12] [--contexts 128 2048] [--steps 24] [--settings lan narrow far] [--no-stages]

Every node and the client is a host of its own, a network namespace, any two as far from each other as the setting
says (bench/wan_emulator.c): the three of the Petals papers, 1 Gbit/s and 4 ms there and back, 100 Mbit/s and 4 ms, 100
Mbit/s and 100 ms. SmolLM2 in float32, a thread a node. The ideal is the ways round the ring (or out and back at each
node), the bytes at the rate of the line, and what nodes and client computed. All ways take a step in turn; medians.

The last table is four nodes with a block each of SmolLM2's shape and random weights, 40 ms between any two, where
computing takes little: what the ring is worth. Needs root and a C compiler.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.demo import find_model
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from bench.wan_hosts import WanHosts
from swarm_protocol.wire_tensor import row_bytes

HIDDEN_SIZE = 576
HEADER_BYTES = 250
"""Of a step: names of nodes and sessions, frames, and what TCP, the emulator's packets and encryption add."""

WAYS = ("ring float32", "ring bfloat16", "ring int8_rows", "relayed float32")


@dataclass(frozen=True, slots=True)
class Setting:
    """Links between any two hosts."""

    name: str
    mbit_per_s: float
    round_trip_s: float

    def ideal_s(self, way: str, num_nodes: int, compute_s: float) -> float:
        """Return the seconds of a step that only computes and travels."""
        shape, dtype = way.split()
        num_ways = num_nodes + 1 if shape == "ring" else 2 * num_nodes
        line_s = (row_bytes(dtype, HIDDEN_SIZE) + HEADER_BYTES) * 8e-6 / self.mbit_per_s
        return num_ways * (self.round_trip_s / 2 + line_s) + compute_s

    def __str__(self) -> str:
        return f"{self.mbit_per_s:g} Mbit/s, {self.round_trip_s * 1e3:g} ms"


SETTINGS = {
    "lan": Setting("lan", 1000, 0.004),
    "narrow": Setting("narrow", 100, 0.004),
    "far": Setting("far", 100, 0.1),
}
STAGES = Setting("stages", 100, 0.04)


class Client:
    """The client's process, which answers an order a line with a line, both JSON."""

    def __init__(self, hosts: WanHosts, number: int, peer: str, model: str, module: str = "bench.wan_client") -> None:
        command = [*hosts.prefix(number), sys.executable, "-m", module, peer, model]
        self._process = subprocess.Popen(
            [*command, hosts.addresses[number]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, **order: Any) -> Any:
        """Return what it answers to an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client ended before it had answered")
        return json.loads(line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=24, help="of each way, setting and context")
    parser.add_argument("--no-stages", action="store_true", help="leave out the last table")
    options = parser.parse_args()
    print(f"{describe_machine()}\n", flush=True)
    for num_nodes in options.nodes:
        edges = [round(30 * number / num_nodes) for number in range(num_nodes + 1)]
        blocks = [f"{start}:{end}" for start, end in itertools.pairwise(edges)]
        with wan_swarm(str(find_model()), blocks) as (hosts, client):
            for context in options.contexts:
                for name in options.settings:
                    _print_table(hosts, client, SETTINGS[name], context, options.steps)
    if not options.no_stages:
        stages = ["0:1", "1:2", "2:3", "3:4"]
        with (
            tempfile.TemporaryDirectory() as folder,
            wan_swarm(_save_shallow(Path(folder)), stages) as (hosts, client),
        ):
            _print_table(hosts, client, STAGES, 128, 2 * options.steps)


@contextlib.contextmanager
def wan_swarm(model: str, blocks: Sequence[str], module: str = "bench.wan_client") -> Any:
    """Give hosts, on each of which but the last a node runs, and the client of `module` there; links are fast."""
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(WanHosts(len(blocks) + 1))
        hosts.set_links(0.0, 0.0)
        peers: list[str] = []
        for number, span in enumerate(blocks):
            options = ("--host", hosts.addresses[number], "--cache-tokens", "16384", "--dtype", "float32")
            node = NodeProcess(model, span, peers[:1], *options, prefix=hosts.prefix(number))
            peers.append(stack.enter_context(node).wait_until_online().address)
            print(f"{number + 1} of {len(blocks)} nodes are online", file=sys.stderr, flush=True)
        client = Client(hosts, len(blocks), peers[0], model, module)
        stack.callback(client.close)
        yield hosts, client


def _print_table(hosts: WanHosts, client: Client, setting: Setting, context: int, steps: int) -> None:
    hosts.set_links(setting.round_trip_s / 2, setting.mbit_per_s)
    found = client.ask(ways=WAYS, context=context, steps=steps)
    hosts.set_links(0.0, 0.0)
    relayed_s = found[-1]["step_s"]
    num_nodes = len(found[0]["spans"])
    print(f"{num_nodes} nodes, {setting}, {context} tokens of context\n")
    print("| way | tokens/s | ms a step | of that computing | ideal ms | × ideal | × relayed | prompt tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for each in found:
        compute_s, step_s = each["compute_s"] + each["client_s"], each["step_s"]
        ideal_s = setting.ideal_s(each["name"], num_nodes, compute_s)
        print(
            f"| {each['name']} | {1 / step_s:.2f} | {step_s * 1e3:.1f} | {compute_s * 1e3:.1f} | {ideal_s * 1e3:.1f} "
            f"| {step_s / ideal_s:.2f} | {relayed_s / step_s:.2f} | {(context - 1) / each['prefill_s']:.0f} |"
        )
    print(flush=True)


def _save_shallow(folder: Path) -> str:
    """Write four blocks of SmolLM2's shape with random weights; return the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=4096, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
