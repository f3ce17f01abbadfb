"""A node's record says how fast it is, how long steps wait, and how far away those are that sessions go on to."""

import asyncio
import random
from dataclasses import replace

import pytest
import torch

from server_node.admission import ServedSpan
from server_node.announcer import Announcer
from server_node.benchmark import measure_speed
from server_node.compute.work import Computed
from server_node.neighbours import PERIOD_S, NeighbourPings, choose_neighbours
from server_node.speed import MAX_SECONDS, RoutingFacts, SpeedMeter
from swarm_protocol.errors import InternalError, PeerUnreachableError, StepTimeoutError, UnexpectedMessageError
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import SESSION_PROTOCOL, Pong
from swarm_protocol.ping import PING_TIMEOUT_S, measure_ping
from swarm_protocol.records import MAX_PINGS, RECORD_LIFETIME_S, REFRESH_PERIOD_S, directory_key, seal
from swarm_protocol.spans import Span
from swarm_protocol.tensors import to_wire
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import LinkProfile, MemoryNetwork, MemoryTransport
from tests.node.node_scenario import (
    CACHE_TOKENS,
    HIDDEN,
    MODEL,
    REVISION,
    SPAN,
    Conversation,
    GatedWorker,
    node_record,
    serving_node,
    states,
    virtual,
)

SERVED = ServedSpan(MODEL, REVISION, SPAN, HIDDEN, "float32", CACHE_TOKENS)


def ran(tokens: int, compute_s: float, queue_s: float = 0.0) -> Computed:
    return Computed(to_wire(torch.zeros(1, tokens, 1)), queue_s, compute_s)


def test_nothing_is_said_of_what_was_never_done() -> None:
    assert SpeedMeter().facts((), 0.0) == RoutingFacts()


def test_decode_steps_and_prompts_are_measured_apart() -> None:
    speed = SpeedMeter()
    speed.ran(ran(1, 0.03), 3, 0.0)
    speed.ran(ran(100, 0.6), 3, 0.0)
    speed.ran(ran(8, 5.0), 3, 0.0)  # neither
    speed.ran(ran(0, 5.0), 3, 0.0)
    facts = speed.facts((), 0.0)
    assert (facts.block_step_s, facts.block_token_s) == (pytest.approx(0.01), pytest.approx(0.002))
    for _ in range(100):
        speed.ran(ran(1, 0.06), 3, 0.0)
    assert speed.facts((), 0.0).block_step_s == pytest.approx(0.02, rel=1e-3)


def test_a_wait_that_is_not_seen_again_is_forgotten() -> None:
    speed = SpeedMeter()
    for _ in range(100):
        speed.ran(ran(1, 0.01, queue_s=0.4), 3, 50.0)
    assert speed.facts((), 50.0).queue_s == pytest.approx(0.4, rel=1e-3)
    assert speed.facts((), 60.0).queue_s == pytest.approx(0.2, rel=1e-3)
    assert speed.facts((), 500.0).queue_s == pytest.approx(0.0, abs=1e-6)


def test_what_is_said_can_always_be_read() -> None:
    speed = SpeedMeter()
    speed.ran(ran(1, 1e6, queue_s=1e6), 1, 0.0)
    facts = speed.facts((), 0.0)
    assert (facts.block_step_s, facts.queue_s) == (MAX_SECONDS, MAX_SECONDS)


@virtual
async def test_the_speed_is_measured_before_anybody_asks() -> None:
    speed = SpeedMeter()
    await measure_speed(GatedWorker(), SERVED, speed)
    facts = speed.facts((), 0.0)
    assert facts.block_step_s is not None
    assert facts.block_token_s is not None
    assert 0 < facts.block_token_s < facts.block_step_s < 1
    assert facts.queue_s == 0.0


@pytest.mark.parametrize("served", [replace(SERVED, cache_tokens=5), SERVED], ids=["no room", "failing"])
def test_a_node_that_cannot_be_measured_says_nothing(served: ServedSpan) -> None:
    @virtual
    async def scenario() -> None:
        worker, speed = GatedWorker(), SpeedMeter()
        worker.bug = InternalError("no")
        await measure_speed(worker, served, speed)
        assert speed.facts((), 0.0) == RoutingFacts()

    scenario()


@virtual
async def test_the_record_says_what_steps_took() -> None:
    async with serving_node() as node:
        talk, _ = await node.open()
        await talk.step(1, 0, states(20))
        await talk.step(2, 20 - 1, states(1))
        await asyncio.sleep(REFRESH_PERIOD_S + 1)
        await node.node._announcer.announce("online")
        record = node.record()
        assert record.block_step_s is not None
        assert record.block_token_s is not None
        assert 0 < record.block_token_s < 1
        assert 0 < record.block_step_s < 1


# Neighbours.


async def add_peer(network: MemoryNetwork, span: Span, **fields: object) -> MemoryTransport:
    transport = network.transport()

    async def answer(stream: FrameStream) -> None:
        talk = Conversation(stream)
        while True:
            await talk.send(Pong((await talk.receive()).nonce))

    await transport.serve(SESSION_PROTOCOL, answer)
    record = replace(
        node_record(transport), start_block=span.start, end_block=span.end, state="online",
        expires_at_s=network.now_s() + RECORD_LIFETIME_S,
    )  # fmt: skip
    record = replace(record, **fields)  # type: ignore[arg-type]
    value = seal(record, network.identity(transport.peer_id).sign)
    await transport.directory.store(directory_key(MODEL, span.start), transport.peer_id, value, record.expires_at_s)
    return transport


@virtual
async def test_holders_of_the_next_block_are_pinged() -> None:
    network = MemoryNetwork()
    me = network.transport()
    near, far = await add_peer(network, Span(3, 9)), await add_peer(network, Span(4, 8))
    for peer, delay_s in ((near, 0.01), (far, 0.04)):
        network.set_link(me.peer_id, peer.peer_id, LinkProfile(delay_s))
    await add_peer(network, Span(2, 4))
    await add_peer(network, Span(5, 8))
    await add_peer(network, Span(4, 8), state="draining")
    await add_peer(network, Span(4, 8), revision="other")
    neighbours = NeighbourPings(me, SERVED)
    await neighbours.measure()
    assert neighbours.pings_s == ((near.peer_id, pytest.approx(0.02)), (far.peer_id, pytest.approx(0.08)))
    network.kill(near.peer_id)
    await neighbours.measure()
    assert neighbours.pings_s == ((far.peer_id, pytest.approx(0.08)),)


@virtual
async def test_a_node_publishes_its_pings_for_as_long_as_it_serves() -> None:
    async with serving_node() as node:
        for _ in range(7):  # until the second round: a record lives no longer than half of that
            await asyncio.sleep(PERIOD_S / 5)
            await add_peer(node.network, Span(4, 8))
        await asyncio.sleep(PERIOD_S / 5)
        await node.node._announcer.announce("online")
        assert node.record().pings_s
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "neighbour pings"]


def test_of_many_neighbours_the_nearest_and_some_others_are_pinged() -> None:
    peers = [PeerId(f"p{number:02}") for number in range(30)]
    assert choose_neighbours(peers[:MAX_PINGS], {}, random.Random(0).sample) == peers[:MAX_PINGS]
    known_s = {peer: 1.0 - number / 100 for number, peer in enumerate(peers[:20])}
    seen: set[PeerId] = set()
    for seed in range(60):
        chosen = choose_neighbours(peers, known_s, random.Random(seed).sample)
        assert chosen[:5] == list(reversed(peers[15:20]))
        assert len(set(chosen)) == MAX_PINGS
        seen.update(chosen)
    assert seen == set(peers)


@virtual
async def test_a_record_that_is_too_long_with_its_pings_goes_without() -> None:
    network = MemoryNetwork()
    transport = network.transport()
    record = replace(
        node_record(transport), software="s" * 160, numerics="n" * 160, revision="r" * 160, dtype="d" * 160
    )
    pings_s = tuple((PeerId("p" * 120), 0.1) for _ in range(MAX_PINGS))
    announcer = Announcer(transport, network.identity(transport.peer_id).sign, record)
    announcer.serving(10, lambda: 10, lambda: RoutingFacts(0.01, 0.001, 0.0, pings_s))
    assert await announcer.announce("online")


# Pings.


@virtual
async def test_a_ping_is_the_round_trip_alone() -> None:
    network = MemoryNetwork(LinkProfile(0.05))
    me, other = network.transport(), await add_peer(network, SPAN)
    assert await measure_ping(me, other.peer_id) == pytest.approx(0.1)


@virtual
async def test_pings_that_go_wrong_are_typed() -> None:
    network = MemoryNetwork()
    me, other = network.transport(), await add_peer(network, SPAN)
    with pytest.raises(PeerUnreachableError):
        await measure_ping(me, PeerId("nobody"))

    async def answer_nonsense(stream: FrameStream) -> None:
        talk = Conversation(stream)
        while True:
            await talk.receive()
            await talk.send(Pong(99))

    await other.serve(SESSION_PROTOCOL, answer_nonsense)
    with pytest.raises(UnexpectedMessageError):
        await measure_ping(me, other.peer_id)
    network.freeze(other.peer_id)
    started_s = asyncio.get_running_loop().time()
    with pytest.raises(StepTimeoutError):
        await measure_ping(me, other.peer_id)
    assert asyncio.get_running_loop().time() - started_s == pytest.approx(PING_TIMEOUT_S)
