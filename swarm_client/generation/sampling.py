"""Choose the next token from logits, with transformers' own logits processors."""

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm_client.generation.text_session import SamplingParams, TokenLogprobs
from swarm_protocol.errors import InvalidRequestError


class TokenChooser:
    """Greedy or seeded choice of tokens. One random number is drawn per position, so that a seed gives one text
    whatever is cancelled, repeated or guessed ahead in between, and whoever else's tokens are chosen with it."""

    def __init__(self, params: SamplingParams) -> None:
        """Raises InvalidRequestError for values that the processors refuse."""
        is_greedy = not params.do_sample or params.temperature == 0
        try:
            self._penalty = _penalty(params)
            self._warpers = None if is_greedy else _warpers(params)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        self._seed = secrets.randbits(63) if params.seed is None else params.seed % (1 << 63)
        self.num_logprobs = params.logprobs
        # Those who are warped alike can be warped together.
        self._kind = None if is_greedy else (params.temperature, params.top_k, params.top_p, params.min_p)

    def choose(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """Return the id of the token behind `token_ids`, for its logits (vocab)."""
        return choose_together(logits[None], [self], [token_ids])[0]

    def _penalized(self, scores: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the scores (1, vocab) with what hangs on the tokens before."""
        return self._penalty(torch.tensor([list(token_ids)], device=scores.device), scores) if self._penalty else scores

    def _uniform(self, position: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=self._seed, counter=position)).random())


def choose_together(
    logits: torch.Tensor, choosers: Sequence[TokenChooser], token_ids: Sequence[Sequence[int]]
) -> list[int]:
    """Return for each row of `logits` (rows, vocab) what its chooser takes behind its `token_ids`.

    A row's choice hangs on that row alone. Raises whatever one of the rows makes a processor raise.
    """
    scores = logits.float()
    if any(chooser._penalty for chooser in choosers):
        rows = zip(choosers, scores[:, None], token_ids, strict=True)
        scores = torch.cat([chooser._penalized(row, ids) for chooser, row, ids in rows])
    kinds: dict[Hashable, list[int]] = {}
    for row, chooser in enumerate(choosers):
        kinds.setdefault(chooser._kind, []).append(row)
    chosen = [0] * len(choosers)
    for rows_of_kind in kinds.values():
        own = scores if len(kinds) == 1 else scores[rows_of_kind]
        first = choosers[rows_of_kind[0]]
        if first._warpers is None:
            ids = own.argmax(dim=-1)
        else:
            uniforms = [choosers[row]._uniform(len(token_ids[row])) for row in rows_of_kind]
            ids = _sampled(own, first._warpers, torch.tensor(uniforms, dtype=torch.double, device=own.device))
        for row, token_id in zip(rows_of_kind, ids.tolist(), strict=True):
            chosen[row] = token_id
    return chosen


def token_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the logarithm of the model's probability of a token and of the `num_top` best, for logits (vocab)."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(num_top, logprobs.shape[0]))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)


@dataclass(frozen=True, slots=True)
class _Warpers:
    """The processors of sampling, in the order in which transformers' `generate` applies them."""

    before: LogitsProcessorList
    nucleus: TopPLogitsWarper | None
    after: LogitsProcessorList


_NO_IDS = torch.empty(0, 0, dtype=torch.long)
"""For the processors that look at scores only."""

_CANDIDATES = 256
"""A nucleus is mostly among so many best tokens, and to find these takes 0.1 ms where transformers sorts the whole
vocabulary: 5 ms for SmolLM2's 49,152 tokens and 27 ms for BLOOM's 250,880 (one thread)."""

_MARGIN = 1e-4
"""By which the candidates' shares must exceed `top_p`, so that rounding does not matter."""


def _sampled(scores: torch.Tensor, warpers: _Warpers, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the id (rows,) that each row's uniform number in [0, 1) falls on after the warpers."""
    scores = warpers.before(_NO_IDS, scores)
    if warpers.nucleus is None:
        return _drawn(warpers.after(_NO_IDS, scores), uniforms)
    top_p = warpers.nucleus.top_p
    best = scores.topk(min(_CANDIDATES, scores.shape[1]), dim=-1)
    shares = (best.values - scores.logsumexp(dim=-1, keepdim=True)).double().exp()
    sums = shares.cumsum(dim=-1)
    is_among = sums[:, -1] > top_p + _MARGIN
    ids = torch.empty(scores.shape[0], dtype=torch.long, device=scores.device)
    if is_among.any():
        is_out = (sums - shares)[is_among] >= top_p
        is_out[:, 0] = False
        kept = best.values[is_among].masked_fill(is_out, -torch.inf)
        # In the order of the vocabulary, so that a number falls on the token that it falls on among all.
        by_id = best.indices[is_among].sort(dim=-1)
        places = _drawn(warpers.after(_NO_IDS, kept.gather(-1, by_id.indices)), uniforms[is_among])
        ids[is_among] = by_id.values.gather(-1, places[:, None])[:, 0]
    if not is_among.all():
        rest = warpers.after(_NO_IDS, warpers.nucleus(_NO_IDS, scores[~is_among]))
        ids[~is_among] = _drawn(rest, uniforms[~is_among])
    return ids


def _drawn(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    points = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def _penalty(params: SamplingParams) -> RepetitionPenaltyLogitsProcessor | None:
    # It comes before the others, as in transformers' `generate`.
    if params.repetition_penalty in (None, 1.0):
        return None
    return RepetitionPenaltyLogitsProcessor(params.repetition_penalty)


def _warpers(params: SamplingParams) -> _Warpers:
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if params.temperature not in (None, 1.0):
        before.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        before.append(TopKLogitsWarper(params.top_k))
    nucleus = TopPLogitsWarper(params.top_p) if params.top_p is not None and params.top_p < 1.0 else None
    if params.min_p:
        after.append(MinPLogitsWarper(params.min_p))
    return _Warpers(before, nucleus, after)
