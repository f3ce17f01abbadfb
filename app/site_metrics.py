"""What the operator of a site watches, for Prometheus. Not for the public: it tells how the site is used.

Names of models and paths come from the site alone, so that strangers cannot make new series.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from swarm_protocol.errors import SwarmError

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
REQUEST_BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # answers take minutes, pages ms
FIRST_TOKEN_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
SPEED_BUCKETS = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)  # tokens/s; 6 is BLOOM-176B's in a swarm

NOT_ERRORS = ("stop", "length", "cancelled", "gone", "internal_error")

Gauges = Callable[[], Mapping[str, float]]

GAUGES = {
    "umbel_site_ready": "Whether new visitors can be served.",
    "umbel_site_draining": "Whether the site is ending: it takes no new work.",
    "umbel_sockets_open": "Websockets.",
    "umbel_sockets_max": "Websockets that may be open.",
    "umbel_answers_running": "Answers that are being made.",
    "umbel_answers_running_max": "Answers that may be made at the same time; others wait.",
    "umbel_answers_waiting": "Answers that wait for their turn.",
    "umbel_http_generations": "HTTP requests that generate.",
    "umbel_process_threads": "Threads of the process.",
}
"""Of the site as it is when it is asked."""


def _codes(kind: type[SwarmError]) -> set[str]:
    return {kind.code}.union(*(_codes(each) for each in kind.__subclasses__()))


def known_code(code: str, known: frozenset[str] = frozenset(_codes(SwarmError)).union(NOT_ERRORS)) -> str:
    """Return a code as a label: nodes may send codes that nobody here knows, each of which would be a series."""
    return code if code in known else "other"


class _SiteGauges(Collector):
    def __init__(self, read: Gauges) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(name, text) for name, text in GAUGES.items()]

    def collect(self) -> Iterable[Metric]:
        values = self._read()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=values[name])


class SiteMetrics:
    """Any thread."""

    def __init__(self, read_gauges: Gauges) -> None:
        """`read_gauges` gives a value for each of `GAUGES`."""
        self.registry = registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_SiteGauges(read_gauges))
        self._requests = Counter(
            "umbel_http_requests", "Answered requests, websockets at their end.", ["method", "path", "status"],
            registry=registry,
        )  # fmt: skip
        self._request_s = Histogram(
            "umbel_http_request_seconds", "From the first byte of a request to the last one of its answer.", ["path"],
            buckets=REQUEST_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._answers = Counter(
            "umbel_answers", "Answers that ended: stop, length, cancelled, gone or an error's code.",
            ["api", "model", "outcome"], registry=registry,
        )  # fmt: skip
        self._prompt_tokens = Counter(
            "umbel_prompt_tokens", "Of answers' prompts.", ["api", "model"], registry=registry
        )
        self._tokens = Counter("umbel_answer_tokens", "Of answers.", ["api", "model"], registry=registry)
        self._first_token_s = Histogram(
            "umbel_first_token_seconds", "From the turn of an answer to its first token.", ["model"],
            buckets=FIRST_TOKEN_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._speed = Histogram(
            "umbel_answer_tokens_per_second", "Of answers, behind the first token.", ["model"],
            buckets=SPEED_BUCKETS, registry=registry,
        )  # fmt: skip
        self._errors = Counter("umbel_errors", "Errors that clients were told of.", ["code"], registry=registry)
        self._moderated = Counter(
            "umbel_moderation", "Calls of the moderation hook: allowed, refused, failed.", ["kind", "outcome"],
            registry=registry,
        )  # fmt: skip
        self._rebuilt = Counter(
            "umbel_sessions_rebuilt", "Sessions that went on at other nodes after a loss.", ["model"], registry=registry
        )
        self._guessed = Counter(
            "umbel_guessed_tokens", "Guessed ahead and computed; those that were right came for nothing.",
            ["model", "outcome"], registry=registry,
        )  # fmt: skip

        for kind in ("prompt", "answer"):  # a counter that begins with its first event shows Prometheus no increase
            self._moderated.labels(kind, "failed")
        self._errors.labels("internal_error")

    def request(self, method: str, path: str, status: int, elapsed_s: float) -> None:
        """Count a request; `path` is a route's, never what a client sent."""
        self._requests.labels(method if method in METHODS else "other", path, str(status)).inc()
        if status != 101:  # of a websocket the time says how long somebody read
            self._request_s.labels(path).observe(elapsed_s)

    def answer(self, api: str, model: str, outcome: str, prompt_tokens: int, new_tokens: int) -> None:
        """Count an answer that ended."""
        self._answers.labels(api, model, known_code(outcome)).inc()
        self._prompt_tokens.labels(api, model).inc(prompt_tokens)
        self._tokens.labels(api, model).inc(new_tokens)

    def speed(self, model: str, first_token_s: float | None, tokens_per_s: float | None) -> None:
        """Take the times of an answer that had tokens."""
        if first_token_s is not None:
            self._first_token_s.labels(model).observe(first_token_s)
        if tokens_per_s is not None:
            self._speed.labels(model).observe(tokens_per_s)

    def guessed(self, model: str, drafted_tokens: int, accepted_tokens: int) -> None:
        """Count the tokens of an answer that were guessed ahead."""
        if drafted_tokens:
            self._guessed.labels(model, "right").inc(accepted_tokens)
            self._guessed.labels(model, "wrong").inc(drafted_tokens - accepted_tokens)

    def error(self, code: str) -> None:
        """Count an error that a client was told of."""
        self._errors.labels(known_code(code)).inc()

    def moderated(self, kind: str, outcome: str) -> None:
        """Count a call of the moderation hook."""
        self._moderated.labels(kind, outcome).inc()

    def rebuilt(self, model: str) -> None:
        """Count a session that other nodes took over after a loss."""
        self._rebuilt.labels(model).inc()

    def text(self) -> bytes:
        """Return the page that Prometheus reads."""
        return generate_latest(self.registry)
