"""A small HTTP server for a fixed set of pages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from typing_extensions import override


class Page(NamedTuple):
    """An HTTP response.

    Args:
        text: The body.
        kind: The content type, without character set.
        status: The HTTP status.
    """

    text: str
    kind: str = "application/json"
    status: int = 200


@contextmanager
def serve_pages(pages: Mapping[str, Callable[[], Page]], host: str, port: int) -> Iterator[int]:
    """Serve pages over plain HTTP in background threads.

    Args:
        pages: Functions that create the pages, keyed by path, such as `/status`.
        host: Address to listen on.
        port: Port to listen on. If 0, any free port is used.

    Yields:
        The port on which the server listens.

    Raises:
        OSError: If the port is not available.
    """

    def missing_page() -> Page:
        return Page(f"choose from {', '.join(pages)}\n", "text/plain", 404)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Respond with the requested page, or with status 404 if there is no such page."""
            page = pages.get(self.path.partition("?")[0], missing_page)()
            body = page.text.encode()
            self.send_response(page.status)
            self.send_header("Content-Type", f"{page.kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        @override
        def log_message(self, *args: Any) -> None:
            """Do not log requests."""

    server = ThreadingHTTPServer((host, port), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
    )
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
