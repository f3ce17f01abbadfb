"""What only the network in memory can do: the script, and time that is told to the millisecond."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from swarm_protocol.errors import PeerUnreachableError, StreamLostError
from swarm_protocol.identity import verify
from swarm_protocol.transport import FrameStream
from swarm_protocol.transport.memory_net import LinkProfile, MemoryNetwork, MemoryTransport
from swarm_protocol.transport.virtual_clock import run_virtual


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send([await stream.receive()])


Scenario = Callable[[MemoryNetwork, MemoryTransport, MemoryTransport, FrameStream], Awaitable[None]]


def run_scenario(scenario: Scenario, profile: LinkProfile | None = None, detection_s: float = 5.0) -> None:
    """Run `scenario` with a client, a server that echoes, and a stream between the two."""

    async def main() -> None:
        network = MemoryNetwork(profile, detection_s=detection_s)
        client, server = network.transport(), network.transport()
        await server.serve("echo", echo)
        stream = await client.dial(server.peer_id, "echo")
        await scenario(network, client, server, stream)
        await client.close()
        await server.close()

    run_virtual(main(), limit_s=3600)


def test_a_round_trip_takes_the_delays_and_the_transmission():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, _: MemoryTransport, stream: FrameStream
    ) -> None:
        assert now_s() == pytest.approx(0.08)  # the dial
        await stream.send([bytes(1_000_000)])
        await stream.receive()
        assert now_s() == pytest.approx(0.08 + 2 * (0.04 + 0.1))

    run_scenario(scenario, LinkProfile(delay_s=0.04, bandwidth_bytes_per_s=10_000_000))


def test_directions_can_differ_and_change():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.set_link(client.peer_id, server.peer_id, LinkProfile(delay_s=1), both_ways=False)
        await stream.send([b"x"])
        await stream.receive()
        assert now_s() == pytest.approx(1)

    run_scenario(scenario)


def test_frames_stay_in_order_when_the_delay_falls():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        for number, delay_s in enumerate((1.0, 0.5, 0.0, 0.0)):
            network.set_link(client.peer_id, server.peer_id, LinkProfile(delay_s=delay_s), both_ways=False)
            await stream.send([b"%d" % number])
        assert [await stream.receive() for _ in range(4)] == [b"0", b"1", b"2", b"3"]
        assert now_s() == pytest.approx(1)

    run_scenario(scenario)


def test_streams_share_the_bandwidth_of_a_link():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        other = await client.dial(server.peer_id, "echo")
        network.set_link(client.peer_id, server.peer_id, LinkProfile(bandwidth_bytes_per_s=1_000_000), both_ways=False)
        await stream.send([bytes(1_000_000)])
        await other.send([bytes(1_000_000)])
        await asyncio.gather(stream.receive(), other.receive())
        assert now_s() == pytest.approx(2)

    run_scenario(scenario)


def test_the_end_of_a_killed_peer_is_seen_after_the_detection_time():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.kill(server.peer_id)
        with pytest.raises(StreamLostError):
            await stream.receive()
        assert now_s() == pytest.approx(5)
        with pytest.raises(StreamLostError):
            await stream.send([b"x"])
        with pytest.raises(PeerUnreachableError):
            await client.dial(server.peer_id, "echo")

    run_scenario(scenario)


def test_a_killed_peer_can_do_nothing_more():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.kill(client.peer_id)
        with pytest.raises(StreamLostError):
            await stream.receive()
        with pytest.raises(PeerUnreachableError):
            await client.dial(server.peer_id, "echo")
        assert not await client.directory.store("key", "me", b"x", client.now_s() + 10)
        assert await client.directory.lookup(["key"]) == {"key": {}}
        assert now_s() == 0

    run_scenario(scenario)


def test_the_handlers_of_a_killed_peer_are_cancelled():
    async def main() -> None:
        network = MemoryNetwork()
        client, server = network.transport(), network.transport()
        ended: list[str] = []

        async def note_the_end(stream: FrameStream) -> None:
            try:
                await stream.receive()
            finally:
                ended.append("ended")

        await server.serve("note", note_the_end)
        await client.dial(server.peer_id, "note")
        network.kill(server.peer_id)
        await asyncio.sleep(0)
        assert ended == ["ended"]

    run_virtual(main())


def test_a_restarted_peer_has_its_id_and_serves_nothing():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        reborn = network.restart(server.peer_id)
        assert reborn.peer_id == server.peer_id
        with pytest.raises(PeerUnreachableError):
            await client.dial(server.peer_id, "echo")
        await reborn.serve("echo", echo)
        fresh = await client.dial(server.peer_id, "echo")
        await fresh.send([b"again"])
        assert await fresh.receive() == b"again"
        with pytest.raises(StreamLostError):
            await stream.receive()
        await reborn.close()

    run_scenario(scenario)


def test_a_frozen_peer_holds_everything_back_and_ends_nothing():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.freeze(server.peer_id)
        await stream.send([b"one"])
        await stream.send([b"two"])
        for waiting in (stream.receive(), client.dial(server.peer_id, "echo"), server.directory.lookup(["key"])):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(waiting, 100)
        network.thaw(server.peer_id)
        assert [await stream.receive(), await stream.receive()] == [b"one", b"two"]
        assert now_s() == pytest.approx(300)

    run_scenario(scenario)


def test_a_sender_is_held_back_by_a_frozen_peer():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.freeze(server.peer_id)
        await stream.send([bytes(200_000)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.send([bytes(200_000)]), 100)

    run_scenario(scenario)


def test_a_cut_ends_the_streams_of_both_sides_and_dials_fail_until_it_is_mended():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.cut(client.peer_id, server.peer_id)
        await stream.send([b"lost"])
        with pytest.raises(StreamLostError):
            await stream.receive()
        assert now_s() == pytest.approx(5)
        with pytest.raises(PeerUnreachableError):
            await client.dial(server.peer_id, "echo")
        assert now_s() == pytest.approx(10)
        network.mend(client.peer_id, server.peer_id)
        await client.dial(server.peer_id, "echo")

    run_scenario(scenario)


def test_a_short_cut_only_delays():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.cut(client.peer_id, server.peer_id)
        await stream.send([b"late"])
        await asyncio.sleep(4)
        network.mend(client.peer_id, server.peer_id)
        assert await stream.receive() == b"late"
        await asyncio.sleep(10)
        await stream.send([b"alive"])
        assert await stream.receive() == b"alive"

    run_scenario(scenario)


def test_a_cut_concerns_two_peers_only():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.cut(client.peer_id, server.peer_id)
        third = network.transport()
        detour = await third.dial(server.peer_id, "echo")
        await detour.send([b"x"])
        assert await detour.receive() == b"x"
        await third.close()

    run_scenario(scenario)


def test_streams_break_after_so_many_frames():
    async def scenario(
        network: MemoryNetwork, client: MemoryTransport, server: MemoryTransport, stream: FrameStream
    ) -> None:
        network.break_streams(client.peer_id, server.peer_id, after_frames=2)
        await stream.send([b"one"])
        await stream.send([b"two"])
        with pytest.raises(StreamLostError):
            await stream.send([b"three"])
        network.break_streams(client.peer_id, server.peer_id)  # there is none any more
        fresh = await client.dial(server.peer_id, "echo")
        network.break_streams(client.peer_id, server.peer_id)
        with pytest.raises(StreamLostError):
            await fresh.receive()

    run_scenario(scenario)


def test_loss_ends_streams_and_is_the_same_in_every_run():
    async def count_frames() -> list[int]:
        network = MemoryNetwork(LinkProfile(loss=0.05), rng=random.Random(7))
        client, server = network.transport(), network.transport()
        await server.serve("echo", echo)
        counts = []
        for _ in range(10):
            stream, count = await client.dial(server.peer_id, "echo"), 0
            try:
                while True:
                    await stream.send([b"x"])
                    await stream.receive()
                    count += 1
            except StreamLostError:
                counts.append(count)
        return counts

    counts = run_virtual(count_frames())
    assert len(set(counts)) > 1
    assert run_virtual(count_frames()) == counts


def test_peers_have_fixed_identities_that_can_sign():
    async def main() -> tuple[str, str]:
        network = MemoryNetwork()
        one, other = network.transport(), network.transport()
        assert verify(one.peer_id, b"data", network.identity(one.peer_id).sign(b"data"))
        with pytest.raises(ValueError, match="online"):
            network.transport(one.peer_id)
        return one.peer_id, other.peer_id

    assert run_virtual(main()) == run_virtual(main())


def test_the_directory_takes_its_time_and_forgets():
    async def main() -> None:
        network = MemoryNetwork(directory_delay_s=0.2)
        one, other = network.transport(), network.transport()
        assert await one.directory.store("key", "one", b"x", one.now_s() + 30)
        assert now_s() == pytest.approx(0.2)
        await asyncio.sleep(29)
        assert await other.directory.lookup(["key"]) == {"key": {"one": b"x"}}
        await asyncio.sleep(1)
        assert await other.directory.lookup(["key"]) == {"key": {}}
        assert await one.directory.store("key", "one", b"y", one.now_s() + 1)

    run_virtual(main())
