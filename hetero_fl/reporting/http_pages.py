"""A small HTTP server for a fixed set of pages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

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


PageFunction = Callable[[Mapping[str, str]], Page]
"""Function from the parameters in the query of an address to a page."""


@contextmanager
def serve_pages(
    pages: Mapping[str, PageFunction],
    host: str,
    port: int,
    headers: Mapping[str, str] | None = None,
    is_allowed_host: Callable[[str], bool] = lambda _host: True,
) -> Iterator[int]:
    """Serve pages over plain HTTP in background threads.

    Args:
        pages: Functions that create the pages, keyed by path, such as `/status`.
        host: Address to listen on.
        port: Port to listen on. If 0, any free port is used.
        headers: Additional headers of all responses.
        is_allowed_host: Function that returns whether requests with this header `Host` are
            answered. Other requests receive the status 403.

    Yields:
        The port on which the server listens.

    Raises:
        OSError: If the port is not available.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Respond with the requested page, or with status 404 if there is no such page."""
            page = self._find_page()
            body = page.text.encode()
            self.send_response(page.status)
            self.send_header("Content-Type", f"{page.kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def _find_page(self) -> Page:
            if not is_allowed_host(self.headers.get("Host", "")):
                return Page("host not allowed\n", "text/plain", 403)
            try:
                address = urlsplit(self.path)
            except ValueError:
                return Page("invalid address\n", "text/plain", 400)
            page = pages.get(address.path)
            if page is None:
                return Page(f"choose from {', '.join(pages)}\n", "text/plain", 404)
            return page(dict(parse_qsl(address.query)))

        @override
        def log_message(self, *args: Any) -> None:
            """Do not log requests."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
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
