"""`POST /api/v2/reports`, for the site's own pages: a reader tells what is wrong with an answer."""

from flask import Flask, Response, abort, request

from app.api_errors import current_request_id, error_response
from app.errors import OriginError
from app.json_body import json_body
from app.reports import ReportRate, ReportRequest, Reports
from app.request_models import parse_fields
from app.security import request_is_own
from app.site import Site
from swarm_protocol.errors import SwarmError


def register(app: Flask, site: Site) -> None:
    """Take reports in `app`, if those who run the site want any; else there is nothing at the path."""
    operation = site.config.operation
    reports, rate = Reports(site.database, operation.reports_days), ReportRate()

    @app.post("/api/v2/reports")
    def report() -> Response:
        if not operation.reports:
            abort(404)
        try:
            if not request_is_own(request, site.config.security):
                raise OriginError("reporting answers")
            asked = parse_fields(ReportRequest, json_body(request))
            rate.count(request.remote_addr or "")
            reports.add(asked, current_request_id())
        except SwarmError as error:
            return error_response(error)
        return Response(status=204)
