"""What only the real network can get wrong: processes, ports, addresses, and what is left behind."""

import asyncio
import gc
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from swarm_protocol.errors import ConfigError, InvalidRecordError, PeerUnreachableError, StreamLostError
from swarm_protocol.identity import create_identity, load_or_create_identity
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import PROTOCOL_VERSIONS
from swarm_protocol.records import NodeRecord, NodeState, seal
from swarm_protocol.transport import FrameStream, dht_membership
from swarm_protocol.transport.hivemind_net import HivemindTransport, NetworkConfig, open_transport

pytestmark = [pytest.mark.p2p, pytest.mark.timeout(60)]

LOCAL = NetworkConfig(host="127.0.0.1")


def joining(*transports: HivemindTransport, **changes: object) -> NetworkConfig:
    addresses = tuple(address for transport in transports for address in transport.addresses)
    return NetworkConfig(**({"host": "127.0.0.1", "initial_peers": addresses} | changes))  # type: ignore[arg-type]


@asynccontextmanager
async def opened(config: NetworkConfig = LOCAL) -> AsyncIterator[HivemindTransport]:
    transport = await open_transport(config)
    try:
        yield transport
    finally:
        await transport.close()


async def echo(stream: FrameStream) -> None:
    while True:
        await stream.send([await stream.receive()])


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    return list(folder.glob(pattern))


def daemons_of(process_id: int) -> list[int]:
    """Process ids of the daemons that `process_id` started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)
        except OSError:
            continue
        if "(p2pd" in fields[0] and int(fields[1].split()[1]) == process_id and fields[1].split()[0] != "Z":
            found.append(int(folder.name))
    return found


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Return how many seconds it took."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - start_s


# --- what is left behind ----------------------------------------------------------------------------------------------


async def test_closing_leaves_no_task_process_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = await open_transport(LOCAL)
    second = await open_transport(joining(first))
    await first.serve("echo", echo)
    stream = await second.dial(first.peer_id, "echo")
    await second.directory.store("key", "sub", b"value", second.now_s() + 30)
    assert len(daemons_of(os.getpid())) == 2
    for transport in (second, first, first):
        await transport.close()
    with pytest.raises(StreamLostError):
        await stream.receive()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert daemons_of(os.getpid()) == []
    assert files_in(tmp_path) == []
    assert files_in(Path("/tmp"), "hivemind-p2pclient-*") == []
    gc.collect()  # unclosed sockets and forgotten tasks would warn, and warnings are errors


async def test_cancelling_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for delay_s in (0.0, 0.02, 0.1, 0.15, 0.16, 0.17, 0.18, 0.19, 0.2, 0.21, 0.22, 0.25):
        opening = asyncio.create_task(open_transport(LOCAL))
        await asyncio.sleep(delay_s)
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await (await opening).close()
        gc.collect()
        assert daemons_of(os.getpid()) == []
        assert files_in(tmp_path) == []


async def test_it_works_in_a_thread_of_its_own():
    def run() -> None:
        async def main() -> None:
            async with opened(joining(first)) as second:
                stream = await second.dial(first.peer_id, "echo")
                await stream.send([b"from another thread"])
                answers.append(await stream.receive())

        asyncio.run(main())

    answers: list[bytes] = []
    async with opened() as first:
        await first.serve("echo", echo)
        await asyncio.to_thread(run)
    assert answers == [b"from another thread"]
    assert [thread.name for thread in threading.enumerate() if "asyncio_" in thread.name or "MainThread" in thread.name]


def test_importing_leaves_logging_and_warnings_alone():
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    assert logging.getLogger("hivemind").handlers == []
    assert not [entry for entry in warnings.filters if "NumPy array is not writable" in str(entry[1])]


# --- processes that die -----------------------------------------------------------------------------------------------

CHILD = """
import asyncio, sys
from swarm_protocol.transport.hivemind_net import NetworkConfig, open_transport

async def main():
    async def hold(stream):
        await stream.send([b"hello"])
        await stream.receive()
    address, port, identity = sys.argv[1:]
    config = NetworkConfig(host="127.0.0.1", initial_peers=(address,), port=int(port), identity_path=identity)
    transport = await open_transport(config)
    await transport.serve("hold", hold)
    print(transport.peer_id, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


async def test_a_process_killed_takes_its_daemon_along_and_peers_see_the_end(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with opened() as transport:
        arguments = [sys.executable, "-c", CHILD, transport.addresses[0], str(port), str(tmp_path / "identity")]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        child = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, env=environment)
        assert child.stdout is not None
        peer_id = (await child.stdout.readline()).decode().strip()
        stream = await transport.dial(peer_id, "hold")  # type: ignore[arg-type]
        assert await stream.receive() == b"hello"
        [daemon] = daemons_of(child.pid)

        killed_at_s = time.monotonic()
        child.send_signal(signal.SIGKILL)
        with pytest.raises(StreamLostError):
            await asyncio.wait_for(stream.receive(), 5)
        seen_s = time.monotonic() - killed_at_s
        await child.wait()
        gone_s = await asyncio.to_thread(wait_until, lambda: not is_running(daemon), 5)
        print(f"end seen after {seen_s:.3f} s, daemon gone after {gone_s:.3f} s")
        assert seen_s < 2

        # The successor takes over identity and port at once, and can be dialled.
        again = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, env=environment)
        assert again.stdout is not None
        assert (await asyncio.wait_for(again.stdout.readline(), 30)).decode().strip() == peer_id
        print(f"successor online after {time.monotonic() - killed_at_s:.1f} s")
        stream = await asyncio.wait_for(transport.dial(peer_id, "hold"), 10)  # type: ignore[arg-type]
        assert await stream.receive() == b"hello"
        print(f"successor dialled after {time.monotonic() - killed_at_s:.1f} s")
        again.kill()
        await again.wait()


async def test_when_the_daemon_dies_streams_end_and_everything_says_so(caplog: pytest.LogCaptureFixture):
    async with opened() as first, opened(joining(first)) as second:
        await first.serve("echo", echo)
        stream = await second.dial(first.peer_id, "echo")
        before = set(daemons_of(os.getpid()))
        assert second._daemon is not None
        os.kill(second._daemon._child.pid, signal.SIGKILL)
        await asyncio.wait_for(second.until_lost(), 5)
        with pytest.raises(StreamLostError):
            await asyncio.wait_for(stream.receive(), 5)
        await asyncio.to_thread(wait_until, lambda: set(daemons_of(os.getpid())) < before, 5)
        with pytest.raises(PeerUnreachableError):
            await second.dial(first.peer_id, "echo")
        with pytest.raises(StreamLostError):
            await second.serve("other", echo)
        async with asyncio.timeout(10):
            assert await second.directory.lookup(["key"]) == {"key": {}}
    assert "the network daemon ended" in caplog.text


# --- starting that fails ----------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_named():
    async with opened() as transport:
        port = int(transport.addresses[0].split("/")[4])
        with pytest.raises(ConfigError, match=f"port {port}"):
            await open_transport(NetworkConfig(host="127.0.0.1", port=port))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NetworkConfig(host="localhost"), "localhost"),
        (NetworkConfig(host="192.0.2.1"), "192.0.2.1"),
        (NetworkConfig(port=70_000), "70000"),
        (NetworkConfig(initial_peers=("nonsense",)), "nonsense"),
        (NetworkConfig(initial_peers=("/ip4/1.2.3.4/tcp/x",)), "/tcp/x"),
        (NetworkConfig(initial_peers=("/ip4/127.0.0.1/tcp/1234",)), "names no peer"),
        (NetworkConfig(initial_peers=("/ip4/127.0.0.1/tcp/1234/p2p/0OIl",)), "0OIl"),
        (NetworkConfig(announce=("/ip4/1.2.3/tcp/1",)), "1.2.3"),
        (NetworkConfig(identity_path="/no/such/folder/identity"), "/no/such/folder"),
    ],
    ids=lambda value: "" if isinstance(value, NetworkConfig) else value,
)
async def test_unusable_configurations_are_refused(config: NetworkConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        await open_transport(config)


async def test_initial_peers_that_nobody_answers_at_are_named():
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBVCLqcnTURUjiSFgQpT5fLAnvmgZzjZGcAuJAgDU1wcx"
    start_s = time.monotonic()
    with pytest.raises(PeerUnreachableError, match="12D3KooWBVCLqcnTURUjiSFgQpT5fLAnvmgZzjZGcAuJAgDU1wcx"):
        await open_transport(NetworkConfig(host="127.0.0.1", initial_peers=(address,), startup_timeout_s=2))
    assert time.monotonic() - start_s < 5
    assert daemons_of(os.getpid()) == []


async def test_one_initial_peer_of_several_is_enough():
    dead = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWBVCLqcnTURUjiSFgQpT5fLAnvmgZzjZGcAuJAgDU1wcx"
    async with opened() as first, opened(joining(first, initial_peers=(dead, *first.addresses))) as second:
        await first.directory.store("key", "sub", b"value", first.now_s() + 30)
        assert await second.directory.lookup(["key"]) == {"key": {"sub": b"value"}}


async def test_an_initial_peer_that_starts_later_is_waited_for(tmp_path: Path):
    identity = load_or_create_identity(tmp_path / "identity")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer_id}"
    early = asyncio.create_task(open_transport(NetworkConfig(host="127.0.0.1", initial_peers=(address,))))
    await asyncio.sleep(1)
    assert not early.done()
    late = NetworkConfig(host="127.0.0.1", port=port, identity_path=str(tmp_path / "identity"))
    async with opened(late) as first:
        second = await early
        await first.serve("echo", echo)
        await (await second.dial(first.peer_id, "echo")).close()
        await second.close()


async def test_a_first_peer_may_be_given_its_own_address(tmp_path: Path):
    identity = load_or_create_identity(tmp_path / "identity")
    own = f"/ip4/127.0.0.1/tcp/4567/p2p/{identity.peer_id}"
    config = NetworkConfig(host="127.0.0.1", initial_peers=(own,), identity_path=str(tmp_path / "identity"))
    async with opened(config) as transport:
        assert transport.peer_id == identity.peer_id
        assert transport.addresses[0].endswith(identity.peer_id)


@pytest.mark.parametrize(("offset_s", "word"), [(10.0, "ahead of"), (-10.0, "behind")])
async def test_a_clock_that_is_off_is_reported(monkeypatch: pytest.MonkeyPatch, offset_s: float, word: str):
    async with opened() as first:
        monkeypatch.setattr(dht_membership, "get_dht_time", lambda: time.time() + offset_s)
        with pytest.raises(ConfigError, match=rf"clock .* is off: 1?\d\.\d s {word}"):
            await open_transport(joining(first))


async def test_a_clock_that_goes_off_while_a_peer_is_in_the_swarm_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(dht_membership, "LOOK_S", 0.1)
    caplog.set_level("INFO", logger=dht_membership.logger.name)
    async with opened() as first, opened(joining(first)):
        with monkeypatch.context() as off:
            off.setattr(dht_membership, "get_dht_time", lambda: time.time() + 10.0)
            await until_logged(caplog, "the clock of this machine is off: 1?[0-9][.][0-9] s ahead of the swarm's")
        await until_logged(caplog, "agrees with the swarm's again")
    named = [record for record in caplog.records if "clock of this machine is off" in record.message]
    assert 1 <= len(named) <= 2, "once by each of the two that know another one"


async def until_logged(caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    async with asyncio.timeout(30):
        while not re.search(pattern, caplog.text):  # noqa: ASYNC110 - nothing tells it
            await asyncio.sleep(0.05)


# --- limits and modes -------------------------------------------------------------------------------------------------


async def test_streams_above_the_limit_are_closed_at_once():
    config = NetworkConfig(host="127.0.0.1", max_incoming_streams=3)
    async with opened(config) as first, opened(joining(first)) as second:
        await first.serve("echo", echo)
        streams = [await second.dial(first.peer_id, "echo") for _ in range(3)]
        for stream in streams:
            await stream.send([b"x"])
            assert await stream.receive() == b"x"
        refused = await second.dial(first.peer_id, "echo")
        with pytest.raises(StreamLostError):
            await asyncio.wait_for(refused.receive(), 5)
        await streams[0].close()
        await asyncio.sleep(0.1)
        fresh = await second.dial(first.peer_id, "echo")
        await fresh.send([b"y"])
        assert await fresh.receive() == b"y"


async def test_a_client_uses_the_swarm_without_listening():
    async with opened() as node, opened(joining(node, client_mode=True)) as client:
        assert client.addresses == ()
        await node.serve("echo", echo)
        await node.directory.store("key", "node", b"value", node.now_s() + 30)
        assert await client.directory.lookup(["key"]) == {"key": {"node": b"value"}}
        assert await client.directory.store("key", "client", b"mine", client.now_s() + 30)
        assert set((await node.directory.lookup(["key"]))["key"]) == {"node", "client"}
        stream = await client.dial(node.peer_id, "echo")
        await stream.send([b"x"])
        assert await stream.receive() == b"x"


async def test_a_client_alone_can_store_nothing():
    async with opened(NetworkConfig(client_mode=True)) as client:
        assert not await client.directory.store("key", "sub", b"value", client.now_s() + 30)
        assert await client.directory.lookup(["key"]) == {"key": {}}


async def test_a_third_peer_is_seen_and_dialled_by_peers_that_never_heard_its_address():
    async with opened() as first, opened(joining(first)) as second:
        await second.directory.lookup(["nodes"])
        async with opened(joining(first)) as third:
            await third.serve("echo", echo)
            await third.directory.store("nodes", "third", b"here", third.now_s() + 30)
            assert await second.directory.lookup(["nodes"]) == {"nodes": {"third": b"here"}}
            stream = await second.dial(third.peer_id, "echo")
            await stream.send([b"x"])
            assert await stream.receive() == b"x"


async def test_values_outlive_a_peer_that_leaves_and_lookups_go_on():
    async with opened() as first, opened(joining(first)) as second:
        third = await open_transport(joining(first))
        await third.directory.store("nodes", "third", b"here", third.now_s() + 30)
        await third.close()
        start_s = time.monotonic()
        assert await second.directory.lookup(["nodes"]) == {"nodes": {"third": b"here"}}
        assert time.monotonic() - start_s < 5


async def test_values_without_a_subkey_cannot_displace_the_others():
    async with opened() as first, opened(joining(first)) as second:
        assert await first.directory.store("nodes", "first", b"here", first.now_s() + 30)
        assert second._node is not None
        assert not await second._node.store("nodes", b"poison", second.now_s() + 3000)
        assert not await second._node.store("nodes", bytes(5000), second.now_s() + 30, subkey="big")
        assert not await second._node.store("nodes", b"stays", second.now_s() + 1e6, subkey="for good")
        for peer in (first, second):
            assert await peer.directory.lookup(["nodes"]) == {"nodes": {"first": b"here"}}


async def test_a_forged_a_replayed_and_an_oversized_record_change_nothing(tmp_path: Path):
    identity = load_or_create_identity(tmp_path / "identity")

    def sealed(state: NodeState, now_s: float) -> tuple[bytes, float]:
        record = node_record(identity.peer_id, state, now_s)
        return seal(record, identity.sign), record.expires_at_s

    async with opened() as first, opened(joining(first)) as second, opened(joining(first)) as attacker:
        mine, owner = "umbel/1/model/0", identity.peer_id
        old, old_until_s = sealed("draining", first.now_s())
        assert await first.directory.store(mine, owner, old, old_until_s)
        now, until_s = sealed("online", first.now_s() + 1)
        assert await first.directory.store(mine, owner, now, until_s)
        assert attacker._node is not None
        attacker._node.protocol.record_validator = None  # it keeps to no rule
        forger = create_identity()
        forged = seal(node_record(owner, "offline", first.now_s()), forger.sign)
        for value, expires_at_s in (
            (forged, until_s + 10),
            (old, until_s + 10),
            (now, until_s + 10),
            (bytes(3000), until_s + 10),
            (b"", until_s + 10),
        ):
            await attacker._node.store(mine, value, expires_at_s, subkey=owner)
            for peer in (first, second):
                assert await peer.directory.lookup([mine]) == {mine: {owner: now}}
        with pytest.raises(InvalidRecordError):
            await second.directory.store(mine, owner, forged, until_s + 10)
        later, later_until_s = sealed("offline", first.now_s() + 2)
        # Whoever brings it. What that returns may be the refusal of the one peer that holds to the forged value.
        await second.directory.store(mine, owner, later, later_until_s)
        for peer in (first, second):
            assert await peer.directory.lookup([mine]) == {mine: {owner: later}}


def node_record(owner: PeerId, state: NodeState, now_s: float) -> NodeRecord:
    return NodeRecord(
        owner, "model", "revision", 0, 4, state, 1, now_s, now_s + 30, PROTOCOL_VERSIONS, "umbel", "float32", "n", 0, 0
    )


async def test_peers_find_a_first_peer_again_that_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(dht_membership, "LOOK_S", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = NetworkConfig(host="127.0.0.1", port=port, identity_path=str(tmp_path / "identity"))

    async def until_seen(by: HivemindTransport, node: HivemindTransport) -> None:
        while not (await by.directory.lookup(["nodes"]))["nodes"]:
            await node.directory.store("nodes", "node", b"here", node.now_s() + 30)
            await asyncio.sleep(0.2)

    first = await open_transport(config)
    async with opened(joining(first)) as node, opened(joining(first, client_mode=True)) as client:
        with caplog.at_level(logging.WARNING):
            await first.close()
            while "no peer of the swarm answers any more" not in caplog.text:
                await node.directory.store("nodes", "node", b"here", node.now_s() + 30)  # finds that nobody is there
                await asyncio.sleep(0.2)
        async with opened(config) as again, opened(joining(again, client_mode=True)) as newcomer:
            async with asyncio.timeout(40):
                await until_seen(newcomer, node)
                await until_seen(client, node)
                await until_seen(again, node)
