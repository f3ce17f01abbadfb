"""`GET /openapi.json`: the description of the site's HTTP paths."""

import json

from flask import Flask, Response

from app.openapi import openapi_document
from app.own_version import site_version


def register(app: Flask) -> None:
    """Serve the description in `app`."""
    body = json.dumps(openapi_document(site_version()), separators=(",", ":"))

    @app.get("/openapi.json")
    def openapi() -> Response:
        response = Response(body, mimetype="application/json")
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response
