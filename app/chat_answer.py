"""One answer of protocol 3, made by a thread of its own into a log that a socket's thread reads.

    waiting in the queue → prefill → deltas → done or error

A reader that is slower than the model holds the model up once the log is full. Without a reader the log drops its
oldest frames, and the answer goes on until its conversation's last owner cancels it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from app import request_ids
from app.answer_log import AnswerLog
from app.answering import AnswerFacts, answering, conversation_text
from app.chat_protocol import (
    Delta,
    Done,
    Usage,
    delta_frame,
    done_frame,
    error_frame,
    event_frame,
    queued_frame,
    started_frame,
)
from app.error_log import logged_report
from app.errors import BusyError, SiteDrainingError
from app.limits import answer_length
from app.native_generation import AnswerMeter, native_sampling
from app.request_models import Generate
from app.site import Site
from swarm_client.events import Prefilled, RouteChanged, SessionEvent
from swarm_client.generation.text_session import FinishReason, SamplingParams, TextSession
from swarm_protocol.errors import InvalidRequestError, MaxLengthError

if TYPE_CHECKING:
    from app.chat_conversation import Conversation

logger = logging.getLogger(__name__)

SESSION_STAYS = (InvalidRequestError, MaxLengthError, BusyError)  # after these the session is as it was
LOOK_S = 0.5  # how often a writer that is held up looks whether it is still wanted


class _CancelledWhileQueuedError(Exception):
    """The answer was cancelled before its turn came."""


class Answer:
    """Any thread may call what is public; `reader` is whoever sends the frames on, one at a time."""

    def __init__(self, site: Site, conversation: "Conversation", command: Generate) -> None:
        self.id = command.id
        self._site, self._conversation, self._command = site, conversation, command
        self._max_bytes = site.config.sockets.resume_ring_bytes
        self._log = AnswerLog(self._max_bytes)
        self._changed = threading.Condition()
        self._reader: object = None
        self._read_seq: int | None = None
        self._wake: Callable[[], None] = lambda: None
        self._is_cancelled = self._is_cut = self._is_ended = False
        self._position: int | None = None
        self._meter = AnswerMeter(time.monotonic())
        self._request_id = request_ids.answer_id()
        self._thread = threading.Thread(target=self._run, name=f"answer-{conversation.session_id}", daemon=True)

    def start(self) -> None:
        """Begin. Called once."""
        self._thread.start()

    @property
    def is_ended(self) -> bool:
        """Whether its last frame is in the log."""
        return self._is_ended

    def has(self, from_seq: int) -> bool:
        """Return whether a reader can go on from this frame."""
        with self._changed:
            return self._log.has(from_seq)

    def attach(self, reader: object, wake: Callable[[], None], from_seq: int) -> bool:
        """Read from a frame on; the reader before reads no more. Return whether the frame is still there."""
        with self._changed:
            if not self._log.has(from_seq):
                return False
            self._reader, self._read_seq, self._wake = reader, from_seq, wake
            self._changed.notify_all()
            return True

    def detach(self, reader: object) -> None:
        """The reader reads no more."""
        with self._changed:
            if self._reader is reader:
                self._reader, self._read_seq, self._wake = None, None, lambda: None
                self._changed.notify_all()

    def next_frame(self, reader: object) -> str | None:
        """Return the frame that `reader` has to send next, and take it for sent; None when there is none now."""
        with self._changed:
            if self._reader is not reader or self._read_seq is None:
                return None
            frame = self._log.read(self._read_seq)
            if frame is not None:
                self._read_seq += 1
                self._changed.notify_all()
            return frame

    def is_read(self, reader: object) -> bool:
        """Return whether the answer is over and `reader` has all of it."""
        with self._changed:
            return self._is_ended and (self._reader is not reader or self._read_seq == self._log.next_seq)

    def cancel(self) -> None:
        """End the answer within a step, with finish reason `cancelled`."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()
        self._conversation.cancel_step()

    def wait(self, timeout_s: float) -> None:
        """Wait for the end, so long at most."""
        self._thread.join(timeout_s)

    def join(self) -> None:
        """Wait until the thread has ended; a cancel makes that soon."""
        self._thread.join()

    # in the thread of the answer

    def _run(self) -> None:
        request_ids.enter(self._request_id)
        try:
            with self._site.drain.cancelling(self._cut):
                done = self._generate()
                if self._is_cut:
                    raise SiteDrainingError
            self._write(lambda seq: done_frame(done, seq), is_last=True)
        except Exception as error:  # the outermost place of an answer: whatever went wrong, the client is told
            self._fail(error)
        self._command = self._command.model_copy(update={"messages": []})  # a kept answer is its text alone

    def _fail(self, error: Exception) -> None:
        report = logged_report(self._site, error, self._conversation.session_id)
        if not isinstance(error, SESSION_STAYS):
            self._conversation.drop_session()
        self._write(lambda seq: error_frame(report, self.id, seq), is_last=True)

    def _cut(self) -> None:
        self._is_cut = True
        self.cancel()

    def _generate(self) -> Done:
        try:
            with self._site.queue.turn(self._queued):
                return self._answer()
        except _CancelledWhileQueuedError:
            return Done(self.id, "cancelled", Usage(0, 0, 0), self._meter.timings())

    def _queued(self, position: int) -> None:
        """Tell the position in the queue when it is new. Raises what ends the waiting."""
        last, self._position = self._position, position
        if last is None:
            self._write(lambda seq: started_frame(self.id, seq, position))
        elif last != position:
            self._write(lambda seq: queued_frame(self.id, seq, position))
        if self._site.drain.is_started:
            raise SiteDrainingError
        if self._is_cancelled:
            raise _CancelledWhileQueuedError

    def _answer(self) -> Done:
        command, limits = self._command, self._site.config.generation
        session = self._conversation.open_session()
        cached = self._conversation.set_messages(command.chat_messages(), continue_last=command.is_continued)
        prompt = len(session.token_ids)
        most = answer_length(command.params.max_new_tokens, prompt, session.max_length, limits)
        embedded = self._conversation.embedded
        if embedded is not None:
            most = embedded.answer_length(most)
        self._tell(Prefilled(cached, prompt))
        try:
            reason = self._stream(session, native_sampling(command, most, limits), prompt)
        finally:
            if embedded is not None:
                embedded.count_tokens(self._meter.num_tokens)
        logger.info(
            "generated protocol=3 prompt_tokens=%d cached_tokens=%d new_tokens=%d finish_reason=%s session=%s",
            prompt, cached, self._meter.num_tokens, reason, self._conversation.session_id,
        )  # fmt: skip
        times = session.times.as_json() if command.times else None
        usage = Usage(prompt, self._meter.num_tokens, cached)
        return Done(self.id, reason, usage, self._meter.timings(), tuple(self._conversation.route), times)

    def _stream(self, session: TextSession, params: SamplingParams, prompt: int) -> FinishReason:
        """Write the answer piece by piece, and what happens to the route; return why it ended."""
        text = conversation_text(self._command.chat_messages())
        facts = AnswerFacts("chat", self._conversation.model.name, text, self._conversation.caller)
        with answering(self._site, facts, session, params, self._tell) as deltas:
            if self._is_cancelled:  # a cancel from before `generate` was forgotten by it
                session.cancel()
            for delta in deltas:
                if delta.token_ids and not self._meter.num_tokens:
                    self._tell(Prefilled(prompt, prompt))
                self._meter.count(len(delta.token_ids), time.monotonic())
                if delta.text or delta.token_ids:
                    piece = Delta(self.id, delta.text, len(delta.token_ids))
                    self._write(lambda seq, piece=piece: delta_frame(piece, seq))  # type: ignore[misc]
                if delta.finish_reason is not None:
                    return delta.finish_reason
                if self._is_cancelled:
                    session.cancel()
        return "cancelled" if self._is_cancelled else "length"

    def _tell(self, event: SessionEvent) -> None:
        if isinstance(event, RouteChanged):
            self._conversation.route = event.route
        self._write(lambda seq: event_frame(event, self.id, seq))

    def _write(self, make: Callable[[int], str], *, is_last: bool = False) -> None:
        with self._changed:
            while not (is_last or self._is_cancelled) and self._read_seq is not None:
                if self._log.unread_bytes(self._read_seq) < self._max_bytes:
                    break
                self._changed.wait(LOOK_S)
            self._log.append(make, self._read_seq)
            self._is_ended = is_last  # at once: whoever reads the last frame may send the next request
            wake = self._wake
        wake()
