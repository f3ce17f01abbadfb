"""One answer as an iterator of text deltas, on a session of its own."""

from collections.abc import Generator, Iterator, Sequence

from swarm_client.events import EventListener
from swarm_client.generation.text_model import DistributedTextModel, DistributedTextSession
from swarm_client.generation.text_session import ChatMessage, SamplingParams, TextDelta
from swarm_client.generation_times import GenerationTimes
from swarm_client.time_log import TimeLog


class TextStream(Iterator[TextDelta]):
    """What `model.stream` returns. The session is opened by the first delta, and closed by the last one or `close`."""

    def __init__(
        self,
        model: DistributedTextModel,
        prompt: str | Sequence[ChatMessage],
        params: SamplingParams,
        max_length: int | None,
        on_event: EventListener | None,
        speculation: str | None = None,
    ) -> None:
        self._model = model
        self._speculation = speculation
        self._session: DistributedTextSession | None = None
        self._deltas = self._generate(prompt, params, max_length, on_event)

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> TextDelta:
        return next(self._deltas)

    @property
    def times(self) -> GenerationTimes:
        """Where the time went until now."""
        return TimeLog().report() if self._session is None else self._session.times

    def close(self) -> None:
        """Cancel what is not generated yet. Idempotent."""
        self._deltas.close()

    def _generate(
        self,
        prompt: str | Sequence[ChatMessage],
        params: SamplingParams,
        max_length: int | None,
        on_event: EventListener | None,
    ) -> Generator[TextDelta]:
        model = self._model
        if max_length is None:
            ids = model.encode(prompt) if isinstance(prompt, str) else model.chat_token_ids(prompt)
            # Two more for special tokens at both ends.
            max_length = min(model.max_length, len(ids) + 2 + params.max_new_tokens)
        self._session = session = model.open_session(max_length, speculation=self._speculation)
        try:
            if isinstance(prompt, str):
                session.append_text(prompt)
            else:
                session.set_messages(prompt)
            yield from session.generate(params, on_event)
        finally:
            session.close()
