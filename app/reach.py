"""`/api/v1/is_reachable/PEER`: whether this site gets through to a peer, as health.petals.dev told its servers.

Only peer ids are dialled, never an address that somebody names; answers are kept for some minutes, and few are looked
for at a time, so that nobody can have the site call many peers for him.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import NoCapacityError
from swarm_protocol.errors import InvalidRequestError, SwarmError
from swarm_protocol.ids import PeerId, parse_peer_id

KEPT_S = 300.0  # as long as the predecessor kept them
MAX_KEPT = 1000
AT_A_TIME = 4  # threads that wait for a peer, of the 48 that serve HTTP
A_MINUTE = 30

Reach = Callable[[PeerId], float]
"""Returns the seconds of a round trip to a peer; raises SwarmError if it does not answer."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Whether a peer answered, in words too, and when that was."""

    is_ok: bool
    message: str
    at_s: float


class Reachability:
    """Dials peers and remembers. Any thread."""

    def __init__(self, reach: Reach, clock: Callable[[], float] = time.monotonic) -> None:
        self._reach, self._clock = reach, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[PeerId, Reached] = OrderedDict()
        self._dialled_s: list[float] = []
        self._num_dialling = 0

    def check(self, text: str) -> Reached:
        """Return whether the peer `text` answers. Blocks for some seconds.

        Raises InvalidRequestError if it is no peer id, NoCapacityError when too many are looked for.
        """
        try:
            peer_id = parse_peer_id(text)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        with self._lock:
            now_s = self._clock()
            known = self._known.get(peer_id)
            if known is not None and now_s - known.at_s < KEPT_S:
                return known
            self._begin(now_s)
        try:
            found = self._dial(peer_id)
        finally:
            with self._lock:
                self._num_dialling -= 1
        with self._lock:
            self._known[peer_id] = found
            self._known.move_to_end(peer_id)
            while len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        return found

    def _begin(self, now_s: float) -> None:
        self._dialled_s = [at_s for at_s in self._dialled_s if now_s - at_s < 60]
        if self._num_dialling >= AT_A_TIME or len(self._dialled_s) >= A_MINUTE:
            raise NoCapacityError("reachability checks a minute", A_MINUTE)
        self._num_dialling += 1
        self._dialled_s.append(now_s)

    def _dial(self, peer_id: PeerId) -> Reached:
        try:
            self._reach(peer_id)
        except SwarmError as error:
            # Its code and not its message, in which the network may name addresses.
            return Reached(False, f"the peer did not answer: {error.code}", self._clock())
        return Reached(True, "the peer answered", self._clock())
