"""The body of a streamed answer of the OpenAI-compatible API, as server-sent events.

The status is decided by what happens first: a piece of the answer, an error, or a second without either. From then on
an error is an event of the stream, which ends without `[DONE]`. Signs of life are comments, from the beginning on.
"""

import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterator

from app.http_generation import Generation
from app.http_peer import HttpPeer, PeerGoneError
from app.openai_generation import Answers, Item
from app.openai_replies import ErrorBody, Reply
from app.openai_requests import ChatRequest, CompletionRequest
from app.site import Site
from swarm_client.generation.text_session import TextDelta

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 1.0
"""For a piece or an error before the headers go out; far below what proxies and clients wait."""

PADDING = " " * 2048
"""In the first comment, since some proxies hold back so much."""

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """A WSGI iterable; its `close` ends the generation."""

    def __init__(
        self,
        site: Site,
        peer: HttpPeer,
        generation: Generation[Item],
        answers: Answers,
        request: ChatRequest | CompletionRequest,
        tell_error: Callable[[Exception], ErrorBody],
    ) -> None:
        """Waits for what comes first. Raises the error if it is one, and PeerGoneError when the client left."""
        self._peer, self._send_timeout_s = peer, site.config.sockets.send_timeout_s
        self._ping_interval_s = site.config.generation.sse_ping_interval_s
        self._generation, self._answers, self._request = generation, answers, request
        self._tell_error = tell_error
        self._items = generation.items()
        self._first = self._wait_for_first()
        self._sent_s = time.monotonic()
        self._body = self._events()

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        """End the generation if it runs. Called by the server when the client left, and at the end."""
        self._body.close()
        self._items.close()
        self._generation.abandon()

    def _wait_for_first(self) -> list[Item]:
        found: list[Item] = []
        until_s = time.monotonic() + FIRST_WAIT_S
        for item in self._items:
            if item is not None:
                found.append(item)
            if isinstance(item, TextDelta) or time.monotonic() >= until_s:
                break
        return found

    def _events(self) -> Generator[bytes]:
        try:
            yield self._sent(f": ping{PADDING}\n\n")
            yield from self._chunk(self._answers.begin())
            for item in itertools.chain(self._first, self._items):
                if item is not None:
                    yield from self._chunk(self._answers.feed(item, has_events=self._request.has_events))
                elif time.monotonic() - self._sent_s >= self._ping_interval_s:
                    yield self._sent(": ping\n\n")
            self._answers.check_whole()
            if self._request.has_usage:
                yield from self._chunk(self._answers.total())
            yield self._sent("data: [DONE]\n\n")
        except PeerGoneError:
            logger.debug("the client of a stream left")
        except Exception as error:  # the outermost place of a stream: whatever went wrong, the client is told
            yield from self._chunk(self._tell_error(error))

    def _chunk(self, told: Reply | str | None) -> Iterator[bytes]:
        """Yield an event with an object, or a comment with a text."""
        if told is not None:
            yield self._sent(f": {told}\n\n" if isinstance(told, str) else f"data: {told.as_json()}\n\n")

    def _sent(self, text: str) -> bytes:
        self._peer.wait_writable(self._send_timeout_s)
        self._sent_s = time.monotonic()
        return text.encode()
