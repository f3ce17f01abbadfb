"""Which version a database's tables are of, and how they are brought to this program's."""

import logging
from enum import Enum
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
UPGRADE_LOCK = 7_083_201_507
"""Of PostgreSQL's advisory locks: any number that others are unlikely to take."""


class SchemaState(Enum):
    """What the tables of a database are to this program."""

    EMPTY = "empty"
    BEHIND = "behind"
    CURRENT = "current"
    NEWER = "newer"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def revisions() -> list[str]:
    """Return all versions that this program knows, the first one first."""
    script = ScriptDirectory.from_config(_config())
    return [found.revision for found in reversed(list(script.walk_revisions()))]


def revision_of(connection: Connection) -> str | None:
    """Return the version of a database; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def schema_state(connection: Connection) -> SchemaState:
    """Compare a database with this program."""
    found, known = revision_of(connection), revisions()
    if found is None:
        return SchemaState.EMPTY
    if found not in known:
        return SchemaState.NEWER
    return SchemaState.CURRENT if found == known[-1] else SchemaState.BEHIND


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring a database to a version, within the transaction of `connection`, which has to be one that writes.

    Processes that do this at the same time wait for each other; who comes second finds nothing to do.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
    config = _config()
    config.attributes["connection"] = connection
    current, known = revision_of(connection), revisions()
    target = known[-1] if revision == "head" else revision
    if current != target:
        logger.info("the database's tables go from version %s to %s", current or "none", target)
    goes_up = current is None or (target in known and known.index(target) >= known.index(current))
    (command.upgrade if goes_up else command.downgrade)(config, target)
