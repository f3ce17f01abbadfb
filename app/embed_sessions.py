"""What a widget key decides about the sessions of its chats: whoever writes the frames, the site applies it."""

from collections.abc import Sequence

from app.errors import EmbedClosedError, EmbedExpiredError
from app.key_usage import Quota
from app.site import Site
from app.widget_keys import WidgetKey
from swarm_client.generation.text_session import ChatMessage
from swarm_protocol.errors import InvalidRequestError

MAX_CONTEXT_CHARS = 4000  # of what a page says about itself; some 1,000 tokens
CONTEXT_HEAD = "The page that this chat is part of says about itself:"


class EmbeddedChat:
    """One conversation's tie to its key, which is looked up anew whenever it decides. Any thread."""

    def __init__(self, site: Site, token: str, address: str) -> None:
        """Raises EmbedExpiredError for a token that is not good here, EmbedClosedError for a key not in use."""
        name = site.embed_tokens.read(token, address)
        if name is None:
            raise EmbedExpiredError
        self._site, self._name = site, name
        self.key_id = name
        self._quota: Quota | None = None
        self.model = self._key().model

    def _key(self) -> WidgetKey:
        found = self._site.widget_keys.find(self._name)
        if found is None or not found.is_enabled:
            raise EmbedClosedError
        return found

    def ask(self) -> None:
        """Count a question. Raises EmbedClosedError, and LimitExceededError where the key allows none now."""
        self._quota = self._key().quota
        self._site.key_usage.ask(self._quota)

    def messages(self, sent: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
        """Return what the model gets. Raises EmbedClosedError or InvalidRequestError."""
        return embedded_messages(self._key(), sent)

    def answer_length(self, wanted: int) -> int:
        """Return how many tokens an answer may have that may have `wanted` otherwise; 1 at least."""
        left = self._site.key_usage.left(self._key().quota)
        return wanted if left is None else max(1, min(wanted, left))

    def count_tokens(self, num_tokens: int) -> None:
        """Count the tokens of an answer, complete or not."""
        if self._quota is not None:  # as it was when the answer began: the key may be gone by now
            self._site.key_usage.count_tokens(self._quota, num_tokens)


def embedded_messages(key: WidgetKey, messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return what the model gets: behind the key's own prompt, whatever the client sent as one.

    A first message of the role `system` is what the page around says about itself. Raises InvalidRequestError when
    there are others of that role.
    """
    is_told = bool(messages) and messages[0].role == "system"
    context = messages[0].content[:MAX_CONTEXT_CHARS].strip() if is_told else ""
    rest = tuple(messages[1:] if is_told else messages)
    if any(message.role == "system" for message in rest):
        raise InvalidRequestError("messages: in an embedded chat only the first one may be of the role system")
    parts = [key.system_prompt.strip(), f"{CONTEXT_HEAD}\n{context}" if context else ""]
    prompt = "\n\n".join(part for part in parts if part)
    return (ChatMessage("system", prompt), *rest) if prompt else rest
