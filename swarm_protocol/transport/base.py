"""Pure: the network as three Protocols. Everything above is handed a `Transport` and knows nothing of libp2p.

A `FrameStream` carries frames, byte strings of 1 to `MAX_FRAME_BYTES`, in order and whole, in both directions. All
methods belong to the event loop of the transport. Cancelling a `receive` loses no frame; a cancelled `send` leaves the
stream unusable, and it must be closed.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from swarm_protocol.ids import PeerId

MAX_FRAME_BYTES = 2 * 1024 * 1024 - 1024
"""The largest frame. libp2p's daemon holds unary payloads to 2 MiB; raw streams have no limit of their own, so this one
is ours, with room below 2 MiB for the length prefix."""

Buffer = bytes | bytearray | memoryview


class FrameStream(Protocol):
    """One bidirectional stream to one peer."""

    @property
    def peer_id(self) -> PeerId:
        """The remote peer, as the transport authenticated it."""

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send one frame, the concatenation of `parts`, and wait until the stream can take another.

        Raises StreamLostError if the stream ended; FrameTooLargeError if the frame is empty or above MAX_FRAME_BYTES.
        """

    def send_now(self, parts: Sequence[Buffer]) -> bool:
        """Send one frame if nothing has to be waited for; False, and nothing is sent, if something has.

        The parts must not be changed any more. Not while a `send` waits, or the frames change their order. Raises as
        `send` does.
        """

    async def receive(self) -> bytes:
        """Return the next frame.

        Raises StreamLostError at the end of the stream, FrameTooLargeError (and the stream is closed) if the peer
        announces a frame that is empty or above MAX_FRAME_BYTES.
        """

    async def close(self) -> None:
        """End the stream on both sides. Idempotent; never raises but CancelledError."""


StreamHandler = Callable[[FrameStream], Awaitable[None]]
"""Serves one incoming stream; the transport closes the stream when it returns or raises."""


class Directory(Protocol):
    """The swarm's shared key-value store: many writers below one key, each under its own subkey, all expiring.

    It is a DHT: eventually consistent, unauthenticated, and lossy. Values must prove themselves (`records.py`).
    """

    async def store(self, key: str, subkey: str, value: bytes, expires_at_s: float) -> bool:
        """Store until `expires_at_s` (seconds since the epoch, the swarm's clock); False if no peer accepted it.

        A value is replaced only by one that expires later.
        """

    async def lookup(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, bytes]]:
        """Return for each of `keys` the values that have not expired, by subkey; empty where nothing is stored."""


class Transport(Protocol):
    """One peer's access to the network."""

    @property
    def peer_id(self) -> PeerId:
        """This peer's own id."""

    @property
    def addresses(self) -> Sequence[str]:
        """The multiaddresses under which others can reach this peer, with `/p2p/<peer id>` at the end."""

    @property
    def directory(self) -> Directory:
        """The swarm's directory as this peer sees it."""

    def now_s(self) -> float:
        """The swarm's clock: seconds since the epoch. Joining fails where it is more than 3 s away from the peers'."""

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for every stream that a peer opens under the name `protocol`."""

    async def dial(self, peer_id: PeerId, protocol: str) -> FrameStream:
        """Open a stream to `peer_id`. The caller sets the deadline.

        Raises PeerUnreachableError if the peer cannot be reached or does not serve `protocol`.
        """

    async def until_lost(self) -> None:
        """Wait until the network is lost for good: streams end, dials fail, and only a new transport helps."""

    async def close(self) -> None:
        """Stop serving, close every stream and leave the network. Idempotent."""
