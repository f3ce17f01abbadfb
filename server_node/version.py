"""Which software this is."""

import importlib.metadata


def software() -> str:
    """Return the program and its version, as records name it."""
    try:
        return f"umbel {importlib.metadata.version('umbel')}"
    except importlib.metadata.PackageNotFoundError:
        return "umbel from source"
