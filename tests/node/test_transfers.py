"""Sessions are copied from a node that leaves to another one; who may not have them, or sends rubbish, is refused."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from server_node.transfers import OFFER_S, PIECE_S
from swarm_protocol.errors import StreamLostError
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import (
    TRANSFER_PROTOCOL,
    CloseSession,
    CopySession,
    Draining,
    FetchSession,
    OfferSession,
    Pages,
    Ping,
    SessionCopied,
    SessionOffered,
    SessionOpened,
    Step,
    WireTensor,
)
from swarm_protocol.tensors import from_wire, to_wire
from swarm_protocol.transport.base import FrameStream
from swarm_protocol.transport.memory_net import MemoryNetwork, MemoryTransport
from tests.node.node_scenario import (
    HIDDEN,
    MODEL,
    REVISION,
    SPAN,
    Conversation,
    Scenario,
    assert_error,
    assert_output,
    ended,
    local_output,
    serving_node,
    settle,
    states,
    virtual,
)

NUM_TOKENS = 9
WIDTH = len(SPAN) * 2 * 2 * 8
"""Numbers of a token: keys and values of 2 heads of 8 in each block of the tiny model."""


@dataclass
class Move:
    """A node that leaves with a client's session of some tokens, another node, and the client's hands."""

    old: Scenario
    new: Scenario
    client: MemoryTransport
    talk: Conversation
    opened: SessionOpened

    def offer(self, **fields: Any) -> OfferSession:
        offer = OfferSession(b"s" * 16, self.opened.resume_token, self.new.transport.peer_id)
        return replace(offer, **fields)

    async def ticket(self) -> bytes:
        offered = await ask(self.client, self.old.transport.peer_id, self.offer())
        assert isinstance(offered, SessionOffered), offered
        return offered.ticket

    def fetch(self, ticket: bytes, **fields: Any) -> FetchSession:
        return replace(FetchSession(ticket, 0, MODEL, REVISION, "test", SPAN.start, SPAN.end), **fields)


async def ask(peer: MemoryTransport, whom: PeerId, message: Any) -> Any:
    talk = Conversation(await peer.dial(whom, TRANSFER_PROTOCOL))
    answer = await talk.ask(message)
    await talk.stream.close()
    return answer


def copy_of(opened: SessionOpened, source: PeerId, ticket: bytes, **fields: Any) -> CopySession:
    return replace(CopySession(b"s" * 16, opened.resume_token, source, ticket), **fields)


@asynccontextmanager
async def moving(numerics: str = "test", is_leaving: bool = True) -> AsyncIterator[Move]:
    network = MemoryNetwork()
    async with serving_node(network=network) as old, serving_node(network=network, numerics=numerics) as new:
        client = network.transport()
        talk, opened = await old.open(client)
        assert_output(await talk.step(1, 0, states(NUM_TOKENS)), local_output(states(NUM_TOKENS)))
        if is_leaving:
            old.stop.set()
            assert isinstance(await talk.receive(), Draining)
        yield Move(old, new, client, talk, opened)
    for node in (old, new):
        await node.assert_clean()


@virtual
async def test_a_copied_session_goes_on_where_it_was():
    async with moving() as move:
        talk, opened = await move.new.open(move.client)
        copied = await ask(
            move.client, move.new.transport.peer_id, copy_of(opened, move.old.transport.peer_id, await move.ticket())
        )
        assert copied == SessionCopied(NUM_TOKENS)
        more = states(NUM_TOKENS + 2)
        reply = await talk.step(1, NUM_TOKENS, more[:, NUM_TOKENS:])
        assert_output(reply, local_output(more)[:, NUM_TOKENS:])
        await talk.ask(CloseSession())


@virtual
async def test_a_copy_is_taken_up_at_a_position():
    async with moving() as move:
        talk, opened = await move.new.open(move.client)
        old, new = move.old.transport.peer_id, move.new.transport.peer_id
        await ask(move.client, new, copy_of(opened, old, await move.ticket()))
        more = states(NUM_TOKENS + 3)
        await move.talk.step(2, NUM_TOKENS - 2, more[:, NUM_TOKENS - 2 :])
        again = copy_of(opened, old, await move.ticket(), position=NUM_TOKENS - 2)
        assert await ask(move.client, new, again) == SessionCopied(NUM_TOKENS + 3)
        reply = await talk.step(1, NUM_TOKENS + 2, more[:, NUM_TOKENS + 2 :])
        assert_output(reply, local_output(more)[:, NUM_TOKENS + 2 :])


@virtual
async def test_a_session_that_is_fetched_is_not_idle_and_then_ends():
    async with moving() as move:
        await asyncio.sleep(4.0)
        ticket = await move.ticket()
        await asyncio.sleep(4.0)
        _, opened = await move.new.open(move.client)
        copy = copy_of(opened, move.old.transport.peer_id, ticket)
        assert await ask(move.client, move.new.transport.peer_id, copy) == SessionCopied(NUM_TOKENS)
        await asyncio.sleep(10.0)
        assert move.old.serving.done()


# Who may not have it


@virtual
async def test_only_its_own_client_can_offer_a_session():
    async with moving() as move:
        old = move.old.transport.peer_id
        stranger = move.old.network.transport()
        assert_error(await ask(stranger, old, move.offer()), "session_not_found")
        assert_error(await ask(move.client, old, move.offer(resume_token=b"w" * 16)), "session_not_found")
        assert_error(await ask(move.client, old, move.offer(session_id=b"w" * 16)), "session_not_found")


@virtual
async def test_only_the_named_node_gets_the_pages_and_only_once():
    async with moving() as move:
        ticket, old = await move.ticket(), move.old.transport.peer_id
        stranger = move.old.network.transport()
        for thief in (stranger, move.client):
            assert_error(await ask(thief, old, move.fetch(ticket)), "session_not_found")
        assert_error(await ask(move.new.transport, old, move.fetch(b"w" * 16)), "session_not_found")
        pages = await ask(move.new.transport, old, move.fetch(ticket))
        assert isinstance(pages, Pages)
        assert (pages.position, pages.states.shape, pages.is_last) == (0, (NUM_TOKENS, WIDTH), True)
        assert_error(await ask(move.new.transport, old, move.fetch(ticket)), "session_not_found")


@virtual
async def test_a_ticket_is_for_now():
    async with moving() as move:
        first = await move.ticket()
        second = await move.ticket()
        new, old = move.new.transport, move.old.transport.peer_id
        assert_error(await ask(new, old, move.fetch(first)), "session_not_found")
        for step_id in range(2, 40):  # so that the session is not taken to be idle
            await move.talk.step(step_id, NUM_TOKENS, states(1))
            await asyncio.sleep(1.0)
        assert OFFER_S < 38
        assert_error(await ask(new, old, move.fetch(second)), "session_not_found")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"numerics": "other"}, "revision_mismatch"),
        ({"revision": "f" * 16}, "revision_mismatch"),
        ({"model": "tiny-bloom"}, "revision_mismatch"),
        ({"end_block": SPAN.end - 1}, "invalid_request"),
        ({"start_block": 9, "end_block": 2}, "invalid_request"),
    ],
)
@virtual
async def test_pages_move_only_between_nodes_that_agree(fields: dict[str, Any], code: str):
    async with moving() as move:
        fetch = move.fetch(await move.ticket(), **fields)
        assert_error(await ask(move.new.transport, move.old.transport.peer_id, fetch), code)


@virtual
async def test_a_node_with_other_numerics_gets_nothing():
    async with moving(numerics="other") as move:
        _, opened = await move.new.open(move.client)
        copy = copy_of(opened, move.old.transport.peer_id, await move.ticket())
        assert_error(await ask(move.client, move.new.transport.peer_id, copy), "revision_mismatch")


@virtual
async def test_a_receiver_that_takes_nothing_does_not_keep_the_session():
    async with moving() as move:
        # More than a stream holds, so that the sender has to wait for the receiver.
        move.old.node.admission.free_token_blocks += 1 << 20
        client = move.old.network.transport()
        move.old.node.admission.leaves_at_s, deadline = None, move.old.node.admission.leaves_at_s
        talk, opened = await move.old.open(client, batch_size=200, max_tokens=20)
        await talk.step(1, 0, states(20, rows=200))
        move.old.node.admission.leaves_at_s = deadline
        offer = OfferSession(b"s" * 16, opened.resume_token, move.new.transport.peer_id)
        ticket = (await ask(client, move.old.transport.peer_id, offer)).ticket
        slow = Conversation(await move.new.transport.dial(move.old.transport.peer_id, TRANSFER_PROTOCOL))
        await slow.send(move.fetch(ticket))
        await asyncio.sleep(0.1)
        assert move.old.node.sessions.num_running == 1
        await talk.send(CloseSession())
        await asyncio.sleep(70.0)
        assert move.old.serving.done()
        move.old.node.admission.free_token_blocks -= 1 << 20


# What is not written

Answer = Callable[[Conversation, FetchSession], Awaitable[None]]


async def source_that(network: MemoryNetwork, answer: Answer) -> PeerId:
    """A peer that answers whoever fetches from it as `answer` does."""
    transport = network.transport()

    async def handle(stream: FrameStream) -> None:
        talk = Conversation(stream)
        await answer(talk, await talk.receive())
        with contextlib.suppress(StreamLostError):
            await talk.receive()

    await transport.serve(TRANSFER_PROTOCOL, handle)
    return transport.peer_id


def pages(num_tokens: int = 2, width: int = WIDTH, position: int = 0, fill: float = 1.0, is_last: bool = True) -> Pages:
    return Pages(position, to_wire(torch.full((num_tokens, width), fill)), outputs(num_tokens), is_last)


def outputs(num_tokens: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> WireTensor:
    return to_wire(torch.ones(1, num_tokens, hidden, dtype=dtype))


WRONG: dict[str, tuple[list[Any], str]] = {
    "not finite": ([pages(fill=float("nan"))], "invalid_tensor"),
    "too wide": ([pages(width=WIDTH + 1)], "invalid_tensor"),
    "another dtype": ([replace(pages(), states=to_wire(torch.ones(2, WIDTH, dtype=torch.float16)))], "invalid_tensor"),
    "another shape": ([replace(pages(), states=to_wire(torch.ones(2 * WIDTH)))], "invalid_tensor"),
    "no shape": ([replace(pages(), states=to_wire(torch.ones(())))], "invalid_tensor"),
    "outputs of more tokens": ([replace(pages(), outputs=outputs(3))], "invalid_tensor"),
    "outputs of another size": ([replace(pages(), outputs=outputs(2, HIDDEN + 1))], "invalid_tensor"),
    "outputs of another dtype": ([replace(pages(), outputs=outputs(2, dtype=torch.int64))], "invalid_tensor"),
    "outputs without a shape": ([replace(pages(), outputs=to_wire(torch.ones(())))], "invalid_tensor"),
    "more than was reserved": ([pages(20), pages(1, position=20)], "max_length_exceeded"),
    "a hole": ([pages(is_last=False), pages(position=3)], "unexpected_message"),
    "the same again": ([pages(is_last=False), pages()], "unexpected_message"),
    "nothing for ever": ([pages(0, is_last=False)] * 3, "unexpected_message"),
    "another message": ([Ping(1)], "unexpected_message"),
    "too late": ([pages(is_last=False)], "timeout"),
}


@pytest.mark.parametrize(("answers", "code"), WRONG.values(), ids=WRONG.keys())
@virtual
async def test_a_source_that_sends_rubbish_is_refused_and_leaves_nothing(answers: list[Any], code: str):
    async with serving_node() as node:
        if code == "max_length_exceeded":
            answers = [replace(answers[0], is_last=False), *answers[1:]]

        async def answer(talk: Conversation, _: FetchSession) -> None:
            for message in answers:
                await talk.send(message)

        source = await source_that(node.network, answer)
        client = node.network.transport()
        talk, opened = await node.open(client)
        began_s = asyncio.get_running_loop().time()
        assert_error(await ask(client, node.transport.peer_id, copy_of(opened, source, b"t" * 16)), code)
        assert asyncio.get_running_loop().time() - began_s <= PIECE_S + 1
        assert node.node.admission.held_bytes == 0
        # Nothing counts as cached, and the session can be used as a new one.
        assert_output(await talk.step(1, 0, states(4)), local_output(states(4)))
        await talk.ask(CloseSession())
        await node.assert_clean()


@virtual
async def test_an_endless_message_is_bounded():
    async with serving_node(max_payload_bytes=64 * 1024) as node:

        async def answer(talk: Conversation, _: FetchSession) -> None:
            await talk.send(pages(1000))

        source = await source_that(node.network, answer)
        client = node.network.transport()
        _, opened = await node.open(client)
        assert_error(await ask(client, node.transport.peer_id, copy_of(opened, source, b"t" * 16)), "frame_too_large")


@virtual
async def test_a_source_that_is_no_peer_or_gone_or_itself_is_refused():
    async with serving_node() as node:
        client, gone = node.network.transport(), node.network.transport()
        await gone.close()
        _, opened = await node.open(client)
        for source, code in (
            (PeerId("no peer!"), "invalid_request"),
            (gone.peer_id, "peer_unreachable"),
            (node.transport.peer_id, "invalid_request"),
        ):
            copy = copy_of(opened, source, b"t" * 16)
            assert_error(await ask(client, node.transport.peer_id, copy), code)


@virtual
async def test_only_the_client_of_an_unused_session_can_have_it_filled():
    async with moving() as move:
        talk, opened = await move.new.open(move.client)
        new, copy = move.new.transport.peer_id, copy_of(opened, move.old.transport.peer_id, b"t" * 16)
        stranger = move.old.network.transport()
        assert_error(await ask(stranger, new, copy), "session_not_found")
        assert_error(await ask(move.client, new, replace(copy, resume_token=b"w" * 16)), "session_not_found")
        await talk.step(1, 0, states(1))
        assert_error(await ask(move.client, new, copy), "unexpected_message")


@virtual
async def test_a_step_during_the_copy_ends_it_and_not_the_session():
    async with serving_node() as node:

        async def answer(talk: Conversation, _: FetchSession) -> None:
            await talk.send(pages(3, is_last=False))
            await asyncio.sleep(1.0)
            await talk.send(pages(3, position=3))

        source = await source_that(node.network, answer)
        client = node.network.transport()
        talk, opened = await node.open(client)
        copying = asyncio.create_task(ask(client, node.transport.peer_id, copy_of(opened, source, b"t" * 16)))
        await settle()
        assert_error(
            await ask(client, node.transport.peer_id, copy_of(opened, source, b"t" * 16)), "unexpected_message"
        )
        assert_output(await talk.step(1, 0, states(2)), local_output(states(2)))
        assert_error(await copying, "invalid_position")
        assert_output(await talk.step(2, 2, states(4)[:, 2:]), local_output(states(4))[:, 2:])


@virtual
async def test_a_session_that_is_closed_while_it_is_filled_is_free_again():
    async with serving_node() as node:

        async def answer(talk: Conversation, _: FetchSession) -> None:
            await talk.send(pages(3, is_last=False))
            await asyncio.sleep(5.0)
            await talk.send(pages(3, position=3))

        source = await source_that(node.network, answer)
        client = node.network.transport()
        talk, opened = await node.open(client)
        copying = asyncio.create_task(ask(client, node.transport.peer_id, copy_of(opened, source, b"t" * 16)))
        await settle()
        await talk.send(CloseSession())
        assert_error(await copying, "session_not_found")
        await talk.receive()
        assert node.free_tokens == 100


@virtual
async def test_a_message_of_another_kind_ends_the_stream():
    async with serving_node() as node:
        talk = await node.dial(protocol=TRANSFER_PROTOCOL)
        assert_error(await talk.ask(Step(1, 0, to_wire(states(1)))), "unexpected_message")
        assert await ended(talk)
        assert from_wire(pages().states).shape == (2, WIDTH)
