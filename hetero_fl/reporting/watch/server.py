"""Serve the page and its data on this machine."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hetero_fl.reporting.http_pages import Page, PageFunction, serve_pages
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.watch.content import WatchedRuns
from hetero_fl.utils.errors import ArgumentError

LOOPBACK = ("127.0.0.1", "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The page loads nothing but its own data.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


@contextmanager
def serve_watch(folders: Sequence[Path], host: str = LOOPBACK[0], port: int = 0) -> Iterator[str]:
    """Serve a web page with live curves of runs.

    Args:
        folders: Run directories, and folders that contain run directories, now or later.
        host: Address to listen on. Requests to a loopback address are only answered if they name a
            loopback address, so that web sites cannot read the runs.
        port: Port to listen on. If 0, any free port is used.

    Yields:
        The address of the page.

    Raises:
        UserError: If a folder does not exist or the port is not available.
    """
    runs = WatchedRuns(folders)
    page = render("watch.html", title="Runs", folders=", ".join(map(str, folders)))

    def runs_page(query: Any) -> Page:
        content = runs.overview(query.get("test", ""), query.get("metric", ""))
        return Page(json.dumps(content, allow_nan=False))

    def clients_page(query: Any) -> Page:
        key = query.get("run", "")
        content = runs.clients(key, query.get("test", ""), query.get("metric", ""))
        return Page(json.dumps(content, allow_nan=False))

    pages: dict[str, PageFunction] = {
        "/": lambda _query: Page(page, "text/html"),
        "/runs.json": runs_page,
        "/clients.json": clients_page,
    }
    with ExitStack() as stack:
        try:
            listening = stack.enter_context(
                serve_pages(
                    pages,
                    host,
                    port,
                    headers=HEADERS,
                    is_allowed_host=_is_loopback if host in LOOPBACK else lambda _host: True,
                )
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ArgumentError(
                f"port: {port} is not available at {host} ({reason}); choose another, or 0 for any "
                "free port"
            ) from None
        name = socket.gethostname() if host in ("", "0.0.0.0") else host
        yield f"http://{name}:{listening}/"


def _is_loopback(host: str) -> bool:
    """Return whether the header `Host` names a loopback address, with or without a port."""
    return re.sub(r":\d+$", "", host).lower() in LOOPBACK
