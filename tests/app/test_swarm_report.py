"""What is said of a swarm: its state, what is missing, what would help, and nothing that strangers should not say."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.swarm_report import (
    MAX_NAME_CHARS,
    MAX_NODES,
    Circumstances,
    ModelReport,
    clean_text,
    clean_version,
    count_replicas,
    is_older,
    model_report,
    needed,
    runs,
    swarm_status,
)
from swarm_client.model_swarm import BlockSize, ModelSwarm, SeenNode
from swarm_protocol.records import NodeRecord
from swarm_protocol.spans import Span, uncovered

SIZE = BlockSize("bfloat16", 1_000_000_000, 300_000_000)
USUAL = Circumstances(2048, 0, None, "0.2.0")


def node(start: int, end: int, *, is_unreachable: bool = False, **fields: object) -> SeenNode:
    plain = NodeRecord(
        "12D3KooWabcdef", "m", "rev", start, end, "online", 1, 0.0, 30.0, (1,), "umbel 0.2.0", "bfloat16",
        "rev/bfloat16/cpu", 1000, 4000, "",
    )  # fmt: skip
    return SeenNode(dataclasses.replace(plain, **fields), None, is_unreachable)  # type: ignore[arg-type]


def report(*nodes: SeenNode, num_blocks: int = 20, token_s: float | None = 0.1, **changes: object) -> ModelReport:
    swarm = ModelSwarm("m", "rev", num_blocks, 1.0, nodes, token_s)
    return model_report(swarm, SIZE, dataclasses.replace(USUAL, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "state", "missing", "single"),
    [
        ([], "down", ["0:20"], []),
        ([node(0, 20)], "degraded", [], ["0:20"]),
        ([node(0, 20), node(0, 20)], "ready", [], []),
        ([node(0, 12), node(0, 12)], "incomplete", ["12:20"], []),
        ([node(0, 12), node(14, 20)], "incomplete", ["12:14"], ["0:12", "14:20"]),
        ([node(0, 20), node(0, 5), node(9, 20)], "degraded", [], ["5:9"]),
        ([node(0, 20, state="joining")], "down", ["0:20"], []),
        ([node(0, 20, state="draining")], "down", ["0:20"], []),
        ([node(0, 20, state="offline")], "down", ["0:20"], []),
        ([node(0, 20, is_unreachable=True)], "down", ["0:20"], []),
        ([node(0, 20, revision="other")], "down", ["0:20"], []),
        ([node(0, 25), node(30, 40)], "degraded", [], ["0:20"]),
        ([node(19, 20), node(0, 1)], "incomplete", ["1:19"], ["0:1", "19:20"]),
    ],
)
def test_the_state_follows_from_who_serves_what(
    nodes: list[SeenNode], state: str, missing: list[str], single: list[str]
) -> None:
    found = report(*nodes)
    assert found.state == state
    assert [str(span) for span in found.missing] == missing
    assert [str(span) for span in found.single] == single
    assert found.can_chat == (state in ("ready", "degraded"))
    assert (found.tokens_per_s is None) == (not found.can_chat)


SPANS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(1, 90)).map(lambda pair: Span(pair[0], pair[0] + pair[1])), max_size=12
)


@given(SPANS, st.integers(1, 80))
def test_counts_runs_and_states_agree_with_the_plain_way(spans: list[Span], num_blocks: int) -> None:
    replicas = count_replicas(spans, num_blocks)
    assert list(replicas) == [sum(s.start <= block < s.end for s in spans) for block in range(num_blocks)]
    assert list(runs(replicas, lambda count: count == 0)) == uncovered(spans, num_blocks)
    parts = [runs(replicas, lambda count, wanted=wanted: count == wanted) for wanted in set(replicas)]
    assert sorted(block for part in parts for span in part for block in range(span.start, span.end)) == list(
        range(num_blocks)
    )
    state = swarm_status(replicas)
    assert (state == "down") == (not any(replicas))
    assert (state in ("down", "incomplete")) == (0 in replicas)
    assert (state == "ready") == (min(replicas) >= 2)


def test_memory_that_is_needed_counts_the_missing_blocks_and_their_cache() -> None:
    found = needed((Span(12, 20),), SIZE)
    assert found is not None
    assert (found.num_blocks, found.dtype) == (8, "bfloat16")
    assert (found.plain_bytes, found.nf4_bytes) == (12_000_000_000, 3_600_000_000)
    assert needed((), SIZE) is None


def test_the_weakest_blocks_are_those_with_the_fewest_nodes_where_that_differs() -> None:
    assert report(node(0, 20), node(0, 20)).weakest == ()
    found = report(node(0, 20), node(0, 20), node(0, 9), node(12, 20))
    assert (found.min_replicas, found.weakest) == (2, (Span(9, 12),))


def test_a_measured_speed_outweighs_the_one_that_is_reckoned() -> None:
    assert (report(node(0, 20)).tokens_per_s, report(node(0, 20)).is_measured) == (10.0, False)
    found = report(node(0, 20), measured_tokens_per_s=3.0)
    assert (found.tokens_per_s, found.is_measured) == (3.0, True)
    assert report(node(0, 2), measured_tokens_per_s=3.0).tokens_per_s is None


def test_a_node_is_shown_with_what_its_record_says() -> None:
    (shown,) = report(
        node(4, 8, name="lab", block_step_s=0.05, numerics="rev/bfloat16/int4-g32/cpu", software="umbel 0.1.9")
    ).nodes
    assert (shown.short_id, shown.name, shown.blocks, shown.state) == ("abcdef", "lab", Span(4, 8), "online")
    assert (shown.dtype, shown.quantization, shown.cache_free) == ("bfloat16", "4-bit", 0.25)
    assert shown.tokens_per_s == pytest.approx(5.0)
    assert (shown.version, shown.is_outdated) == ("0.1.9", True)


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"dtype": "<script>"}, "dtype", ""),
        ({"numerics": "javascript:alert(1)"}, "quantization", None),
        ({"numerics": "rev/bfloat16/int8-row/cpu"}, "quantization", "int8"),
        ({"max_tokens": 0}, "cache_free", None),
        ({"free_tokens": 9000}, "cache_free", 1.0),
        ({"block_step_s": 0.0}, "tokens_per_s", None),
        ({"block_step_s": None}, "tokens_per_s", None),
        ({"software": "umbel 99.0.0"}, "is_outdated", False),
        ({"software": "petals 2.2.0"}, "version", ""),
    ],
)
def test_odd_words_of_a_record_are_not_passed_on(fields: dict[str, object], name: str, expected: object) -> None:
    (shown,) = report(node(0, 20, **fields)).nodes
    assert getattr(shown, name) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lab one", "lab one"),
        ("a\nb\u202ec\u200b  d", "a b c d"),
        ("x" * 100, "x" * MAX_NAME_CHARS),
        ("<b>bold</b>", "<b>bold</b>"),  # escaped where it is written
        ("my box 192.168.1.7", ""),
        ("/ip4/10.0.0.1/tcp/1", ""),
        ("fe80::1", ""),
        ("2001:db8:1:2:3:4:5:6", ""),
        ("/dns/host", ""),
    ],
)
def test_names_are_one_short_visible_line_without_addresses(text: str, shown: str) -> None:
    assert clean_text(text) == shown


@given(st.text(max_size=200))
def test_no_text_has_an_address_or_anything_invisible_left(text: str) -> None:
    shown = clean_text(text)
    assert len(shown) <= MAX_NAME_CHARS
    assert shown.isprintable()
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", shown)


@pytest.mark.parametrize(
    ("software", "version", "is_outdated"),
    [
        ("umbel 0.2.0", "0.2.0", False),
        ("umbel 0.1.9", "0.1.9", True),
        ("umbel 0.10.0", "0.10.0", False),
        ("umbel 0.1", "0.1", True),
        ("umbel 0.1.0rc1", "0.1.0rc1", True),
        ("umbel 10.0.0.1", "", False),
        ("umbel from source", "", False),
        ("umbel 1.2.3 <b>", "", False),
    ],
)
def test_versions_are_compared_with_the_sites(software: str, version: str, is_outdated: bool) -> None:
    assert clean_version(software) == version
    assert (is_older(software, "0.2.0") and bool(version)) == is_outdated


def test_a_flood_of_nodes_makes_no_endless_page() -> None:
    nodes = [node(0, 20, state="offline", peer_id=f"peer{number:06}") for number in range(2 * MAX_NODES)]
    found = report(*nodes, node(0, 20))
    assert (len(found.nodes), found.num_nodes) == (MAX_NODES, 2 * MAX_NODES + 1)
    assert found.nodes[0].state == "online"
