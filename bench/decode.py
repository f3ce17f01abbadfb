"""Tokens/s of one session through 1, 2 and 3 nodes on this machine, against transformers in one process.

    python -m bench.decode [--rounds 7] [--tokens 32] [--threads 1] [--ways float32:2 int8:2 …] [--llama-cpp PYTHON]

Every way runs in turn, round by round, so that a noisy machine disturbs all of them alike; the table gives medians,
the spread (smallest and largest round) and the ratio to transformers in float32 of the same round. All processes have
`--threads` threads each. A second table says where a token's time goes; a third, what a hop costs at hidden 4096 when
its block computes next to nothing.

A way of Umbel is what its nodes hold and how many there are: `float32:3`, `bfloat16:2`, `int8:1`, `nf4:2`. Nodes with
quantized blocks run in bfloat16, the client's head in float32. `--llama-cpp` names a Python interpreter with the
package llama-cpp-python, which is measured on the same file.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from app.demo import find_model
from bench.llama_cpp_process import LlamaCppProcess
from bench.machine import describe_machine
from bench.node_processes import NodeProcess
from swarm_client import AutoDistributedModelForCausalLM, ClientConfig, DistributedCausalLM
from swarm_client.generation_times import GenerationTimes

PROMPT_TOKENS = 16
CLIENT = ClientConfig(host="127.0.0.1", relay=False)
CUTS = {1: ["0:30"], 2: ["0:15", "15:30"], 3: ["0:10", "10:20", "20:30"]}
HELD = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--quantization", "int8"),
    "nf4": ("--quantization", "nf4"),
}
WAYS = ("float32:1", "float32:2", "float32:3", "bfloat16:2", "int8:1", "int8:2", "nf4:1", "nf4:2")


@dataclass(slots=True)
class Way:
    """One way to generate: seconds per token of each round, and for nodes where they went."""

    name: str
    run: Callable[[torch.Tensor, int], float]
    token_s: list[float] = field(default_factory=list)
    times: list[GenerationTimes] = field(default_factory=list)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=[f"{held}:{n}" for held in HELD for n in CUTS])
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{describe_machine()}; {options.threads} thread(s) per process\n", flush=True)
    with contextlib.ExitStack() as stack:
        ways = [_transformers("float32"), _transformers("bfloat16")]
        ways += [_umbel(stack, *name.split(":"), options.threads) for name in options.ways]
        if options.llama_cpp:
            ways.append(_llama_cpp(stack, options.llama_cpp, options.threads))
        prompt = torch.arange(100, 100 + PROMPT_TOKENS)[None]
        for way in ways:
            way.run(prompt, 4)
            way.times.clear()
        for number in range(options.rounds):
            for way in ways:
                way.token_s.append(way.run(prompt, options.tokens))
            print(f"round {number + 1} of {options.rounds}", flush=True)
        _print_speeds(ways)
        _print_shares([way for way in ways if way.times])
    _print_hop(options.threads)


def _transformers(dtype: str) -> Way:
    model = find_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=getattr(torch, dtype))
    return Way(f"transformers, one process, {dtype}", lambda prompt, n: _time_local(local, prompt, n))


def _umbel(stack: contextlib.ExitStack, held: str, num_nodes: str, threads: int) -> Way:
    model, blocks = str(find_model()), CUTS[int(num_nodes)]
    options = ("--threads", str(threads), "--cache-tokens", "4096", *HELD[held])
    first = stack.enter_context(NodeProcess(model, blocks[0], (), *options)).wait_until_online()
    for span in blocks[1:]:
        stack.enter_context(NodeProcess(model, span, [first.address], *options)).wait_until_online()
    # The head is faster in float32 than in bfloat16 (6.4 and 8.0 ms), whatever the nodes run in.
    remote = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=[first.address], config=CLIENT, dtype="float32"
    )
    stack.callback(remote.close)
    way = Way(f"Umbel, {num_nodes} node{'s' * (num_nodes != '1')}, {held}", lambda prompt, n: 0.0)
    way.run = _remote_timer(remote, way)
    return way


def _llama_cpp(stack: contextlib.ExitStack, python: str, threads: int) -> Way:
    model = find_model()
    process = stack.enter_context(LlamaCppProcess(python, str(model), threads))
    encoding = model.stem.rpartition(".")[2]
    name = f"llama.cpp, one process, {encoding} (llama-cpp-python {process.version})"
    return Way(name, lambda prompt, n: process.token_s(prompt[0].tolist(), n))


def _time_local(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> float:
    """Return seconds per token of transformers' own generate, the prefill's share taken out."""
    mask = torch.ones_like(prompt)
    times = []
    for count in (1, num_tokens + 1):
        started_s = time.perf_counter()
        model.generate(prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        times.append(time.perf_counter() - started_s)
    return (times[1] - times[0]) / num_tokens


def _remote_timer(model: DistributedCausalLM, way: Way) -> Callable[[torch.Tensor, int], float]:
    @torch.inference_mode()
    def run(prompt: torch.Tensor, num_tokens: int) -> float:
        with model.inference_session(max_length=prompt.shape[1] + num_tokens + 1) as session:
            ids, position = prompt, 0
            started_s = 0.0
            for count in range(num_tokens + 1):
                output = session.step(model.ends.embed(ids, position))
                position += ids.shape[1]
                ids = model.ends.logits(output[:, -1:])[:, -1].argmax(-1, keepdim=True)
                if count == 0:
                    started_s = time.perf_counter()
            ended_s = time.perf_counter()
            session.time_log.pause(ended_s)
            way.times.append(session.times)
            return (ended_s - started_s) / num_tokens

    return run


def _print_speeds(ways: Sequence[Way]) -> None:
    print("\n| way | tokens/s, median | smallest–largest | × transformers, median of rounds |\n|---|---|---|---|")
    for way in ways:
        speeds = [1 / seconds for seconds in way.token_s]
        ratios = [base / own for base, own in zip(ways[0].token_s, way.token_s, strict=True)]
        print(
            f"| {way.name} | {statistics.median(speeds):.1f} | {min(speeds):.1f}–{max(speeds):.1f} "
            f"| {statistics.median(ratios):.2f} |"
        )


def _print_shares(ways: Sequence[Way]) -> None:
    """Medians over the rounds of each round's medians."""
    print("\n| ms per token, medians | all | compute | node queue | wire and loops, all hops | per hop | client |")
    print("|---|---|---|---|---|---|---|")
    for way in ways:
        tokens = [times.per_token for times in way.times]
        compute, queue, wire, client = (
            statistics.median(getattr(token, name) for token in tokens) * 1e3
            for name in ("compute_s", "queue_s", "wire_s", "client_s")
        )
        per_hop = statistics.median(hop.per_token.wire_s for times in way.times for hop in times.hops) * 1e3
        whole = statistics.median(way.token_s) * 1e3
        print(f"| {way.name} | {whole:.1f} | {compute:.1f} | {queue:.2f} | {wire:.2f} | {per_hop:.2f} | {client:.1f} |")


def _print_hop(threads: int) -> None:
    """What one hop costs in software: batch 1, hidden 4096, a block of next to no work."""
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=1, num_key_value_heads=1, head_dim=8, intermediate_size=8,
        num_hidden_layers=1, vocab_size=32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        LlamaForCausalLM(config).save_pretrained(folder)
        path = str(Path(folder))
        node = stack.enter_context(NodeProcess(path, "0:1", (), "--threads", str(threads), "--cache-tokens", "4096"))
        node.wait_until_online()
        model = AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=[node.address], config=CLIENT)
        stack.callback(model.close)
        steps, hops = [], []
        with model.inference_session(max_length=2000) as session, torch.inference_mode():
            state = torch.randn(1, 1, 4096)
            for _ in range(1500):
                started_s = time.perf_counter()
                session.step(state)
                steps.append(time.perf_counter() - started_s)
                hops.append(session.last_timings[0])
        steps, hops = steps[100:], hops[100:]
        overhead = [step - hop.compute_s for step, hop in zip(steps, hops, strict=True)]
        print("\n| one hop, hidden 4096, batch 1, ms | median | 90 % |\n|---|---|---|")
        for name, values in (
            ("whole step as the caller sees it", steps),
            ("of it compute at the node", [hop.compute_s for hop in hops]),
            ("of it waiting in the node", [hop.queue_s for hop in hops]),
            ("software overhead: step less compute", overhead),
        ):
            high = sorted(values)[len(values) * 9 // 10]
            print(f"| {name} | {statistics.median(values) * 1e3:.2f} | {high * 1e3:.2f} |")


if __name__ == "__main__":
    main()
