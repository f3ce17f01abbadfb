"""All peers together have so many bytes a second, and share them fairly."""

import asyncio
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_node import flags
from server_node.paced_transport import PacedTransport
from server_node.pacing import SMALL_BYTES, Pacing
from swarm_protocol.messages import COMPUTE_PROTOCOL
from swarm_protocol.transport.base import MAX_FRAME_BYTES, FrameStream
from swarm_protocol.transport.memory_net import MemoryNetwork, MemoryTransport
from tests.node.node_scenario import assert_output, forward, local_output, serving_node, states, virtual

RATE = 1_000_000
BIG, SMALL = 100_000, 10_000


def sent_until(pacing: Pacing, end_s: float) -> list[tuple[float, int]]:
    """Return when which frame goes."""
    now_s, sent = 0.0, []
    while now_s <= end_s:
        while (frame := pacing.next(now_s)) is not None:
            sent.append((now_s, frame.number))
        wait_s = pacing.wait_s(now_s)
        if wait_s is None:
            break
        now_s += wait_s
    return sent


def test_streams_take_turns_by_bytes() -> None:
    pacing = Pacing(RATE, 0.0)
    owner = {}
    for _ in range(20):
        owner[pacing.add("big", 2 * BIG).number] = "big"
    for _ in range(40):
        owner[pacing.add("half as big", BIG).number] = "half as big"
    sent = [owner[number] for _, number in sent_until(pacing, 100.0)]
    assert len(sent) == 60
    for end in range(3, 60, 3):
        assert abs(sent[:end].count("half as big") - 2 * sent[:end].count("big")) <= 2


def test_a_stream_that_comes_later_is_not_behind_all_that_waits() -> None:
    pacing = Pacing(RATE, 0.0)
    for _ in range(50):
        pacing.add("first", BIG)
    assert sent_until(pacing, 0.0)
    late = pacing.add("second", BIG)
    order = [number for _, number in sent_until(pacing, 100.0)]
    assert order.index(late.number) <= 1


def test_a_small_frame_does_not_wait_for_a_big_one_that_went_but_many_do() -> None:
    pacing = Pacing(RATE, 0.0)
    pacing.add("prompt", MAX_FRAME_BYTES)
    assert pacing.next(0.0) is not None
    small = [pacing.add("steps", SMALL).number for _ in range(200)]
    big = pacing.add("prompt", BIG).number
    sent = sent_until(pacing, 100.0)
    assert sent[0] == (0.0, small[0])
    # They get half of the rate while the big one is paid for, not more.
    during = [when_s for when_s, number in sent if number in small and when_s < 1.0]
    assert (len(during) - 1) * SMALL <= 0.5 * RATE * 1.25 + SMALL
    assert big in [number for _, number in sent]


def test_what_nobody_waits_for_any_more_costs_nothing() -> None:
    pacing = Pacing(RATE, 0.0)
    gone = [pacing.add(name, MAX_FRAME_BYTES) for name in "abc"]
    for frame in gone:
        pacing.withdraw(frame)
    assert (pacing.next(0.0), pacing.wait_s(0.0)) == (None, None)
    kept = pacing.add("d", BIG)
    assert pacing.next(0.0) is kept
    pacing.give_back(BIG, 0.0)
    pacing.add("d", BIG)
    assert pacing.wait_s(0.0) == 0.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MAX_FRAME_BYTES)), min_size=1, max_size=40))
def test_every_frame_goes_and_all_keep_to_the_rate(frames: list[tuple[str, int]]) -> None:
    pacing = Pacing(RATE, 0.0)
    sizes = {pacing.add(stream, size).number: size for stream, size in frames}
    sent = sent_until(pacing, 10_000.0)
    assert sorted(number for _, number in sent) == sorted(sizes)
    total = 0
    for when_s, number in sent:
        total += sizes[number]
        # What was begun may be overdrawn, by one big frame, and by the small ones' share meanwhile.
        overdrawn = 1.5 * MAX_FRAME_BYTES + SMALL_BYTES + 0.5 * RATE
        assert total <= RATE * when_s + 0.25 * RATE + overdrawn


class Peers:
    """A paced peer, and others with streams to it."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.paced = PacedTransport(self.network.transport(), RATE)
        self.received: dict[str, int] = defaultdict(int)

    async def send_for_ever(self, name: str, stream: FrameStream, size_bytes: int) -> None:
        while True:
            await stream.send([bytes(size_bytes)])

    async def count(self, name: str, stream: FrameStream) -> None:
        while True:
            self.received[name] += len(await stream.receive())

    async def other(self) -> MemoryTransport:
        return self.network.transport()


@pytest.mark.parametrize("outgoing", [True, False], ids=["outgoing", "incoming"])
def test_the_rate_holds_and_streams_of_all_peers_share_it(outgoing: bool):
    @virtual
    async def scenario() -> None:
        peers = Peers()
        async with asyncio.TaskGroup() as group:
            tasks = []

            async def accepted(stream: FrameStream) -> None:
                name = stream.peer_id
                if outgoing:
                    await peers.send_for_ever(name, stream, BIG)
                else:
                    await peers.count(name, stream)

            await peers.paced.serve("flood", accepted)
            for _ in range(4):
                other = await peers.other()
                stream = await other.dial(peers.paced.peer_id, "flood")
                work = (
                    peers.count(other.peer_id, stream) if outgoing else peers.send_for_ever(other.peer_id, stream, BIG)
                )
                tasks.append(group.create_task(work))
            await asyncio.sleep(10.0)
            counts = sorted(peers.received.values())
            assert sum(counts) == pytest.approx(10 * RATE, rel=0.05)
            assert len(counts) == 4
            assert counts[-1] - counts[0] <= 0.25 * RATE + BIG  # the first one had the burst for itself
            for task in tasks:
                task.cancel()

    scenario()


def test_steps_go_on_beside_prompts():
    @virtual
    async def scenario() -> None:
        peers = Peers()

        async def swallow(stream: FrameStream) -> None:
            while True:
                await stream.receive()

        async def echo(stream: FrameStream) -> None:
            while True:
                await stream.send([await stream.receive()])

        await peers.paced.serve("prompts", swallow)
        await peers.paced.serve("steps", echo)
        async with asyncio.TaskGroup() as group:
            floods = []
            for _ in range(4):
                stream = await (await peers.other()).dial(peers.paced.peer_id, "prompts")
                floods.append(group.create_task(peers.send_for_ever("", stream, MAX_FRAME_BYTES)))
            steps = await (await peers.other()).dial(peers.paced.peer_id, "steps")
            slowest_s = 0.0
            for _ in range(100):
                began_s = asyncio.get_running_loop().time()
                await steps.send([bytes(SMALL)])
                await steps.receive()
                slowest_s = max(slowest_s, asyncio.get_running_loop().time() - began_s)
            # 100 steps of 20 kB in both directions are 2 s of the half that they may take; a big frame alone is 2.1 s.
            assert slowest_s <= 0.05
            assert asyncio.get_running_loop().time() <= 4.0
            for flood in floods:
                flood.cancel()

    scenario()


def test_a_node_with_little_bandwidth_does_the_same_work_more_slowly():
    @virtual
    async def scenario() -> None:
        async with serving_node(max_bytes_per_s=RATE, max_step_tokens=1 << 15) as node:
            talk, _ = await node.open()
            prompts = [await node.dial(protocol=COMPUTE_PROTOCOL) for _ in range(3)]
            many = states(128, rows=256)
            began_s = asyncio.get_running_loop().time()
            big = asyncio.gather(*(prompt.ask(forward(many)) for prompt in prompts))
            for step in range(20):
                assert_output(await talk.step(step + 1, 0, states(2)), local_output(states(2)))
            assert asyncio.get_running_loop().time() - began_s < 2.0
            expected = local_output(many)
            for reply in await big:
                assert_output(reply, expected)
            # 12.6 MB in, and then as much out, partly beside it.
            assert 13.0 < asyncio.get_running_loop().time() - began_s < 27.0

    scenario()


def test_a_frame_whose_reader_gave_up_waiting_is_not_lost():
    @virtual
    async def scenario() -> None:
        peers = Peers()
        received: list[int] = []
        done = asyncio.Event()

        async def impatient(stream: FrameStream) -> None:
            while len(received) < 4:
                try:
                    async with asyncio.timeout(0.3):
                        received.append(len(await stream.receive()))
                except TimeoutError:
                    continue
            done.set()

        await peers.paced.serve("frames", impatient)
        stream = await (await peers.other()).dial(peers.paced.peer_id, "frames")
        for number in range(4):
            await stream.send([bytes(MAX_FRAME_BYTES - number)])
        await done.wait()
        assert received == [MAX_FRAME_BYTES - number for number in range(4)]
        assert asyncio.get_running_loop().time() >= 3 * (MAX_FRAME_BYTES - 3) / RATE - 0.25

    scenario()


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("20Mbit", 2_500_000), ("5MB", 5_000_000), ("1.5 mbit/s", 187_500), ("800KB/s", 800_000), ("1Gbit", 125_000_000)],
)
def test_a_bound_of_the_bandwidth_is_in_bits_or_bytes_a_second(text: str, bytes_per_s: int) -> None:
    arguments = flags.settings().parse(["run", "m", "--max-bandwidth", text], {})
    assert flags.node_config(arguments).network.max_bytes_per_s == bytes_per_s


@pytest.mark.parametrize("text", ["20", "0Mbit", "100Kbit", "Mbit", "-1MB", "20Mb"])
def test_what_is_no_rate_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags.settings().parse(["run", "m", f"--max-bandwidth={text}"], {})
    assert "a rate of at least 1Mbit is needed" in capsys.readouterr().err
