"""Frames on a socket whose other side does as it likes."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from swarm_protocol.errors import FrameTooLargeError, StreamLostError
from swarm_protocol.transport.base import MAX_FRAME_BYTES
from swarm_protocol.transport.framed_socket import SCRATCH_BYTES, FramedSocket
from swarm_protocol.transport.p2p_daemon import frame_message

pytestmark = pytest.mark.timeout(20)


@asynccontextmanager
async def framed(preamble: bytes | None = b"hi") -> AsyncIterator[tuple[FramedSocket, socket.socket]]:
    """Yield a framed socket and the raw other end, which has sent the preamble."""
    near, far = socket.socketpair()
    loop = asyncio.get_running_loop()
    with far:
        far.setblocking(False)
        _, framed_socket = await loop.connect_accepted_socket(lambda: FramedSocket(bytearray(SCRATCH_BYTES)), near)
        if preamble is not None:
            await loop.sock_sendall(far, frame_message(preamble))
            assert await framed_socket.receive_preamble() == preamble
        yield framed_socket, far
        framed_socket.abort()
        await asyncio.sleep(0)


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


async def test_frames_are_put_together_from_single_bytes():
    async with framed(None) as (near, far):
        for byte in frame_message(b"p" * 300) + frame(b"one") + frame(b"three"):
            far.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await near.receive_preamble() == b"p" * 300
        assert [await near.receive(), await near.receive()] == [b"one", b"three"]


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 60_000, 65_536, 65_540, 262_143, 262_148, 400_000])
async def test_frames_are_put_together_wherever_they_are_cut(cut: int):
    frames = [b"a" * 262_144, b"b" * 65_536, b"c", b"d" * 300_000]
    data = b"".join(frame(content) for content in frames)
    async with framed() as (near, far):
        loop = asyncio.get_running_loop()

        async def send_all() -> None:
            await loop.sock_sendall(far, data[:cut])
            await asyncio.sleep(0.005)
            await loop.sock_sendall(far, data[cut:])

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            assert [await near.receive() for _ in frames] == frames


async def test_preamble_and_frames_may_come_in_one_piece():
    async with framed(None) as (near, far):
        far.send(frame_message(b"preamble") + frame(b"x") * 3)
        assert await near.receive_preamble() == b"preamble"
        assert [await near.receive() for _ in range(3)] == [b"x"] * 3


@pytest.mark.parametrize("size", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
async def test_an_announced_size_outside_the_limits_ends_the_stream_after_the_frames_before(size: int):
    async with framed() as (near, far):
        far.send(frame(b"fine") + size.to_bytes(4, "big") + b"more")
        assert await near.receive() == b"fine"
        for _ in range(2):
            with pytest.raises(FrameTooLargeError, match=str(size)):
                await near.receive()
        assert near.is_ended
        assert await asyncio.get_running_loop().sock_recv(far, 1) == b""


async def test_an_end_in_the_middle_of_a_frame_is_a_lost_stream():
    async with framed() as (near, far):
        far.send(frame(b"whole") + frame(b"half of it")[:8])
        far.close()
        assert await near.receive() == b"whole"
        with pytest.raises(StreamLostError):
            await near.receive()


async def test_frames_that_arrived_survive_a_broken_socket():
    async with framed() as (near, far):
        far.send(frame(b"the reason"))
        await asyncio.sleep(0.01)
        far.close()
        with pytest.raises(StreamLostError):
            await near.send([b"x" * 2_000_000])
        assert await near.receive() == b"the reason"
        with pytest.raises(StreamLostError):
            await near.receive()


@pytest.mark.parametrize("head", [b"\x00", b"\xff\xff\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
async def test_a_preamble_that_makes_no_sense_ends_the_stream(head: bytes):
    async with framed(None) as (near, far):
        far.send(head)
        with pytest.raises((StreamLostError, FrameTooLargeError)):
            await near.receive_preamble()


async def test_reading_stops_while_nobody_receives():
    async with framed() as (near, far):
        sent = 0
        for _ in range(1000):
            try:
                sent += far.send(frame(b"x" * 1000))
            except BlockingIOError:
                await asyncio.sleep(0.001)
        assert sent < 2_000_000
        num_frames = sent // 1004
        assert [len(await near.receive()) for _ in range(num_frames)] == [1000] * num_frames


async def test_closing_does_not_wait_for_ever_for_a_peer_that_does_not_read():
    async with framed() as (near, _):
        sending = asyncio.create_task(near.send([bytes(2_000_000)]))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            await near.close()
        with pytest.raises(StreamLostError):
            await sending
