"""A server's small window: `/healthz`, `/metrics` for Prometheus, `/status` as JSON, over plain HTTP, for whoever watches it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from hetero_fl.errors import UserError
from hetero_fl.experiment.deployment.status import Status

WAIT = 5.0  # seconds for an answer


@contextmanager
def window(status: Status, host: str, port: int) -> Iterator[int]:
    """Keep it open; yields the port, which 0 leaves to the system. Raises UserError if it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {"/healthz": _health, "/metrics": _metrics, "/status": _status}
            page = pages.get(self.path.split("?")[0])
            code, kind, text = page(status) if page else (404, "text/plain", f"choose from {', '.join(pages)}\n")
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads who asked."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(f"metrics.port: {port} of {host} cannot be had ({error.strerror}); take another") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def look(address: str) -> dict[str, Any]:
    """What the window at an address shows of a run. Raises UserError if there is none."""
    base = address if "://" in address else f"http://{address}"
    try:
        with urlopen(f"{base.rstrip('/')}/status", timeout=WAIT) as answer:
            tree = json.loads(answer.read())
    except (URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise UserError(
            f"{address}: no server shows its status there ({why}); its file names the port: metrics.port"
        ) from None
    return dict(tree)


def _health(status: Status) -> tuple[int, str, str]:
    """A server that has failed is not well; one that waits for nodes is."""
    tree = status.tree()
    return 503 if tree["phase"] == "failed" else 200, "application/json", json.dumps({"phase": tree["phase"]}) + "\n"


def _metrics(status: Status) -> tuple[int, str, str]:
    return 200, "text/plain; version=0.0.4", status.prometheus()


def _status(status: Status) -> tuple[int, str, str]:
    return 200, "application/json", json.dumps(status.tree()) + "\n"
