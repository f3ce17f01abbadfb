"""Pages of prefixes: what is found, for whom, what goes first, and that the numbers are those of the first time."""

import pytest
import torch

from server_node.compute.block_runner import BlockRunner
from server_node.compute.kv_cache import KVCache
from server_node.compute.prefix_store import PrefixStore
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import PAGE_TOKENS
from swarm_protocol.spans import Span
from tests.node.node_scenario import HIDDEN, SPAN, tiny_span

ALICE, BOB = PeerId("Alice"), PeerId("Bob")
PAGE_BYTES = 3 * 2 * 4 * 8 * 2 * PAGE_TOKENS
"""Three blocks, keys and values, float32, heads of 8, two of them cached."""


def hashes(text: str) -> list[bytes]:
    """One name a page; each covers the letters before it, as real ones do."""
    return [text[: end + 1].encode().ljust(16) for end in range(len(text))]


def states(num_pages: int, seed: int = 0, extra: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_pages * PAGE_TOKENS + extra, HIDDEN, generator=generator)


@pytest.fixture
def runner() -> BlockRunner:
    return BlockRunner(tiny_span())


def opened(
    runner: BlockRunner,
    store: PrefixStore,
    text: str,
    owner: PeerId = ALICE,
    blocks: Span = SPAN,
    max_tokens: int = 2000,
) -> KVCache:
    cache = runner.new_cache(1, max_tokens, blocks)
    with torch.inference_mode():
        store.fill(cache, owner, hashes(text))
    return cache


def kept(runner: BlockRunner, store: PrefixStore, text: str, owner: PeerId = ALICE) -> KVCache:
    """A session that computed all of its prefix."""
    cache = opened(runner, store, text, owner)
    runner.run_step(cache, states(len(text), extra=3)[:, cache.position :], cache.position, SPAN)
    with torch.inference_mode():
        store.keep(cache)
    return cache


def known(runner: BlockRunner, store: PrefixStore, text: str, **who: object) -> int:
    """How many pages of a prefix a new session would begin with."""
    return opened(runner, store, text, **who).position // PAGE_TOKENS  # type: ignore[arg-type]


def test_a_later_session_begins_with_the_pages_that_agree(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    kept(runner, store, "abc")
    assert known(runner, store, "abc") == 3
    assert known(runner, store, "abcd") == 3
    assert known(runner, store, "abx") == 2
    assert known(runner, store, "xbc") == 0
    assert known(runner, store, "") == 0


def test_the_output_behind_a_known_prefix_is_what_it_would_be_without(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    kept(runner, store, "ab")
    cache = opened(runner, store, "ab")
    tokens = states(2, extra=5)
    start = cache.position
    output = runner.run_step(cache, tokens[:, start:], start, SPAN)
    torch.testing.assert_close(output, runner.forward(tokens, SPAN)[:, start:], rtol=1e-5, atol=1e-5)


def test_what_a_session_does_later_does_not_reach_the_pages(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    first = kept(runner, store, "ab")
    second = opened(runner, store, "ab")
    for cache in (first, second):
        runner.run_step(cache, states(2, seed=9), 0, SPAN)  # other tokens in the same places
        with torch.inference_mode():
            store.keep(cache)
    third = opened(runner, store, "ab")
    tokens = states(2, extra=1)
    output = runner.run_step(third, tokens[:, -1:], 2 * PAGE_TOKENS, SPAN)
    torch.testing.assert_close(output, runner.forward(tokens, SPAN)[:, -1:], rtol=1e-5, atol=1e-5)


def test_pages_behind_a_rollback_are_not_kept(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    cache = opened(runner, store, "abc")
    runner.run_step(cache, states(2), 0, SPAN)
    runner.run_step(cache, states(2, seed=9), PAGE_TOKENS + 1, SPAN)
    with torch.inference_mode():
        store.keep(cache)
    assert known(runner, store, "abc") == 1


def test_pages_are_found_by_their_owner_and_for_their_blocks_only(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    kept(runner, store, "ab")
    assert known(runner, store, "ab", owner=BOB) == 0
    assert known(runner, store, "ab", blocks=Span(1, 3)) == 0
    assert known(runner, store, "ab") == 2


def test_no_more_is_taken_than_the_session_reserved(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    kept(runner, store, "abc")
    assert known(runner, store, "abc", max_tokens=2 * PAGE_TOKENS + 1) == 2


def test_full_pages_only_are_kept(runner: BlockRunner) -> None:
    store = PrefixStore(1 << 30)
    cache = opened(runner, store, "ab")
    runner.run_step(cache, states(1, extra=PAGE_TOKENS - 1), 0, SPAN)
    store.keep(cache)
    assert (len(store), store.size_bytes) == (1, PAGE_BYTES)


def test_the_oldest_prefix_goes_first_and_its_end_before_its_beginning(runner: BlockRunner) -> None:
    store = PrefixStore(8 * PAGE_BYTES)
    for owner in (ALICE, BOB):
        kept(runner, store, "abcd", owner)
    assert len(store) == 8
    assert known(runner, store, "abcd") == 4  # used again, so Bob's are the oldest
    kept(runner, store, "xy", PeerId("Caro"))
    assert [known(runner, store, "abcd", owner=owner) for owner in (BOB, ALICE)] == [2, 4]
    assert store.size_bytes == 8 * PAGE_BYTES


def test_one_owner_fills_half_of_the_store_and_pushes_out_nobody_else(runner: BlockRunner) -> None:
    store = PrefixStore(8 * PAGE_BYTES)
    kept(runner, store, "ab", BOB)
    for text in ("abcd", "efgh", "ijkl"):
        kept(runner, store, text)
    assert len(store) == 6
    assert [known(runner, store, text) for text in ("abcd", "efgh", "ijkl")] == [0, 0, 4]
    assert known(runner, store, "ab", owner=BOB) == 2


def test_a_prefix_larger_than_the_share_keeps_its_beginning(runner: BlockRunner) -> None:
    store = PrefixStore(8 * PAGE_BYTES)
    kept(runner, store, "abcdef")
    assert known(runner, store, "abcdef") == 4


def test_a_store_of_no_size_keeps_nothing(runner: BlockRunner) -> None:
    store = PrefixStore(0)
    cache = kept(runner, store, "ab")
    assert (len(store), store.size_bytes, cache.page_keys) == (0, 0, ())
