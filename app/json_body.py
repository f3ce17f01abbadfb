"""The JSON in the body of a request, whatever its sender says that it is."""

import json
from typing import Any

from flask import Request

from swarm_protocol.errors import InvalidRequestError


def json_body(req: Request) -> dict[str, Any]:
    """Return the object in the body. Raises InvalidRequestError, and RequestEntityTooLarge beyond the site's limit."""
    try:
        values = json.loads(req.get_data(cache=False))
    except (ValueError, RecursionError):
        raise InvalidRequestError("the body is not valid JSON") from None
    if not isinstance(values, dict):
        raise InvalidRequestError("the body is not a JSON object")
    return values
