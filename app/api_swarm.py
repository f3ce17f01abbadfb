"""The swarm's state for programs: `/api/v2/swarm` with its events and badges, and the predecessor's `/api/v1/state`."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator

from flask import Flask, Response, request
from pydantic import BaseModel

from app.errors import ModelNotFoundError, NoCapacityError
from app.http_peer import HttpPeer, PeerGoneError
from app.site import Site
from app.swarm_replies import ReachReply, petals_state, swarm_event, swarm_reply
from app.swarm_svg import badge
from app.swarm_texts import ENGLISH, texts_in

logger = logging.getLogger(__name__)

MAX_AGE_S = 15
TICK_S = 1.0
"""How often a listener's thread looks for news, and whether the client is still there."""

EVENT_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def register(app: Flask, site: Site) -> None:
    """Serve the swarm's state in `app`."""
    initial_peers = site.config.initial_peers

    @app.get("/api/v2/swarm")
    def swarm() -> Response:
        return _cached(swarm_reply(site.board.report(), texts_in(ENGLISH), initial_peers))

    @app.get("/api/v1/state")
    def state() -> Response:
        ids = [address.rpartition("/p2p/")[2][-6:] for address in initial_peers]
        return _cached(petals_state(site.board.report(), ids))

    @app.get("/api/v1/is_reachable/<peer_id>")
    def is_reachable(peer_id: str) -> Response:
        found = site.reachability.check(peer_id)
        reply = ReachReply(
            success=found.is_ok, ok=found.is_ok, message=found.message, your_ip=request.remote_addr or ""
        )
        return Response(reply.model_dump_json(), mimetype="application/json")

    @app.get("/api/v2/swarm/badge.svg")
    def swarm_badge() -> Response:
        report, name = site.board.report(), request.args.get("model")
        model = report.find(name)
        if model is None:
            raise ModelNotFoundError(str(name), [each.name for each in report.models])
        texts = texts_in(ENGLISH)
        words = texts(f"state.{model.state}").lower()
        if model.tokens_per_s is not None:
            words = f"{words}, {texts.number(round(model.tokens_per_s, 1))} tokens/s"
        response = Response(badge(model.name, model.state, words), mimetype="image/svg+xml")
        return _with_age(response)

    @app.get("/api/v2/swarm/events")
    def swarm_events() -> Response:
        peer = HttpPeer(request.environ)
        if not site.listeners.try_take():
            raise NoCapacityError(site.listeners.what, site.listeners.limit)
        body = _Listener(site, peer, lambda: swarm_event(site.board.report(), texts_in(ENGLISH)).model_dump_json())
        return Response(body, headers=EVENT_HEADERS, content_type="text/event-stream; charset=utf-8")


def _cached(reply: BaseModel) -> Response:
    """Return a reply that need not be sent again to whoever has it."""
    return _with_age(Response(reply.model_dump_json(), mimetype="application/json"))


def _with_age(response: Response) -> Response:
    response.set_etag(hashlib.sha256(response.get_data()).hexdigest()[:32])
    response.headers["Cache-Control"] = f"public, max-age={MAX_AGE_S}"
    response.make_conditional(request)
    return response


class _Listener:
    """A WSGI iterable of events: one now, and one whenever the state is another. Its `close` frees the place."""

    def __init__(self, site: Site, peer: HttpPeer, state: Callable[[], str]) -> None:
        self._site, self._peer, self._state = site, peer, state
        self._body = self._events()
        self._has_place = True

    def __iter__(self) -> Iterator[bytes]:
        return self._body

    def close(self) -> None:
        """Free the place. Called by the server, whatever happened."""
        if self._has_place:
            self._has_place = False
            self._site.listeners.give_back()

    def _events(self) -> Iterator[bytes]:
        status = self._site.config.status
        ping_s, send_s = self._site.config.generation.sse_ping_interval_s, self._site.config.sockets.send_timeout_s
        began_s = sent_s = time.monotonic()
        shown = self._state()
        yield _event(shown)
        # Where it cannot be seen that a client left, its thread would stay: the state is told once.
        while self._peer.can_be_seen and time.monotonic() - began_s < status.events_s:
            time.sleep(TICK_S)
            if self._peer.is_gone() or self._site.drain.is_started:
                return
            newest = self._state()
            is_due = time.monotonic() - sent_s >= ping_s
            if newest == shown and not is_due:
                continue
            try:
                self._peer.wait_writable(send_s)
            except PeerGoneError:
                return
            sent_s = time.monotonic()
            yield b": ping\n\n" if newest == shown else _event(newest)
            shown = newest


def _event(data: str) -> bytes:
    return f"event: swarm\ndata: {data}\n\n".encode()
