"""The chat page, and the static files under a path that changes with their content."""

import hashlib
from pathlib import Path

from flask import Flask, Response, abort, make_response, render_template, send_from_directory

from app.config import SiteConfig
from app.site import Site

ROOT = Path(__file__).resolve().parent.parent
STATIC_FOLDER = ROOT / "static"
TEMPLATE_FOLDER = ROOT / "templates"

IMMUTABLE = "public, max-age=31536000, immutable"


def build_hash(folder: Path) -> str:
    """Return a name for the content of all files in `folder`: it changes when one of them does."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def page_config(site: Site) -> dict[str, object]:
    """Return what the page has to know before it connects."""
    config: SiteConfig = site.config
    models = [
        {
            "id": entry.name,
            "status": entry.status,
            "context_length": entry.context_length,
            "missing": list(entry.missing),
        }
        for entry in site.models.entries()
    ]
    return {
        "models": models,
        "socket_path": "/api/v2/generate",
        "max_frame_bytes": config.sockets.max_frame_bytes,
        "session_max_length": config.generation.session_max_length,
        "ping_interval_s": config.sockets.ping_interval_s,
        "reports": config.operation.reports,
        "initial_peers": list(config.initial_peers),
        "languages": sorted(path.stem for path in (STATIC_FOLDER / "locales").glob("*.json")),
    }


def register(app: Flask, site: Site) -> None:
    """Serve the page and its files in `app`."""
    build = build_hash(STATIC_FOLDER)
    modules = sorted(path.name for path in (STATIC_FOLDER / "js").glob("*.js"))

    @app.get("/")
    def chat_page() -> Response:
        page = render_template("chat.html", build=build, modules=modules, config=page_config(site))
        response = make_response(page)
        response.headers["Cache-Control"] = "no-cache"
        return response

    @app.get("/static/<build_name>/<path:name>")
    def static_file(build_name: str, name: str) -> Response:
        if build_name != build:  # of an older build: its page reloads rather than mixing modules
            abort(404)
        response = send_from_directory(STATIC_FOLDER, name)
        response.headers["Cache-Control"] = IMMUTABLE
        return response
