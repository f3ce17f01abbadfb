"""The network on libp2p: streams through the p2pd daemon, the directory in hivemind's DHT. All else is in `base.py`.

The daemon is a child process with a control socket; every stream is a socket of its own between it and this process.
hivemind's `P2P` and `DHTNode` share the caller's event loop, in any thread; nothing forks.
"""

import asyncio
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from swarm_protocol.errors import ConfigError, PeerUnreachableError, StreamLostError
from swarm_protocol.identity import load_or_create_identity
from swarm_protocol.ids import PeerId
from swarm_protocol.transport.base import Directory, FrameStream, StreamHandler
from swarm_protocol.transport.dht_membership import join, keep_joined
from swarm_protocol.transport.directory_rules import check_value, is_storable, usable_values
from swarm_protocol.transport.framed_socket import SCRATCH_BYTES, FramedSocket, FramedStream
from swarm_protocol.transport.network_config import NetworkConfig
from swarm_protocol.transport.p2p_daemon import Daemon, DaemonFiles, complete, frame_message, start_daemon
from swarm_protocol.transport.reachability import DIRECT, reached_in_words
from swarm_protocol.transport.serving import run_handler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch and protobuf, by way of hivemind; it adds filters of its own, too
    import hivemind.hivemind_cli
    from hivemind.dht.node import DHTNode
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase
    from hivemind.p2p import P2P, PeerID
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.logging import use_hivemind_log_handler
    from hivemind.utils.multiaddr import Multiaddr
    from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS, get_dht_time
# hivemind installs a log handler and renames the level WARNING; both are taken back, and its chatter is cut.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(logging.ERROR)

__all__ = ["HivemindTransport", "NetworkConfig", "open_transport"]

logger = logging.getLogger(__name__)

_P2PD: Final = Path(hivemind.hivemind_cli.__file__).with_name("p2pd")
LISTEN_BACKLOG: Final = 1024  # streams that arrive at once wait here; asyncio's default of 100 refuses more
DIAL_TIMEOUT_S: Final = 30  # the daemon's own limit for a dial whose caller went away
UNREGISTER_TIMEOUT_S: Final = 2.0  # to unregister handlers; a daemon that died never answers
ADDRESS_REFRESH_S: Final = 30.0  # relays and port mappings come and go


async def open_transport(config: NetworkConfig) -> "HivemindTransport":
    """Join the network, or start one where `config` names no initial peers (other than this one).

    Raises ConfigError for unusable addresses, ports and key files and for a clock that is off, PeerUnreachableError if
    no initial peer answers within `config.startup_timeout_s`.
    """
    transport = HivemindTransport(config)
    try:
        async with asyncio.timeout(config.startup_timeout_s):
            await transport._open()
    except TimeoutError:
        await transport.close()
        peers = ", ".join(config.initial_peers) or "none were given, so the network daemon itself is stuck"
        raise PeerUnreachableError(f"no initial peer answered within {config.startup_timeout_s:g} s: {peers}") from None
    except BaseException:
        await transport.close()
        raise
    return transport


class HivemindTransport:
    """One peer's access to the swarm. Make it with `open_transport`; belongs to the loop that it was made in."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._scratch = bytearray(SCRATCH_BYTES)
        self._peer_id = PeerId("")
        self._addresses: tuple[str, ...] = ()
        self._handlers: dict[str, StreamHandler] = {}
        self._sockets: set[FramedSocket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_incoming = 0
        self._is_closed = False
        self._lost = asyncio.Event()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._daemon: Daemon | None = None
        self._server: asyncio.Server | None = None
        self._p2p: P2P | None = None
        self._node: DHTNode | None = None
        self._directory: HivemindDirectory | None = None

    @property
    def peer_id(self) -> PeerId:
        """This peer's id."""
        return self._peer_id

    @property
    def addresses(self) -> Sequence[str]:
        """The multiaddresses under which others can reach this peer; none for a client that does not listen."""
        return self._addresses

    @property
    def directory(self) -> Directory:
        """The swarm's directory."""
        assert self._directory is not None
        return self._directory

    def now_s(self) -> float:
        """The swarm's clock: this machine's, within 3 s of the other peers' when it joined."""
        return float(get_dht_time())

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for every incoming stream of `protocol`; a second call replaces the handler."""
        is_new = protocol not in self._handlers
        self._handlers[protocol] = handler
        if is_new:
            request = p2pd_pb2.StreamHandlerRequest(
                addr=Multiaddr(f"/unix{self._path('incoming.sock')}").to_bytes(), proto=[protocol], balanced=False
            )
            socket = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=request))
            await socket.close()

    async def dial(self, peer_id: PeerId, protocol: str) -> FrameStream:
        """Open a stream; the daemon finds the peer's addresses. After a failure it may refuse the peer for some 5 s."""
        try:
            peer = PeerID.from_base58(peer_id).to_bytes()
        except ValueError:
            raise PeerUnreachableError(f"cannot dial {peer_id!r}: not a peer id") from None
        opening = p2pd_pb2.StreamOpenRequest(peer=peer, proto=[protocol], timeout=DIAL_TIMEOUT_S)
        try:
            socket = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening))
        except StreamLostError as error:
            raise PeerUnreachableError(f"cannot reach {peer_id}: {error}") from error
        return FramedStream(peer_id, socket)

    async def close(self) -> None:
        """Leave the network: no new streams, the end of the open ones, then the directory, the daemon and its files."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._server is not None:
            self._server.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(socket.close() for socket in list(self._sockets)))
        if self._node is not None:
            await _shut_down(self._node)
        elif self._p2p is not None:
            await _disconnect(self._p2p)
        if self._daemon is not None:
            await self._daemon.stop()
        if self._folder is not None:
            self._folder.cleanup()

    async def until_lost(self) -> None:
        """Wait until the daemon ends by itself: all streams end, dials fail; close, and open a new transport."""
        await self._lost.wait()

    # --- joining ------------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        config = self._config
        for address in config.announce:
            _parse_multiaddr(address)
        peers = {_peer_in(address): address for address in config.initial_peers}
        # A socket's path may have about 100 characters, and not every TMPDIR leaves room for ours.
        place = None if len(tempfile.gettempdir()) <= 70 else "/tmp"  # noqa: S108
        self._folder = tempfile.TemporaryDirectory(prefix="umbel-", dir=place, ignore_cleanup_errors=True)
        identity_path = Path(config.identity_path or self._path("identity"))
        self._peer_id = load_or_create_identity(identity_path).peer_id
        others = {peer: address for peer, address in peers.items() if peer != self._peer_id}
        files = DaemonFiles(_P2PD, identity_path, self._path("control.sock"))
        self._daemon = await start_daemon(config, list(others.values()), files)
        self._remove_ephemeral_key()
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: self._new_socket(self._on_incoming), str(self._path("incoming.sock")), backlog=LISTEN_BACKLOG
        )
        await complete(self._connect(files.control_socket))
        await self._refresh_addresses()
        self._node = await DHTNode.create(
            self._p2p,
            client_mode=config.client_mode,
            wait_timeout=config.rpc_timeout_s,
            record_validator=_BoundedValues(),
            # No caches: only `latest=True` sees new peers, so they would never be read.
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
        )
        self._directory = HivemindDirectory(self._node)
        if others:
            await join(self._node, others)
            self._spawn(keep_joined(self._node, self._p2p, others), "membership")
        self._spawn(self._watch_daemon(self._daemon), "daemon watcher")
        if config.relay or config.map_ports:
            self._spawn(self._keep_addresses(), "address refresh")

    async def _connect(self, control_socket: Path) -> None:
        self._p2p = await P2P.replicate(Multiaddr(f"/unix{control_socket}"))

    async def _refresh_addresses(self) -> None:
        assert self._p2p is not None
        try:
            addresses = await complete(self._p2p.get_visible_maddrs(latest=True))
            self._addresses = tuple(str(address) for address in addresses)
        except ValueError:  # hivemind's way to say that there are none
            self._addresses = ()

    async def _keep_addresses(self) -> None:
        reached = DIRECT
        while True:
            await asyncio.sleep(ADDRESS_REFRESH_S)
            try:
                async with asyncio.timeout(ADDRESS_REFRESH_S):
                    await self._refresh_addresses()
                now_reached = reached_in_words(self._addresses, self._config.initial_peers)
                if now_reached != reached and not self._config.client_mode:
                    logger.warning("%s peer=%s", now_reached, self._peer_id)
                reached = now_reached
            except Exception as error:  # hivemind raises whatever happens below it; the next time may be better
                logger.warning("the addresses are not known anew: %r peer=%s", error, self._peer_id)

    async def _watch_daemon(self, daemon: Daemon) -> None:
        status = await daemon.wait()
        self._lost.set()
        logger.error("the network daemon ended with status %d peer=%s", status, self._peer_id)

    # --- streams ------------------------------------------------------------------------------------------------------

    async def _ask(self, request: p2pd_pb2.Request) -> FramedSocket:
        """Send `request` to the daemon on a new socket; return it when the daemon agrees.

        Raises StreamLostError if the daemon refuses or is gone.
        """
        if self._is_closed:
            raise StreamLostError("the transport is closed")
        path, loop = str(self._path("control.sock")), asyncio.get_running_loop()
        try:
            _, socket = await loop.create_unix_connection(self._new_socket, path)
        except OSError as error:
            raise StreamLostError(f"the network daemon is gone: {error.strerror}") from error
        try:
            socket.write_raw(frame_message(request.SerializeToString()))
            response = p2pd_pb2.Response.FromString(await socket.receive_preamble())
            if response.type == p2pd_pb2.Response.ERROR:
                raise StreamLostError(str(response.error.msg))
        except BaseException:
            socket.abort()
            raise
        return socket

    def _new_socket(self, on_preamble: Callable[[FramedSocket], None] | None = None) -> FramedSocket:
        socket = FramedSocket(self._scratch, on_preamble, self._sockets.discard)
        self._sockets.add(socket)
        return socket

    def _on_incoming(self, socket: FramedSocket) -> None:
        """Start the handler of a new stream, whose preamble says who opened it and for what."""
        assert socket.preamble is not None
        info = p2pd_pb2.StreamInfo.FromString(socket.preamble)
        stream = FramedStream(PeerId(PeerID(info.peer).to_base58()), socket)
        handler = self._handlers.get(info.proto)
        if handler is None or self._is_closed:
            socket.abort()
        elif self._num_incoming >= self._config.max_incoming_streams:
            logger.debug("stream refused, %d are open peer=%s", self._num_incoming, stream.peer_id)
            socket.abort()
        else:
            self._num_incoming += 1
            self._spawn(self._run_handler(info.proto, handler, stream), f"{info.proto} handler")

    async def _run_handler(self, protocol: str, handler: StreamHandler, stream: FramedStream) -> None:
        try:
            await run_handler(protocol, handler, stream)
        finally:
            self._num_incoming -= 1

    def _spawn(self, coroutine: Any, name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remove_ephemeral_key(self) -> None:
        if self._config.identity_path is None:  # the daemon has read it; a process that is killed leaves no key behind
            self._path("identity").unlink()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name, name)


class HivemindDirectory:
    """The directory in hivemind's DHT (Kademlia)."""

    def __init__(self, node: DHTNode) -> None:
        self._node = node

    async def store(self, key: str, subkey: str, value: bytes, expires_at_s: float) -> bool:
        """Store at the peers whose ids are nearest to the key's. Raises InvalidRecordError if it is too big or late."""
        check_value(subkey, value, expires_at_s, get_dht_time())
        is_client = self._node.protocol.client_mode  # nobody can ask a client for what it keeps
        stored = await self._node.store_many(
            [key], [value], [float(expires_at_s)], subkeys=[subkey], exclude_self=is_client
        )
        return bool(stored[key, subkey])

    async def lookup(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, bytes]]:
        """Ask the peers that are nearest to the keys, never a cache: the nodes of the last seconds count."""
        found = await self._node.get_many(list(keys), sufficient_expiration_time=float("inf"))
        values = {key: found[key].value if found[key] is not None else None for key in keys}
        return {key: usable_values(values[key], get_dht_time()) for key in keys}


class _BoundedValues(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped; subclassing is its way in
    """Keeps out of this peer's storage what `directory_rules` refuses."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether to store `record`, or to believe it when another peer answers with it."""
        tolerated_now_s = get_dht_time() + MAX_DHT_TIME_DISCREPANCY_SECONDS
        return is_storable(record.subkey, record.value, record.expiration_time, tolerated_now_s)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """Two of a kind are one."""
        return isinstance(other, _BoundedValues)


async def _shut_down(node: DHTNode) -> None:
    """End the node and what it left running."""
    try:
        async with asyncio.timeout(UNREGISTER_TIMEOUT_S):
            await node.shutdown()
    except Exception as error:
        logger.debug("the directory did not shut down cleanly: %r", error)
    await _disconnect(node.p2p)


async def _disconnect(p2p: P2P) -> None:
    """Close the connection to the daemon, and let what waits for an answer of it fail and end."""
    await p2p.shutdown()
    control = p2p._client.control
    for _ in range(10):  # a failed call may lead to another one
        for call in list(control._pending_calls.values()):
            if not call.done():
                call.set_exception(ConnectionResetError("the transport is closed"))
        await asyncio.sleep(0)
    tasks = [control._read_task, control._write_task, *control._handler_tasks.values()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _parse_multiaddr(address: str) -> Multiaddr:
    try:
        return Multiaddr(address)
    except Exception as error:  # the parser raises KeyError, ValueError and its own classes
        raise ConfigError(f"not a multiaddress, such as /ip4/1.2.3.4/tcp/31337/p2p/12D3KooW…: {address!r}") from error


def _peer_in(address: str) -> PeerId:
    parsed = _parse_multiaddr(address)
    try:
        return PeerId(PeerID.from_base58(parsed["p2p"]).to_base58())
    except Exception as error:
        raise ConfigError(f"the multiaddress {address!r} names no peer: it has to end with /p2p/12D3KooW…") from error
