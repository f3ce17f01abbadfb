"""The client of `bench.wan`, in a process of its own since it lives on a host of its own.

    python -m bench.wan_client ADDRESS MODEL HOST

Takes an order a line, as JSON, and answers each with a line. Every way has a session; they take a step in turn, so that
what disturbs the machine disturbs all alike.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import torch

from swarm_client import AutoDistributedModelForCausalLM, ClientConfig, DistributedCausalLM, InferenceSession
from swarm_client.routing.link_health import LinkHealth

RING, RELAYED = "ring", "relayed"


@dataclass(slots=True)
class Way:
    """One way, `ring` or `relayed` and a dtype that travels, and the seconds of its steps."""

    name: str
    session: InferenceSession
    ids: torch.Tensor
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    client_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians of one way, in seconds; `spans` are the blocks of its hops."""

    name: str
    step_s: float
    compute_s: float
    client_s: float
    prefill_s: float
    spans: list[int]


def main() -> None:
    """Serve the orders of the standard input."""
    peer, source, host = sys.argv[1:]
    torch.set_num_threads(1)
    config = ClientConfig(host=host, relay=False, reuse_prefixes=False)
    model = AutoDistributedModelForCausalLM.from_pretrained(source, initial_peers=[peer], config=config)
    try:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            found = _measure(model, order["ways"], order["context"], order["steps"])
            print(json.dumps([asdict(each) for each in found]), flush=True)
    finally:
        model.close()


@torch.inference_mode()
def _measure(model: DistributedCausalLM, names: list[str], context: int, steps: int) -> list[Measured]:
    ways = [_begin(model, name, context, steps) for name in names]
    try:
        for _ in range(steps):
            for way in ways:
                _step(model, way)
        return [_measured(way) for way in ways]
    finally:
        for way in ways:
            way.session.close()


def _begin(model: DistributedCausalLM, name: str, context: int, steps: int) -> Way:
    shape, dtype = name.split()
    swarm = model.remote_blocks.swarm
    swarm.config = replace(swarm.config, wire_dtype=dtype)
    session = model.remote_blocks.session(context + steps + 1)
    way = Way(name, session, torch.randint(100, 400, (1, context)))
    _travel(shape)
    session.step(model.ends.embed(way.ids[:, :1], 0))  # opens it, which is not measured
    states = model.ends.embed(way.ids[:, 1:], 1)
    started_s = time.perf_counter()
    output = session.step(states)
    way.prefill_s = time.perf_counter() - started_s
    way.ids = model.ends.logits(output[:, -1:])[:, -1].argmax(-1, keepdim=True)
    return way


def _step(model: DistributedCausalLM, way: Way) -> None:
    _travel(way.name.split()[0])
    started_s = time.perf_counter()
    states = model.ends.embed(way.ids, way.session.position)
    sent_s = time.perf_counter()
    output = way.session.step(states)
    came_s = time.perf_counter()
    way.ids = model.ends.logits(output)[:, -1].argmax(-1, keepdim=True)
    ended_s = time.perf_counter()
    way.step_s.append(ended_s - started_s)
    way.client_s.append(sent_s - started_s + ended_s - came_s)
    way.compute_s.append(sum(timing.compute_s for timing in way.session.last_timings))


def _travel(shape: str) -> None:
    """Let nodes send on by themselves, or everything come back to the client at each hop."""
    setattr(LinkHealth, "works", lambda *_: shape == RING)  # noqa: B010


def _measured(way: Way) -> Measured:
    step_s, compute_s, client_s = (statistics.median(each) for each in (way.step_s, way.compute_s, way.client_s))
    spans = [len(timing.hop.span) for timing in way.session.last_timings]
    return Measured(way.name, step_s, compute_s, client_s, way.prefill_s, spans)


if __name__ == "__main__":
    main()
