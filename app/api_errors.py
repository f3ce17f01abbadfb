"""Errors told by HTTP: as JSON with a code on the API's paths, in one plain sentence elsewhere."""

import logging
import secrets

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from app.chat_protocol import error_object, legacy_error
from app.errors import ErrorReport, http_status, report_error
from app.security import is_api
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)


def make_report(error: BaseException) -> ErrorReport:
    """Return what a client may know; the log gets the rest of what is our fault."""
    request_id = secrets.token_hex(8)
    if not isinstance(error, SwarmError):
        logger.error("bug request_id=%s path=%s", request_id, request.path, exc_info=error)
    return report_error(error, request_id)


def error_response(error: BaseException, status: int | None = None) -> Response:
    """Return an error in the form that both protocols' clients read, with a real status."""
    report = make_report(error)
    response = jsonify(legacy_error(report))
    response.status_code = http_status(report) if status is None else status
    response.headers["X-Error-Code"] = report.code
    if report.retryable:
        response.headers["Retry-After"] = "30"
    return response


def register(app: Flask) -> None:
    """Have every error of `app` told in JSON on the API's paths, and never with a stack."""

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if is_api(request.path):
            response = jsonify(error={"code": f"http_{status}", "message": error.description, "retryable": False})
        else:
            response = Response(f"{status} {error.name}\n", mimetype="text/plain")
        response.status_code = status
        for name, value in error.get_headers(request.environ):
            if name in ("Allow", "Location"):
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def bug(error: Exception) -> Response:
        report = make_report(error)
        if is_api(request.path):
            response = jsonify(error=error_object(report))
        else:
            response = Response(f"{report.message}\n", mimetype="text/plain")
        response.status_code = http_status(report)
        return response
