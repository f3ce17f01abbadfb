"""Errors of sockets on their way to a client: what the client may not know goes into the site's log."""

import logging
import secrets

from app.errors import ErrorReport, report_error
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)


def logged_report(error: Exception, session_id: str) -> ErrorReport:
    """Return what a client is told of `error`, and log it under the same number."""
    request_id = secrets.token_hex(8)
    if not isinstance(error, SwarmError):
        logger.error("bug request_id=%s session=%s", request_id, session_id, exc_info=error)
    else:
        logger.info("refused code=%s request_id=%s session=%s", error.code, request_id, session_id)
    return report_error(error, request_id)
