"""The network in memory, for scenarios: delays, bandwidth, deaths and partitions happen as scripted, and always alike.

Streams are reliable, as on libp2p: losing a frame means losing the stream. Time is the running loop's, so that on a
`VirtualClockLoop` nothing really waits. What the script can do, and what the peers see of it:

    kill(peer)       its own streams end at once and its handlers are cancelled; the others see the ends of their
                     streams after `detection_s`; dials to it fail
    restart(peer)    a new transport under the same peer id, which serves nothing yet
    freeze(peer)     nothing leaves it or reaches it, not even ends; streams, dials and its directory hang; `thaw`
                     lets through what was held back
    cut(a, b)        nothing passes between the two; their streams end on both sides after `detection_s`, and so long
                     dials take to fail; `mend` lets through what has not ended yet
    break_streams(a, b)   all streams between the two end now, or after some more frames

Randomness enters only by `LinkProfile.loss`, drawn from the generator that the network was made with.
"""

import asyncio
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Final

from swarm_protocol.errors import PeerUnreachableError
from swarm_protocol.identity import Identity
from swarm_protocol.ids import PeerId
from swarm_protocol.transport.base import FrameStream, StreamHandler
from swarm_protocol.transport.directory_rules import check_value
from swarm_protocol.transport.memory_stream import Fuse, Link, LinkProfile, MemoryStream, connect
from swarm_protocol.transport.serving import run_handler

__all__ = ["LinkProfile", "MemoryDirectory", "MemoryNetwork", "MemoryTransport"]

WINDOW_BYTES: Final = 256 * 1024  # under way and unread, per direction; what sockets and daemon hold is of this order
EPOCH_S: Final = 1_700_000_000.0  # the swarm's clock when the network is made; any fixed value does
DETECTION_S: Final = 0.03  # how soon the end of a killed peer was seen on loopback


class MemoryNetwork:
    """The peers, the links between them, the directory, and the script's hands. Belongs to one event loop."""

    def __init__(
        self,
        profile: LinkProfile | None = None,
        *,
        detection_s: float = DETECTION_S,
        directory_delay_s: float = 0.0,
        window_bytes: int = WINDOW_BYTES,
        rng: random.Random | None = None,
    ) -> None:
        """Make an empty network; `profile` is that of every link that `set_link` does not name."""
        self.detection_s = detection_s
        self.directory_delay_s = directory_delay_s
        self.records: dict[str, dict[str, tuple[bytes, float]]] = {}  # key → subkey → value, expiry
        self._profile = profile or LinkProfile()
        self._window_bytes = window_bytes
        self._rng = rng or random.Random(0)  # noqa: S311  # has to be reproducible, not secret
        self._links: dict[tuple[PeerId, PeerId], Link] = {}
        self._peers: dict[PeerId, MemoryTransport] = {}
        self._identities: dict[PeerId, Identity] = {}
        self._frozen: dict[PeerId, asyncio.Event] = {}
        self._cuts: set[frozenset[PeerId]] = set()
        self._start_s = asyncio.get_running_loop().time()

    def transport(self, peer_id: PeerId | None = None) -> "MemoryTransport":
        """Return a new peer; without `peer_id`, one with the next of a fixed series of identities.

        Raises ValueError if the peer is online.
        """
        if peer_id is None:
            peer_id = self._next_identity().peer_id
        if self.online(peer_id) is not None:
            raise ValueError(f"peer {peer_id} is online already")
        self._peers[peer_id] = MemoryTransport(self, peer_id)
        return self._peers[peer_id]

    def identity(self, peer_id: PeerId) -> Identity:
        """Return the key of a peer that was made without a `peer_id`, to sign its records with."""
        return self._identities[peer_id]

    def now_s(self) -> float:
        """The swarm's clock."""
        return EPOCH_S + asyncio.get_running_loop().time() - self._start_s

    # --- the script ---------------------------------------------------------------------------------------------------

    def set_link(self, source: PeerId, target: PeerId, profile: LinkProfile, *, both_ways: bool = True) -> None:
        """Change the link for the frames that are sent from now on."""
        self.link(source, target).profile = profile
        if both_ways:
            self.link(target, source).profile = profile

    def kill(self, peer_id: PeerId) -> None:
        """End the peer as SIGKILL would."""
        self._peers[peer_id].die()

    def restart(self, peer_id: PeerId) -> "MemoryTransport":
        """Return a new transport for a peer, killing what is left of the old one."""
        self.kill(peer_id)
        self.thaw(peer_id)
        return self.transport(peer_id)

    def freeze(self, peer_id: PeerId) -> None:
        """Stop everything to and from the peer without ending anything."""
        self._frozen.setdefault(peer_id, asyncio.Event())

    def thaw(self, peer_id: PeerId) -> None:
        """Undo `freeze`."""
        event = self._frozen.pop(peer_id, None)
        if event is not None:
            event.set()
            self._deliver_held()

    def cut(self, one: PeerId, other: PeerId) -> None:
        """Let nothing pass between two peers."""
        self._cuts.add(frozenset((one, other)))
        for stream in self._streams_between(one, other):
            asyncio.get_running_loop().call_later(self.detection_s, self._end_if_cut, stream)

    def mend(self, one: PeerId, other: PeerId) -> None:
        """Undo `cut`."""
        self._cuts.discard(frozenset((one, other)))
        self._deliver_held()

    def break_streams(self, one: PeerId, other: PeerId, *, after_frames: int = 0) -> None:
        """End every stream between two peers on both sides, once `after_frames` more were sent on it."""
        for stream in self._streams_between(one, other):
            if after_frames == 0:
                _end_both(stream, "the stream broke")
            else:
                stream.fuse = stream.other.fuse = Fuse(after_frames)

    # --- for the transports -------------------------------------------------------------------------------------------

    def online(self, peer_id: PeerId) -> "MemoryTransport | None":
        """Return the peer's transport unless it was closed or killed, or never made."""
        transport = self._peers.get(peer_id)
        return transport if transport is not None and not transport.is_closed else None

    def link(self, source: PeerId, target: PeerId) -> Link:
        """Return the link from `source` to `target`."""
        link = self._links.get((source, target))
        if link is None:
            link = Link(self._profile, self._window_bytes, self._rng, lambda: self._is_blocked(source, target))
            self._links[source, target] = link
        return link

    def is_cut(self, one: PeerId, other: PeerId) -> bool:
        """Whether the two are cut off from each other."""
        return frozenset((one, other)) in self._cuts

    async def until_thawed(self, *peer_ids: PeerId) -> None:
        """Wait while one of the peers is frozen."""
        while frozen := [self._frozen[peer_id] for peer_id in peer_ids if peer_id in self._frozen]:
            await frozen[0].wait()

    def _is_blocked(self, one: PeerId, other: PeerId) -> bool:
        return one in self._frozen or other in self._frozen or self.is_cut(one, other)

    def _streams_between(self, one: PeerId, other: PeerId) -> list[MemoryStream]:
        """The ends at `one`, or, where it is gone already, those at `other`."""
        near = [stream for stream in self._peers[one].streams if stream.peer_id == other]
        return near or [stream for stream in self._peers[other].streams if stream.peer_id == one]

    def _end_if_cut(self, stream: MemoryStream) -> None:
        if self.is_cut(stream.owner, stream.peer_id):
            _end_both(stream, "the connection timed out")

    def _deliver_held(self) -> None:
        for transport in self._peers.values():
            for stream in list(transport.streams):
                stream.deliver_held()

    def _next_identity(self) -> Identity:
        identity = Identity(hashlib.sha256(b"umbel memory network %d" % len(self._identities)).digest())
        self._identities[identity.peer_id] = identity
        return identity


class MemoryTransport:
    """One peer of a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, peer_id: PeerId) -> None:
        self.network = network
        self.is_closed = False
        self.streams: list[MemoryStream] = []
        self._peer_id = peer_id
        self._handlers: dict[str, StreamHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._directory = MemoryDirectory(self)
        self._lost = asyncio.Event()

    @property
    def peer_id(self) -> PeerId:
        """This peer's id."""
        return self._peer_id

    @property
    def addresses(self) -> Sequence[str]:
        """One address, for show: dials go by peer id."""
        return (f"/memory/0/p2p/{self._peer_id}",)

    @property
    def directory(self) -> "MemoryDirectory":
        """The directory, which all peers share."""
        return self._directory

    def now_s(self) -> float:
        """The swarm's clock."""
        return self.network.now_s()

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for every incoming stream of `protocol`; a second call replaces the handler."""
        self._handlers[protocol] = handler

    async def dial(self, peer_id: PeerId, protocol: str) -> FrameStream:
        """Open a stream; takes a round trip."""
        network, me = self.network, self._peer_id
        if self.is_closed or peer_id == me:
            raise PeerUnreachableError(f"cannot dial {peer_id}: this transport is closed, or it is this peer")
        await network.until_thawed(me, peer_id)
        if network.is_cut(me, peer_id):
            await asyncio.sleep(network.detection_s)
            raise PeerUnreachableError(f"cannot reach {peer_id}: the connection timed out")
        near = MemoryStream(me, peer_id, network.link(me, peer_id), self._forget)
        await asyncio.sleep(network.link(me, peer_id).profile.delay_s)
        target = network.online(peer_id)
        refusal = "it is not online" if target is None else target._accept(near, protocol)
        try:
            await asyncio.sleep(network.link(peer_id, me).profile.delay_s)
            await network.until_thawed(me, peer_id)
        except asyncio.CancelledError:
            if refusal is None:
                await near.close()
            raise
        if refusal is None and network.online(me) is not self:
            await near.close()
            refusal = "this transport is closed"
        if refusal is not None:
            raise PeerUnreachableError(f"cannot reach {peer_id}: {refusal}")
        if not near.is_ended:
            self.streams.append(near)
        return near

    async def until_lost(self) -> None:
        """Wait until this peer is killed."""
        await self._lost.wait()

    async def close(self) -> None:
        """Leave the network in good order: the others see the ends of their streams after the frames under way."""
        if self.is_closed:
            return
        self.is_closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in list(self.streams):
            await stream.close()

    def die(self) -> None:
        """Leave the network as a killed process does."""
        if self.is_closed:
            return
        self.is_closed = True
        self._lost.set()
        for task in self._tasks:
            task.cancel()
        seen_at_s = asyncio.get_running_loop().time() + self.network.detection_s
        for stream in list(self.streams):
            stream.end("this peer was killed")
            stream.other.arrive_later(None, seen_at_s)

    def _accept(self, far: MemoryStream, protocol: str) -> str | None:
        """Take the other end of a stream that a peer opens, or say why not."""
        handler = self._handlers.get(protocol)
        if handler is None:
            return f"it does not serve {protocol}"
        stream = MemoryStream(self._peer_id, far.owner, self.network.link(self._peer_id, far.owner), self._forget)
        connect(stream, far)
        self.streams.append(stream)
        task = asyncio.create_task(run_handler(protocol, handler, stream), name=f"{protocol} handler")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return None

    def _forget(self, stream: MemoryStream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)


class MemoryDirectory:
    """The directory as one peer sees it: always at once, and all of it."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport

    async def store(self, key: str, subkey: str, value: bytes, expires_at_s: float) -> bool:
        """Store a value; False if one that expires as late or later is there, or if this peer is gone.

        Raises InvalidRecordError if it is too big or expires too late.
        """
        network = self._transport.network
        check_value(subkey, value, expires_at_s, network.now_s())
        await self._reach()
        values = network.records.setdefault(key, {})
        present = values.get(subkey)
        if self._transport.is_closed or expires_at_s <= network.now_s():
            return False
        if present is not None and network.now_s() < present[1] and expires_at_s <= present[1]:
            return False
        values[subkey] = (bytes(value), expires_at_s)
        return True

    async def lookup(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, bytes]]:
        """Return what has not expired; nothing if this peer is gone."""
        network = self._transport.network
        await self._reach()
        now_s = network.now_s()
        found = {} if self._transport.is_closed else network.records
        return {
            key: {subkey: value for subkey, (value, expires_at_s) in found.get(key, {}).items() if expires_at_s > now_s}
            for key in keys
        }

    async def _reach(self) -> None:
        await self._transport.network.until_thawed(self._transport.peer_id)
        await asyncio.sleep(self._transport.network.directory_delay_s)


def _end_both(stream: MemoryStream, reason: str) -> None:
    stream.end(reason)
    stream.other.end(reason)
