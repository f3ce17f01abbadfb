"""What alembic runs: the migrations, in a transaction that the caller began (`app/schema.py`)."""

from alembic import context

from app.tables import metadata

# transactional_ddl: alembic leaves it out for SQLite because Python's driver used to commit before such statements.
# Ours begins and ends transactions by itself, so that a step that fails leaves nothing behind in either database.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
