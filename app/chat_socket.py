"""One websocket from its first frame to its close: the frame that opens it chooses the protocol.

waiting for open or resume → protocol 2 here, or protocol 3 in `native_socket` → closed
"""

import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from app.caller import Caller
from app.chat_conversation import Conversation
from app.chat_protocol import (
    decode_object,
    error_frame,
    legacy_error_frame,
    not_resumed_frame,
    opened_frame,
    parse_command,
    resumed_frame,
)
from app.error_log import logged_report
from app.errors import SHUT_OUT, NoCapacityError, OriginError, SessionExpiredError
from app.legacy_socket import LegacySocket
from app.limits import SHUT_OUT_CLOSES, CloseCode, is_expired
from app.native_socket import NativeSocket, open_conversation
from app.request_models import LegacyOpen, Open, Resume
from app.site import Site
from app.socket_link import SocketGoneError, SocketLink
from swarm_protocol.errors import LimitExceededError

logger = logging.getLogger(__name__)

POLL_S = 0.5  # how often an idle socket looks whether it expired or the site is ending


class ChatSocket:
    """Serves one websocket; used by one thread."""

    def __init__(self, site: Site, link: SocketLink, caller: Caller, *, is_own_page: bool) -> None:
        self._site, self._link, self._caller, self._is_own_page = site, link, caller, is_own_page
        self._limits = site.config.sockets
        self._legacy = LegacySocket(site, link, caller)
        self._is_legacy = False
        self._may_be_native = True
        self._native: NativeSocket | None = None

    def run(self) -> None:
        """Answer frames until the socket is closed by either side. Raises nothing."""
        try:
            session = self._site.key_usage.session(self._site.quota(self._caller))
            with session, self._site.addresses.one(self._caller.address) as may_be_native:
                self._may_be_native = may_be_native
                while self._native is None and self._is_to_go_on():
                    frame = self._link.receive(POLL_S)
                    if frame is not None and not self._answer(frame):
                        return
                if self._native is not None:
                    self._native.run()
        except SocketGoneError:
            logger.debug("socket gone session=%s", self._legacy.session_id)
        except LimitExceededError as error:  # of sessions; all others are told where they come up
            with suppress(SocketGoneError):
                self._link.send(legacy_error_frame(logged_report(self._site, error, self._legacy.session_id)))
                self._link.close(CloseCode.TOO_MANY, "too many sessions")
        finally:
            self._legacy.close()

    def _is_to_go_on(self) -> bool:
        """Return whether to wait for a frame; else the socket was closed and its client told why."""
        if self._site.drain.is_started:
            self._link.close(CloseCode.RESTART, "restarting")
            return False
        try:
            self._site.bans.check(self._caller)
        except SHUT_OUT as why:
            self._link.send(legacy_error_frame(logged_report(self._site, why, self._legacy.session_id)))
            self._link.close(*SHUT_OUT_CLOSES[type(why)])
            return False
        if is_expired(self._legacy.last_used_s, time.monotonic(), self._limits):
            error = SessionExpiredError(self._legacy.session_id, self._limits.idle_s)
            self._link.send(legacy_error_frame(logged_report(self._site, error, self._legacy.session_id)))
            self._link.close(CloseCode.IDLE, "idle")
            return False
        return True

    def _answer(self, frame: str | bytes) -> bool:
        """Answer one frame; return whether the socket stays open."""
        values: dict[str, Any] = {}
        try:
            values = decode_object(frame)
            command = parse_command(values, 2 if self._is_legacy else None)
            match command:
                case Open():
                    return self._open(command)
                case Resume():
                    return self._resume(command)
                case _:
                    self._legacy.carry_out(command)
                    self._is_legacy = self._is_legacy or isinstance(command, LegacyOpen)
        except SocketGoneError:
            raise
        except Exception as error:  # the outermost loop of a socket: whatever went wrong, the client is told
            return self._fail(error, values)
        return not self._link.is_gone

    def _fail(self, error: Exception, values: dict[str, Any]) -> bool:
        report = logged_report(self._site, error, self._legacy.session_id)
        if not self._is_legacy and (values.get("protocol") == 3 or values.get("type") == "resume"):
            self._link.send(error_frame(report, None))
            if isinstance(error, OriginError):
                self._link.close(CloseCode.ORIGIN, "origin not allowed")
            return not isinstance(error, OriginError)
        self._link.send(legacy_error_frame(report))
        self._link.close(*SHUT_OUT_CLOSES.get(type(error), (CloseCode.NORMAL, "")))
        return False

    def _may_begin(self) -> bool:
        if not self._is_own_page:
            raise OriginError
        if self._may_be_native:
            return True
        error = NoCapacityError("websockets of one address", self._limits.ws_per_address)
        self._link.send(error_frame(logged_report(self._site, error, self._legacy.session_id), None))
        self._link.close(CloseCode.TOO_MANY, "too many sockets")
        return False

    def _open(self, command: Open) -> bool:
        if not self._may_begin():
            return False
        conversation = open_conversation(self._site, command, self._caller)
        self._native = self._native_socket(conversation, opened_frame(conversation.offer, conversation.token))
        conversation.take(self._native, self._link.wake)
        return True

    def _resume(self, command: Resume) -> bool:
        """Take a conversation from its last socket, which may live; the socket stays open whatever becomes of it."""
        if not self._may_begin():
            return False
        found = self._site.kept.find(command.token)
        if isinstance(found, str):
            self._link.send(not_resumed_frame(found))
            return True
        answer = found.answer
        native = self._native_socket(found, resumed_frame(found.offer, command.id, command.from_seq))
        if answer is None or answer.id != command.id or not answer.attach(native, self._link.wake, command.from_seq):
            self._link.send(not_resumed_frame("lost"))
            return True
        if not self._site.kept.attach(command.token, self._caller.address):
            answer.detach(native)
            self._link.send(not_resumed_frame("expired"))
            return True
        found.caller = replace(self._caller, widget_key=found.caller.widget_key)
        self._native = native
        found.take(native, self._link.wake)
        logger.info("resumed from_seq=%d session=%s", command.from_seq, found.session_id)
        return True

    def _native_socket(self, conversation: Conversation, greeting: str) -> NativeSocket:
        return NativeSocket(self._site, self._link, conversation, greeting)
