"""Who may call what from where: security headers, cross-origin rules, and the check of a websocket's Origin."""

from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from flask import Flask, Request, Response, abort, request
from werkzeug.middleware.proxy_fix import ProxyFix

from app.config import SecurityConfig

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
API_PREFIXES = ("/api/", "/v1/")

API_POLICY = "default-src 'none'; frame-ancestors 'none'"

# No inline script or style, nothing from other hosts, and no way to turn a string into HTML.
PAGE_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "manifest-src 'self'",
        "worker-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)


def embed_policy(origins: Sequence[str]) -> str:
    """Return the policy of a page that pages of `origins`, and the site's own, may show in a frame."""
    return PAGE_POLICY.replace("frame-ancestors 'none'", " ".join(["frame-ancestors 'self'", *origins]))


def preview_policy() -> str:
    """Return the policy of a page that shows embedded chats of this site."""
    return f"{PAGE_POLICY}; frame-src 'self'"


HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=(), interest-cohort=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def normal_origin(origin: str) -> str | None:
    """Return an Origin as scheme://host[:port] in lower case, without a default port; None if it is none."""
    try:
        parts = urlsplit(origin.strip().lower())
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    is_default = port in (None, {"http": 80, "https": 443}[parts.scheme])
    return f"{parts.scheme}://{host}" if is_default else f"{parts.scheme}://{host}:{port}"


def is_own_origin(origin: str | None, site_url: str, allowed: Collection[str]) -> bool:
    """Return whether a page of `origin` is the site's own or named in the configuration.

    No Origin, and `null`, are nobody's: a browser always names the origin of a page that opens a websocket.
    """
    found = normal_origin(origin) if origin else None
    return found is not None and found in {normal_origin(known) for known in (site_url, *allowed)}


def request_is_own(req: Request, config: SecurityConfig) -> bool:
    """Return whether a request comes from the site's own or a configured page."""
    return is_own_origin(req.headers.get("Origin"), req.host_url, config.allowed_origins)


def is_forged(req: Request, config: SecurityConfig) -> bool:
    """Return whether a page of somebody else may have made a reader's browser send a request.

    A browser names the page's origin or its relation to the site in every request with an unsafe method; what names
    neither is no browser, and has no reader whose rights it could use.
    """
    if "Origin" in req.headers:
        return not request_is_own(req, config)
    return req.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")


def is_api(path: str) -> bool:
    """Return whether a path belongs to the API, which other origins may use."""
    return path.startswith(API_PREFIXES)


CLIENT_HEADERS = ("x-stainless-", "openai-")
"""How the headers begin by which OpenAI's libraries describe themselves, in browsers too."""


def _allowed_headers(req: Request) -> str:
    asked = [name.strip() for name in req.headers.get("Access-Control-Request-Headers", "").split(",")]
    own = [name for name in asked if name.lower().startswith(CLIENT_HEADERS) and name.replace("-", "").isalnum()]
    return ", ".join(["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key", "X-Request-ID", *own[:20]])


def _allow_cross_origin(response: Response, config: SecurityConfig) -> None:
    origin = request.headers.get("Origin", "")
    if config.public_api:
        response.headers["Access-Control-Allow-Origin"] = "*"
    elif is_own_origin(origin, request.host_url, config.allowed_origins):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.vary.add("Origin")
    else:
        return
    response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
    response.headers["Access-Control-Allow-Headers"] = _allowed_headers(request)
    response.headers["Access-Control-Expose-Headers"] = (
        "X-Error-Code, X-Request-ID, Retry-After, X-Should-Retry, X-Ignored-Params"
    )
    response.headers["Access-Control-Max-Age"] = "86400"


def secure(app: Flask, config: SecurityConfig) -> None:
    """Give every response of `app` its headers, and believe the configured proxies."""
    if config.trusted_hosts:
        app.config["TRUSTED_HOSTS"] = list(config.trusted_hosts)
    if config.trusted_proxies:
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=config.trusted_proxies, x_proto=1, x_host=1
        )

    @app.before_request
    def refuse_forged() -> None:
        if request.method not in SAFE_METHODS and not is_api(request.path) and is_forged(request, config):
            abort(403)

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        policy = PAGE_POLICY if response.mimetype == "text/html" else API_POLICY
        response.headers.setdefault("Content-Security-Policy", policy)
        if config.hsts:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"
        if is_api(request.path):
            _allow_cross_origin(response, config)
            response.headers.setdefault("Cache-Control", "no-store")
        else:
            response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        return response
