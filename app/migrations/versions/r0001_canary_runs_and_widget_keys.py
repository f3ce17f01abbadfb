"""Test answers and widget keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "canary_runs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("first_token_s", sa.Double),
        sa.Column("tokens_per_s", sa.Double),
        sa.Column("min_replicas", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_canary_runs"),
    )
    op.create_index("ix_canary_runs_model_started_at", "canary_runs", ["model", "started_at"])
    op.create_table(
        "widget_keys",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("origins", sa.Text, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("system_prompt", sa.Text, nullable=False),
        sa.Column("theme", sa.Text, nullable=False),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("tokens_per_day", sa.Integer),
        sa.Column("is_enabled", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_widget_keys"),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("widget_keys")
    op.drop_table("canary_runs")
