"""What blocks in 32, 16, 8 and 4 bits take on this CPU: 15 blocks of SmolLM2, in one process.

    python -m bench.quantized_blocks [--rounds 7] [--threads 1] [--rows 1 2 4 8 16 256]

The first table is the products of the linear layers alone, one layer after the other as in a step, so that few weights
come from the cache; the second is whole decode steps of so many sessions, or rows of one prefill from 64 on. All ways
run in turn, round by round.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from app.demo import find_model
from bench.machine import describe_machine
from server_node.compute.block_loader import load_blocks, module_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.quantization import scheme_of
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.spans import Span

SPAN = Span(0, 15)
CPU = torch.device("cpu")
WAYS = (("none", "float32"), ("none", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16"), ("nf4", "bfloat16"))
CONTEXT_TOKENS = 100
PREFILL_ROWS = 64
"""From here on rows are those of a prompt."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 256])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{describe_machine()}; {options.threads} thread(s)\n", flush=True)
    checkpoint = open_checkpoint(str(find_model()))
    runners = {}
    for quantization, dtype in WAYS:
        runner = load_blocks(
            checkpoint, SPAN, dtype=getattr(torch, dtype), device=CPU, scheme=scheme_of(quantization, CPU)
        )
        held = dtype if quantization == "none" else f"{quantization}, {dtype}"
        runners[f"{held} ({module_bytes(runner.module) / 1e6:.0f} MB)"] = runner
    for title, prepare in (("products alone", _products), ("whole steps", _steps)):
        print(f"| ms, {title}; rows: | " + " | ".join(map(str, options.rows)) + " |")
        print("|---" * (len(options.rows) + 1) + "|")
        columns = [_measure(runners, prepare, rows, options.rounds) for rows in options.rows]
        for name in runners:
            print(f"| {name} | " + " | ".join(f"{statistics.median(column[name]):.1f}" for column in columns) + " |")
        print(flush=True)


Prepare = Callable[[BlockRunner, int], Callable[[], object]]


@torch.inference_mode()
def _measure(runners: dict[str, BlockRunner], prepare: Prepare, rows: int, rounds: int) -> dict[str, list[float]]:
    ways = {name: prepare(runner, rows) for name, runner in runners.items()}
    taken_ms: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            started_s = time.perf_counter()
            run()
            if number:
                taken_ms[name].append((time.perf_counter() - started_s) * 1e3)
    return taken_ms


def _products(runner: BlockRunner, rows: int) -> Callable[[], object]:
    layers = [module for module in runner.module.blocks.modules() if hasattr(module, "in_features")]
    inputs = {layer.in_features: torch.randn(rows, layer.in_features).to(runner.module.dtype) for layer in layers}
    return lambda: [layer(inputs[layer.in_features]) for layer in layers]


def _steps(runner: BlockRunner, rows: int) -> Callable[[], object]:
    shape: Sequence[int] = (1, rows) if rows >= PREFILL_ROWS else (rows, 1)
    states = torch.randn(*shape, runner.module.config.hidden_size)
    cache = runner.new_cache(shape[0], 8192)
    runner.run_step(cache, states[:, :1].repeat(1, CONTEXT_TOKENS, 1), 0, SPAN)
    # Every time at the same position, so that the context does not grow.
    return lambda: runner.run_step(cache, states, CONTEXT_TOKENS, SPAN)


if __name__ == "__main__":
    main()
