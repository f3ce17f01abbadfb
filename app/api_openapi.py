"""`GET /openapi.json`: the description of the site's HTTP paths."""

import json
from importlib.metadata import PackageNotFoundError, version

from flask import Flask, Response

from app.openapi import openapi_document


def register(app: Flask) -> None:
    """Serve the description in `app`."""
    body = json.dumps(openapi_document(_version()), separators=(",", ":"))

    @app.get("/openapi.json")
    def openapi() -> Response:
        response = Response(body, mimetype="application/json")
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response


def _version() -> str:
    try:
        return version("umbel")
    except PackageNotFoundError:  # run from a folder, without having been installed
        return "0"
