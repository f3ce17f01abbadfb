"""The OpenAI-compatible API, mounted at `/v1` and `/api/v1`: for now the list of models."""

import time
from typing import Any

from flask import Flask, Response, jsonify

from app.model_registry import ModelEntry
from app.site import Site

PREFIXES = ("/v1", "/api/v1")


def model_object(entry: ModelEntry, created: int) -> dict[str, Any]:
    """Return a model in OpenAI's form, with what a swarm adds: whether all of its blocks are served."""
    return {
        "id": entry.name,
        "object": "model",
        "created": created,
        "owned_by": "umbel",
        "context_length": entry.context_length,
        "max_model_len": entry.context_length,
        "status": entry.status,
        "missing_blocks": list(entry.missing),
    }


def openai_error(status: int, message: str, code: str, param: str | None = None) -> Response:
    """Return an error in OpenAI's form."""
    response = jsonify(error={"message": message, "type": "invalid_request_error", "param": param, "code": code})
    response.status_code = status
    return response


def register(app: Flask, site: Site) -> None:
    """Serve the API in `app`."""
    created = int(time.time())

    def list_models() -> Response:
        return jsonify(object="list", data=[model_object(entry, created) for entry in site.models.entries()])

    def get_model(model_id: str) -> Response:
        for entry in site.models.entries():
            if entry.name == model_id:
                return jsonify(model_object(entry, created))
        return openai_error(404, f"the model {model_id[:100]!r} does not exist", "model_not_found", "model")

    for prefix in PREFIXES:
        app.add_url_rule(f"{prefix}/models", f"list_models{prefix}", list_models, methods=["GET"])
        app.add_url_rule(f"{prefix}/models/<path:model_id>", f"get_model{prefix}", get_model, methods=["GET"])
