"""Who is let in, what is reserved, and that it comes back."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from server_node.admission import Admission, ServedSpan
from server_node.config import NodeLimits
from swarm_protocol.errors import InvalidTensorError, SwarmError
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import Backward, Forward, OpenSession, Step
from swarm_protocol.spans import Span
from swarm_protocol.tensors import to_wire

ALICE, BOB = PeerId("Ahce"), PeerId("Bob")
SERVED = ServedSpan("m", "r", Span(4, 8), 16, "float32", cache_tokens=100)


def ledger(**limits: Any) -> Admission:
    whole = {"max_cache_share_per_peer": 1.0, "headroom_share": 0.0}
    return Admission(SERVED, NodeLimits(**{**whole, **limits}))


def request(**fields: Any) -> OpenSession:
    defaults = {
        "session_id": b"s" * 16,
        "versions": (1,),
        "model": "m",
        "revision": "r",
        "start_block": 4,
        "end_block": 8,
        "batch_size": 2,
        "max_tokens": 10,
    }
    return OpenSession(**{**defaults, **fields})


def forward(**fields: Any) -> Forward:
    defaults = {
        "request_id": 1, "model": "m", "revision": "r", "start_block": 4, "end_block": 8,
        "hidden_states": to_wire(torch.zeros(1, 2, 16)),
    }  # fmt: skip
    return Forward(**{**defaults, **fields})


def test_a_session_reserves_its_token_blocks_until_it_is_released():
    admission = ledger()
    plan = admission.admit(request(start_block=5, end_block=7), ALICE)
    assert plan.token_blocks == 2 * 2 * 10
    assert admission.free_token_blocks == 400 - 40
    assert admission.free_tokens == 90
    admission.release(plan)
    assert (admission.free_token_blocks, admission.num_sessions) == (400, 0)


def test_the_cache_can_be_filled_to_the_last_token_and_no_further():
    admission = ledger()
    admission.admit(request(batch_size=1, max_tokens=99), ALICE)
    admission.admit(request(batch_size=1, max_tokens=1), BOB)
    with pytest.raises(SwarmError, match="1 tokens needed, 0 free") as caught:
        admission.admit(request(batch_size=1, max_tokens=1), BOB)
    assert caught.value.code == "cache_full"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "other"}, "revision_mismatch"),
        ({"revision": "other"}, "revision_mismatch"),
        ({"versions": (7, 8)}, "unsupported_version"),
        ({"start_block": 3}, "blocks_not_served"),
        ({"end_block": 9}, "blocks_not_served"),
        ({"start_block": 6, "end_block": 6}, "invalid_request"),
        ({"start_block": 7, "end_block": 5}, "invalid_request"),
        ({"upstream": "Bob!"}, "invalid_request"),
        ({"downstream": "Bob!"}, "invalid_request"),
        ({"max_tokens": 51}, "cache_full"),
    ],
)
def test_what_is_refused_reserves_nothing(fields: dict[str, Any], code: str):
    admission = ledger()
    with pytest.raises(SwarmError) as caught:
        admission.admit(request(**fields), ALICE)
    assert caught.value.code == code
    assert (admission.free_token_blocks, admission.num_sessions) == (400, 0)


def test_the_nodes_before_and_behind_are_remembered():
    plain = ledger().admit(request(), ALICE)
    assert (plain.upstream, plain.keeps_tape) == (None, False)
    before, behind = ("12D3KooW" + letter * 44 for letter in "ab")
    plan = ledger().admit(request(upstream=before, downstream=behind), ALICE)
    assert (plan.upstream, plan.keeps_tape) == (before, True)


def test_a_peer_has_its_own_cap_of_sessions_and_all_peers_together_another():
    admission = ledger(max_sessions_per_peer=1, max_sessions=2)
    small = request(batch_size=1, max_tokens=1)
    first = admission.admit(small, ALICE)
    for peer, why in ((ALICE, "this peer has 1"),):
        with pytest.raises(SwarmError, match=why):
            admission.admit(small, peer)
    admission.admit(small, BOB)
    with pytest.raises(SwarmError, match="2 sessions are open") as caught:
        admission.admit(small, PeerId("Caro"))
    assert caught.value.code == "limit_exceeded"
    admission.release(first)
    admission.admit(small, ALICE)


def test_streams_and_queued_steps_are_counted_per_peer():
    admission = ledger(max_streams_per_peer=1, max_queued_per_peer=1)
    with admission.stream(ALICE):
        with pytest.raises(SwarmError), admission.stream(ALICE):
            pass
        with admission.stream(BOB):
            assert admission.num_streams == 2
    assert admission.num_streams == 0
    admission.queue(ALICE)
    with pytest.raises(SwarmError) as caught:
        admission.queue(ALICE)
    assert caught.value.code == "limit_exceeded"
    admission.queue(BOB)
    admission.unqueue(ALICE)
    admission.queue(ALICE)


def test_a_session_grows_as_far_as_the_cache_has_room():
    admission = ledger()
    plan = admission.admit(request(batch_size=1, max_tokens=10), ALICE)
    other = admission.admit(request(batch_size=1, max_tokens=40), BOB)
    larger = admission.extend(plan, 60)
    assert (larger.max_tokens, admission.free_tokens) == (60, 0)
    with pytest.raises(SwarmError, match="1 tokens needed, 0 free") as caught:
        admission.extend(larger, 61)
    assert (caught.value.code, caught.value.retryable) == ("cache_full", True)
    assert admission.extend(larger, 20) is larger
    for each in (larger, other):
        admission.release(each)
    assert (admission.free_token_blocks, admission.num_sessions) == (400, 0)


def test_new_sessions_leave_room_for_open_ones_to_grow():
    admission = ledger(headroom_share=0.2)
    assert admission.tokens_for_new_sessions == 100
    plan = admission.admit(request(batch_size=1, max_tokens=50), ALICE)
    assert (admission.free_tokens, admission.tokens_for_new_sessions) == (50, 30)
    with pytest.raises(SwarmError, match="31 tokens needed, 30 free"):
        admission.admit(request(batch_size=1, max_tokens=31), BOB)
    assert admission.extend(plan, 95).max_tokens == 95
    assert admission.tokens_for_new_sessions == 0


def test_one_peer_gets_its_share_of_the_cache_and_no_more():
    admission = ledger(max_cache_share_per_peer=0.75)
    plan = admission.admit(request(batch_size=1, max_tokens=70), ALICE)
    for more in (
        lambda: admission.admit(request(batch_size=1, max_tokens=6), ALICE),
        lambda: admission.extend(plan, 76),
    ):
        with pytest.raises(SwarmError, match="6 tokens needed, 5 free") as caught:
            more()
        assert caught.value.code == "cache_full"
    admission.admit(request(batch_size=1, max_tokens=25), BOB)
    admission.release(plan)
    admission.admit(request(batch_size=1, max_tokens=75), ALICE)


def test_a_draining_node_begins_nothing():
    admission = ledger()
    admission.leaves_at_s, admission.has_left = 1.0, True
    for begin in (lambda: admission.admit(request(), ALICE), lambda: admission.queue(ALICE)):
        with pytest.raises(SwarmError) as caught:
            begin()
        assert caught.value.code == "node_draining"


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (Step(1, 0, to_wire(torch.zeros(2, 3, 16))), None),
        (Step(1, 0, to_wire(torch.zeros(2, 0, 16))), None),
        (Step(1, 0, to_wire(torch.zeros(2, 3, 16, dtype=torch.bfloat16)), (1, 1)), None),
        (Step(1, 0, to_wire(torch.zeros(1, 3, 16))), "invalid_tensor"),
        (Step(1, 0, to_wire(torch.zeros(2, 3, 15))), "invalid_tensor"),
        (Step(1, 0, to_wire(torch.zeros(2, 16))), "invalid_tensor"),
        (Step(1, 0, to_wire(torch.zeros(2, 3, 16, dtype=torch.int64))), "invalid_tensor"),
        (Step(1, 0, to_wire(torch.zeros(2, 33, 16))), "invalid_request"),
        (Step(1, 0, to_wire(torch.zeros(2, 1, 16)), (0,)), "invalid_request"),
        (Step(1, 0, to_wire(torch.zeros(2, 1, 16)), ()), "invalid_request"),
        (Step(1, 0, to_wire(torch.zeros(2, 1, 16)), (0, 2)), "invalid_request"),
    ],
)
def test_the_content_of_steps_is_judged(step: Step, code: str | None):
    admission = ledger(max_step_tokens=64)
    problem = admission.step_problem(step, admission.admit(request(), ALICE))
    assert (problem.code if problem else None) == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "other"}, "revision_mismatch"),
        ({"end_block": 9}, "blocks_not_served"),
        ({"hidden_states": to_wire(torch.zeros(1, 2, 3))}, "invalid_tensor"),
        ({"hidden_states": to_wire(torch.zeros(0, 2, 16))}, "invalid_tensor"),
        ({"hidden_states": to_wire(torch.zeros(1, 0, 16))}, "invalid_tensor"),
        ({"hidden_states": to_wire(torch.zeros(5, 13, 16))}, "invalid_request"),
    ],
)
def test_the_content_of_passes_is_judged(fields: dict[str, Any], code: str):
    with pytest.raises(SwarmError) as caught:
        ledger(max_step_tokens=64).check_pass(forward(**fields))
    assert caught.value.code == code


@pytest.mark.parametrize("gradients", [torch.zeros(1, 3, 16), torch.zeros(1, 2, 8), torch.zeros(1, 2, 16).long()])
def test_gradients_have_to_be_those_of_the_states(gradients: torch.Tensor):
    asked = forward()
    values = {name: getattr(asked, name) for name in asked.__slots__}
    wanted = Backward(**values, gradients=asked.hidden_states)
    assert ledger().check_pass(wanted) == asked.span
    with pytest.raises(InvalidTensorError):
        ledger().check_pass(replace(wanted, gradients=to_wire(gradients)))


def test_no_more_is_let_in_than_a_step_may_carry():
    admission = ledger(max_step_tokens=64)
    assert admission.payload_bytes() == 64 * 16 * 4
    assert admission.payload_bytes(admission.admit(request(), ALICE)) == 64 * 16 * 4
    assert ledger().payload_bytes(ledger().admit(request(), ALICE)) == 100 * 16 * 4
    assert ledger(max_payload_bytes=640).max_step_tokens == 10
