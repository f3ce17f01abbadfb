"""Tokens/s of a node's device with several sessions at once, against one session; no network, no embeddings, no head.

    python -m bench.batching --worker-only [--rounds 5] [--tokens 24] [--threads 2] [--dtype float32] [--lengths 16,128]

Sessions decode as clients that answer at once: each submits its next step when it has the last one's output. The line
"direct" is one session's steps called without the worker, which is what batching must not cost a lone session. Rounds
are interleaved, so that a noisy machine disturbs all alike; the table gives medians and the ratio to one session.
"""

import argparse
import asyncio
import statistics
import time

import torch

from app.demo import find_model
from bench.machine import describe_machine
from server_node.compute.block_loader import load_blocks
from server_node.compute.block_runner import BlockRunner
from server_node.compute.work import AllocateWork, StepWork
from server_node.compute.worker import ComputeWorker
from swarm_protocol.messages import WireTensor
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire

SESSIONS = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each session and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", default="16,128", help="the shortest and the longest prompt, in tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(str(find_model()))
    runner = load_blocks(
        checkpoint,
        Span(0, checkpoint.num_blocks),
        dtype=getattr(torch, options.dtype),
        device=torch.device(options.device),
    )
    print(describe_machine())
    asyncio.run(_measure(runner, options))


async def _measure(runner: BlockRunner, options: argparse.Namespace) -> None:
    worker = ComputeWorker(runner=runner, num_threads=options.threads)
    shortest, longest = (int(length) for length in options.lengths.split(","))
    speeds: dict[str, list[float]] = {"direct": []}
    for number in range(options.rounds + 1):
        direct = _direct(runner, (shortest + longest) // 2, options.tokens)
        found = {"direct": direct}
        for num_sessions in SESSIONS:
            lengths = [shortest + (longest - shortest) * (2 * i + 1) // (2 * num_sessions) for i in range(num_sessions)]
            found[str(num_sessions)] = await _batched(worker, runner, lengths, options.tokens)
        if number:  # the first round warms up
            for name, speed in found.items():
                speeds.setdefault(name, []).append(speed)
            print(f"round {number} of {options.rounds}", flush=True)
    worker.close()
    alone = statistics.median(speeds["1"])
    print(f"\n{options.dtype}, {options.threads} threads, prompts of {shortest} to {longest} tokens\n")
    print("| sessions | tokens/s, all | × one session |\n|---|---|---|")
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):.1f} | {statistics.median(values) / alone:.2f} |")


def _random(runner: BlockRunner, num_tokens: int) -> torch.Tensor:
    return torch.randn(1, num_tokens, runner.module.config.hidden_size)


def _direct(runner: BlockRunner, length: int, num_tokens: int) -> float:
    cache = runner.new_cache(1, length + num_tokens)
    with torch.inference_mode():
        states = to_wire(runner.run_step(cache, _random(runner, length), 0, runner.span)[:, -1:])
        started_s = time.perf_counter()
        for position in range(length, length + num_tokens):
            states = to_wire(runner.run_step(cache, from_wire(states), position, runner.span))
    return num_tokens / (time.perf_counter() - started_s)


async def _batched(worker: ComputeWorker, runner: BlockRunner, lengths: list[int], num_tokens: int) -> float:
    sessions = [await _open(worker, runner, length, num_tokens) for length in lengths]
    started_s = time.perf_counter()
    await asyncio.gather(*(_decode(worker, work, num_tokens) for work in sessions))
    return len(lengths) * num_tokens / (time.perf_counter() - started_s)


async def _open(worker: ComputeWorker, runner: BlockRunner, length: int, num_tokens: int) -> StepWork:
    """Return a session's first decode step, its prompt being computed."""
    cache = await worker.run(AllocateWork(runner.span, 1, length + num_tokens))
    prompt = await worker.run(StepWork(cache, runner.span, 0, to_wire(_random(runner, length))))
    return StepWork(cache, runner.span, length, _last(prompt.hidden_states))


async def _decode(worker: ComputeWorker, work: StepWork, num_tokens: int) -> None:
    for position in range(work.position, work.position + num_tokens):
        output = await worker.run(StepWork(work.cache, work.blocks, position, work.hidden_states))
        work = StepWork(work.cache, work.blocks, position, output.hidden_states)


def _last(states: WireTensor) -> WireTensor:
    return to_wire(from_wire(states)[:, -1:])


if __name__ == "__main__":
    main()
