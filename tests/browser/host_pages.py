"""Pages of other people that embed the chat: a small server on a port, and so an origin, of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Host:
    """Serves what tests put into `pages`, by path, with `headers` of the same path."""

    url: str
    pages: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)

    def put(self, path: str, body: str, **headers: str) -> str:
        """Serve a page from now on; return its address. Names of headers are written with underscores."""
        self.pages[path] = f"<!doctype html><html lang=en><title>A page</title><body>{body}"
        self.headers[path] = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.url + path


@contextmanager
def running_host(name: str = "127.0.0.1") -> Iterator[Host]:
    """Run a server of pages; `name` is how its origin calls it."""
    host = Host("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            body = host.pages.get(path, "").encode()
            self.send_response(200 if path in host.pages else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for header, value in host.headers.get(path, {}).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        host.url = f"http://{name}:{server.server_address[1]}"
        yield host
        server.shutdown()
        thread.join(5)
