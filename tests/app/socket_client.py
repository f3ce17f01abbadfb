"""A client of both protocols, with short names for what tests do all the time."""

import json
from contextlib import ExitStack
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.app.site_process import SiteProcess


class Client:
    """One websocket; frames are objects. `own_page` sends the Origin of the site's own page."""

    def __init__(self, site: SiteProcess, *, origin: str | None = None, own_page: bool = True, **options: Any) -> None:
        chosen = site.url if own_page and origin is None else origin
        self._stack = ExitStack()
        connection = connect(site.socket_url, origin=chosen, compression=None, **options)  # type: ignore[arg-type]
        self.ws: ClientConnection = self._stack.enter_context(connection)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def close(self) -> None:
        self._stack.close()

    def send(self, **fields: object) -> None:
        self.ws.send(json.dumps(fields))

    def receive(self, timeout_s: float = 5.0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ws.recv(timeout_s))
        return found

    def open(self, **fields: object) -> dict[str, Any]:
        self.send(type="open", protocol=3, **fields)
        return self.receive()

    def generate(
        self,
        *contents: str,
        id: str = "a",  # noqa: A002
        fields: dict[str, object] | None = None,
        **params: object,
    ) -> None:
        roles = ["user", "assistant"] * len(contents)
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        self.send(type="generate", id=id, messages=messages, params=params, **fields or {})

    def receive_until(
        self, kind: str, timeout_s: float = 10.0, skip: tuple[str, ...] = ()
    ) -> tuple[str, dict[str, Any]]:
        """Return the text of the deltas, and the first event of a kind; those of the kinds in `skip` may come too."""
        text = ""
        while (event := self.receive(timeout_s))["type"] != kind:
            assert event["type"] in ("started", "progress", "delta", "pong", "error", *skip), event
            text += event.get("text", "")
        return text, event

    def open_legacy(self, **fields: object) -> dict[str, Any]:
        self.send(type="open_inference_session", **fields)
        return self.receive()

    def legacy_replies(self) -> list[dict[str, Any]]:
        """Return the replies up to the one that stops."""
        replies = [self.receive()]
        while not replies[-1].get("stop", True):
            replies.append(self.receive())
        return replies

    def close_code(self, timeout_s: float = 5.0) -> int | None:
        """Return the code with which the site closes; frames before it are dropped."""
        try:
            while True:
                self.ws.recv(timeout_s)
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else None
