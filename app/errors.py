"""Pure: the errors that only the site raises, beside those of the swarm, and how any error is told to a client.

SwarmError
├── ModelNotFoundError      model_not_found
├── ModelLoadingError       model_loading       retryable
├── NoCapacityError         no_capacity         retryable
├── BusyError               busy                retryable
├── SessionExpiredError     session_expired     retryable
├── SiteDrainingError       draining            retryable
├── ReplacedError           replaced
├── OriginError             origin_not_allowed
├── EmbedExpiredError       embed_expired       retryable
├── EmbedClosedError        embed_closed
├── DatabaseUnavailableError  database_unavailable  retryable
├── KeyRequiredError        key_required
├── InvalidKeyError         invalid_key
├── BannedError             banned
├── RefusedError            content_refused
└── ModerationFailedError   moderation_failed   retryable
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swarm_protocol.errors import SwarmError

MAX_REFUSAL_CHARS = 500


class ModelNotFoundError(SwarmError):
    """The site does not offer the model that was asked for."""

    code = "model_not_found"

    def __init__(self, name: str, available: Sequence[str]) -> None:
        super().__init__(f"model {name[:100]!r} is not served here; available: {', '.join(available) or 'none'}")


class ModelLoadingError(SwarmError):
    """The model is configured, but not loaded yet or not loadable now."""

    code, retryable = "model_loading", True

    def __init__(self, name: str) -> None:
        super().__init__(f"model {name} is still being loaded; try again in a minute")


class NoCapacityError(SwarmError):
    """The site serves as many sockets or requests as it may."""

    code, retryable = "no_capacity", True

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"all {limit} {what} of this site are in use; try again in a minute")


class BusyError(SwarmError):
    """A socket runs one generation at a time."""

    code, retryable = "busy", True

    def __init__(self) -> None:
        super().__init__("an answer is being generated on this socket; cancel it or wait for its end")


class SessionExpiredError(SwarmError):
    """Nothing was generated on a socket for too long. The wording is matched on by clients of the predecessor."""

    code, retryable = "session_expired", True

    def __init__(self, session_id: str, idle_s: float) -> None:
        super().__init__(f"Session {session_id} expired: nothing was generated for {idle_s:g} s; open a new one")


class SiteDrainingError(SwarmError):
    """The site is restarting and takes no new work."""

    code, retryable = "draining", True

    def __init__(self) -> None:
        super().__init__("the site is restarting; connect again in some seconds")


class ReplacedError(SwarmError):
    """The client sent the same request again, and the later one is answered."""

    code = "replaced"

    def __init__(self) -> None:
        super().__init__("a request with the same Idempotency-Key came after this one, and is answered in its place")


class OriginError(SwarmError):
    """A page of another origin asked for something that is for this site's own pages."""

    code = "origin_not_allowed"

    def __init__(self, what: str = "protocol 3") -> None:
        super().__init__(f"{what} is open to this site's own pages only")


class EmbedExpiredError(SwarmError):
    """The token of an embedded chat is too old, or came from elsewhere; its page fetches another one."""

    code, retryable = "embed_expired", True

    def __init__(self) -> None:
        super().__init__("the token of this embedded chat is no longer good here; fetch another one")


class DatabaseUnavailableError(SwarmError):
    """What is asked for is in the site's database, which does not answer."""

    code, retryable = "database_unavailable", True

    def __init__(self) -> None:
        super().__init__("the site's database does not answer, so keys cannot be looked up; try again in a minute")


class KeyRequiredError(SwarmError):
    """The site answers programs only with an API key."""

    code = "key_required"

    def __init__(self) -> None:
        super().__init__("an API key of this site is needed: send it as `Authorization: Bearer uk_…`")


class InvalidKeyError(SwarmError):
    """The API key that was sent is unknown, revoked or expired."""

    code = "invalid_key"

    def __init__(self) -> None:
        super().__init__("this API key is unknown, revoked or expired; ask those who run this site for another one")


class BannedError(SwarmError):
    """The operator has shut an address or a key out."""

    code = "banned"

    def __init__(self) -> None:
        super().__init__("this site is closed to your address or key; ask those who run it why")


class EmbedClosedError(SwarmError):
    """The widget key of an embedded chat is not in use any more."""

    code = "embed_closed"

    def __init__(self) -> None:
        super().__init__("this embedded chat is closed: its key is unknown, disabled or revoked")


class RefusedError(SwarmError):
    """The operator's moderation does not allow a prompt or an answer; the message is what it says to the reader."""

    code = "content_refused"

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence[:MAX_REFUSAL_CHARS] or "this site does not answer that")


class ModerationFailedError(SwarmError):
    """The operator's moderation did not say whether something is allowed."""

    code, retryable = "moderation_failed", True

    def __init__(self) -> None:
        super().__init__("this site looks at what is written here, and could not do so now; try again in a minute")


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """What a client is told about an error: never a stack, always a stable code.

    `kind` is the exception's class name, which clients of the predecessor expect at the start of `traceback`.
    """

    kind: str
    code: str
    message: str
    retryable: bool
    request_id: str
    retry_after_s: int | None = None
    """If the error says so itself."""

    @property
    def one_line(self) -> str:
        """The error as one line, in the form of the last line of a Python traceback."""
        return f"{self.kind}: {' '.join(self.message.split())}"


def report_error(error: BaseException, request_id: str) -> ErrorReport:
    """Return what a client may know of `error`; anything that is not a SwarmError becomes `internal_error`."""
    if isinstance(error, SwarmError):
        wait_s = getattr(error, "retry_after_s", None)
        return ErrorReport(type(error).__name__, error.code, str(error), error.retryable, request_id, wait_s)
    message = f"something went wrong on the site; its log has the details under {request_id}"
    return ErrorReport("InternalError", "internal_error", message, True, request_id)


RETRY_AFTER_S = {
    "busy": 1,
    "draining": 5,
    "stream_lost": 1,
    "no_capacity": 15,
    "cache_full": 15,
    "model_loading": 30,
    "database_unavailable": 15,
    "missing_blocks": 30,
}
"""When another try is worth it, by code: guesses of how long such a state lasts; others may be tried at once."""


def retry_after_s(report: ErrorReport) -> int | None:
    """Return after how many seconds to try again; None where that would not help."""
    if report.retry_after_s is not None:
        return report.retry_after_s
    return RETRY_AFTER_S.get(report.code, 0) if report.retryable else None


SHUT_OUT = (BannedError, InvalidKeyError)
"""Errors by which somebody who was let in is sent away."""

HTTP_STATUS = {
    "model_not_found": 404,
    "key_required": 401,
    "invalid_key": 401,
    "banned": 403,
    "origin_not_allowed": 403,
    "embed_closed": 403,
    "content_refused": 400,
    "invalid_request": 400,
    "malformed_frame": 400,
    "max_length_exceeded": 400,
    "replaced": 409,
    "frame_too_large": 413,
    "limit_exceeded": 429,
    "internal_error": 500,
    "timeout": 504,
}
"""Statuses of errors told by HTTP; a code that is not listed is a 503 when retryable, else a 500."""


def http_status(report: ErrorReport) -> int:
    """Return the HTTP status that fits an error."""
    return HTTP_STATUS.get(report.code, 503 if report.retryable else 500)
