"""`GET /api/v2/usage`: what the key that asks has used."""

from flask import Flask, Response, request

from app.caller import caller_of
from app.errors import KeyRequiredError
from app.site import Site
from app.usage import KEPT_DAYS
from app.usage_replies import usage_reply
from swarm_protocol.errors import InvalidRequestError

DEFAULT_DAYS = 30


def register(app: Flask, site: Site) -> None:
    """Serve it in `app`."""

    @app.get("/api/v2/usage")
    def usage() -> Response:
        key = caller_of(request.environ).api_key
        if key is None:
            raise KeyRequiredError
        text = request.args.get("days", str(DEFAULT_DAYS))
        if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= KEPT_DAYS):
            raise InvalidRequestError(f"days: a number from 1 to {KEPT_DAYS} is wanted")
        site.usage.flush()  # what this process has counted shows at once
        reply = usage_reply(key, site.usage.rows(int(text), key.id))
        return Response(reply.model_dump_json(), mimetype="application/json")
