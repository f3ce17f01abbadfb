"""Texts as vectors: the mean of the hidden states that a model's head would see, computed by the swarm."""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from swarm_client.inference_session import InferenceSession
from swarm_protocol.errors import CancelledStepError, InvalidRequestError, MaxLengthError
from swarm_protocol.messages import MAX_BATCH_ROWS
from swarm_protocol.model.parts import EndsModule

BATCH_TOKENS = 2048
"""Of one step: its states are 120 MB for BLOOM-176B, in float32."""


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield the indices of `lengths` in groups of equal length, of at most so many rows and tokens (but one row)."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    for length, indices in by_length.items():
        rows = max(1, min(max_rows, max_tokens // length))
        for start in range(0, len(indices), rows):
            yield tuple(indices[start : start + rows])


class DistributedEmbedder:
    """Fulfils `TextEmbedder`. Sequences of equal length go through the swarm together, without padding."""

    def __init__(self, ends: EndsModule, open_session: Callable[[int], InferenceSession], max_length: int) -> None:
        """`open_session` makes a session for so many tokens a row."""
        self._ends = ends
        self._open_session = open_session
        self._max_length = max_length
        self._lock = threading.Lock()
        self._session: InferenceSession | None = None
        self._is_cancelled = False

    def embed(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return a vector of unit length for each sequence; see `TextEmbedder`."""
        for ids in token_ids:
            if not ids:
                raise InvalidRequestError("a text without tokens has no embedding")
            if len(ids) > self._max_length:
                raise MaxLengthError(0, len(ids), self._max_length)
        vectors: list[list[float]] = [[] for _ in token_ids]
        for batch in batches([len(ids) for ids in token_ids], MAX_BATCH_ROWS, BATCH_TOKENS):
            found = self._embed_batch(torch.tensor([list(token_ids[index]) for index in batch]))
            for index, vector in zip(batch, found.tolist(), strict=True):
                vectors[index] = vector
        return vectors

    def cancel(self) -> None:
        """End a running `embed` now, and all later ones. Any thread."""
        with self._lock:
            self._is_cancelled = True
            session = self._session
        if session is not None:
            session.cancel()

    @torch.inference_mode()
    def _embed_batch(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors (rows, hidden) of ids (rows, n)."""
        session = self._open_session(ids.shape[1])
        try:
            total = torch.zeros(0)
            with session.cancellable():
                with self._lock:  # within `cancellable`, so that a cancel from here on is not lost
                    self._session = session
                for start in range(0, ids.shape[1], BATCH_TOKENS):
                    if self._is_cancelled:
                        raise CancelledStepError("embedding was cancelled")
                    states = session.step(self._ends.embed(ids[:, start : start + BATCH_TOKENS], start))
                    part = self._ends.last_hidden_states(states).double().sum(dim=1)
                    total = total + part if start else part
        finally:
            with self._lock:
                self._session = None
            session.close()
        return torch.nn.functional.normalize(total, dim=-1)
