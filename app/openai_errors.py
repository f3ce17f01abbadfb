"""Pure: errors in the form and with the statuses that clients of OpenAI's API know."""

from app.errors import ErrorReport, ModelNotFoundError, http_status
from app.openai_replies import ErrorBody, ErrorObject
from app.openai_requests import ParamError

CODES = {
    "max_length_exceeded": "context_length_exceeded",
    "missing_blocks": "no_servers_for_blocks",
    "cache_full": "capacity_exceeded",
    "no_capacity": "capacity_exceeded",
    "limit_exceeded": "rate_limit_exceeded",
    "timeout": "swarm_timeout",
    "content_refused": "content_filter",
}
"""Codes that have another name here; all others are the same in every API."""

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

RETRY_AFTER_S = 30

HOPELESS = ("missing_blocks",)
"""Of these the swarm has waited long enough itself; clients that try again at once only make others wait."""


def openai_error(report: ErrorReport, param: str | None = None, status: int | None = None) -> ErrorBody:
    """Return the body that tells an error; `status` None means the one that fits it."""
    number = http_status(report) if status is None else status
    kind = TYPES.get(number, "server_error" if number >= 500 else "invalid_request_error")
    return ErrorBody(
        error=ErrorObject(
            message=report.message,
            type=kind,
            param=param,
            code=CODES.get(report.code, report.code),
            retryable=report.retryable,
            request_id=report.request_id,
        )
    )


def param_of(error: BaseException) -> str | None:
    """Return the field of a request that an error is about, if it is about one."""
    match error:
        case ParamError():
            return error.param
        case ModelNotFoundError():
            return "model"
        case _:
            return None


def openai_error_headers(report: ErrorReport) -> dict[str, str]:
    """Return the headers by which clients decide whether to try again."""
    is_worth_it = report.retryable and report.code not in HOPELESS
    headers = {"X-Error-Code": report.code, "X-Should-Retry": "true" if is_worth_it else "false"}
    wait_s = RETRY_AFTER_S if report.retry_after_s is None else report.retry_after_s
    return headers | ({"Retry-After": str(wait_s)} if report.retryable else {})


def is_openai(path: str) -> bool:
    """Return whether a path is one of the OpenAI-compatible API's, whose errors have its form."""
    return path.startswith("/v1/") or (path.startswith("/api/v1/") and path != "/api/v1/generate")
