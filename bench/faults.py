"""Decoding while nodes lose their caches, as in Table 1 of the Petals paper, on the network in memory.

    python -m bench.faults [--tokens 1024] [--seeds 3] [--rates 0,1e-4,1e-3,1e-2] [--ways …]

The paper (arXiv:2312.08361, section 4.1) generates 1,024 tokens with BLOOM-7.1B, 30 blocks of hidden size 4096 in
float32, in four stages of 8, 7, 8 and 7 blocks on a GTX 1080 Ti each, all in one machine; embeddings and head are left
out. With a probability of 0 to 1e-2 a send fails, and the stage that it went to loses its cache. What it does not say
follows from its figures: 0.48 steps/s with restarts at 1e-3 is what ((1 - q)^-1024 - 1) / q steps at 15.5 steps/s make
where q = 1 - (1 - p)^5, so there are five sends in a step, and the last one, back to the client, counts for the last
stage here. (That of 128 tokens fits, too.) Its recovery costs 7.1 s, which is 512 tokens one by one at one stage.

Client and nodes are the real ones; what devices and links take is simulated, on a virtual clock:

  - a token: 57.6 ms for all blocks and 0.0134 ms for each token before it, from 17.1 and 15.5 steps/s at 128 and 1,024
    tokens with plain caching. 28 GB of weights at the card's 484 GB/s are 58 ms;
  - several tokens: 171 ms and 1.86 ms each, from 3.44 and 0.89 steps/s without a cache at 128 and 1,024 tokens;
  - a link: 0.6 ms one way and 180 MB/s, which is what a hop of hidden size 4096 costs through our daemons on loopback
    beyond its computation (docs/performance.md). States have their true size, 16 kB a token.

`forget` lets a node lose its sessions, as in the paper. `kill` ends it, where another one has its blocks, and starts a
new one in its place. `without tapes` opens a new session after a failure and computes all tokens again as one prompt,
`restart` and `cache-less` are computed from the times above as the paper's own baselines are, and `restart` from our
rate of steps without tapes. Outputs are compared with those of the whole model in one process.

What a tape costs the client at rate 0 is CPU time, of which a virtual clock knows nothing: it is measured by the real
one, on the same network with devices and links that take no time, sessions with and without in turn.
"""

import argparse
import asyncio
import logging
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.machine import describe_machine
from bench.simulated_swarm import SimulatedSwarm, load_blocks, simulated_swarm, thin_model
from swarm_client.config import ClientConfig
from swarm_client.swarm_session import SwarmSession
from swarm_protocol.errors import SwarmError
from swarm_protocol.messages import WireTensor
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.memory_net import LinkProfile
from swarm_protocol.transport.virtual_clock import run_virtual

HIDDEN = 4096
STAGES = (8, 7, 8, 7)
"""Blocks of each; each is one block of the thin model."""
SENDS = len(STAGES) + 1

STEP_S, CONTEXT_S = 0.0576, 0.0134e-3
PREFILL_S, TOKEN_S = 0.171, 1.86e-3
LINK = LinkProfile(0.6e-3, 180e6)
FREE = LinkProfile()

PAPER_RATES = (0.0, 1e-4, 1e-3, 1e-2)
PAPER = {
    "Petals": (10.7, 10.7, 7.76, 2.17),
    "caching with restarts": (15.5, 11.8, 0.48, None),
    "cache-less": (0.89, 0.89, 0.89, 0.89),
}
WITHOUT = ClientConfig(tape_bytes=0, reuse_prefixes=False)
CONFIG = ClientConfig(reuse_prefixes=False)
CHUNK = 64
"""Steps of one turn where real time is measured."""


def stage_s(share: float, num_tokens: int, position: int) -> float:
    """Return what a stage with so much of the model takes for a forward."""
    base_s = STEP_S if num_tokens == 1 else PREFILL_S + TOKEN_S * num_tokens
    return share * (base_s + CONTEXT_S * (position + num_tokens))


def no_time(_num_tokens: int, _position: int) -> float:
    """Return what a device takes whose time is not simulated."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one generation, in virtual time."""

    steps_per_s: float
    num_failures: int
    stalls_s: tuple[float, ...]
    error: float
    """The largest difference to the model in one process, relative to the largest value."""


class Generation:
    """Steps over the swarm, and failures among them."""

    def __init__(self, swarm: SimulatedSwarm, way: str, inputs: torch.Tensor, max_length: int) -> None:
        self._swarm, self._way, self._inputs, self._max_length = swarm, way, inputs, max_length
        self._config = WITHOUT if way == "without tapes" else CONFIG
        self.session: SwarmSession = swarm.session(self._config, max_length)

    async def step(self, position: int) -> torch.Tensor:
        """Return the output of the token at `position`, after all others."""
        try:
            result = await self.session.step(self._cut(position, position + 1), position)
        except SwarmError:
            if self._way != "without tapes":
                raise
            await self.session.close()
            self.session = self._swarm.session(self._config, self._max_length)
            await self.session.open(position + 1)
            result = (await self.session.run(self._cut, position + 1, 0))[-1]
        return from_wire(result.outputs[-1])[:, -1:]

    async def fail(self, sends: Sequence[int]) -> None:
        """Let the stages of these sends lose what they have."""
        for index in {min(send, len(STAGES) - 1) for send in sends}:
            peer_id = next(hop.peer_id for hop in self.session.route if hop.span == Span(index, index + 1))
            if self._way == "kill":
                self._swarm.kill(peer_id)
                await self._swarm.add_node(Span(index, index + 1), _times()[index])
            else:
                self._swarm.forget(peer_id)

    def _cut(self, start: int, end: int) -> WireTensor:
        return to_wire(self._inputs[:, start:end])


def _times(is_simulated: bool = True) -> list[partial[float]]:
    return [partial(stage_s, blocks / sum(STAGES)) if is_simulated else partial(no_time) for blocks in STAGES]


async def generate(folder: Path, way: str, rate: float, seed: int, wanted: torch.Tensor, inputs: torch.Tensor) -> Run:
    """Decode all of `inputs` (1, n, hidden) a token at a time."""
    rng, num_tokens = random.Random(seed), inputs.shape[1]
    loop = asyncio.get_running_loop()
    spans = [Span(index, index + 1) for index in range(len(STAGES))] * (2 if way == "kill" else 1)
    stages = list(zip(spans, _times() * 2, strict=False))
    async with simulated_swarm(folder, HIDDEN, stages, LINK, has_tapes=way != "without tapes") as swarm:
        generation = Generation(swarm, way, inputs, num_tokens)
        await generation.session.open(1)
        started_s, usual_s, num_failures, error = loop.time(), 0.0, 0, 0.0
        stalls: list[float] = []
        for position in range(num_tokens):
            failing = [send for send in range(SENDS) if rng.random() < rate]
            if failing:
                await generation.fail(failing)
                num_failures += len(failing)
            before_s = loop.time()
            output = await generation.step(position)
            if failing:
                stalls.append(loop.time() - before_s - usual_s)
            else:
                usual_s = loop.time() - before_s
            error = max(error, float((output - wanted[:, position : position + 1]).abs().max()))
        took_s = loop.time() - started_s
        await generation.session.close()
    return Run(num_tokens / took_s, num_failures, tuple(stalls), error / float(wanted.abs().max()))


async def tape_cost(folder: Path, inputs: torch.Tensor) -> tuple[float, float, float]:
    """Return the CPU seconds of client, nodes and network for a step without and with tapes, and their ratio."""
    stages = [(Span(index, index + 1), time_s) for index, time_s in enumerate(_times(is_simulated=False))]
    async with AsyncExitStack() as stack:
        sessions = []
        for config in (WITHOUT, CONFIG):
            swarm = simulated_swarm(folder, HIDDEN, stages, FREE, has_tapes=config is CONFIG)
            session = (await stack.enter_async_context(swarm)).session(config, inputs.shape[1])
            stack.push_async_callback(session.close)
            sessions.append(session)
            await session.open(1)
        took: tuple[list[float], list[float]] = ([], [])
        for start in range(0, inputs.shape[1] - CHUNK + 1, CHUNK):
            for index in (0, 1) if start // CHUNK % 2 else (1, 0):
                before_s = time.process_time()
                for position in range(start, start + CHUNK):
                    await sessions[index].step(to_wire(inputs[:, position : position + 1]), position)
                took[index].append((time.process_time() - before_s) / CHUNK)
    # Pairs, since the machine's speed changes.
    ratio = statistics.median(with_s / without_s for without_s, with_s in zip(*took, strict=True))
    return statistics.median(took[0]), statistics.median(took[1]), ratio


def restart_rate(steps_per_s: float, rate: float, num_tokens: int) -> float:
    """Return the steps/s of a generation that begins anew at every failure, in expectation."""
    fails = 1 - (1 - rate) ** SENDS
    needed = ((1 - fails) ** -num_tokens - 1) / fails if fails else num_tokens
    return steps_per_s * num_tokens / needed


def cacheless_rate(num_tokens: int) -> float:
    """Return the steps/s where each step computes all tokens again."""
    sends_s = 2 * len(STAGES) * LINK.delay_s
    took_s = (stage_s(1.0, length, 0) + sends_s for length in range(1, num_tokens + 1))
    return num_tokens / sum(took_s)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="0,1e-4,1e-3,1e-2", help="of failures, for each send")
    parser.add_argument("--ways", default="forget,kill,without tapes", help="none measures the tapes' CPU time alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("server_node").setLevel(logging.ERROR)  # nodes that are killed say that they are
    print(describe_machine(), flush=True)
    rates = [float(rate) for rate in options.rates.split(",")]
    inputs = torch.randn(1, options.tokens, HIDDEN, generator=torch.Generator().manual_seed(0))
    with thin_model(HIDDEN, len(STAGES)) as folder, torch.inference_mode():
        wanted = load_blocks(folder, Span(0, len(STAGES)))(inputs)
        found: dict[str, list[list[Run]]] = {}
        for way in filter(None, options.ways.split(",")):
            found[way] = []
            for rate in rates:
                runs = []
                for seed in range(options.seeds if rate else 1):
                    run = run_virtual(generate(folder, way, rate, seed, wanted, inputs))
                    print(f"{way} at {rate:g}, seed {seed}: {run.steps_per_s:.2f} steps/s, ", end="")
                    print(f"{run.num_failures} failures, error {run.error:.1e}", flush=True)
                    runs.append(run)
                found[way].append(runs)
        if found:
            _print_rates(found, rates, options.tokens)
            _print_stalls(found)
        without_s, with_s, ratio = run_virtual(tape_cost(folder, inputs))
    print(f"\nCPU time of a step without tapes {without_s * 1e3:.2f} ms, with {with_s * 1e3:.2f} ms, ", end="")
    more = (ratio - 1) * without_s / STEP_S
    print(f"ratio of pairs {ratio:.3f}: {more:+.2%} of a step of {STEP_S * 1e3:.1f} ms")


def _print_rates(found: dict[str, list[list[Run]]], rates: Sequence[float], num_tokens: int) -> None:
    print("\n| way | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---|" + "---|" * len(rates))
    for way, columns in found.items():
        means = [statistics.harmonic_mean([run.steps_per_s for run in runs]) for runs in columns]
        print(_row(way, means, means[0]))
    if "without tapes" in found:
        plain = found["without tapes"][0][0].steps_per_s
        print(_row("restart, computed", [restart_rate(plain, rate, num_tokens) for rate in rates], plain))
    cacheless = cacheless_rate(num_tokens)
    print(_row("cache-less, computed", [cacheless] * len(rates), cacheless))
    for name, figures in PAPER.items():
        known = [figures[PAPER_RATES.index(rate)] if rate in PAPER_RATES else None for rate in rates]
        print(_row(f"paper, {name}", known, figures[0] or 1.0))


def _row(name: str, figures: Sequence[float | None], first: float) -> str:
    cells: Iterator[str] = ("–" if figure is None else f"{figure:.3g} ({figure / first:.2f})" for figure in figures)
    return f"| {name} | " + " | ".join(cells) + " |"


def _print_stalls(found: dict[str, list[list[Run]]]) -> None:
    print("\n| way | failures | stall, s, median | longest | largest error |\n|---|---|---|---|---|")
    for way, columns in found.items():
        runs = [run for column in columns for run in column]
        stalls = [stall for run in runs for stall in run.stalls_s]
        if stalls:
            print(
                f"| {way} | {sum(run.num_failures for run in runs)} | {statistics.median(stalls):.3f} "
                f"| {max(stalls):.3f} | {max(run.error for run in runs):.1e} |"
            )


if __name__ == "__main__":
    main()
