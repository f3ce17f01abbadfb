"""Errors of sockets on their way to a client: what the client may not know goes into the site's log."""

import logging
import secrets

from app import request_ids
from app.errors import ErrorReport, report_error
from app.site import Site
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)


def logged_report(site: Site, error: Exception, session_id: str) -> ErrorReport:
    """Return what a client is told of `error`; log it under the id of what this thread does, and count it."""
    request_id = request_ids.current_id() or secrets.token_hex(8)
    if not isinstance(error, SwarmError):
        logger.error("bug session=%s", session_id, exc_info=error)
    else:
        logger.info("refused code=%s session=%s", error.code, session_id)
    report = report_error(error, request_id)
    site.metrics.error(report.code)
    return report
