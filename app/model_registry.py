"""The models that the site offers: opened in the background at start, found by name afterwards."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from app.config import SiteConfig
from app.errors import ModelLoadingError, ModelNotFoundError
from swarm_client.generation.text_session import TextModel
from swarm_protocol.errors import PeerUnreachableError, SwarmError
from swarm_protocol.ids import PeerId

if TYPE_CHECKING:
    from swarm_client import Swarm

logger = logging.getLogger(__name__)

ModelStatus = Literal["loading", "ready", "incomplete", "failed"]

MAX_ATTEMPTS = 20  # with the waits below: 15 minutes, in which a swarm that just starts has come up
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """How to get one model: the name it was asked for by, and a blocking call that opens it."""

    name: str
    open: Callable[[], TextModel]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model as the site shows it. `missing` are the blocks that nobody serves, in words."""

    name: str
    status: ModelStatus
    context_length: int | None
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """One model as it is asked about its swarm; `model` None while it is not open."""

    name: str
    status: ModelStatus
    model: TextModel | None


class SwarmConnection:
    """The site's one connection to the swarm, shared by all models; made when the first of them is opened."""

    def __init__(
        self,
        initial_peers: Sequence[str],
        *,
        relay: bool,
        wire_dtype: str = "auto",
        speculation: str = "off",
        draft_model: str = "",
        draft_quantization: str = "nf4",
    ) -> None:
        self._initial_peers, self._relay = tuple(initial_peers), relay
        self._wire_dtype, self._speculation = wire_dtype, speculation
        self._draft_model, self._draft_quantization = draft_model, draft_quantization
        self._swarm: Swarm | None = None

    def open_model(self, source: str) -> TextModel:
        """Return a model of the swarm. Blocks; one thread at a time. Raises SwarmError."""
        # Here and not above: this loads the numeric libraries, which must happen after gunicorn forked.
        from swarm_client import ClientConfig, Swarm, open_text_model

        if self._swarm is None:
            config = ClientConfig(
                initial_peers=self._initial_peers,
                relay=self._relay,
                wire_dtype=self._wire_dtype,
                speculation=self._speculation,
                draft_model=self._draft_model or None,
                draft_quantization=self._draft_quantization,
            )
            self._swarm = Swarm.connect(config)
        return open_text_model(source, swarm=self._swarm)

    def ping(self, peer_id: PeerId) -> float:
        """Return the seconds of a round trip to a peer. Raises SwarmError if it does not answer."""
        if self._swarm is None:
            raise PeerUnreachableError("the site has not joined the swarm yet")
        return self._swarm.ping(peer_id)

    def close(self) -> None:
        """Leave the swarm. Idempotent."""
        if self._swarm is not None:
            self._swarm.close()


def swarm_registry(config: SiteConfig) -> "ModelRegistry":
    """Return the models of `config`, to be opened through the swarm that its peers belong to."""
    connection = SwarmConnection(
        config.initial_peers,
        relay=config.relay,
        wire_dtype=config.wire_dtype,
        speculation=config.speculation,
        draft_model=config.draft_model,
        draft_quantization=config.draft_quantization,
    )
    sources = [ModelSource(source, partial(connection.open_model, source)) for source in config.models]
    return ModelRegistry(sources, connection.close, connection.ping)


class ModelRegistry:
    """Opens models one after another in a thread of its own; every method may be called by any thread."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        on_close: Callable[[], None] = lambda: None,
        ping: Callable[[PeerId], float] | None = None,
    ) -> None:
        """`on_close` frees what the sources share. `ping` dials a peer of their swarm; None where there is none."""
        self.ping = ping or _no_swarm
        self._sources = tuple(sources)
        self._on_close = on_close
        self._models: dict[str, TextModel] = {}
        self._failed: set[str] = set()
        self._stop = threading.Event()

    def start(self, on_ready: Callable[[], None], on_failed: Callable[[], None] = lambda: None) -> None:
        """Begin to open the models; then calls `on_ready` if all are open, `on_failed` if none is. Raises nothing."""
        threading.Thread(target=self._load_all, args=(on_ready, on_failed), name="open-models", daemon=True).start()

    def load(self) -> None:
        """Open the models in this thread, for tests and scripts."""
        self._load_all(lambda: None, lambda: None)

    def close(self) -> None:
        """Stop opening and free what the sources share."""
        self._stop.set()
        self._on_close()

    @property
    def is_ready(self) -> bool:
        """Whether every configured model is open, and there is one."""
        return bool(self._sources) and len(self._models) == len(self._sources)

    def find(self, name: str | None) -> TextModel:
        """Return the model called `name`, or the first one. Raises ModelNotFoundError or ModelLoadingError."""
        for source in self._sources:
            model = self._models.get(source.name)
            if name in (None, "", source.name) or (model is not None and model.name == name):
                if model is None:
                    raise ModelLoadingError(_public_name(source.name))
                return model
        raise ModelNotFoundError(str(name), [entry.name for entry in self.entries()])

    def entries(self) -> list[ModelEntry]:
        """Return all models in the configured order, the default one first."""
        return [self._entry(source) for source in self._sources]

    def opened(self) -> list[OpenedModel]:
        """Return all models in the configured order, without asking them anything."""
        return [self._opened(source) for source in self._sources]

    def _opened(self, source: ModelSource) -> OpenedModel:
        model = self._models.get(source.name)
        if model is None:
            status: ModelStatus = "failed" if source.name in self._failed else "loading"
            return OpenedModel(_public_name(source.name), status, None)
        return OpenedModel(model.name, "ready", model)

    def _entry(self, source: ModelSource) -> ModelEntry:
        opened = self._opened(source)
        model = opened.model
        if model is None:
            return ModelEntry(opened.name, opened.status, None, ())
        try:
            missing = tuple(model.missing_blocks())
        except SwarmError as error:
            logger.warning("cannot tell which blocks are served model=%s: %s", model.name, error)
            missing = ()
        return ModelEntry(model.name, "incomplete" if missing else "ready", model.max_length, missing)

    def _load_all(self, on_ready: Callable[[], None], on_failed: Callable[[], None]) -> None:
        for source in self._sources:
            self._load(source)
        if self._stop.is_set():
            return
        if self.is_ready:
            on_ready()
        elif not self._models:
            on_failed()

    def _load(self, source: ModelSource) -> None:
        wait_s = FIRST_WAIT_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                model = source.open()
            except SwarmError as error:
                logger.warning("cannot open model=%s attempt=%d: %s", source.name, attempt, error)
                if not error.retryable or attempt == MAX_ATTEMPTS or self._stop.wait(wait_s):
                    break
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            except Exception:
                logger.exception("cannot open model=%s", source.name)
                break
            else:
                logger.info("opened model=%s max_length=%d", model.name, model.max_length)
                self._models[source.name] = model
                return
        self._failed.add(source.name)


def _no_swarm(_: PeerId) -> float:
    raise PeerUnreachableError("these models are in no swarm")


def _public_name(source: str) -> str:
    """Return a name for a model that is not open yet; of a path only the last part, which says enough."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return source.rstrip("/").rsplit("/", 1)[-1]
    return source
