"""A model hub on loopback: one repository's files in the layout of huggingface.co, and answers that go wrong on demand.

Like the real one it redirects shards to a storage of another origin, which has ETags of its own.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]

REPO = "some-org/tiny"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_secret"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: `range` is that of the header."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent_bytes: int = 0


@dataclass
class Hub:
    """The server as a test sees it. `faults` are for the next answers of the storage, one each."""

    files: dict[str, bytes]
    faults: deque[str] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    linked_etag: dict[str, str] = field(default_factory=dict)
    commit: str = COMMIT
    is_gated: bool = False
    has_loop: bool = False

    def downloads(self) -> list[Request]:
        """Return the requests for contents of shards."""
        return [request for request in self.requests if request.path.startswith("/storage/")]

    def sent_bytes(self) -> int:
        return sum(request.sent_bytes for request in self.downloads())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if path == f"/api/models/{REPO}/revision/main":
            self.send(200, json.dumps({"id": REPO, "sha": self.hub.commit}).encode())
        elif path == f"/api/models/{REPO}/tree/{self.hub.commit}":
            self.send(200, json.dumps([_entry(*item) for item in self.hub.files.items()]).encode())
        elif found := re.fullmatch(f"/{REPO}/resolve/{self.hub.commit}/(.+)", path):
            self.resolve(found[1])
        elif path.startswith("/storage/"):
            self.serve(self.hub.files[path.removeprefix("/storage/")])
        else:
            self.send(404, b"")

    def resolve(self, name: str) -> None:
        content = self.hub.files.get(name)
        headers = {"X-Repo-Commit": self.hub.commit}
        if self.hub.is_gated and name.endswith(".safetensors"):
            self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        elif self.hub.has_loop and self.command == "GET" and name.endswith(".safetensors"):
            self.send(302, b"", headers | {"Location": self.path})
        elif content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif name.endswith(".safetensors"):
            etag = self.hub.linked_etag.get(name, hashlib.sha256(content).hexdigest())
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{etag}"'}
            # Another name of this machine is another origin.
            port = self.server.server_address[1]
            self.send(302, b"", headers | {"Location": f"http://localhost:{port}/storage/{name}"})
        else:
            self.send(200, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def serve(self, content: bytes) -> None:
        fault = self.hub.faults.popleft() if self.hub.faults else ""
        etag = "another" if fault == "other etag" else f"storage-{len(content)}"
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if fault.isdecimal():
            self.send(int(fault), b"", {"Retry-After": "7"} if fault == "429" else None)
        elif asked is None or fault == "no ranges":
            self.send(200, bytes(len(content)) if fault == "zeros" else content, headers)
        else:
            start, end = int(asked[1]), int(asked[2]) + 1
            shift = 1 if fault == "other range" else 0
            total = len(content) + (1 if fault == "other size" else 0)
            headers["Content-Range"] = f"bytes {start + shift}-{end + shift - 1}/{total}"
            if fault == "compressed":
                headers["Content-Encoding"] = "gzip"
            body = content[start:end]
            if fault == "short":
                body = body[:-1]
            elif fault == "long":
                body += b"x"
            self.send(206, body, headers, cut=fault == "cut")

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        sent = b"" if self.command == "HEAD" else body[: len(body) // 2] if cut else body
        token = self.headers.get("Authorization")
        # Before the client has any of it, and goes on.
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), token, len(sent)))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that left."""


@contextmanager
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a folder's files as `REPO`, and let the hub's library ask there."""
    hub = Hub({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    server = _Server(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()
