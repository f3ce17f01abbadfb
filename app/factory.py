"""The Flask application, put together from its parts."""

from typing import cast

from flask import Flask

from app import (
    access,
    api_access,
    api_errors,
    api_http,
    api_metrics,
    api_openai,
    api_openapi,
    api_reports,
    api_swarm,
    api_usage,
    api_ws,
    embed_pages,
    pages,
    security,
    swarm_page,
)
from app.access import with_access
from app.config import SiteConfig, environment_config
from app.model_registry import ModelRegistry, swarm_registry
from app.site import EXTENSION, Site
from app.ws_socket import with_websockets

MAX_BODY_BYTES = 1_048_576  # a prompt that fills any context is below 200 kB


def create_app(config: SiteConfig | None = None, models: ModelRegistry | None = None) -> Flask:
    """Return the site as a WSGI application. It opens no model before `site_of(app).start` is called.

    `config` None means the environment's; `models` None means the models of `config`, through the swarm.
    """
    config = environment_config() if config is None else config
    site = Site(config, models or swarm_registry(config))
    app = Flask("app", static_folder=None, template_folder=str(pages.TEMPLATE_FOLDER))
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.config["MAX_FORM_MEMORY_SIZE"] = MAX_BODY_BYTES
    app.extensions[EXTENSION] = site
    app.json.ensure_ascii = True  # type: ignore[attr-defined]
    access.register(app)
    api_errors.register(app)
    api_access.register(app, site)
    api_ws.register(app, site)
    api_http.register(app, site)
    api_openai.register(app, site)
    api_openapi.register(app)
    api_reports.register(app, site)
    api_swarm.register(app, site)
    api_usage.register(app, site)
    api_metrics.register(app, site)
    pages.register(app, site)
    swarm_page.register(app, site)
    embed_pages.register(app, site)
    security.secure(app, config.security)
    wsgi_app = with_websockets(app.wsgi_app, config.sockets.send_timeout_s)
    app.wsgi_app = with_access(api_ws.with_socket_cap(wsgi_app, site), site)  # type: ignore[method-assign, assignment]
    return app


def site_of(app: Flask) -> Site:
    """Return what the requests of an application made by `create_app` share."""
    return cast(Site, app.extensions[EXTENSION])
