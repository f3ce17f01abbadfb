"""A websocket in protocol 3: the frames of a client one way, the frames of an answer's log the other.

    idle ⇄ an answer runs → closed, or left by its client: the answer ends, or goes on for those who come back

The handler's thread only reads, sends and waits: answers are made by threads of their own, so a ping or a cancel is
answered at once, and a heartbeat is sent whatever the swarm does. When a client that asked for `resume` is gone, the
handler's thread stays with its answer until that is over, taken by another socket, or nobody came for too long.
"""

import logging
import time
from contextlib import suppress
from dataclasses import replace

from app.caller import Caller
from app.chat_conversation import Conversation
from app.chat_protocol import (
    Command,
    bye_frame,
    decode_object,
    error_frame,
    heartbeat_frame,
    opened_frame,
    parse_command,
    pong_frame,
    request_id_of,
    rewound_frame,
)
from app.embed_sessions import EmbeddedChat
from app.error_log import logged_report
from app.errors import SHUT_OUT, BusyError, SessionExpiredError, SiteDrainingError
from app.limits import SHUT_OUT_CLOSES, CloseCode, is_expired, session_length
from app.request_models import Bye, Cancel, Generate, Open, Ping, Rewind
from app.site import Site
from app.socket_link import SocketGoneError, SocketLink
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)

POLL_S = 0.5  # how often an idle socket looks whether it expired or the site is ending
KEEP_LOOK_S = 0.2  # how often an answer without a socket is looked after
MAX_FRAMES_AT_ONCE = 64  # of an answer, before what the client sent is looked at


def open_conversation(site: Site, command: Open, caller: Caller) -> Conversation:
    """Choose the model; the inference session is opened by the first answer. Raises SwarmError."""
    embedded = None if command.embed is None else EmbeddedChat(site, command.embed, caller.address)
    model = site.models.find(embedded.model if embedded is not None and embedded.model else command.model)
    length = session_length(command.max_length, model.max_length, site.config.generation)
    caller = replace(caller, widget_key=None if embedded is None else embedded.key_id)
    site.bans.check(caller)
    conversation = Conversation(site, model, length, caller, embedded)
    if command.resume:
        conversation.token = site.kept.add(conversation, caller.address)
    return conversation


class NativeSocket:
    """Serves one websocket that was opened in protocol 3; used by one thread.

    Whoever gives it the conversation lets it `run`: nobody else frees what the conversation holds.
    """

    def __init__(self, site: Site, link: SocketLink, conversation: Conversation, greeting: str) -> None:
        """`greeting` is the first frame to be sent."""
        self._site, self._link, self._greeting = site, link, greeting
        self._limits = site.config.sockets
        self._talk = conversation
        link.limit_rate()
        self._last_used_s = self._last_sent_s = time.monotonic()

    def run(self) -> None:
        """Answer frames until the socket is closed by either side. Raises nothing."""
        is_for_good = False
        try:
            self._send(self._greeting)
            while self._is_to_go_on():
                frame = self._link.receive(0)
                if frame is None:
                    self._link.wait(min(POLL_S, self._limits.heartbeat_s))
                elif not self._answer(frame):
                    is_for_good = True
                    break
        except SHUT_OUT as error:
            is_for_good = True
            self._shut_out(error)
        except (SocketGoneError, LookupError):  # the latter: frames that were not sent yet are gone
            logger.debug("socket gone session=%s", self._talk.session_id)
        except Exception:  # the outermost loop of a socket
            logger.exception("bug session=%s", self._talk.session_id)
        finally:
            self._leave(is_for_good=is_for_good)

    def _is_to_go_on(self) -> bool:
        """Send what is to be sent, and return whether the socket stays open."""
        if not self._talk.is_owned_by(self):
            self._link.close(CloseCode.TAKEN_OVER, "taken over")
            return False
        if self._link.is_gone:
            raise SocketGoneError
        self._site.bans.check(self._talk.caller)
        self._send_frames()
        answer = self._talk.answer
        if answer is not None and not answer.is_read(self):
            self._last_used_s = now_s = time.monotonic()
            if now_s - self._last_sent_s >= self._limits.heartbeat_s:
                self._send(heartbeat_frame(answer.id))
            return True
        if self._site.drain.is_started:
            self._link.send(bye_frame("draining"))
            self._link.close(CloseCode.RESTART, "restarting")
            return False
        if is_expired(self._last_used_s, time.monotonic(), self._limits):
            self._tell(SessionExpiredError(self._talk.session_id, self._limits.idle_s), None)
            self._link.close(CloseCode.IDLE, "idle")
            return False
        return True

    def _shut_out(self, error: SwarmError) -> None:
        with suppress(SocketGoneError):
            self._tell(error, None)
            self._link.close(*SHUT_OUT_CLOSES[type(error)])

    def _send_frames(self) -> None:
        answer = self._talk.answer
        for _ in range(MAX_FRAMES_AT_ONCE):
            frame = None if answer is None else answer.next_frame(self)
            if frame is None:
                return
            self._send(frame)
        self._link.wake()

    def _send(self, frame: str) -> None:
        self._link.send(frame)
        self._last_sent_s = time.monotonic()

    def _tell(self, error: Exception, request_id: str | None) -> None:
        self._link.send(error_frame(logged_report(self._site, error, self._talk.session_id), request_id))

    def _answer(self, frame: str | bytes) -> bool:
        """Answer one frame; return whether the socket stays open."""
        values = {}
        try:
            values = decode_object(frame)
            return self._carry_out(parse_command(values, 3))
        except SocketGoneError:
            raise
        except Exception as error:  # the outermost place of a frame: whatever went wrong, the client is told
            self._tell(error, request_id_of(values))
        return True

    def _carry_out(self, command: Command) -> bool:
        match command:
            case Open():
                self._open(command)
            case Generate():
                self._generate(command)
            case Rewind():
                self._send(rewound_frame(self._talk.rewind(command.messages)))
            case Ping():
                self._send(pong_frame(command))
            case Cancel():
                self._cancel(command)
            case Bye():
                self._link.close(CloseCode.NORMAL, "")
                return False
        return True

    def _open(self, command: Open) -> None:
        """Begin another conversation on the same socket."""
        if self._talk.running is not None:
            raise BusyError
        conversation = open_conversation(self._site, command, self._talk.caller)
        self._forget()
        self._talk.leave(self)
        self._talk = conversation
        self._last_used_s = time.monotonic()
        conversation.take(self, self._link.wake)
        self._send(opened_frame(conversation.offer, conversation.token))

    def _generate(self, command: Generate) -> None:
        answer = self._talk.answer
        if answer is not None and not answer.is_read(self):
            raise BusyError
        if self._site.drain.is_started:
            raise SiteDrainingError
        self._last_sent_s = time.monotonic()
        self._talk.generate(command, self, self._link.wake)

    def _cancel(self, command: Cancel) -> None:
        answer = self._talk.running
        if answer is not None and command.id in (None, answer.id):
            answer.cancel()

    # after the client left

    def _leave(self, *, is_for_good: bool) -> None:
        talk, answer = self._talk, self._talk.answer
        if answer is not None:
            answer.detach(self)
        if not talk.is_owned_by(self):
            return
        if self._hear_last_words() or is_for_good:
            self._forget()
        is_kept = talk.token is not None and answer is not None and self._site.kept.detach(talk.token)
        if is_kept:
            self._stay_with_answer()
        answer = talk.running
        if answer is not None and talk.is_owned_by(self):
            answer.cancel()
            answer.join()
        if talk.token is not None and talk.is_owned_by(self):
            if is_kept:
                self._site.kept.ended(talk.token)
            else:
                self._forget()
        talk.leave(self)

    def _hear_last_words(self) -> bool:
        """Obey a cancel that came just before the client left; return whether it said that it will not come back."""
        is_for_good = False
        for frame in self._link.unread:
            try:
                command = parse_command(decode_object(frame), 3)
            except SwarmError:
                continue
            if isinstance(command, Cancel):
                self._cancel(command)
            is_for_good = is_for_good or isinstance(command, Bye)
        return is_for_good

    def _stay_with_answer(self) -> None:
        """Let the answer go on until it is over, taken, or the time for that has passed."""
        until_s = time.monotonic() + self._limits.resume_grace_s
        while (answer := self._talk.running) is not None and self._talk.is_owned_by(self):
            if time.monotonic() >= until_s or self._site.drain.is_started or self._is_shut_out():
                return
            answer.wait(KEEP_LOOK_S)

    def _is_shut_out(self) -> bool:
        try:
            self._site.bans.check(self._talk.caller)
        except SHUT_OUT:
            return True
        return False

    def _forget(self) -> None:
        if self._talk.token is not None:
            self._site.kept.forget(self._talk.token)
