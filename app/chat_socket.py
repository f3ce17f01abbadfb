"""One websocket's conversation: the frames of a client, answered one after another on one inference session.

    waiting for open → idle ⇄ generating → closed

The handler's thread runs the generation and answers what arrived between two pieces of the text. While a step of the
swarm blocks it, it still tells what the session's listener hears; the thread that reads the socket cancels the session:
for a `cancel` frame, a flood, a lost peer.
"""

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.chat_protocol import (
    Command,
    Delta,
    Done,
    Opened,
    ProtocolVersion,
    Usage,
    bye_frame,
    decode_object,
    delta_frame,
    done_frame,
    error_frame,
    event_frame,
    legacy_error_frame,
    legacy_opened_frame,
    legacy_reply_frame,
    opened_frame,
    parse_command,
    pong_frame,
    request_id_of,
    started_frame,
)
from app.errors import BusyError, ErrorReport, OriginError, SessionExpiredError, SiteDrainingError, report_error
from app.legacy_generation import legacy_replies, running
from app.limits import CloseCode, answer_length, is_expired, session_length
from app.native_generation import AnswerMeter, native_sampling
from app.request_models import Cancel, Generate, LegacyGenerate, LegacyOpen, Open, Ping
from app.site import Site
from app.socket_link import SocketGoneError, SocketLink
from swarm_client.events import SessionEvent
from swarm_client.generation.text_session import FinishReason, SamplingParams, TextModel, TextSession
from swarm_protocol.errors import InvalidRequestError, MaxLengthError, SwarmError

logger = logging.getLogger(__name__)

POLL_S = 0.5  # how often an idle socket looks whether it expired or the site is ending
SESSION_STAYS = (InvalidRequestError, MaxLengthError, BusyError)  # after these the session is as it was


class ChatSocket:
    """Serves one websocket from its first frame to its close; used by one thread."""

    def __init__(self, site: Site, link: SocketLink, *, is_own_page: bool) -> None:
        self._site, self._link, self._is_own_page = site, link, is_own_page
        self._limits = site.config.sockets
        self._protocol: ProtocolVersion | None = None
        self._model: TextModel | None = None
        self._max_length = 0
        self._session: TextSession | None = None
        self._session_id = secrets.token_hex(8)
        self._last_used_s = time.monotonic()
        self._is_cancelled = False

    def run(self) -> None:
        """Answer frames until the socket is closed by either side. Raises nothing."""
        try:
            while self._is_to_go_on():
                frame = self._link.receive(POLL_S)
                if frame is not None and not self._answer(frame):
                    return
        except SocketGoneError:
            logger.debug("socket gone session=%s", self._session_id)
        finally:
            self._drop_session()

    def _is_to_go_on(self) -> bool:
        """Return whether to wait for a frame; else the socket was closed and its client told why."""
        if self._site.drain.is_started:
            if self._protocol == 3:
                self._link.send(bye_frame("draining"))
            self._link.close(CloseCode.RESTART, "restarting")
            return False
        if is_expired(self._last_used_s, time.monotonic(), self._limits):
            self._tell(SessionExpiredError(self._session_id, self._limits.idle_s), None)
            self._link.close(CloseCode.IDLE, "idle")
            return False
        return True

    def _answer(self, frame: str | bytes) -> bool:
        """Answer one frame; return whether the socket stays open."""
        values: dict[str, Any] = {}
        try:
            values = decode_object(frame)
            self._carry_out(parse_command(values, self._protocol))
        except SocketGoneError:
            raise
        except Exception as error:  # the outermost loop of a socket: whatever went wrong, the client is told
            return self._fail(error, values)
        return not self._link.is_gone

    def _fail(self, error: Exception, values: dict[str, Any]) -> bool:
        if not isinstance(error, SESSION_STAYS):
            self._drop_session()
        if self._protocol is None and values.get("protocol") == 3:
            self._link.send(error_frame(self._report(error), None))
            if isinstance(error, OriginError):
                self._link.close(CloseCode.ORIGIN, "origin not allowed")
                return False
            return True
        self._tell(error, request_id_of(values))
        if self._protocol != 3:
            self._link.close(CloseCode.NORMAL, "")
            return False
        return True

    def _report(self, error: Exception) -> ErrorReport:
        request_id = secrets.token_hex(8)
        if not isinstance(error, SwarmError):
            logger.error("bug request_id=%s session=%s", request_id, self._session_id, exc_info=error)
        else:
            code = error.code
            logger.info("refused code=%s request_id=%s session=%s", code, request_id, self._session_id)
        return report_error(error, request_id)

    def _tell(self, error: Exception, generation_id: str | None) -> None:
        report = self._report(error)
        if self._protocol == 3:
            self._link.send(error_frame(report, generation_id))
        else:
            self._link.send(legacy_error_frame(report))

    def _carry_out(self, command: Command) -> None:
        match command:
            case LegacyOpen():
                self._open(command.model, command.max_length)
                self._protocol = 2
                self._open_session()
                self._link.send(legacy_opened_frame())
            case LegacyGenerate():
                self._generate_legacy(command)
            case Open():
                self._open_native(command)
            case Generate():
                self._generate(command)
            case Ping():
                self._link.send(pong_frame(command))
            case Cancel():
                pass  # the generation ended before the frame arrived

    def _open(self, name: str | None, max_length: int | None) -> TextModel:
        model = self._site.models.find(name)
        self._drop_session()
        self._model = model
        self._max_length = session_length(max_length, model.max_length, self._site.config.generation)
        self._last_used_s = time.monotonic()
        return model

    def _open_native(self, command: Open) -> None:
        """Choose the model. The session is opened by the first generate: a page that only looks holds no cache."""
        if not self._is_own_page:
            raise OriginError
        model = self._open(command.model, command.max_length)
        self._protocol = 3
        most = min(self._max_length, self._site.config.generation.max_new_tokens)
        self._link.send(opened_frame(Opened(self._session_id, model.name, self._max_length, most)))

    def _open_session(self) -> TextSession:
        if self._session is None:
            model = self._chosen_model()
            self._session = model.open_session(self._max_length)
            logger.info("opened model=%s max_length=%d session=%s", model.name, self._max_length, self._session_id)
        return self._session

    def _chosen_model(self) -> TextModel:
        if self._model is None:  # parse_command lets no generate through before an open
            raise InvalidRequestError("no session is open; send open first")
        return self._model

    def _drop_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
            logger.info("closed session=%s", self._session_id)

    @contextmanager
    def _generating(self, session: TextSession, generation_id: str | None) -> Iterator[None]:
        """Let the peer and the end of the site cancel `session` while the handler's thread is inside.

        Raises SiteDrainingError on leaving when it was the site.
        """
        self._is_cancelled = is_cut = False

        def cancel() -> None:
            self._is_cancelled = True
            session.cancel()

        def cut() -> None:
            nonlocal is_cut
            is_cut = True
            cancel()

        try:
            with self._site.drain.cancelling(cut), self._link.interrupting(generation_id, cancel):
                yield
        finally:
            self._last_used_s = time.monotonic()
        if is_cut:
            raise SiteDrainingError

    def _generate_legacy(self, command: LegacyGenerate) -> None:
        session = self._open_session()
        num_tokens = 0
        with self._generating(session, None):
            for reply in legacy_replies(self._chosen_model(), session, command):
                if self._link.is_gone:
                    raise SocketGoneError
                if reply is not None:
                    num_tokens += reply.token_count
                    self._link.send(legacy_reply_frame(reply))
                if self._is_cancelled:
                    session.cancel()
        logger.info("generated protocol=2 new_tokens=%d session=%s", num_tokens, self._session_id)

    def _generate(self, command: Generate) -> None:
        if self._site.drain.is_started:
            raise SiteDrainingError
        self._link.send(started_frame(command.id))
        meter = AnswerMeter(time.monotonic())
        session = self._open_session()
        cached = session.set_messages(command.chat_messages())
        prompt = len(session.token_ids)
        limits = self._site.config.generation
        most = answer_length(command.params.max_new_tokens, prompt, session.max_length, limits)
        with self._generating(session, command.id):
            reason = self._stream(session, native_sampling(command, most, limits), command.id, meter)
        usage = Usage(prompt, meter.num_tokens, cached)
        times = session.times.as_json() if command.times else None
        self._link.send(done_frame(Done(command.id, reason, usage, meter.timings(), times)))
        logger.info(
            "generated protocol=3 prompt_tokens=%d cached_tokens=%d new_tokens=%d finish_reason=%s session=%s",
            prompt, cached, meter.num_tokens, reason, self._session_id,
        )  # fmt: skip

    def _stream(
        self, session: TextSession, params: SamplingParams, generation_id: str, meter: AnswerMeter
    ) -> FinishReason:
        """Send the answer piece by piece, and what happens to the route; return why it ended."""

        def tell(event: SessionEvent) -> None:
            # In this thread, while it waits for a step. A peer that is gone ends the step.
            self._link.send(event_frame(event, generation_id))
            self._answer_in_between(generation_id)

        with running(session, params, tell) as deltas:
            for delta in deltas:
                meter.count(len(delta.token_ids), time.monotonic())
                if delta.text or delta.token_ids:
                    event = Delta(generation_id, meter.next_seq(), delta.text, len(delta.token_ids))
                    self._link.send(delta_frame(event))
                if delta.finish_reason is not None:
                    return delta.finish_reason
                self._answer_in_between(generation_id)
                if self._is_cancelled:
                    session.cancel()
        return "cancelled" if self._is_cancelled else "length"

    def _answer_in_between(self, generation_id: str) -> None:
        """Answer the frames that arrived while a generation runs."""
        while (frame := self._link.receive(0)) is not None:
            values: dict[str, Any] = {}
            try:
                values = decode_object(frame)
                command = parse_command(values, 3)
            except SwarmError as error:
                self._tell(error, request_id_of(values))
                continue
            match command:
                case Ping():
                    self._link.send(pong_frame(command))
                case Cancel():
                    self._is_cancelled = self._is_cancelled or command.id in (None, generation_id)
                case _:
                    self._tell(BusyError(), request_id_of(values))
