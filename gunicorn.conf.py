"""gunicorn's settings for the site, from the environment: `gunicorn -c gunicorn.conf.py`."""

import os
import sys
from typing import Any

from app.config import environment_config
from app.database import site_database
from app.logs import configure_logs
from app.moderation import check_hook
from app.server import gunicorn_settings
from swarm_protocol.errors import ConfigError


def _settings() -> dict[str, Any]:
    os.environ.setdefault("UMBEL_HOST", "0.0.0.0")  # noqa: S104  a host's router reaches it from outside
    config = environment_config()
    configure_logs(config.operation)
    if not config.models:
        raise ConfigError("no model to serve: set UMBEL_MODELS")
    site_database(config.database_url).check()
    check_hook(config.operation)
    return gunicorn_settings(config)


try:
    globals().update(_settings())
except ConfigError as error:  # gunicorn would show a stack
    sys.stderr.write(f"umbel-chat: {error}\n")
    sys.exit(2)
