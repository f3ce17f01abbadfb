"""`GET /metrics`: what Prometheus reads. All of it is on the status page as well, so that everybody may have it."""

from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from app.site import Site
from app.swarm_metrics import SwarmCollector


def register(app: Flask, site: Site) -> None:
    """Serve the swarm's gauges in `app`."""
    registry = CollectorRegistry()
    registry.register(SwarmCollector(site.board.report))

    @app.get("/metrics")
    def metrics() -> Response:
        response = Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)
        response.headers["Cache-Control"] = "no-store"
        return response
