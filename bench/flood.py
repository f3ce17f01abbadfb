"""What floods from one peer cost another peer's session, at a real node on loopback.

    python -m bench.flood [--rounds 3] [--kinds pings,prefills] [--model FILE] [--seconds 4]

The node and its daemon have one core to themselves. The one who is flooded decodes through the Python client, and
shares the other core with the flooder (`bench/flooder.py`, a process at the lowest priority), so that what is measured
is the node's doing and not who gets a core. Before each flood the session is measured alone; then the flood runs for
5 s, which uses up its bursts, and the session is measured again. Where the machine has one core only, all share it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from app.demo import find_model
from bench.flooder import FLOODS
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import AutoDistributedModelForCausalLM, ClientConfig, DistributedCausalLM, InferenceSession
from swarm_protocol.model.checkpoint import open_checkpoint

CLIENT = ClientConfig(host="127.0.0.1", relay=False)
BURST_S = 5.0
PAUSE_S = 1.0
LENGTH = 60


@dataclass(slots=True)
class Found:
    """Of one kind of flood, in each round: ms per step alone and flooded, as median and mean, and the longest step."""

    alone: list[tuple[float, float]] = field(default_factory=list)
    flooded: list[tuple[float, float]] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(FLOODS), help="which floods, with commas between them")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each measurement")
    parser.add_argument("--model", help="a folder or GGUF file; the demo's model if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = options.model or str(find_model())
    checkpoint = open_checkpoint(model)
    blocks = f"0:{checkpoint.num_blocks}"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    with NodeProcess(model, blocks, (), "--cache-tokens", "65536").wait_until_online() as node:
        os.sched_setaffinity(0, cores[-1:])
        hidden_size = checkpoint.config.hidden_size
        words = (node.address, checkpoint.name, checkpoint.revision, str(checkpoint.num_blocks), str(hidden_size))
        remote = AutoDistributedModelForCausalLM.from_pretrained(model, initial_peers=[node.address], config=CLIENT)
        try:
            with _flooder(words) as flooder:
                found = _measure(remote, flooder, options)
        finally:
            remote.close()
    _print(found)


@contextmanager
def _flooder(words: tuple[str, ...]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        ["nice", "-n", "19", sys.executable, "-m", "bench.flooder", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def _tell(flooder: "subprocess.Popen[str]", word: str) -> None:
    assert flooder.stdin is not None
    assert flooder.stdout is not None
    flooder.stdin.write(f"{word}\n")
    flooder.stdin.flush()
    assert flooder.stdout.readline() == "ready\n", f"the flooder ended at {word}"


def _measure(
    remote: DistributedCausalLM, flooder: "subprocess.Popen[str]", options: argparse.Namespace
) -> dict[str, Found]:
    kinds = options.kinds.split(",")
    found = {kind: Found() for kind in kinds}
    states = torch.randn(1, 1, remote.config.hidden_size)
    with remote.inference_session(max_length=LENGTH + 1) as session, torch.inference_mode():
        session.step(torch.randn(1, LENGTH, remote.config.hidden_size))
        _steps(session, states, 1.0)
        for number in range(options.rounds):
            for kind in kinds:
                alone = _steps(session, states, options.seconds)
                _tell(flooder, kind)
                burst = _steps(session, states, BURST_S)
                flooded = _steps(session, states, options.seconds)
                _tell(flooder, "stop")
                time.sleep(PAUSE_S)
                found[kind].alone.append((statistics.median(alone), statistics.mean(alone)))
                found[kind].flooded.append((statistics.median(flooded), statistics.mean(flooded)))
                found[kind].longest.append(max(burst + flooded))
                medians = f"{statistics.median(alone):.1f} → {statistics.median(flooded):.1f}"
                means = f"{statistics.mean(alone):.1f} → {statistics.mean(flooded):.1f}"
                burst_means = f"burst {statistics.mean(burst):.1f}"
                print(f"round {number + 1} {kind}: {medians}; mean {means}; {burst_means} ms", flush=True)
    return found


def _steps(session: InferenceSession, states: torch.Tensor, seconds: float) -> list[float]:
    """Decode for so long, always at the same position; return the ms of each step."""
    taken = []
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        session.position = LENGTH
        started_s = time.perf_counter()
        session.step(states)
        taken.append((time.perf_counter() - started_s) * 1e3)
    return taken


def _print(found: dict[str, Found]) -> None:
    print(f"\n{describe_machine()}\n")
    print("| flood | ms/step alone | flooded | × median | × mean | longest step, ms |\n|---|---|---|---|---|---|")
    for kind, of in found.items():
        ratios = [
            statistics.median(after[which] / before[which] for before, after in zip(of.alone, of.flooded, strict=True))
            for which in (0, 1)
        ]
        alone, flooded = (statistics.median(median for median, _ in values) for values in (of.alone, of.flooded))
        print(f"| {kind} | {alone:.1f} | {flooded:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {max(of.longest):.0f} |")


if __name__ == "__main__":
    main()
