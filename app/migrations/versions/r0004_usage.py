"""What was used, by day, key and model."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "usage",
        sa.Column("day", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("answer_tokens", sa.BigInteger, nullable=False),
        sa.Column("errors", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("day", "key_id", "model", name="pk_usage"),
    )
    op.create_index("ix_usage_key_id_day", "usage", ["key_id", "day"])


def downgrade() -> None:
    """Drop it."""
    op.drop_table("usage")
