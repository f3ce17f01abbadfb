"""Peers that send too fast are read more slowly, all of their streams together, and nobody else is."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_node.config import NodeLimits
from server_node.rates import FRAME_BYTES, PeerRates, TokenBucket
from swarm_protocol.errors import StreamLostError
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import COMPUTE_PROTOCOL, CloseSession, ErrorReply, Ping, Pong, SessionClosed, Step
from swarm_protocol.tensors import to_wire
from tests.node.node_scenario import (
    Conversation,
    assert_error,
    assert_output,
    forward,
    local_output,
    open_session,
    serving_node,
    states,
    virtual,
)

ALICE, BOB = PeerId("alice"), PeerId("bob")


def now_s() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize(
    ("taken", "at_s", "wanted_s"),
    [
        ([], 0.0, 0.0),
        ([(0.0, 50.0)], 0.0, 0.0),
        ([(0.0, 50.0), (0.0, 20.0)], 0.0, 2.0),
        ([(0.0, 70.0)], 1.5, 0.5),
        ([(0.0, 70.0)], 2.0, 0.0),
        # what refills is never above the burst
        ([(0.0, 1.0), (100.0, 60.0)], 100.0, 1.0),
        # what is given back neither
        ([(0.0, -1000.0), (0.0, 60.0)], 0.0, 1.0),
        ([(0.0, 60.0), (0.0, -10.0)], 0.0, 0.0),
        # a clock that steps back refills nothing twice
        ([(10.0, 60.0), (5.0, 10.0)], 10.0, 2.0),
    ],
)
def test_a_bucket(taken: list[tuple[float, float]], at_s: float, wanted_s: float) -> None:
    bucket = TokenBucket(rate_per_s=10.0, burst=50.0, now_s=0.0)
    for when_s, amount in taken:
        bucket.take(amount, when_s)
    assert bucket.wait_s(at_s) == pytest.approx(wanted_s)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 100)), min_size=1))
def test_whoever_waits_as_told_is_within_rate_and_burst(frames: list[tuple[float, float]]) -> None:
    bucket = TokenBucket(rate_per_s=10.0, burst=50.0, now_s=0.0)
    at_s, sent = 0.0, 0.0
    for pause_s, amount in frames:
        at_s += pause_s + bucket.wait_s(at_s + pause_s)
        assert sent <= 50.0 + 10.0 * at_s + 1e-6
        bucket.take(amount, at_s)
        sent += amount


def test_small_frames_count_for_the_work_that_they_make() -> None:
    rates = PeerRates(FRAME_BYTES, 10 * FRAME_BYTES, 10, 10)
    for _ in range(12):
        rates.frame(ALICE, 20, 0.0)
    assert rates.wait_s(ALICE, 0.0) == pytest.approx(2.0)
    assert rates.wait_s(BOB, 0.0) == 0.0


def test_peers_that_were_quiet_are_forgotten() -> None:
    rates = PeerRates(1000.0, 1000.0, 10, 10)
    for number in range(5000):
        rates.message(PeerId(str(number)), number)
    assert len(rates) <= 1024


async def ping(talk: Conversation, count: int) -> float:
    """Return how long that many pings and their answers took."""
    started_s = now_s()
    for number in range(count):
        assert await talk.ask(Ping(number)) == Pong(number)
    return now_s() - started_s


@virtual
async def test_a_flood_of_pings_goes_on_at_the_rate_and_slows_nobody_else():
    async with serving_node(peer_messages_per_s=10, peer_burst_messages=50) as node:
        flooder = node.network.transport()
        talks = [(await node.open(flooder, session_id=bytes([n]) * 16))[0] for n in range(3)]
        other, _ = await node.open()
        assert await ping(talks[0], 20) == 0.0
        flood = asyncio.gather(*(ping(talk, 100) for talk in talks))
        await asyncio.sleep(1)
        assert await ping(other, 20) == 0.0
        took_s = max(await flood)
        # 3 streams, 3 openings and 320 pings, less the burst of 50.
        assert took_s == pytest.approx((326 - 50) / 10, rel=0.05)


@virtual
async def test_steps_that_are_computed_are_not_slowed_but_refused_ones_are():
    async with serving_node(peer_messages_per_s=10, peer_burst_messages=5) as node:
        talk, _ = await node.open()
        for step_id in range(1, 40):
            assert_output(await talk.step(step_id, 0, states(2)), local_output(states(2)))
        assert now_s() < 1
        for _ in range(40):
            assert isinstance(await talk.step(50, 0, states(2)), ErrorReply)
        assert 3 < now_s() < 5
        compute = await node.dial_compute()
        for _ in range(40):
            assert_output(await compute.ask(forward(states(2))), local_output(states(2)))
        assert now_s() < 5


@virtual
async def test_streams_that_are_only_opened_count_as_messages():
    async with serving_node(peer_messages_per_s=10, peer_burst_messages=5) as node:
        peer = node.network.transport()
        for _ in range(55):
            await (await node.dial(peer)).stream.close()
        assert node.node.admission.rates.wait_s(peer.peer_id, now_s()) == pytest.approx(5.0)
        talk, _ = await node.open(peer)
        assert now_s() == pytest.approx(5.0, rel=0.1)
        assert await talk.ask(CloseSession()) == SessionClosed()
        await asyncio.sleep(1)
        await node.assert_clean()


@virtual
async def test_bytes_of_all_streams_of_a_peer_come_at_its_rate_and_no_deadline_passes_meanwhile():
    size = 40 * 32 * 4
    limits = {"peer_bytes_per_s": FRAME_BYTES, "peer_burst_bytes": 4 * FRAME_BYTES, "frame_s": 2.0, "idle_s": 3.0}
    async with serving_node(**limits) as node:
        peer = node.network.transport()
        talks = [await node.dial(peer, COMPUTE_PROTOCOL) for _ in range(3)]
        message = forward(states(40))
        assert size < FRAME_BYTES

        async def ask(talk: Conversation) -> None:
            for _ in range(10):
                assert_output(await talk.ask(message), local_output(states(40)))

        await asyncio.gather(*(ask(talk) for talk in talks))
        # 30 frames, less the burst of 4 and what is overdrawn by 3 at the end.
        assert now_s() == pytest.approx(23.0, rel=0.05)


@virtual
async def test_a_message_in_several_frames_is_slowed_in_the_middle_and_not_ended():
    limits = {"peer_bytes_per_s": 100_000, "peer_burst_bytes": 100_000, "frame_s": 5.0, "max_step_tokens": 1 << 15}
    async with serving_node(**limits) as node:
        talk = await node.dial(protocol=COMPUTE_PROTOCOL)
        # 4.2 MB in three frames.
        message = forward(states(128, rows=256))
        assert_output(await talk.ask(message), local_output(states(128, rows=256)))
        assert now_s() == pytest.approx(41, rel=0.1)


@virtual
async def test_a_site_with_all_its_sessions_decoding_never_meets_a_rate():
    """128 sessions of BLOOM-176B in float32 at 3 tokens/s, or of a small model at 30."""
    limits = NodeLimits()
    for hidden_bytes, tokens_per_s in ((14_336 * 4, 3), (2_048 * 4, 30)):
        rates = PeerRates(
            limits.peer_bytes_per_s, limits.peer_burst_bytes, limits.peer_messages_per_s, limits.peer_burst_messages
        )
        for tick in range(60 * tokens_per_s):
            at_s = tick / tokens_per_s
            for _ in range(limits.max_sessions_per_peer):
                rates.message(ALICE, at_s)
                rates.frame(ALICE, hidden_bytes + 100, at_s)
            assert rates.wait_s(ALICE, at_s) == 0.0
            for _ in range(limits.max_sessions_per_peer):
                rates.computed(ALICE, at_s)


@virtual
async def test_a_flood_that_reads_nothing_and_ends_leaves_nothing():
    async with serving_node(peer_messages_per_s=10, peer_burst_messages=50) as node:
        peer = node.network.transport()
        talk, _ = await node.open(peer)
        with suppress(StreamLostError):
            for number in range(500):
                await talk.send(Ping(number))
        await talk.stream.close()
        other = await node.dial(peer)
        await other.send(open_session(session_id=b"o" * 16))
        await other.send(Step(1, 0, to_wire(states(1))))
        await other.stream.close()
        await asyncio.sleep(120)
        await node.assert_clean()


@virtual
async def test_more_streams_than_a_peer_may_have_get_no_answer_while_it_is_over_its_rates():
    async with serving_node(peer_messages_per_s=10, peer_burst_messages=20, max_streams_per_peer=3) as node:
        peer = node.network.transport()
        talks = [await node.dial(peer) for _ in range(3)]
        refused = await node.dial(peer)
        assert_error(await refused.receive(), "limit_exceeded")
        for _ in range(30):
            talks.append(await node.dial(peer))
        with pytest.raises(StreamLostError):
            await talks[-1].receive()
        for talk in talks:
            await talk.stream.close()
        await asyncio.sleep(10)
        await node.assert_clean()


@virtual
async def test_breaking_the_protocol_again_and_again_slows_a_peer_down():
    async with serving_node(peer_messages_per_s=10, peer_burst_messages=50) as node:
        peer = node.network.transport()
        for _ in range(10):
            talk = await node.dial(peer)
            await talk.stream.send([b"nonsense"])
            assert_error(await talk.receive(), "malformed_frame")
        # 22 messages each, less the burst, and the last one is overdrawn.
        assert now_s() == pytest.approx((9 * 22 + 1 - 50) / 10, rel=0.1)
