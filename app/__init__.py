"""The chat site: a page, a websocket and an HTTP API in front of a distributed model. Imports no torch."""

from app.factory import create_app

__all__ = ["create_app"]
