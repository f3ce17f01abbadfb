"""What quantized blocks of large models take on a GPU: decode steps of blocks with a real shape and random weights.

    python -m bench.gpu [--shape bloom-176b llama-3.1-70b] [--quantization nf4 int8] [--rows 1 8 32] [--blocks N]

As many blocks as fit are run, one after the other as in a node, so that weights come from memory and not from a cache.
Steps are of one session of so many rows behind 100 tokens. The floor is the time to read the weights once, at the
bandwidth of a copy on the same device; the whole model is extrapolated from the time per block, without its ends and
the network.
`--shape small` is for any device, a CPU too, and says nothing about speed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BloomConfig, LlamaConfig, PreTrainedConfig

from bench.machine import describe_machine
from server_node.compute.block_loader import module_bytes
from server_node.compute.block_runner import BlockRunner
from server_node.compute.device import free_memory_bytes
from server_node.compute.quantization import Held, Quantizer, quantized_bytes, scheme_of
from swarm_protocol.errors import ConfigError
from swarm_protocol.model.anatomy import build_empty, find_anatomy, keep_blocks_only
from swarm_protocol.model.parts import SpanModule
from swarm_protocol.spans import Span

CONTEXT_TOKENS = 100
FREE_SHARE = 0.8
"""Of the memory that is free, for weights: the rest is for caches and activations."""

COPY_BYTES = 1 << 30
"""Far beyond any cache; on a CPU an eighth of it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's blocks; the vocabulary is none of them and small."""

    config: PreTrainedConfig
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Figure:
    """What steps of so many rows took. `floor_share` is 1.0 where a step takes as long as reading the weights."""

    num_rows: int
    block_s: float
    floor_share: float

    def whole_steps_per_s(self, num_blocks: int) -> float:
        """Return the steps/s of a model of so many blocks, on one such device after the other."""
        return 1 / (self.block_s * num_blocks)


SHAPES = ("bloom-176b", "llama-3.1-70b", "small")


def shapes_of(name: str) -> dict[str, Shape]:
    """Return the shapes that a value of `--shape` stands for."""
    if name == "bloom-176b":
        return {name: Shape(BloomConfig(hidden_size=14336, n_head=112, n_layer=70, vocab_size=64), 70)}
    if name == "llama-3.1-70b":
        return {name: Shape(_llama(8192, 64, 8, 28672, 80), 80)}
    bloom = BloomConfig(hidden_size=512, n_head=8, n_layer=2, vocab_size=64)
    return {"small bloom": Shape(bloom, 2), "small llama": Shape(_llama(512, 8, 2, 1024, 2), 2)}


def _llama(hidden_size: int, num_heads: int, num_kv_heads: int, intermediate_size: int, num_blocks: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_blocks,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=8192,
    )


def random_blocks(shape: Shape, scheme: Held | None, device: torch.device, most: int | None) -> BlockRunner:
    """Return as many blocks as fit, `most` at most, quantized one by one. Raises ConfigError if none fits."""
    dtype = torch.bfloat16
    model = build_empty(shape.config, dtype)
    anatomy = find_anatomy(model)
    block = getattr(model.get_submodule(anatomy.decoder), anatomy.blocks)[0]
    plain_bytes = module_bytes(block)
    block_bytes = plain_bytes if scheme is None else quantized_bytes(block, scheme)
    room_bytes = int(FREE_SHARE * free_memory_bytes(device)) - (plain_bytes if scheme else 0)
    num_blocks = min(room_bytes // block_bytes, most or shape.num_blocks, shape.num_blocks)
    if num_blocks < 1:
        raise ConfigError(f"one block takes {(plain_bytes + block_bytes) / 1e9:.1f} GB while it is made: none fits")
    span = Span(0, num_blocks)
    keep_blocks_only(model, anatomy, span)
    decoder = model.get_submodule(anatomy.decoder)
    blocks = nn.ModuleList(list(getattr(decoder, anatomy.blocks))[:num_blocks])
    quantizer = Quantizer(scheme) if scheme is not None else None
    generator = torch.Generator(device).manual_seed(0)
    for block in blocks:
        _fill(block, device, generator)
        if quantizer:
            quantizer(block)
    setattr(decoder, anatomy.blocks, blocks)
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is not None:  # its buffers are computed, and were on the meta device
        decoder.rotary_emb = type(rotary)(config=decoder.config).to(device)
    return BlockRunner(SpanModule(decoder, anatomy.blocks, span))


@torch.no_grad()
def _fill(block: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    block.to_empty(device=device)
    for name, weight in block.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes/s of a copy on `device`, read and written ones."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 8
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_timed(lambda: target.copy_(source), device, 10))


def measure(runner: BlockRunner, rows: Sequence[int], bandwidth: float, rounds: int) -> list[Figure]:
    """Run decode steps of each number of rows."""
    span, device = runner.span, runner.module.device
    floor_s = module_bytes(runner.module.blocks) / len(span) / bandwidth
    figures = []
    for num_rows in rows:
        cache = runner.new_cache(num_rows, CONTEXT_TOKENS + 1)
        shape = (num_rows, CONTEXT_TOKENS, runner.module.config.hidden_size)
        states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, runner.module.dtype)
        runner.run_step(cache, states, 0, span)
        # Every time at the same position, so that the context does not grow.
        step_s = _timed(lambda cache=cache, states=states: runner.run_step(cache, states[:, :1], CONTEXT_TOKENS, span),
                        device, rounds)  # fmt: skip
        block_s = statistics.median(step_s) / len(span)
        figures.append(Figure(num_rows, block_s, floor_s / block_s))
    return figures


def _timed(run: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Return seconds of each run but the first two, with what it started on the device."""
    taken_s = []
    for _ in range(rounds + 2):
        _wait(device)
        started_s = time.perf_counter()
        run()
        _wait(device)
        taken_s.append(time.perf_counter() - started_s)
    return taken_s[2:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES[:2]))
    parser.add_argument("--quantization", nargs="+", choices=("none", "int8", "nf4"), default=["nf4", "int8"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--blocks", type=int, help="at most so many; default: as many as fit")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    has_cuda = torch.cuda.is_available()
    if not has_cuda and set(options.shape) != {"small"}:
        sys.exit("no CUDA device is here, and these shapes are for one: --shape small runs on a CPU")
    device = torch.device("cuda" if has_cuda else "cpu")
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device) if has_cuda else "no GPU"
    print(f"{describe_machine()}; {name}, a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    print("| blocks | MB a block | rows | steps/s of a block | of the floor | whole model, steps/s | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for shape_name, shape in (each for chosen in options.shape for each in shapes_of(chosen).items()):
        for quantization in options.quantization:
            try:
                runner = random_blocks(shape, scheme_of(quantization, device), device, options.blocks)
            except ConfigError as error:
                sys.exit(f"{shape_name}, {quantization}: {error}")
            _print(
                f"{shape_name}, {quantization}", shape, runner, measure(runner, options.rows, bandwidth, options.rounds)
            )
            del runner
            if has_cuda:
                torch.cuda.empty_cache()


def _print(title: str, shape: Shape, runner: BlockRunner, figures: Sequence[Figure]) -> None:
    held_mb = module_bytes(runner.module.blocks) / len(runner.span) / 1e6
    for figure in figures:
        steps_per_s = figure.whole_steps_per_s(shape.num_blocks)
        print(
            f"| {len(runner.span)} of {title} | {held_mb:.1f} | {figure.num_rows} | {1 / figure.block_s:.0f} "
            f"| {figure.floor_share:.2f} | {steps_per_s:.2f} | {steps_per_s * figure.num_rows:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
