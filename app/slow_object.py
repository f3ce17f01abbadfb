"""The body of an answer that comes as one object, for proxies that give up on a connection without a byte.

An answer that is there soon has its own status. One that takes long begins with white space, which JSON allows, so that
nothing on the way takes the connection for dead; from then on an error can only break it off, and clients take that for
what it is: an answer that did not arrive.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from app.http_generation import Generation
from app.http_peer import HttpPeer, PeerGoneError

logger = logging.getLogger(__name__)

BEGUN_WAIT_S = 25.0
"""Once the answer has begun, errors are rare. Routers of hosts wait 30 s for the first byte."""

WAIT_S = 50.0
"""Else: a swarm that lacks blocks is waited for 30 s, and its error shall have its status. nginx waits 60 s."""

T = TypeVar("T")


class SlowObject(Generic[T]):
    """A WSGI iterable; its `close` ends the generation."""

    def __init__(
        self,
        peer: HttpPeer,
        generation: Generation[T],
        feed: Callable[[T], bool],
        whole: Callable[[], str],
        interval_s: float,
        tell_error: Callable[[Exception], object],
    ) -> None:
        """Waits for the end, or until it takes too long. `feed` takes each item and returns whether the answer has
        begun, `whole` returns the object; `tell_error` writes the log. Raises the error if there is one by then."""
        self._peer, self._generation, self._interval_s = peer, generation, interval_s
        self._feed, self._whole, self._tell_error = feed, whole, tell_error
        self._items = generation.items()
        self._has_begun = False
        self.is_there = self._wait()
        self._body = self._drip()

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        """End the generation if it runs."""
        self._body.close()
        self._items.close()
        self._generation.abandon()

    def text(self) -> str:
        """Return the object, where `is_there`."""
        return self._whole()

    def _wait(self) -> bool:
        """Return whether the answer is whole."""
        started_s = time.monotonic()
        for item in self._items:
            self._take(item)
            if time.monotonic() - started_s >= (BEGUN_WAIT_S if self._has_begun else WAIT_S):
                return False
        return True

    def _take(self, item: T | None) -> None:
        if item is not None:
            self._has_begun = self._feed(item) or self._has_begun

    def _drip(self) -> Generator[bytes]:
        sent_s = time.monotonic()
        try:
            yield b" "
            for item in self._items:
                self._take(item)
                if time.monotonic() - sent_s >= self._interval_s:
                    sent_s = time.monotonic()
                    yield b" "
            yield self._whole().encode()
        except PeerGoneError:
            logger.debug("the client of a slow answer left")
        except Exception as error:  # the outermost place of the body
            self._tell_error(error)
            self._peer.drop()
