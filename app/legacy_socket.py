"""A websocket in protocol 2: one inference session, whose answers are made by the handler's thread."""

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from app import request_ids
from app.answering import AnswerFacts, answering
from app.caller import Caller
from app.chat_protocol import Command, legacy_opened_frame, legacy_reply_frame
from app.errors import SiteDrainingError
from app.legacy_generation import legacy_replies
from app.limits import session_length
from app.request_models import LegacyGenerate, LegacyOpen
from app.site import Site
from app.socket_link import SocketGoneError, SocketLink
from swarm_client.generation.text_session import TextModel, TextSession
from swarm_protocol.errors import InvalidRequestError

logger = logging.getLogger(__name__)


class LegacySocket:
    """Carries out the commands of one socket; used by one thread."""

    def __init__(self, site: Site, link: SocketLink, caller: Caller) -> None:
        self._site, self._link, self._caller = site, link, caller
        self._model: TextModel | None = None
        self._session: TextSession | None = None
        self._is_cancelled = False
        self.session_id = secrets.token_hex(8)
        self.last_used_s = time.monotonic()
        """When something was generated last."""

    def carry_out(self, command: Command) -> None:
        """Open or generate. Raises SwarmError, and SocketGoneError as soon as the peer is."""
        match command:
            case LegacyOpen():
                self._open(command)
            case LegacyGenerate():
                self._generate(command)

    def close(self) -> None:
        """Free the caches. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
            logger.info("closed session=%s", self.session_id)

    def _open(self, command: LegacyOpen) -> None:
        self._model = model = self._site.models.find(command.model)
        length = session_length(command.max_length, model.max_length, self._site.config.generation)
        self._session = model.open_session(length)
        self.last_used_s = time.monotonic()
        logger.info("opened model=%s max_length=%d session=%s", model.name, length, self.session_id)
        self._link.send(legacy_opened_frame())

    def _generate(self, command: LegacyGenerate) -> None:
        model, session = self._model, self._session
        if model is None or session is None:  # parse_command lets no generate through before an open
            raise InvalidRequestError("no session is open; send open_inference_session first")
        num_tokens = 0
        name = request_ids.answer_id()
        with request_ids.working(name), self._generating(session), self._site.queue.turn(self._queued):
            facts = AnswerFacts("legacy_socket", model.name, command.inputs or "", self._caller)
            generate = partial(answering, self._site, facts, is_cancelled=lambda: self._is_cancelled)
            for reply in legacy_replies(model, session, command, generate):
                if self._link.is_gone:
                    raise SocketGoneError
                self._site.bans.check(self._caller)
                if reply is not None:
                    num_tokens += reply.token_count
                    self._link.send(legacy_reply_frame(reply))
                if self._is_cancelled:
                    session.cancel()
        logger.info("generated protocol=2 new_tokens=%d session=%s", num_tokens, self.session_id)

    def _queued(self, _position: int) -> None:
        """Raise what ends the waiting for a turn."""
        if self._link.is_gone:
            raise SocketGoneError
        if self._is_cancelled:
            raise SiteDrainingError
        self._site.bans.check(self._caller)

    @contextmanager
    def _generating(self, session: TextSession) -> Iterator[None]:
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
            with self._site.drain.cancelling(cut), self._link.interrupting(cancel):
                yield
        finally:
            self.last_used_s = time.monotonic()
        if is_cut:
            raise SiteDrainingError
