"""Sequences go through the swarm in groups of one length, and each goes once."""

from hypothesis import given
from hypothesis import strategies as st

from swarm_client.generation.embedder import batches


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 5), st.integers(1, 30))
def test_batches_hold_every_sequence_once_and_keep_their_bounds(lengths: list[int], rows: int, tokens: int) -> None:
    found = list(batches(lengths, rows, tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        assert len({lengths[index] for index in batch}) == 1
        assert len(batch) <= rows
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= tokens
