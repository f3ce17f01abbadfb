"""Errors told by HTTP: as JSON with a code on the API's paths, in OpenAI's form on OpenAI's, else in a plain sentence.

Each request has an id, in a header of its answer and in the log with whatever goes wrong.
"""

import logging

from flask import Flask, Response, current_app, has_app_context, jsonify, request
from werkzeug.exceptions import HTTPException

from app import request_ids
from app.chat_protocol import error_object, legacy_error
from app.errors import ErrorReport, http_status, report_error
from app.openai_errors import is_openai, openai_error, openai_error_headers, param_of
from app.security import is_api
from app.site import EXTENSION, Site
from swarm_protocol.errors import SwarmError

logger = logging.getLogger(__name__)


def current_request_id() -> str:
    """Return the id of the request that this thread answers."""
    return request_ids.current_id() or ""


def make_report(error: BaseException, path: str | None = None, request_id: str | None = None) -> ErrorReport:
    """Return what a client may know; the log gets the rest of what is our fault.

    `path` and `request_id` are those of the current request, unless there is none any more.
    """
    request_id = current_request_id() if request_id is None else request_id
    if not isinstance(error, SwarmError):
        where = request.path if path is None else path
        logger.error("bug path=%s", where, exc_info=error)
    report = report_error(error, request_id)
    if has_app_context():
        site: Site = current_app.extensions[EXTENSION]
        site.metrics.error(report.code)
    return report


def openai_response(error: BaseException) -> Response:
    """Return an error in OpenAI's form."""
    report = make_report(error)
    response = Response(openai_error(report, param_of(error)).as_json(), mimetype="application/json")
    response.status_code = http_status(report)
    response.headers.update(openai_error_headers(report))
    return response


def error_response(error: BaseException, status: int | None = None) -> Response:
    """Return an error in the form that both protocols' clients read, with a real status."""
    report = make_report(error)
    response = jsonify(legacy_error(report))
    response.status_code = http_status(report) if status is None else status
    response.headers["X-Error-Code"] = report.code
    if report.retryable:
        response.headers["Retry-After"] = "30" if report.retry_after_s is None else str(report.retry_after_s)
    return response


def register(app: Flask) -> None:
    """Have every error of `app` told in JSON on the API's paths, and never with a stack."""

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        if is_openai(request.path):
            told = ErrorReport(
                error.name, f"http_{status}", error.description or error.name, False, current_request_id()
            )
            response = Response(openai_error(told, status=status).as_json(), mimetype="application/json")
            response.headers["X-Should-Retry"] = "false"
        elif is_api(request.path):
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
        if is_openai(request.path):
            return openai_response(error)
        report = make_report(error)
        if is_api(request.path):
            response = jsonify(error=error_object(report))
        else:
            response = Response(f"{report.message}\n", mimetype="text/plain")
        response.status_code = http_status(report)
        return response
