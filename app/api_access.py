"""Who a request comes from, as far as the site lets it in: its API key, and whether it was shut out.

A Bearer text that does not begin like a key of ours is nobody's: OpenAI's clients always send one, with any text. One
that does is meant for us, so it has to be good: whoever holds it counts on its limits and its usage.
"""

import re

from flask import Flask, Request, Response, request

from app.api_keys import PREFIX, ApiKey
from app.caller import CALLER, Caller
from app.errors import InvalidKeyError, KeyRequiredError
from app.key_usage import standing_headers
from app.security import is_api, request_is_own
from app.site import Site

GENERATING = re.compile(r"/api/v[12]/generate|(/api)?/v1/(models(/.*)?|chat/completions|completions|embeddings)")
"""Paths that need a key where the site wants one. What shows the swarm stays open, as its page does."""

LIMITED = re.compile(r"(/api)?/v1/(chat/completions|completions|embeddings)")
"""Paths whose answers tell what is left of the caller's limits, in headers that OpenAI's clients know."""

UNCHECKED = ("/health/", "/healthz", "/readyz", "/metrics", "/v1/health", "/api/v1/health")
"""Probes: they ask for no database, and nobody is shut out."""


def bearer_text(authorization: str) -> str:
    """Return what a client sent as `Authorization: Bearer`; empty for none."""
    scheme, _, text = authorization.strip().partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


def sent_key(site: Site, req: Request) -> ApiKey | None:
    """Return the API key that a request came with. Raises InvalidKeyError, DatabaseUnavailableError."""
    text = bearer_text(req.headers.get("Authorization", ""))
    if not text.startswith(PREFIX):
        return None
    key = site.api_keys.find(text)
    if key is None:
        raise InvalidKeyError
    return key


def _is_own_page(site: Site, req: Request) -> bool:
    """Return whether a page of the site asks. A reading of one's own page has no Origin, but says where it is from."""
    return request_is_own(req, site.config.security) or req.headers.get("Sec-Fetch-Site") == "same-origin"


def register(app: Flask, site: Site) -> None:
    """Have every request of `app` looked at before anything is done for it."""

    @app.before_request
    def identify() -> None:
        path = request.path
        if path.startswith(UNCHECKED) or request.method == "OPTIONS":
            return
        key = sent_key(site, request) if is_api(path) else None
        caller = Caller(request.remote_addr or "", key)
        site.bans.check(caller)
        request.environ[CALLER] = caller
        is_wanted = site.config.security.require_key and GENERATING.fullmatch(path) is not None
        if is_wanted and key is None and not _is_own_page(site, request):
            raise KeyRequiredError

    @app.after_request
    def tell_limits(response: Response) -> Response:
        caller = request.environ.get(CALLER)
        quota = site.quota(caller) if isinstance(caller, Caller) and LIMITED.fullmatch(request.path) else None
        if quota is not None:
            usage = site.key_usage
            response.headers.update(standing_headers(usage.requests(quota), usage.tokens(quota)))
        return response

    @app.after_request
    def name_the_scheme(response: Response) -> Response:
        if response.status_code == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response
