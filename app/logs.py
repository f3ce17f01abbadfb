"""The log of a site: lines for people or JSON for collectors, each with the id of the request that it is about.

What readers write and get is never in it, unless the operator turns that on: what goes wrong in a request is logged
without the text of the exception, which may quote what it choked on.
"""

import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from app import request_ids
from app.config import OperationConfig

logger = logging.getLogger(__name__)

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class _Context(logging.Filter):
    """Notes in each record which request its thread works for; a record may say so itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        found = request_ids.current_id()
        record.fields = {**getattr(record, "fields", {}), **({"request_id": found} if found else {})}
        return True


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(record, "fields", {})
    return found


def _without_texts(error: BaseException) -> list[str]:
    """Return the stack of an exception and of those behind it: where, and of what kind, but not what they say."""
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [] if inner is None else [*_without_texts(inner), "\nand then:\n\n"]
    lines += ["Traceback (most recent call last):\n", *traceback.format_tb(error.__traceback__)]
    return [*lines, f"{type(error).__name__}: (its text is left out, since it may quote a reader)\n"]


def _stack(exc_info: Any, *, is_quoted: bool) -> str:
    """Return the stack that a record has; with the texts of its exceptions if `is_quoted`, or outside of a request."""
    error = exc_info[1]
    if error is None:
        return ""
    if is_quoted or request_ids.current_id() is None:
        return "".join(traceback.format_exception(error)).rstrip("\n")
    return "".join(_without_texts(error)).rstrip("\n")


class _TextFormatter(logging.Formatter):
    def __init__(self, *, is_quoted: bool) -> None:
        super().__init__(TEXT_FORMAT)
        self._is_quoted = is_quoted

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # of another handler, which may tell more
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the library's name
        pairs = [
            f"{name}={value!r}" if " " in f"{value}" else f"{name}={value}" for name, value in _fields(record).items()
        ]
        return " ".join([super().formatMessage(record), *pairs])

    def formatException(self, exc_info: Any) -> str:  # noqa: N802
        return _stack(exc_info, is_quoted=self._is_quoted)


class _JsonFormatter(JsonFormatter):
    def __init__(self, *, is_quoted: bool) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s", rename_fields={"levelname": "level", "name": "logger"})
        self._is_quoted = is_quoted

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None
        return super().format(record)

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        super().add_fields(log_data, record, message_dict)
        log_data.update(log_data.pop("fields", {}))

    def formatException(self, exc_info: Any) -> str:  # noqa: N802
        return _stack(exc_info, is_quoted=self._is_quoted)


class _Addresses(logging.Filter):
    """Takes readers' addresses out of what gunicorn says of requests that it could not read."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if " ip=" in message:
            record.msg, record.args = re.sub(r" from ip=\S+?(?=:? |$)", "", message), ()
        return True


def configure_logs(config: OperationConfig) -> None:
    """Have this process log to stderr as `config` says. Called once, before anything is served."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Context())
    if not config.log_addresses:
        handler.addFilter(_Addresses())
    form = _JsonFormatter if config.log_format == "json" else _TextFormatter
    handler.setFormatter(form(is_quoted=config.log_prompts))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Its lines show links to a hub's storage, which open it for whoever has them.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # two lines whenever a database is looked at
    if config.log_prompts:
        logger.warning(
            "UMBEL_LOG_PROMPTS is on: this log holds what readers write and what they are answered. "
            "Tell them so, and keep it as you would keep letters"
        )
