"""The tables of the site's database, as they are after all migrations: a test holds the two against each other.

Times are in seconds since 1970. What has no value is NULL.
"""

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text

metadata = MetaData(naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"})
"""Constraints have names that do not depend on the database, so that migrations can name them."""

canary_runs = Table(
    "canary_runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("model", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("first_token_s", Double),
    Column("tokens_per_s", Double),
    Column("min_replicas", Integer, nullable=False),
    Index(None, "model", "started_at"),
)

widget_keys = Table(
    "widget_keys",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("origins", Text, nullable=False),  # separated by spaces, which no origin has
    Column("model", Text),
    Column("system_prompt", Text, nullable=False),
    Column("theme", Text, nullable=False),
    Column("requests_per_minute", Integer),
    Column("tokens_per_day", Integer),
    Column("is_enabled", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("secret_hash", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("requests_per_minute", Integer),
    Column("tokens_per_day", Integer),
    Column("sessions", Integer),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Index(None, "secret_hash", unique=True),
    Index(None, "revoked_at"),
)

bans = Table(
    "bans",
    metadata,
    Column("target", String(64), primary_key=True),  # a network in CIDR form, or the id of a key
    Column("reason", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
)

reports = Table(
    "reports",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("created_at", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("comment", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("conversation", Text),  # JSON: pairs of role and text; NULL where the reader did not send it
    Index(None, "created_at"),
)

usage = Table(
    "usage",
    metadata,
    Column("day", Integer, primary_key=True, autoincrement=False),  # since 1970, of UTC
    Column("key_id", String(64), primary_key=True),  # of an API or widget key; empty for what is nobody's
    Column("model", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("answer_tokens", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Index(None, "key_id", "day"),
)
