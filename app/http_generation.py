"""A generation that an HTTP request waits for: it runs in a thread of its own, while the request's thread looks after
the connection.

    running → cancelled (by the client, the end of the site) → ended

A step of the swarm may block for minutes. Meanwhile the request's thread sees within a tick that the client left, and
can send it signs of life. It never waits for a thread that it gave up: that one frees what it holds when its step ends.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from app import request_ids
from app.errors import ReplacedError, SiteDrainingError
from app.http_peer import HttpPeer, PeerGoneError
from app.site import Site
from swarm_protocol.errors import CancelledStepError

logger = logging.getLogger(__name__)

TICK_S = 0.1
"""How often the connection is looked at: a cancel has 0.5 s, of which the step needs some."""

MAX_QUEUED = 64
"""Pieces that a slow reader may leave; then the generation waits for it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in a queue; `error` None where all went well."""

    error: BaseException | None = None


class Generation(Generic[T]):
    """Made and read by the request's thread; `work` runs in the other one."""

    def __init__(
        self,
        site: Site,
        peer: HttpPeer,
        work: Callable[["Generation[T]"], None],
        cancel: Callable[[], None],
        on_end: Callable[[], None],
        on_queued: Callable[["Generation[T]", int], None] = lambda *_: None,
    ) -> None:
        """`work` hands over what it makes by `put`. `cancel` lets it end soon, from any thread; `on_end` is called in
        its thread behind it, whatever happened. `on_queued` gets each new position in the site's queue in front of it:
        1 for the next one, 0 once the turn has come; not called when there is no wait."""
        self._site, self._peer = site, peer
        self._work, self._cancel, self._on_end = work, cancel, on_end
        self._queue: queue.Queue[T | _End] = queue.Queue(MAX_QUEUED)
        self._is_cancelled = threading.Event()
        self._is_abandoned = threading.Event()
        self._ended_by: type[SiteDrainingError | ReplacedError] | None = None
        self._on_queued, self._position = on_queued, 0
        self._request_id = request_ids.current_id() or request_ids.answer_id()

    @property
    def is_cancelled(self) -> bool:
        """Whether `work` should end; it looks before it begins something that forgets an earlier cancel."""
        return self._is_cancelled.is_set()

    def items(self) -> Generator[T | None]:
        """Yield what `work` puts, and None whenever there was nothing for a tick. Once.

        Raises what `work` raised, PeerGoneError when the client left, SiteDrainingError when the site ended it,
        ReplacedError when the client sent the request again, and BannedError or InvalidKeyError when it was shut out.
        However it is left, the work is cancelled and ends by itself.
        """
        try:
            threading.Thread(target=self._run, name="umbel-http-generation", daemon=True).start()
        except RuntimeError:  # no thread to be had
            self._on_end()
            raise
        try:
            alone = self._site.in_flight.alone(self._peer.request_key, self._replaced)
            with self._site.drain.cancelling(self._cut), alone:
                yield from self._items()
        finally:
            self.abandon()

    def _items(self) -> Iterator[T | None]:
        looked_s = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=TICK_S)
            except queue.Empty:
                item = None
            if time.monotonic() - looked_s >= TICK_S:
                looked_s = time.monotonic()
                if self._peer.is_gone():
                    raise PeerGoneError
                self._site.bans.check(self._peer.caller)
            if isinstance(item, _End):
                if self._ended_by is not None:
                    raise self._ended_by
                if item.error is not None:
                    raise item.error
                return
            yield item

    def abandon(self) -> None:
        """Cancel the work; nobody reads what it makes any more. Idempotent."""
        self._is_abandoned.set()
        self._stop()

    # the other thread

    def put(self, item: T) -> None:
        """Hand something over; waits for a slow reader, and drops it when there is none any more."""
        self._put(item)

    def _run(self) -> None:
        error: BaseException | None = None
        request_ids.enter(self._request_id)
        try:
            session = self._site.key_usage.session(self._site.quota(self._peer.caller))
            with session, self._site.http_generations.take(), self._site.queue.turn(self._queued):
                self._work(self)
        except Exception as found:  # the outermost place of the thread: the request's thread tells the client
            error = found
        finally:
            try:
                self._on_end()
            except Exception:
                logger.exception("cannot end a generation")
            self._put(_End(error))

    def _queued(self, position: int) -> None:
        """Tell a new position; leave the queue of generations when nobody waits any more."""
        if self.is_cancelled:
            raise CancelledStepError("the request was given up before its turn came")
        if position != self._position:
            self._position = position
            self._on_queued(self, position)

    def _put(self, item: T | _End) -> None:
        while not self._is_abandoned.is_set():
            try:
                self._queue.put(item, timeout=TICK_S)
            except queue.Full:
                continue
            return

    # any thread

    def _cut(self) -> None:
        self._ended_by = SiteDrainingError
        self._stop()

    def _replaced(self) -> None:
        self._ended_by = ReplacedError
        self._stop()

    def _stop(self) -> None:
        if not self._is_cancelled.is_set():
            self._is_cancelled.set()
            self._cancel()
