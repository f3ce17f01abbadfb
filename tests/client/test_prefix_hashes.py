"""Names of pages: equal exactly if everything that decides the keys and values is equal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_client.prefix_hashes import TokenPrefix, page_hashes
from swarm_client.routing.find_route import Hop, ModelKey
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import MAX_PREFIX_PAGES, PAGE_TOKENS
from swarm_protocol.spans import Span

KEY = b"k" * 32
MODEL = ModelKey("m", "r", 10)
HOPS = [Hop(PeerId("a"), Span(0, 5), "r/float32/cpu"), Hop(PeerId("b"), Span(5, 10), "r/float32/cpu")]
TOKENS = tuple(range(3 * PAGE_TOKENS + 5))


def hashes(tokens: tuple[int, ...] = TOKENS, **changes: object) -> tuple[bytes, ...]:
    given = {"key": KEY, "model": MODEL, "hops": HOPS, "dtype": "float32", **changes}
    return page_hashes(given["key"], given["model"], given["hops"], TokenPrefix(tokens, given["dtype"]))  # type: ignore[arg-type]


def test_every_full_page_has_a_name_of_its_own() -> None:
    assert len(hashes()) == 3
    assert len(set(hashes())) == 3
    assert hashes(TOKENS[: PAGE_TOKENS - 1]) == ()
    assert hashes() == hashes(TOKENS[:-1])


@given(st.integers(0, 3 * PAGE_TOKENS - 1))
def test_a_page_covers_all_tokens_up_to_its_end(changed: int) -> None:
    tokens = (*TOKENS[:changed], 9999, *TOKENS[changed + 1 :])
    same = [one == other for one, other in zip(hashes(), hashes(tokens), strict=True)]
    assert same == [page < changed // PAGE_TOKENS for page in range(3)]


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"other" * 6},
        {"model": ModelKey("m", "other", 10)},
        {"dtype": "bfloat16"},
        {"hops": HOPS[:1]},
        {"hops": [HOPS[0], Hop(PeerId("b"), Span(5, 9), "r/float32/cpu")]},
        {"hops": [Hop(PeerId("a"), Span(0, 5), "r/int8/cpu"), HOPS[1]]},
        {"hops": [Hop(PeerId("a"), Span(0, 5), "r/bfloat16/cuda"), HOPS[1]]},
    ],
    ids=["key", "revision", "dtype", "hop", "span", "quantization", "numerics"],
)
def test_whatever_changes_the_numbers_changes_all_names(change: dict[str, object]) -> None:
    assert not set(hashes()) & set(hashes(**change))


def test_which_peer_it_is_does_not_matter() -> None:
    assert hashes(hops=[Hop(PeerId("z"), hop.span, hop.numerics) for hop in HOPS]) == hashes()


def test_a_prefix_has_no_more_pages_than_a_message_carries() -> None:
    assert len(hashes((1,) * (PAGE_TOKENS * (MAX_PREFIX_PAGES + 2)))) == MAX_PREFIX_PAGES
