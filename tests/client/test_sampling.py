"""Tokens are drawn as from all of transformers' logits processors, whatever is left out on the way there."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm_client.generation.sampling import TokenChooser, choose_together, token_logprobs
from swarm_client.generation.text_session import SamplingParams

VOCABULARY = 3000
MAKERS: dict[str, Any] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
SETTINGS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.5, "min_p": 0.02},
    {"repetition_penalty": 1.3, "temperature": 0.8, "top_p": 0.95},
    {"top_p": 0.0},
    {"top_k": 600, "top_p": 0.999},
    {"temperature": 2.0},
]


def peaked(rows: int, seed: int) -> torch.Tensor:
    """Logits as a language model makes them: few tokens have nearly all of it."""
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


def flat(rows: int, seed: int) -> torch.Tensor:
    """Logits whose nucleus is most of the vocabulary."""
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 0.1


def by_transformers(params: dict[str, Any], seed: int, logits: torch.Tensor, ids: Sequence[int]) -> int:
    processors = LogitsProcessorList([make(params[name]) for name, make in MAKERS.items() if name in params])
    shares = processors(torch.tensor([list(ids)]), logits[None].clone())[0].double().softmax(-1).cumsum(-1)
    drawn = TokenChooser(SamplingParams(1, seed=seed))._uniform(len(ids)) * shares[-1]
    return int(torch.searchsorted(shares, drawn, right=True))


@pytest.mark.parametrize("make", [peaked, flat])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_draws_are_those_of_transformers_processors(params: dict[str, Any], make: Any) -> None:
    chooser = TokenChooser(SamplingParams(1, do_sample=True, seed=3, **params))
    for position, logits in enumerate(make(60, 1)):
        ids = [(7 * at) % VOCABULARY for at in range(position)] or [5]
        assert chooser.choose(logits, ids) == by_transformers(params, 3, logits, ids)


def test_rows_of_all_kinds_choose_together_what_they_choose_alone() -> None:
    settings = [{"do_sample": True, **params} for params in SETTINGS] * 2 + [{}, {"repetition_penalty": 1.5}, {}]
    choosers = [TokenChooser(SamplingParams(1, seed=at, **params)) for at, params in enumerate(settings)]
    # Wide and narrow nuclei in one batch.
    logits = torch.stack([peaked(1, at)[0] if at % 2 else flat(1, at)[0] for at in range(len(choosers))])
    ids = [[at, 2 * at, 5] for at in range(len(choosers))]
    together = choose_together(logits, choosers, ids)
    assert together == [chooser.choose(*row) for chooser, *row in zip(choosers, logits, ids, strict=True)]
    assert len(set(together)) > len(choosers) // 2


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCABULARY + 1])
def test_logprobs_are_those_of_the_whole_distribution_whatever_is_sampled(num_top: int) -> None:
    (logits,) = peaked(1, 4)
    wanted = logits.double().log_softmax(-1)
    found = token_logprobs(logits.bfloat16().float(), 7, num_top)
    exact = token_logprobs(logits, 7, num_top)
    assert exact.logprob == pytest.approx(float(wanted[7]), abs=1e-4)
    assert found.logprob == pytest.approx(exact.logprob, abs=0.1)
    assert len(exact.top) == min(num_top, VOCABULARY)
    order = wanted.argsort(descending=True).tolist()[:num_top]
    assert [token_id for token_id, _ in exact.top] == order
    assert [logprob for _, logprob in exact.top] == pytest.approx(wanted[order].tolist(), abs=1e-4)
