"""What it costs a model that hidden states travel in fewer bytes: the gate of `swarm_client/wire_choice.py`.

    python -m bench.wire_quality [MODEL] [--spans 3 10] [--window 256] [--threads 2]

The model's blocks run in float32 in this process, cut into so many spans, and what goes into the first, from one to the
next, and out of the last, is made what a node would send and back. Against the same with nothing changed: perplexity of
a fixed text, the share of its tokens after which the most likely next token is the same one, and the mean divergence
(Kullback-Leibler) of the next token's distribution, which shows more than the other two on so short a text. A dtype
passes if perplexity changes by 0.3 % at most and 98 % of the most likely tokens stay, at every number of spans.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from app.demo import find_model
from bench.machine import describe_machine
from bench.plain_text import TEXT
from swarm_protocol.model import load_ends, load_span, open_checkpoint
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.spans import Span
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.wire_tensor import INT8_ROWS, row_bytes

MOST_PERPLEXITY = 0.003
LEAST_AGREEMENT = 0.98
DTYPES = ("float32", "bfloat16", "float16", INT8_ROWS)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Damage:
    """Against states that travel as they are; `perplexity` is the relative change."""

    perplexity: float
    agreement: float
    divergence: float

    @property
    def passes(self) -> bool:
        """Whether a dtype that does no more than this may be chosen unasked."""
        return abs(self.perplexity) <= MOST_PERPLEXITY and self.agreement >= LEAST_AGREEMENT


class Judge:
    """Runs a text through a model whose states travel in a dtype."""

    def __init__(self, checkpoint: Checkpoint, num_spans: int, window: int) -> None:
        """The text is cut into pieces of `window` tokens."""
        whole = checkpoint.num_blocks
        edges = [round(whole * number / num_spans) for number in range(num_spans + 1)]
        cuts = [Span(start, end) for start, end in itertools.pairwise(edges)]
        self._spans = [load_span(checkpoint, cut, dtype=torch.float32, device=CPU) for cut in cuts]
        self._ends = load_ends(checkpoint, dtype=torch.float32, device=CPU)
        ids = checkpoint.tokenizer()(TEXT, return_tensors="pt").input_ids
        self.pieces = [ids[:, start : start + window] for start in range(0, ids.shape[1] - 1, window)]
        self._next_ids = torch.cat([piece[0, 1:] for piece in self.pieces])
        self._wanted = self._run(None)

    def damage(self, dtype: str) -> Damage:
        """Return what `dtype` does."""
        found, wanted = self._run(dtype), self._wanted
        change = math.expm1(self._loss(found) - self._loss(wanted))
        is_same = found.argmax(-1) == wanted.argmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
        return Damage(change, is_same.float().mean().item(), divergence.item())

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self._next_ids)

    @property
    def perplexity(self) -> float:
        """Of the text, with nothing changed."""
        return math.exp(self._loss(self._wanted))

    @torch.inference_mode()
    def _run(self, dtype: str | None) -> torch.Tensor:
        """Return the log-probabilities (tokens, vocabulary) of the next tokens; `dtype` None leaves all as it is."""
        found = []
        for piece in self.pieces:
            states = self._ends.embed(piece)
            for span in self._spans:
                states = span(_travelled(states, dtype))
            logits = self._ends.logits(_travelled(states, dtype))
            found.append(logits[0, :-1].float().log_softmax(-1))
        return torch.cat(found)

    def _loss(self, log_probabilities: torch.Tensor) -> float:
        return -log_probabilities.gather(1, self._next_ids[:, None]).mean().item()


def _travelled(states: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return states if dtype is None else from_wire(to_wire(states, dtype)).float()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, a GGUF file or a cached repository; SmolLM2 of the demo")
    parser.add_argument("--spans", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--window", type=int, default=256, help="tokens of a piece of the text")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model or str(find_model()))
    hidden_size = checkpoint.config.get_text_config().hidden_size
    print(
        f"{describe_machine()}\n{checkpoint.name}, {checkpoint.config.model_type}, hidden {hidden_size}\n", flush=True
    )
    has_passed = dict.fromkeys(DTYPES, True)
    print("| spans | dtype | bytes per token | perplexity | same most likely token | divergence | passes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for num_spans in options.spans:
        judge = Judge(checkpoint, num_spans, options.window)
        for dtype in DTYPES:
            damage = judge.damage(dtype)
            has_passed[dtype] &= damage.passes
            print(
                f"| {num_spans} | {dtype} | {row_bytes(dtype, hidden_size)} | {damage.perplexity:+.3%} "
                f"| {damage.agreement:.2%} | {damage.divergence:.6f} | {'yes' if damage.passes else 'no'} |",
                flush=True,
            )
    print(f"\nperplexity {judge.perplexity:.2f} over {judge.num_tokens} tokens")
    fewest = min((d for d in DTYPES if has_passed[d]), key=lambda d: row_bytes(d, hidden_size), default="float32")
    print(f"over slow lines: {fewest}")


if __name__ == "__main__":
    main()
