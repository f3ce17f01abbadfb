"""The route of the websocket, and what is decided before a connection is upgraded: its Origin and its place."""

import json
import logging
from collections.abc import Iterable
from typing import Any

import simple_websocket
from flask import Flask, Response, request
from flask_sock import Sock
from wsproto.utilities import RemoteProtocolError

from app import request_ids
from app.api_errors import error_response
from app.caller import caller_of
from app.chat_protocol import legacy_error
from app.chat_socket import ChatSocket
from app.errors import NoCapacityError, OriginError, report_error
from app.security import API_POLICY, HEADERS, request_is_own
from app.site import Site
from app.socket_link import SocketLink
from app.ws_socket import SocketEvent, WsgiApp, is_websocket
from swarm_protocol.errors import InvalidRequestError

logger = logging.getLogger(__name__)

PATH = "/api/v2/generate"


def register(app: Flask, site: Site) -> None:
    """Serve the chat's websocket in `app`."""
    limits, security = site.config.sockets, site.config.security
    app.config["SOCK_SERVER_OPTIONS"] = {
        "ping_interval": limits.ping_interval_s,
        "max_message_size": limits.max_frame_bytes,
        "event_class": SocketEvent,
    }

    @app.before_request
    def check_origin() -> Response | None:
        if request.path != PATH or not is_websocket(request.environ):
            return None
        if security.public_api or request_is_own(request, security) or caller_of(request.environ).api_key:
            return None
        return error_response(OriginError("the API"), status=403)

    @app.errorhandler(RemoteProtocolError)
    @app.errorhandler(simple_websocket.ConnectionError)
    def bad_handshake(_error: Exception) -> Response:
        return error_response(InvalidRequestError("the websocket handshake is incomplete"), status=400)

    @Sock(app).route(PATH)  # type: ignore[untyped-decorator]
    def chat(ws: Any) -> None:
        own = request_is_own(request, security)
        ChatSocket(site, SocketLink(ws, limits), caller_of(request.environ), is_own_page=own).run()


def with_socket_cap(app: WsgiApp, site: Site) -> WsgiApp:
    """Return `app` with websockets beyond the cap refused by plain HTTP, so that threads are left for pages."""

    def run(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not is_websocket(environ):
            return app(environ, start_response)
        if not site.sockets.try_take():
            return _refuse(site, start_response)
        try:
            return app(environ, start_response)
        finally:
            site.sockets.give_back()

    return run


def _refuse(site: Site, start_response: Any) -> Iterable[bytes]:
    """Answer 503. The protocol that the client speaks cannot be known yet, so this has the fields of both."""
    report = report_error(NoCapacityError(site.sockets.what, site.sockets.limit), request_ids.current_id() or "")
    site.metrics.error(report.code)
    body = json.dumps(legacy_error(report)).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Retry-After", "30")]
    headers += [*HEADERS.items(), ("Content-Security-Policy", API_POLICY)]
    start_response("503 Service Unavailable", headers)
    logger.warning("refused a websocket: all %d places are taken", site.sockets.limit)
    return [body]
