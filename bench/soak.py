"""Let clients use a swarm at random for long, kill some of them and a node again and again, and see what is left.

    python -m bench.soak [--minutes 20] [--seed 0] [--clients 3]

Three nodes of a small random model on loopback: two that hold a half each and stay, and one with all blocks that is
killed and started again. Clients (`bench/soak_client.py`) are killed and started again, too. Memory of the staying
nodes is sampled once a minute; at the end, when all clients are gone and the grace period for their sessions is over,
the nodes' free tokens have to be exactly what they were.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import ClientConfig
from swarm_client.routing.find_route import ModelKey
from swarm_client.swarm import Swarm
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.records import NodeRecord

_BLOCKS = 6
_OPTIONS = ("--cache-tokens", "20000")
_SETTLE_S = 85.0
"""After the last client: 60 s of grace for sessions, and a record that is published every 10 s."""


@dataclass(slots=True)
class Soak:
    """What runs, and what came of it."""

    source: str
    rng: random.Random
    nodes: list[NodeProcess]
    clients: "list[subprocess.Popen[str]]" = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_started: int = 0

    def start_client(self) -> None:
        """Start a client with a seed of its own."""
        self.num_started += 1
        words = (self.nodes[0].address, self.source, str(self.rng.randrange(1 << 20)))
        client = subprocess.Popen(
            [sys.executable, "-m", "bench.soak_client", *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.clients.append(client)
        threading.Thread(target=self._read, args=(client,), daemon=True).start()

    def kill_client(self) -> None:
        """End a client as a power cut would; its daemon ends with it."""
        client = self.clients.pop(self.rng.randrange(len(self.clients)))
        if client.poll() is not None:
            self.counts["clients that ended by themselves"] += 1
        client.kill()
        client.wait(10)
        self.counts["killed clients"] += 1

    def _read(self, client: "subprocess.Popen[str]") -> None:
        assert client.stdout is not None
        with client.stdout:
            for line in client.stdout:
                self.counts.update(json.loads(line))


def main() -> None:
    """Soak and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=3)
    options = parser.parse_args()
    print(f"{describe_machine()}; {options.minutes:g} minutes, seed {options.seed}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
            num_hidden_layers=_BLOCKS, vocab_size=64,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        first = NodeProcess(folder, "0:3", (), *_OPTIONS).wait_until_online()
        with first, NodeProcess(folder, "3:6", [first.address], *_OPTIONS).wait_until_online() as second:
            soak = Soak(folder, random.Random(options.seed), [first, second])
            _run(soak, options)


def _run(soak: Soak, options: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(soak.source)
    key = ModelKey(checkpoint.name, checkpoint.revision, checkpoint.num_blocks)
    swarm = Swarm.connect(ClientConfig((soak.nodes[0].address,), host="127.0.0.1", relay=False))
    processes = [psutil.Process(node.pid) for node in soak.nodes]
    third: NodeProcess | None = None
    print("| minute | node 0:3, MB | its daemon | node 3:6, MB | its daemon | free tokens |\n|---|---|---|---|---|---|")
    began_s = time.monotonic()
    try:
        _sample(swarm, key, processes, soak, "start")
        for _ in range(options.clients):
            soak.start_client()
        next_kill_s = next_restart_s = 15.0
        next_sample_s = 60.0
        while (passed_s := time.monotonic() - began_s) < options.minutes * 60:
            time.sleep(0.5)
            if passed_s >= next_sample_s:
                _sample(swarm, key, processes, soak, f"{next_sample_s / 60:.0f}")
                next_sample_s += 60.0
            if passed_s >= next_kill_s:
                soak.kill_client()
                soak.start_client()
                next_kill_s += soak.rng.uniform(15, 40)
            if passed_s >= next_restart_s:
                if third is None:
                    third = NodeProcess(soak.source, f"0:{_BLOCKS}", [soak.nodes[0].address], *_OPTIONS)
                else:
                    third.kill()
                    soak.counts["killed nodes"] += 1
                    third = None
                next_restart_s += soak.rng.uniform(20, 50)
    finally:
        while soak.clients:
            soak.kill_client()
        if third is not None:
            third.kill()
    time.sleep(_SETTLE_S)
    free = _sample(swarm, key, processes, soak, "end")
    swarm.close()
    print("\n| what | count |\n|---|---|")
    for what, count in sorted(soak.counts.items(), key=lambda item: (item[0].startswith("error"), item[0])):
        print(f"| {what} | {count} |")
    is_exact = len(free) == len(soak.nodes) and all(record.free_tokens == record.max_tokens for record in free)
    print(f"\nfree tokens at the end are {'exact' if is_exact else 'NOT what they were'}")
    sys.exit(0 if is_exact else 1)


def _sample(swarm: Swarm, key: ModelKey, processes: list[psutil.Process], soak: Soak, when: str) -> list[NodeRecord]:
    """Print one row; return the records of the nodes that stay."""
    watcher = swarm._watcher(key)
    swarm.loop.run(watcher.refresh())
    records = swarm.loop.run(watcher.view()).records
    staying = sorted(
        (r for r in records if r.end_block - r.start_block < _BLOCKS), key=lambda record: record.start_block
    )
    sizes = [
        f"{process.memory_info().rss / 1e6:.0f} | {sum(c.memory_info().rss for c in process.children()) / 1e6:.0f}"
        for process in processes
    ]
    free = ", ".join(f"{record.free_tokens} of {record.max_tokens}" for record in staying)
    print(f"| {when} | {sizes[0]} | {sizes[1]} | {free} |", flush=True)
    return staying


if __name__ == "__main__":
    main()
