"""What a client tells of a model's nodes: what it saw, what a token takes, and how large a block is."""

import dataclasses
from pathlib import Path

import pytest

from swarm_client.block_size import block_size
from swarm_client.model_swarm import BlockSize
from swarm_client.routing.costs import HOP_S, UNKNOWN_PING_S
from swarm_client.routing.find_route import ModelKey
from swarm_client.routing.seen import seen_swarm
from swarm_client.routing.swarm_view import SwarmView
from swarm_protocol.ids import PeerId
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.records import NodeRecord
from tests.tiny_models import save_tiny_model

MODEL = ModelKey("m", "rev", 10)
A, B = PeerId("a"), PeerId("b")


def record(name: str, start: int, end: int, **fields: object) -> NodeRecord:
    plain = NodeRecord(
        name, "m", "rev", start, end, "online", 1, 0.0, 30.0, (1,), "umbel", "float32", "n", 1000, 1000, ""
    )
    return dataclasses.replace(plain, **fields)  # type: ignore[arg-type]


def test_records_that_expired_since_they_were_read_are_left_out() -> None:
    view = SwarmView([record("a", 0, 10), record("b", 0, 10, expires_at_s=20.0)])
    assert [node.record.peer_id for node in seen_swarm(view, MODEL, (), (), 19.0).nodes] == ["a", "b"]
    assert [node.record.peer_id for node in seen_swarm(view, MODEL, (), (), 20.0).nodes] == ["a"]


def test_a_failing_node_counts_as_unreachable_until_it_answers_a_ping() -> None:
    records = [record("a", 0, 10)]
    (node,) = seen_swarm(SwarmView(records), MODEL, {A}, {A}, 1.0).nodes
    assert node.is_unreachable
    (node,) = seen_swarm(SwarmView(records, {A: 0.01}), MODEL, {A}, {A}, 1.0).nodes
    assert (node.is_unreachable, node.ping_s) == (False, 0.01)
    (node,) = seen_swarm(SwarmView(records), MODEL, {A}, (), 1.0).nodes
    assert not node.is_unreachable  # it only had no room


@pytest.mark.parametrize(
    ("records", "failing", "token_s"),
    [
        ([record("a", 0, 10, block_step_s=0.01)], set(), UNKNOWN_PING_S + HOP_S + 0.1),
        ([record("a", 0, 9, block_step_s=0.01)], set(), None),
        ([record("a", 0, 10, state="joining")], set(), None),
        ([record("a", 0, 10, revision="other")], set(), None),
        ([record("a", 0, 10, block_step_s=0.01)], {A}, None),
        (
            [record("a", 0, 10, block_step_s=0.01), record("b", 0, 10, block_step_s=0.02)],
            {A},
            UNKNOWN_PING_S + HOP_S + 0.2,
        ),
    ],
)
def test_what_a_token_takes_is_that_of_the_best_route(
    records: list[NodeRecord], failing: set[PeerId], token_s: float | None
) -> None:
    found = seen_swarm(SwarmView(records), MODEL, failing, failing, 1.0).token_s
    assert found == (None if token_s is None else pytest.approx(token_s))


def test_the_size_of_a_block_is_known_without_loading_it(tmp_path: Path) -> None:
    block = save_tiny_model("llama", tmp_path).model.layers[0]
    size = block_size(open_checkpoint(str(tmp_path)))
    num_weights = sum(weight.numel() for weight in block.parameters())
    num_in_norms = sum(weight.numel() for weight in block.parameters() if weight.dim() == 1)
    assert size == BlockSize("float32", 4 * num_weights, 4 * num_in_norms + (num_weights - num_in_norms) * 5 // 8)
