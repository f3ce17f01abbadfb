"""Choose the next token from logits, with transformers' own logits processors."""

import secrets
from collections.abc import Sequence

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

from swarm_client.generation.text_session import SamplingParams
from swarm_protocol.errors import InvalidRequestError


class TokenChooser:
    """Greedy or seeded choice of tokens. One random number is drawn per position, so that a seed gives one text
    whatever is cancelled, repeated or guessed ahead in between."""

    def __init__(self, params: SamplingParams) -> None:
        """Raises InvalidRequestError for values that the processors refuse."""
        self._is_greedy = not params.do_sample or params.temperature == 0
        try:
            self._processors = _processors(params, self._is_greedy)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        self._seed = secrets.randbits(63) if params.seed is None else params.seed % (1 << 63)

    def choose(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """Return the id of the token behind `token_ids`, for its logits (vocab)."""
        scores = logits.float()[None]
        if self._processors:
            scores = self._processors(torch.tensor([list(token_ids)], device=logits.device), scores)
        if self._is_greedy:
            return int(scores[0].argmax())
        cumulative = scores[0].double().softmax(dim=-1).cumsum(dim=-1)
        point = self._uniform(len(token_ids)) * float(cumulative[-1])
        return int(torch.searchsorted(cumulative, point, right=True).clamp(max=len(cumulative) - 1))

    def _uniform(self, position: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=self._seed, counter=position)).random())


def _processors(params: SamplingParams, is_greedy: bool) -> LogitsProcessorList:
    """Return the processors in the order in which transformers' `generate` applies them."""
    chosen = LogitsProcessorList()
    if params.repetition_penalty not in (None, 1.0):
        chosen.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if is_greedy:
        return chosen
    if params.temperature not in (None, 1.0):
        chosen.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chosen.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1.0:
        chosen.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chosen.append(MinPLogitsWarper(params.min_p))
    return chosen
