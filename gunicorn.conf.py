"""gunicorn's settings for the site, from the environment: `gunicorn -c gunicorn.conf.py`."""

import logging
import os
import sys

from app.config import environment_config
from app.server import gunicorn_settings
from swarm_protocol.errors import ConfigError

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
# Its lines show links to a hub's storage, which open it for whoever has them.
logging.getLogger("httpx2").setLevel(logging.WARNING)

os.environ.setdefault("UMBEL_HOST", "0.0.0.0")  # noqa: S104  a host's router reaches it from outside
_config = environment_config()
if not _config.models:
    raise ConfigError("no model to serve: set UMBEL_MODELS")

globals().update(gunicorn_settings(_config))
