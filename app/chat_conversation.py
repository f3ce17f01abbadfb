"""A conversation of protocol 3: its model, inference session and answers. It may change its socket, and outlive it.

Whoever owns it, a socket's thread, gives the commands; the newest one owns it. The answer that runs has a thread of its
own, the only one then that uses the inference session, but for `cancel`.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Sequence

from app.caller import Caller
from app.chat_answer import Answer
from app.chat_protocol import Offer
from app.embed_sessions import EmbeddedChat
from app.errors import BusyError, NoCapacityError
from app.native_generation import offered_defaults, offered_limits
from app.request_models import Generate
from app.site import Site
from swarm_client.events import RoutePart
from swarm_client.generation.text_session import ChatMessage, TextModel, TextSession

logger = logging.getLogger(__name__)


class Conversation:
    """One client's talk with one model, under one session id."""

    def __init__(
        self, site: Site, model: TextModel, max_length: int, caller: Caller, embedded: EmbeddedChat | None = None
    ) -> None:
        """`embedded` where the page of a widget key opened it."""
        self.model = model
        self.max_length = max_length
        self.caller = caller
        """Whose it is; who takes it up again has its token."""
        self.embedded = embedded
        self.session_id = secrets.token_hex(8)
        self.token: str | None = None
        """By which a client may come back; None if it did not ask for that."""
        self.answer: Answer | None = None
        """The last one; it may be over."""
        self.route: Sequence[RoutePart] = ()
        self._messages: Sequence[ChatMessage] = ()
        self._num_added = 0  # messages that the site put before the client's
        self._site = site
        self._lock = threading.Lock()
        self._owner: object = None
        self._wake_owner: Callable[[], None] = lambda: None
        self._session: TextSession | None = None

    @property
    def offer(self) -> Offer:
        """What a client is told when it comes."""
        config = self._site.config
        return Offer(
            self.session_id,
            self.model.name,
            self.max_length,
            offered_limits(self.max_length, config),
            offered_defaults(self.max_length, config.generation),
            tuple(self.route),
        )

    @property
    def running(self) -> Answer | None:
        """The answer that is being made."""
        return None if self.answer is None or self.answer.is_ended else self.answer

    def is_owned_by(self, owner: object) -> bool:
        """Return whether nobody took the conversation since."""
        return self._owner is owner

    def take(self, owner: object, wake: Callable[[], None]) -> None:
        """Own the conversation from now on; who owned it before is woken, and finds out."""
        with self._lock:
            wake_other, self._owner, self._wake_owner = self._wake_owner, owner, wake
        wake_other()

    def leave(self, owner: object) -> None:
        """Free the caches and forget the owner, unless another one took the conversation. Nothing may be running."""
        with self._lock:
            if self._owner is not owner:
                return
            self._owner, self._wake_owner, self._messages = None, lambda: None, ()
            self._drop_session()

    def generate(self, command: Generate, reader: object, wake: Callable[[], None]) -> Answer:
        """Begin an answer in a thread of its own, for `reader`; `wake` is called when there is something to read.

        Raises BusyError while another one runs, NoCapacityError when there is no thread to be had,
        LimitExceededError or EmbedClosedError where the key of an embedded chat says so.
        """
        if self.running is not None:
            raise BusyError
        if self.embedded is not None:
            self.embedded.ask()
        answer = Answer(self._site, self, command)
        answer.attach(reader, wake, 0)
        before, self.answer = self.answer, answer
        try:
            answer.start()
        except RuntimeError:  # no thread to be had
            self.answer = before
            raise NoCapacityError("threads", threading.active_count()) from None
        return answer

    def rewind(self, num_messages: int) -> int:
        """Keep the first messages of what was sent last; return how many tokens stay. Raises BusyError, SwarmError."""
        if self.running is not None:
            raise BusyError
        self._messages = tuple(self._messages[: max(0, num_messages + self._num_added)])
        return 0 if self._session is None else self._session.keep_messages(self._messages)

    # for the thread of the answer

    def open_session(self) -> TextSession:
        """Return the inference session, which the first answer opens: a page that only looks holds no cache."""
        if self._session is None:
            self._session = self.model.open_session(self.max_length)
            logger.info("opened model=%s max_length=%d session=%s", self.model.name, self.max_length, self.session_id)
        return self._session

    def set_messages(self, messages: Sequence[ChatMessage], *, continue_last: bool) -> int:
        """Make the session hold a prompt; return how many tokens of it were there already.

        Raises EmbedClosedError, and InvalidRequestError for messages that an embedded chat may not send.
        """
        sent = messages
        if self.embedded is not None:
            messages = self.embedded.messages(messages)
        kept = self.open_session().set_messages(messages, continue_last=continue_last)
        self._messages, self._num_added = messages, len(messages) - len(sent)
        return kept

    def cancel_step(self) -> None:
        """End what runs in the session now. Any thread."""
        session = self._session
        if session is not None:
            session.cancel()

    def drop_session(self) -> None:
        """Give the caches up; the next answer computes everything again."""
        with self._lock:
            self._drop_session()

    def _drop_session(self) -> None:
        session, self._session, self.route = self._session, None, ()
        if session is not None:
            session.close()
            logger.info("closed session=%s", self.session_id)
