"""What all requests of a site share: its models, the places for sockets and requests, and whether it is ending."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from app.api_keys import ApiKeys
from app.bans import REFRESH_S, Bans
from app.caller import Caller
from app.canary import Canary, runs_of
from app.canary_history import CanaryHistory
from app.config import SiteConfig
from app.database import site_database
from app.embed_tokens import EmbedTokens
from app.errors import NoCapacityError
from app.generation_queue import GenerationQueue
from app.in_flight import InFlight
from app.keeper import Chore, Keeper
from app.kept_conversations import AddressCount, KeptConversations
from app.key_usage import KeyUsage, Quota, address_quota
from app.limit_store import LEASE_S, counts_of
from app.model_registry import ModelRegistry
from app.moderation import Moderator
from app.own_version import site_version
from app.reach import Reachability
from app.site_metrics import SiteMetrics
from app.swarm_board import SwarmBoard
from app.usage import FLUSH_S, UsageBook
from app.widget_keys import WidgetKeys

if TYPE_CHECKING:
    from app.chat_conversation import Conversation

logger = logging.getLogger(__name__)

EXTENSION = "umbel"  # where a Flask application has its site

DRAIN_POLL_S = 0.2  # how soon a SIGTERM is seen; gunicorn tells nobody


class Places:
    """A number of places, of which each holder takes one. Any thread."""

    def __init__(self, what: str, limit: int) -> None:
        self.what, self.limit = what, limit
        self._lock = threading.Lock()
        self._taken = 0

    @property
    def taken(self) -> int:
        """The number of places in use."""
        return self._taken

    def try_take(self) -> bool:
        """Take a place if there is one."""
        with self._lock:
            if self._taken >= self.limit:
                return False
            self._taken += 1
            return True

    def give_back(self) -> None:
        """Free a place that was taken."""
        with self._lock:
            self._taken -= 1

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place. Raises NoCapacityError when there is none."""
        if not self.try_take():
            raise NoCapacityError(self.what, self.limit)
        try:
            yield
        finally:
            self.give_back()


class Drain:
    """The end of a site: no new work from `start` on, and running answers cancelled when their time is over."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._lock = threading.Lock()
        self._cancels: set[Callable[[], None]] = set()
        self._started = threading.Event()

    @property
    def is_started(self) -> bool:
        """Whether the site is ending."""
        return self._started.is_set()

    @contextmanager
    def cancelling(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Have `cancel` called, by another thread, when the time of running answers is over."""
        with self._lock:
            self._cancels.add(cancel)
        try:
            yield
        finally:
            with self._lock:
                self._cancels.discard(cancel)

    def watch(self, is_alive: Callable[[], bool]) -> None:
        """Start the drain when `is_alive` turns false. Runs in a thread of its own until the process ends."""
        threading.Thread(target=self._watch, args=(is_alive,), name="drain", daemon=True).start()

    def _watch(self, is_alive: Callable[[], bool]) -> None:
        while is_alive():
            time.sleep(DRAIN_POLL_S)
        logger.info("draining: running answers have %g s", self._drain_s)
        self._started.set()
        time.sleep(self._drain_s)
        with self._lock:
            cancels = tuple(self._cancels)
        for cancel in cancels:
            cancel()


class Site:
    """One site in one process."""

    def __init__(self, config: SiteConfig, models: ModelRegistry) -> None:
        self.config = config
        self.models = models
        self.sockets = Places("websockets", config.sockets.ws_max)
        self.http_generations = Places("places for HTTP requests", config.generation.http_max)
        self.in_flight = InFlight()
        self.queue = GenerationQueue(config.generation.running_max, config.generation.waiting_max)
        self.kept: KeptConversations[Conversation] = KeptConversations(config.sockets)
        self.addresses = AddressCount(config.sockets.ws_per_address)
        self.drain = Drain(config.sockets.drain_s)
        self.metrics = SiteMetrics(self._gauges)
        self.moderator = Moderator(config.operation, self.metrics)
        self.database = site_database(config.database_url)
        self.history = CanaryHistory(self.database)
        self.board = SwarmBoard(models, self.queue, site_version(), runs_of(self.history))
        self.canary = Canary(models, self.queue, self.history, self.board.report, config.status)
        self.reachability = Reachability(lambda peer_id: models.ping(peer_id))
        self.listeners = Places("listeners", min(config.status.events_max, config.http_threads // 4))
        known = config.security.signing_secrets
        self.api_keys = ApiKeys(self.database)
        self.bans = Bans(self.database)
        self.usage = UsageBook(self.database)
        self.widget_keys = WidgetKeys(self.database)
        self.key_usage = KeyUsage(counts_of(config.limits.limits_url))
        self.embed_tokens = EmbedTokens([secret.encode() for secret in known] or [secrets.token_bytes(32)])

    @property
    def is_ready(self) -> bool:
        """Whether new visitors can be served."""
        return self.models.is_ready and not self.drain.is_started

    def quota(self, caller: Caller) -> Quota | None:
        """Return what a caller may use: what the API key allows, or the address; a widget key's is `EmbeddedChat`'s."""
        if caller.api_key is not None:
            return caller.api_key.quota
        return address_quota(caller.address, self.config.limits)

    def _gauges(self) -> dict[str, float]:
        """Return what `app.site_metrics.GAUGES` names."""
        return {
            "umbel_site_ready": self.is_ready,
            "umbel_site_draining": self.drain.is_started,
            "umbel_sockets_open": self.sockets.taken,
            "umbel_sockets_max": self.sockets.limit,
            "umbel_answers_running": self.queue.num_running,
            "umbel_answers_running_max": self.config.generation.running_max,
            "umbel_answers_waiting": self.queue.num_waiting,
            "umbel_http_generations": self.http_generations.taken,
            "umbel_process_threads": threading.active_count(),
        }

    def start(self, is_alive: Callable[[], bool], on_ready: Callable[[], None], on_failed: Callable[[], None]) -> None:
        """Open the models and watch for the end. Called once, in the process that serves, after any fork."""
        self.drain.watch(is_alive)
        self.models.start(on_ready, on_failed)
        self.canary.start(lambda: self.drain.is_started)
        chores = (
            Chore("bans", self.bans.refresh, REFRESH_S),
            Chore("usage", self.usage.flush, FLUSH_S),
            Chore("leases", self.key_usage.renew, LEASE_S / 4),
        )
        self.bans.leave_to_keeper()
        Keeper(chores).start()

    def close(self) -> None:
        """Let the models go, and write what was counted. Called once, at the end of the process."""
        self.models.close()
        self.usage.flush()
        self.database.close()
