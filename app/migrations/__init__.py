"""How the site's database came to be what `app/tables.py` says: alembic's environment, and a file for each step."""

__all__: list[str] = []
