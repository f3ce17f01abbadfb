"""What everything above may rely on, of the network in memory and of the real one alike."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from swarm_protocol.errors import FrameTooLargeError, InvalidRecordError, PeerUnreachableError, StreamLostError
from swarm_protocol.identity import create_identity
from swarm_protocol.transport import FrameStream, Transport
from swarm_protocol.transport.base import MAX_FRAME_BYTES
from tests.transport.conftest import Pair

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(30)]


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send([await stream.receive()])


@asynccontextmanager
async def both_ends(server: Transport, client: Transport, name: str) -> AsyncIterator[tuple[FrameStream, FrameStream]]:
    """Open a stream and yield the dialled end and the accepted one."""
    accepted: asyncio.Future[FrameStream] = asyncio.get_running_loop().create_future()
    is_done = asyncio.Event()

    async def keep(stream: FrameStream) -> None:
        accepted.set_result(stream)
        await is_done.wait()

    await server.serve(name, keep)
    near = await client.dial(server.peer_id, name)
    try:
        yield near, await accepted
    finally:
        is_done.set()
        await near.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # of things that set no event
            await asyncio.sleep(0.005)


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_frames_come_back_whole_and_in_order(pair: Pair):
    await pair.first.serve("echo", echo)
    stream = await pair.second.dial(pair.first.peer_id, "echo")
    assert stream.peer_id == pair.first.peer_id
    frames = [bytes([i]) * size for i, size in enumerate((1, 3, 4, 5, 65_535, 65_536, 300_000, 1_000_001, 2))]

    async def send_all() -> None:
        for frame in frames:
            await stream.send([frame])

    async with asyncio.TaskGroup() as group:
        group.create_task(send_all())
        received = [await stream.receive() for _ in frames]
    assert received == frames
    await stream.close()


async def test_parts_make_one_frame_of_any_kind_of_buffer(pair: Pair):
    async with both_ends(pair.first, pair.second, "parts") as (near, far):
        await near.send([b"head", bytearray(b"-"), memoryview(b"body" * 50_000), b""])
        assert await far.receive() == b"head-" + b"body" * 50_000


async def test_a_frame_is_sent_now_unless_something_has_to_be_waited_for(pair: Pair):
    async with both_ends(pair.first, pair.second, "now") as (near, far):
        assert near.send_now([b"one ", b"frame"])
        assert await far.receive() == b"one frame"
        num_sent = 0
        while num_sent < 1000 and near.send_now([bytes(100_000)]):
            num_sent += 1
        assert 0 < num_sent < 1000
        sending = asyncio.create_task(near.send([b"last"]))
        for _ in range(num_sent):
            assert len(await far.receive()) == 100_000
        assert await far.receive() == b"last"
        await sending
        assert near.send_now([b"again"])
        assert await far.receive() == b"again"
        with pytest.raises(FrameTooLargeError):
            near.send_now([])
        await near.close()
        with pytest.raises(StreamLostError):
            near.send_now([b"late"])


async def test_parts_may_be_changed_once_they_are_sent(pair: Pair):
    async with both_ends(pair.first, pair.second, "reuse") as (near, far):
        buffer = bytearray(b"a" * 1_000_000)
        receiving = asyncio.create_task(far.receive())
        await near.send([buffer])
        buffer[:] = b"b" * len(buffer)
        assert await receiving == b"a" * 1_000_000


async def test_the_accepting_end_knows_who_dialled_and_can_send_first(pair: Pair):
    async with both_ends(pair.first, pair.second, "greet") as (near, far):
        assert far.peer_id == pair.second.peer_id
        await far.send([b"hello"])
        assert await near.receive() == b"hello"


async def test_each_side_can_dial_the_other(pair: Pair):
    await pair.second.serve("echo", echo)
    stream = await pair.first.dial(pair.second.peer_id, "echo")
    await stream.send([b"x"])
    assert await stream.receive() == b"x"
    await stream.close()


async def test_the_largest_frame_passes(pair: Pair):
    async with both_ends(pair.first, pair.second, "largest") as (near, far):
        frame = bytes(MAX_FRAME_BYTES)
        _, received = await asyncio.gather(near.send([frame]), far.receive())
        assert received == frame


@pytest.mark.parametrize("parts", [[bytes(MAX_FRAME_BYTES), b"x"], [], [b""]], ids=["too large", "no part", "empty"])
async def test_frames_outside_the_limits_are_refused_and_leave_the_stream_usable(pair: Pair, parts: list[bytes]):
    async with both_ends(pair.first, pair.second, "limits") as (near, far):
        with pytest.raises(FrameTooLargeError):
            await near.send(parts)
        await near.send([b"fine"])
        assert await far.receive() == b"fine"


async def test_ten_megabytes_in_frames_arrive(pair: Pair):
    async with both_ends(pair.first, pair.second, "bulk") as (near, far):
        chunks = [bytes([i]) * 1_000_000 for i in range(10)]

        async def send_all() -> None:
            for chunk in chunks:
                await near.send([chunk])

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            received = [await far.receive() for _ in chunks]
        assert received == chunks


async def test_two_hundred_streams_work_at_once(pair: Pair):
    await pair.first.serve("echo", echo)

    async def use(number: int) -> bytes:
        stream = await pair.second.dial(pair.first.peer_id, "echo")
        await stream.send([b"%d" % number])
        await all_are_open.wait()
        answer = await stream.receive()
        await stream.close()
        return answer

    all_are_open = asyncio.Barrier(200)
    assert await asyncio.gather(*(use(i) for i in range(200))) == [b"%d" % i for i in range(200)]


async def test_several_tasks_may_send_on_one_stream(pair: Pair):
    async with both_ends(pair.first, pair.second, "senders") as (near, far):

        async def send_some(fill: bytes) -> None:
            for _ in range(5):
                await near.send([fill * 200_000, fill])

        async with asyncio.TaskGroup() as group:
            for fill in (b"a", b"b", b"c"):
                group.create_task(send_some(fill))
            frames = [await far.receive() for _ in range(15)]
        assert sorted(frames) == [fill * 200_001 for fill in (b"a",) * 5 + (b"b",) * 5 + (b"c",) * 5]


# --- waiting and cancelling -------------------------------------------------------------------------------------------


async def test_cancelling_a_receive_loses_no_frame(pair: Pair):
    async with both_ends(pair.first, pair.second, "cancel") as (near, far):
        sent = [bytes([i % 256]) * (1 + 997 * i) for i in range(120)]

        async def send_all() -> None:
            for frame in sent:
                await near.send([frame])
                await asyncio.sleep(0)

        received: list[bytes] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            for attempt in itertools.count():
                if len(received) == len(sent):
                    break
                receiving = asyncio.create_task(far.receive())
                for _ in range(attempt % 4):
                    await asyncio.sleep(0)
                receiving.cancel()
                try:
                    received.append(await receiving)
                except asyncio.CancelledError:
                    await asyncio.sleep(0)
        assert received == sent


async def test_a_sender_waits_for_a_slow_reader(pair: Pair):
    async with both_ends(pair.first, pair.second, "slow") as (near, far):
        num_sent, total = 0, 60

        async def send_all() -> None:
            nonlocal num_sent
            for i in range(total):
                await near.send([bytes([i]) * 1_000_000])
                num_sent += 1

        sending = asyncio.create_task(send_all())
        settled = -1
        while settled != num_sent:  # until it stands still
            settled = num_sent
            await asyncio.sleep(0.3)
        assert settled < total - 20, "the sender was never held back"
        assert [(await far.receive())[:1] for _ in range(total)] == [bytes([i]) for i in range(total)]
        await sending


async def test_a_cancelled_send_ends_the_stream(pair: Pair):
    async with both_ends(pair.first, pair.second, "half") as (near, far):

        async def send_for_ever() -> None:
            while True:
                await near.send([bytes(2_000_000)])

        sending = asyncio.create_task(send_for_ever())
        await asyncio.sleep(0.2)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(StreamLostError):
            await near.send([b"x"])

        async def receive_all() -> None:
            while True:
                assert len(await far.receive()) == 2_000_000, "a frame was cut"

        with pytest.raises(StreamLostError):
            await receive_all()


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_what_was_sent_before_a_close_is_received_before_the_end(pair: Pair):
    async with both_ends(pair.first, pair.second, "goodbye") as (near, far):
        await far.send([b"an answer"])
        await far.send([b"the reason"])
        await far.close()
        await asyncio.sleep(0.05)
        assert await near.receive() == b"an answer"
        assert await near.receive() == b"the reason"
        for _ in range(2):
            with pytest.raises(StreamLostError):
                await near.receive()


async def test_closing_wakes_those_who_wait_on_both_sides(pair: Pair):
    async with both_ends(pair.first, pair.second, "wake") as (near, far):
        waiting = [asyncio.create_task(near.receive()), asyncio.create_task(far.receive())]
        await asyncio.sleep(0.01)
        await near.close()
        for task in waiting:
            with pytest.raises(StreamLostError):
                await asyncio.wait_for(task, 5)
        with pytest.raises(StreamLostError):
            await near.send([b"x"])


async def test_sending_to_a_closed_peer_fails_in_the_end(pair: Pair):
    async with both_ends(pair.first, pair.second, "deaf") as (near, far):
        await far.close()

        async def send_on() -> None:
            for _ in range(1000):
                await near.send([b"x" * 1000])
                await asyncio.sleep(0.001)

        with pytest.raises(StreamLostError):
            await send_on()


async def test_closing_twice_is_fine(pair: Pair):
    async with both_ends(pair.first, pair.second, "twice") as (near, far):
        await near.close()
        await near.close()
        await far.close()


async def test_a_handler_that_returns_ends_its_stream(pair: Pair):
    async def brief(stream: FrameStream) -> None:
        await stream.send([b"done"])

    await pair.first.serve("brief", brief)
    stream = await pair.second.dial(pair.first.peer_id, "brief")
    assert await stream.receive() == b"done"
    with pytest.raises(StreamLostError):
        await stream.receive()


async def test_a_handler_that_fails_is_logged_and_tells_the_peer_nothing(pair: Pair, caplog: pytest.LogCaptureFixture):
    async def broken(stream: FrameStream) -> None:
        await stream.receive()
        raise RuntimeError("a secret path")

    await pair.first.serve("broken", broken)
    stream = await pair.second.dial(pair.first.peer_id, "broken")
    with caplog.at_level(logging.ERROR):
        await stream.send([b"go"])
        with pytest.raises(StreamLostError) as raised:
            await stream.receive()
    assert "secret" not in str(raised.value)
    await until(lambda: "a secret path" in caplog.text)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_a_handler_that_loses_its_stream_is_not_an_error(pair: Pair, caplog: pytest.LogCaptureFixture):
    await pair.first.serve("echo", echo)
    with caplog.at_level(logging.WARNING):
        stream = await pair.second.dial(pair.first.peer_id, "echo")
        await stream.close()
        await asyncio.sleep(0.05)
    assert not caplog.records


# --- dialling ---------------------------------------------------------------------------------------------------------


async def test_dialling_a_protocol_that_is_not_served_fails(pair: Pair):
    with pytest.raises(PeerUnreachableError):
        await pair.second.dial(pair.first.peer_id, "nobody serves this")


async def test_dialling_an_unknown_peer_fails(pair: Pair):
    with pytest.raises(PeerUnreachableError):
        await asyncio.wait_for(pair.second.dial(create_identity().peer_id, "echo"), 30)


async def test_dialling_oneself_fails(pair: Pair):
    await pair.first.serve("echo", echo)
    with pytest.raises(PeerUnreachableError):
        await pair.first.dial(pair.first.peer_id, "echo")


async def test_serving_again_replaces_the_handler(pair: Pair):
    def answering(word: bytes) -> Callable[[FrameStream], Awaitable[None]]:
        async def answer(stream: FrameStream) -> None:
            await stream.send([word])

        return answer

    await pair.first.serve("replaced", answering(b"old"))
    await pair.first.serve("replaced", answering(b"new"))
    stream = await pair.second.dial(pair.first.peer_id, "replaced")
    assert await stream.receive() == b"new"
    await stream.close()


async def test_addresses_end_with_the_peer_id(pair: Pair):
    assert pair.first.addresses
    assert all(address.endswith(f"/p2p/{pair.first.peer_id}") for address in pair.first.addresses)


# --- the directory ----------------------------------------------------------------------------------------------------


async def test_values_of_several_peers_are_seen_by_all(pair: Pair):
    expires_at_s = pair.first.now_s() + 60
    assert await pair.first.directory.store("model", "one", b"\x00first", expires_at_s)
    assert await pair.second.directory.store("model", "two", b"second", expires_at_s)
    for peer in (pair.first, pair.second):
        assert await peer.directory.lookup(["model", "other"]) == {
            "model": {"one": b"\x00first", "two": b"second"},
            "other": {},
        }


async def test_a_new_value_is_seen_although_the_key_was_looked_up_before(pair: Pair):
    for number in range(5):
        await pair.first.directory.store("growing", f"node {number}", b"here", pair.first.now_s() + 60)
        assert len((await pair.second.directory.lookup(["growing"]))["growing"]) == number + 1


async def test_a_value_is_replaced_only_by_one_that_expires_later(pair: Pair):
    now_s = pair.first.now_s()
    assert await pair.first.directory.store("replace", "node", b"old", now_s + 30)
    assert not await pair.first.directory.store("replace", "node", b"earlier", now_s + 20)
    assert await pair.second.directory.lookup(["replace"]) == {"replace": {"node": b"old"}}
    assert await pair.first.directory.store("replace", "node", b"later", now_s + 40)
    assert await pair.second.directory.lookup(["replace"]) == {"replace": {"node": b"later"}}


async def test_values_expire(pair: Pair):
    await pair.first.directory.store("brief", "long", b"x", pair.first.now_s() + 60)
    await pair.first.directory.store("brief", "short", b"x", pair.first.now_s() + 0.5)
    assert set((await pair.second.directory.lookup(["brief"]))["brief"]) == {"long", "short"}
    await asyncio.sleep(0.6)
    assert set((await pair.second.directory.lookup(["brief"]))["brief"]) == {"long"}


async def test_many_keys_are_looked_up_together(pair: Pair):
    keys = [f"bucket {i}" for i in range(20)]
    stores = (pair.first.directory.store(key, "node", key.encode(), pair.first.now_s() + 60) for key in keys)
    assert all(await asyncio.gather(*stores))
    assert await pair.second.directory.lookup(keys) == {key: {"node": key.encode()} for key in keys}
    assert await pair.second.directory.lookup([]) == {}


@pytest.mark.parametrize(
    ("subkey", "size", "expires_in_s"),
    [("n", 2049, 10), ("", 1, 10), ("n" * 129, 1, 10), ("ñ", 1, 10), ("n", 1, 4000)],
    ids=["value too large", "no subkey", "subkey too long", "subkey not ASCII", "expires too late"],
)
async def test_values_that_would_not_be_kept_are_refused(pair: Pair, subkey: str, size: int, expires_in_s: float):
    with pytest.raises(InvalidRecordError):
        await pair.first.directory.store("refused", subkey, bytes(size), pair.first.now_s() + expires_in_s)


async def test_the_largest_value_and_subkey_are_kept(pair: Pair):
    assert await pair.first.directory.store("large", "n" * 128, bytes(2048), pair.first.now_s() + 3600)
    assert await pair.second.directory.lookup(["large"]) == {"large": {"n" * 128: bytes(2048)}}


async def test_the_clocks_agree_and_go_on(pair: Pair):
    before_s, start_s = pair.first.now_s(), time.monotonic()
    await asyncio.sleep(0.05)
    assert pair.second.now_s() - before_s == pytest.approx(time.monotonic() - start_s, abs=0.5)
    assert pair.second.now_s() > before_s
