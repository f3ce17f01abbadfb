"""Pure: which nodes could not send on to which others lately."""

from swarm_protocol.ids import PeerId

RETRY_S = 300.0
"""Until two nodes are tried again: what is between them is mostly a router, and dialing in vain delays a step."""


class LinkHealth:
    """Ways between nodes that did not work; times are in seconds and do not go back."""

    def __init__(self) -> None:
        self._failed_s: dict[tuple[PeerId, PeerId], float] = {}

    def failed(self, first: PeerId, second: PeerId, now_s: float) -> None:
        """`first` could not send on to `second`."""
        self._failed_s = {link: at_s for link, at_s in self._failed_s.items() if now_s - at_s < RETRY_S}
        self._failed_s[first, second] = now_s

    def works(self, first: PeerId, second: PeerId, now_s: float) -> bool:
        """Whether it may be tried."""
        failed_s = self._failed_s.get((first, second))
        return failed_s is None or now_s - failed_s >= RETRY_S
