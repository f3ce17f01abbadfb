"""Pure: how fast a peer may send.

A peer that sends faster is not cut off: nothing more is read from any of its streams until it is back at its rate, so
that an honest burst only slows down. Two things are counted. Bytes cost memory and copies. Messages that make the
device compute nothing (openings, pings, steps that are refused) are tiny, and cost the event loop its time.
"""

from swarm_protocol.ids import PeerId

FRAME_BYTES = 8 * 1024
"""What a smaller frame counts as: handling one takes about as long as copying so much."""

BROKEN_STREAM = 20
"""Messages that a stream counts as which breaks the protocol: no honest peer does it twice a second."""

_FORGET_ABOVE = 1024
"""Peers of whom something is kept, before those that have been quiet are forgotten; 200 bytes each."""


class TokenBucket:
    """Refills at a rate up to a burst. It may be overdrawn, by what had arrived already, and is then waited for."""

    def __init__(self, rate_per_s: float, burst: float, now_s: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._level = burst
        self._updated_s = now_s

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`, whether it is there or not; a negative one gives back."""
        self._level = min(self._burst, self._refilled(now_s) - amount)
        self._updated_s = max(now_s, self._updated_s)

    def wait_s(self, now_s: float) -> float:
        """Return how long it takes until the bucket is not overdrawn any more."""
        return max(0.0, -self._refilled(now_s) / self._rate_per_s)

    def is_full(self, now_s: float) -> bool:
        """Whether nothing that was taken is missing."""
        return self._refilled(now_s) >= self._burst

    def _refilled(self, now_s: float) -> float:
        return min(self._burst, self._level + self._rate_per_s * max(0.0, now_s - self._updated_s))


class PeerRates:
    """The buckets of every peer that sent something lately. Belongs to the event loop."""

    def __init__(self, bytes_per_s: float, burst_bytes: float, messages_per_s: float, burst_messages: float) -> None:
        self._bytes_per_s, self._burst_bytes = bytes_per_s, burst_bytes
        self._messages_per_s, self._burst_messages = messages_per_s, burst_messages
        self._buckets: dict[PeerId, tuple[TokenBucket, TokenBucket]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def frame(self, peer: PeerId, num_bytes: int, now_s: float) -> None:
        """Count a frame that arrived."""
        self._of(peer, now_s)[0].take(max(num_bytes, FRAME_BYTES), now_s)

    def message(self, peer: PeerId, now_s: float, count: int = 1) -> None:
        """Count a message, or a stream that was opened, until `computed` says that the device worked for it."""
        self._of(peer, now_s)[1].take(count, now_s)

    def computed(self, peer: PeerId, now_s: float) -> None:
        """A message that was counted made the device compute, which has bounds of its own."""
        self._of(peer, now_s)[1].take(-1.0, now_s)

    def wait_s(self, peer: PeerId, now_s: float) -> float:
        """Return for how long nothing is to be read from the peer."""
        return max((bucket.wait_s(now_s) for bucket in self._buckets.get(peer, ())), default=0.0)

    def _of(self, peer: PeerId, now_s: float) -> tuple[TokenBucket, TokenBucket]:
        buckets = self._buckets.get(peer)
        if buckets is None:
            if len(self._buckets) >= _FORGET_ABOVE:
                self._forget(now_s)
            buckets = self._buckets[peer] = (
                TokenBucket(self._bytes_per_s, self._burst_bytes, now_s),
                TokenBucket(self._messages_per_s, self._burst_messages, now_s),
            )
        return buckets

    def _forget(self, now_s: float) -> None:
        for peer, buckets in list(self._buckets.items()):
            if all(bucket.is_full(now_s) for bucket in buckets):
                del self._buckets[peer]
