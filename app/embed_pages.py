"""What other sites embed: the page of a widget key, its tokens, the loader, and the page that writes snippets."""

import json
import re

from flask import Flask, Response, abort, jsonify, make_response, render_template, request, send_from_directory

from app.embed_tokens import TOKEN_LIFE_S
from app.pages import IMMUTABLE, STATIC_FOLDER, build_hash
from app.security import embed_policy, normal_origin, preview_policy
from app.site import Site
from app.swarm_texts import languages
from app.widget_keys import WidgetKey

LOADER_FOLDER = STATIC_FOLDER / "widget"
FLOATING_CACHE = "public, max-age=3600"
EMPTY_PAGE = "<!doctype html><title></title>"
SHARED_MODULES = ("chat.js", "composer.js", "connection.js", "render.js", "transcript.js")
"""Those that the embed page asks for first; they name the others."""


def loader_versions() -> dict[str, str]:
    """Return the released versions of the loader, oldest first, with their hashes for `integrity`."""
    found = json.loads((LOADER_FOLDER / "MANIFEST.json").read_text())
    ordered = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    return {version: f"sha384-{found[version]['sha384']}" for version in ordered}


def key_origins(key: WidgetKey) -> list[str]:
    """Return the origins that may embed a key, as browsers write them; what is none cannot reach a header."""
    found = [normal_origin(origin) for origin in key.origins]
    return [origin for origin in found if origin is not None and re.fullmatch(r"https?://[\w.\[\]:-]+", origin)]


def embed_config(site: Site, key: WidgetKey, address: str) -> dict[str, object]:
    """Return what the embed page has to know."""
    sockets = site.config.sockets
    return {
        "key": key.key,
        "origins": key_origins(key),
        "theme": key.theme,
        "socket_path": "/api/v2/generate",
        "token": site.embed_tokens.make(key.key, address),
        "token_path": f"/embed/{key.key}/token",
        "token_life_s": TOKEN_LIFE_S,
        "max_frame_bytes": sockets.max_frame_bytes,
        "ping_interval_s": sockets.ping_interval_s,
        "languages": languages(),
        "reports": site.config.operation.reports,
    }


def _empty_page() -> Response:
    """Return what unknown, disabled and revoked keys all get, so that nobody learns which are which."""
    response = make_response(EMPTY_PAGE, 404)
    response.headers["Cache-Control"] = "no-store"
    return response


def register(app: Flask, site: Site) -> None:
    """Serve the widget in `app`."""
    build = build_hash(STATIC_FOLDER)
    modules = [*SHARED_MODULES, *sorted(f"embed/{path.name}" for path in (STATIC_FOLDER / "js/embed").glob("*.js"))]
    versions = loader_versions()
    newest = list(versions)[-1]

    def usable(name: str) -> WidgetKey | None:
        key = site.widget_keys.find(name)
        return key if key is not None and key.is_enabled else None

    @app.get("/embed/<name>")
    def embed_page(name: str) -> Response:
        key = usable(name)
        if key is None:
            return _empty_page()
        config = embed_config(site, key, request.remote_addr or "")
        response = make_response(render_template("embed.html", build=build, modules=modules, config=config))
        response.headers["Content-Security-Policy"] = embed_policy(key_origins(key))
        response.headers["Cache-Control"] = "no-store"  # it has a token
        # For pages that are isolated from other origins (COEP) and may frame only what agrees to that.
        response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        response.headers["Cross-Origin-Embedder-Policy"] = "require-corp"
        return response

    @app.get("/embed/<name>/token")
    def embed_token(name: str) -> Response:
        key = usable(name)
        if key is None or request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            abort(404)
        response = jsonify(token=site.embed_tokens.make(key.key, request.remote_addr or ""))
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/widget/v<version>.js")
    def loader(version: str) -> Response:
        if version not in versions and version != "1":
            abort(404)
        found = newest if version == "1" else version
        response = send_from_directory(LOADER_FOLDER, f"v{found}.js", mimetype="text/javascript")
        response.headers["Cache-Control"] = FLOATING_CACHE if version == "1" else IMMUTABLE
        response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        response.headers["Access-Control-Allow-Origin"] = "*"  # a page that pins the hash asks for it with CORS
        return response

    @app.get("/widget")
    def widget_page() -> Response:
        config = {"origin": request.host_url.rstrip("/"), "version": newest, "integrity": versions[newest]}
        page = render_template("widget.html", build=build, config={**config, "languages": languages()})
        response = make_response(page)
        response.headers["Content-Security-Policy"] = preview_policy()
        response.headers["Cache-Control"] = "no-cache"
        return response
