"""What a peer can make the node keep is bounded: half messages, outputs that nobody takes, streams that do not end."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from server_node.compute.work import Work
from server_node.link import Link, open_link
from swarm_protocol.errors import StreamLostError
from swarm_protocol.messages import COMPUTE_PROTOCOL, Message, Pong
from swarm_protocol.wire import encode
from tests.node.node_scenario import (
    Conversation,
    assert_error,
    assert_output,
    ended,
    forward,
    local_output,
    serving_node,
    settle,
    states,
    virtual,
)


def frames_of(message: Message, frame_bytes: int) -> list[bytes]:
    return [b"".join(parts) for parts in encode(message, frame_bytes)]


@virtual
async def test_a_message_in_crumbs_ends_its_stream_before_it_costs_memory():
    async with serving_node() as node:
        talk = await node.dial_compute()
        crumbs = frames_of(forward(states(16)), 200)
        start, crumb = crumbs[0], crumbs[1][:5]
        with suppress(StreamLostError):
            await talk.stream.send([start])
            for _ in range(1500):
                await talk.stream.send([crumb])
        assert_error(await talk.receive(), "malformed_frame")
        assert await ended(talk)
        await node.assert_clean()


@virtual
async def test_a_message_that_trickles_ends_its_stream():
    async with serving_node(frame_s=60.0) as node:
        talk = await node.dial_compute()
        crumbs = frames_of(forward(states(90)), 200)
        started_s = asyncio.get_running_loop().time()
        with suppress(StreamLostError):
            for crumb in crumbs[:30]:
                await talk.stream.send([crumb])
                await asyncio.sleep(10)
        assert await ended(talk)
        assert asyncio.get_running_loop().time() - started_s < 80
        await node.assert_clean()


@virtual
async def test_messages_that_are_half_here_are_capped():
    async with serving_node(max_payload_bytes=1 << 16, max_step_tokens=1 << 9) as node:
        peer = node.network.transport()
        crumbs = frames_of(forward(states(500)), 50_000)
        talks = [await node.dial(peer, COMPUTE_PROTOCOL) for _ in range(11)]
        for talk in talks:
            await talk.stream.send([crumbs[0]])
        await settle()
        assert_error(await talks[-1].receive(), "limit_exceeded")
        other = await node.dial_compute()
        await other.stream.send([crumbs[0]])
        await other.stream.send([crumbs[1]])
        assert_output(await other.receive(), local_output(states(500)))
        await talks[0].stream.send([crumbs[1]])
        assert_output(await talks[0].receive(), local_output(states(500)))
        for talk in (*talks, other):
            await talk.stream.close()
        await settle()
        assert node.node.admission.held_bytes == 0
        await node.assert_clean()


@virtual
async def test_forward_passes_wait_until_their_outputs_are_taken():
    async with serving_node(send_s=60.0) as node:
        talk = await node.dial_compute()
        computed = 0
        run = node.worker.run

        async def counting(work: Work) -> Any:
            nonlocal computed
            computed += 1
            return await run(work)

        node.worker.run = counting  # type: ignore[method-assign]
        asking = asyncio.create_task(ask_again_and_again(talk, forward(states(4096))))
        await asyncio.sleep(10)
        # 524 kB of output each; the memory network takes the first one whole.
        assert computed == 2
        assert node.node.admission.num_streams == 1
        await asyncio.sleep(70)
        assert node.node.admission.num_streams == 0
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await node.assert_clean()


async def ask_again_and_again(talk: Conversation, message: Message) -> None:
    with suppress(StreamLostError):
        while True:
            await talk.send(message)


@virtual
async def test_a_stream_counts_until_its_last_answer_is_taken():
    async with serving_node(max_streams_per_peer=1, send_s=60.0) as node:
        peer = node.network.transport()
        talk = await node.dial(peer, COMPUTE_PROTOCOL)
        await talk.send(forward(states(4096)))
        await talk.send(forward(states(4096)))
        await settle()
        await talk.stream.send([b"nonsense"])
        await asyncio.sleep(10)
        again = await node.dial(peer, COMPUTE_PROTOCOL)
        assert_error(await again.receive(), "limit_exceeded")
        await asyncio.sleep(100)
        await node.assert_clean()


@virtual
async def test_nobody_waits_for_answers_to_a_stream_that_has_ended():
    async with serving_node() as node:
        talk = await node.dial()
        link = Link(talk.stream, node.node.admission, 1000)
        async with open_link(link):
            await link.abort()
            await settle()
            link.post(Pong(1))
            async with asyncio.timeout(5):
                with pytest.raises(StreamLostError):
                    await link.all_sent()
