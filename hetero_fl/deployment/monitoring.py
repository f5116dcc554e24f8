"""Status file, metrics over HTTP, and log lines of a server."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.error import URLError
from urllib.request import urlopen

from hetero_fl.deployment.messages import versions
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.processes import is_process_running
from hetero_fl.utils.serialization import write_atomically

if TYPE_CHECKING:
    from prometheus_client import Metric

# Lines of what happens at a server or a node: for a reader, or as JSON for whoever gathers them
# from many machines.

LONGEST = 2000  # characters of a message


class EventLog:
    """Writes a line for everything that happens.

    Args:
        form: `text`, or `json`: an object a line with `time` (UTC), `message`, and what it is about: `run`, `round`, `client` …
        about: what all lines are about.
    """

    def __init__(self, form: str = "text", stream: TextIO | None = None, **about: Any) -> None:
        self.form = form
        self.about = {name: value for name, value in about.items() if value is not None}
        self._stream = stream
        self._writing = threading.Lock()
        self.quiet = False  # then nothing is written

    def __call__(self, line: str, **about: Any) -> None:
        """One thing that happened."""
        line = one_line(line, LONGEST)
        if self.form == "json":
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            known = {
                name: value for name, value in {**self.about, **about}.items() if value is not None
            }
            line = json.dumps({"time": now, "message": line, **known}, ensure_ascii=False)
        else:
            line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}"
        if self.quiet:
            return
        with self._writing:
            print(line, file=self._stream or sys.stderr, flush=True)


class LineStream(io.TextIOBase):
    """A stream whose lines go to a log: for what is printed elsewhere."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._log(line)
        return len(text)


# How a run across machines stands: who is here, which round, what was sent; for people, for files,
# for Prometheus.

FILE = "status.json"  # in the run directory
EVENTS = 20  # of the last ones
EVALUATION_SETS = ("personal", "global", "server")
SPREAD = ("_std", "_worst", "_undefined")


class RunStatus:
    """What the server knows of its run at this moment; every change goes to a small file.

    Args:
        path: the run directory, which is not made for it.
        clients: those that are expected.
    """

    def __init__(self, path: Path, clients: Collection[str]) -> None:
        self._path = path
        self._changing = threading.RLock()
        self._present: Callable[[], Collection[str]] = tuple
        self._logs: Callable[[], Mapping[str, str]] = dict
        # here? since when?
        self._nodes: dict[str, tuple[bool, float | None]] = dict.fromkeys(clients, (False, None))
        self._events: list[dict[str, Any]] = []
        self._tree: dict[str, Any] = {
            "phase": "waiting", "run": None, "name": None, "algorithm": None, "rounds": 0, "round": 0,
            "up_bytes": 0, "down_bytes": 0, "failures": 0, "seconds": None, "epsilon": None,
            **dict.fromkeys(EVALUATION_SETS), "pid": os.getpid(), "host": socket.gethostname(), "versions": versions(),
        }  # fmt: skip

    def update(self, **known: Any) -> None:
        """Something else is known: `phase` (waiting, running, stopping, done, interrupted, failed), `run`, `name` …"""
        with self._changing:
            self._tree |= known
            self._write()

    def set_presence_source(self, present: Callable[[], Collection[str]]) -> None:
        """Whom to ask who is here."""
        self._present = present

    def set_log_source(self, logs: Callable[[], Mapping[str, str]]) -> None:
        """Set the function that returns the audit log heads."""
        self._logs = logs

    def add_event(self, line: str) -> None:
        """Something happened."""
        with self._changing:
            self._events = [*self._events, {"time": time.time(), "message": line}][-EVENTS:]
            self._write()

    def add_record(self, record: Mapping[str, Any]) -> None:
        """A round is complete: its line of `metrics.jsonl`."""
        with self._changing:
            tree = self._tree
            if record["round"] <= tree["round"]:  # it is held again
                return
            tree["round"] = record["round"]
            for name in ("up_bytes", "down_bytes"):
                tree[name] += record[name]
            tree["failures"] += len(record["failed"])
            tree["seconds"] = sum(record["seconds"].values())
            tree["epsilon"] = (
                record["privacy"]["epsilon"] if "privacy" in record else tree["epsilon"]
            )
            for name in EVALUATION_SETS:
                if scores := record.get(name):
                    tree[name] = {m: v for m, v in scores.items() if not m.endswith(SPREAD)}
            self._write()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values; times are seconds since 1970, `seconds` those of the last round."""
        with self._changing:
            now = time.time()
            present = set(self._present())
            for client, (here, _) in self._nodes.items():
                if here != (client in present):
                    self._nodes[client] = not here, now
            logs = self._logs()
            nodes = {
                client: {
                    "here": here,
                    "since": since,
                    **({"log": logs[client]} if client in logs else {}),
                }
                for client, (here, since) in sorted(self._nodes.items())
            }
            return {**self._tree, "nodes": nodes, "events": self._events, "updated": now}

    def prometheus(self) -> str:
        """Return the same in Prometheus's text format."""
        from prometheus_client import generate_latest

        return generate_latest(self).decode()

    def collect(self) -> Iterator[Metric]:
        """Yield what `prometheus` writes (the collector protocol of prometheus_client); what is not known is left out."""
        from prometheus_client import Metric

        tree = self.to_dict()
        here = sum(node["here"] for node in tree["nodes"].values())
        states = [({"state": "here"}, here), ({"state": "gone"}, len(tree["nodes"]) - here)]
        sent = [({"direction": way}, tree[f"{way}_bytes"]) for way in ("up", "down")]
        about = {name: tree[name] or "" for name in ("run", "name", "algorithm", "phase")}
        scores = [
            ({"of": name, "metric": metric}, value)
            for name in EVALUATION_SETS
            for metric, value in (tree[name] or {}).items()
        ]
        families: Sequence[tuple[str, str, str, Sequence[tuple[Mapping[str, Any], Any]]]] = (
            ("info", "gauge", "the run", [(about | tree["versions"], 1)]),
            ("rounds", "gauge", "rounds of the run", [({}, tree["rounds"])]),
            ("rounds_completed", "gauge", "rounds that are complete", [({}, tree["round"])]),
            ("nodes", "gauge", "nodes that are here, and that are not", states),
            ("bytes_total", "counter", "encoded payloads, at the server", sent),
            ("failures_total", "counter", "uploads that were requested and not used", [({}, tree["failures"])]),
            ("round_seconds", "gauge", "of the last round", [({}, tree["seconds"])]),
            ("privacy_epsilon", "gauge", "what the run has spent", [({}, tree["epsilon"])]),
            ("score", "gauge", "of the last evaluation, mean over clients", scores),
        )  # fmt: skip
        for name, kind, description, samples in families:
            family = Metric(f"hetero_fl_{name}".removesuffix("_total"), description, kind)
            for labels, value in samples:
                if value is not None:
                    texts = {label: str(text) for label, text in labels.items()}
                    family.add_sample(f"hetero_fl_{name}", texts, value)
            if family.samples:
                yield family

    def _write(self) -> None:
        if (self._path / "config.yaml").exists():  # before, there is no run directory
            with suppress(OSError):  # the run needs none of it
                write_atomically(
                    self._path / FILE, (json.dumps(self.to_dict(), indent=1) + "\n").encode()
                )


def read_status(folder: Path) -> dict[str, Any]:
    """The file in a run directory; of a server that was killed since, `phase` is `gone`. Raises UserError."""
    try:
        tree = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if tree["phase"] not in ("done", "failed", "interrupted") and not _is_process_alive(tree):
            tree["phase"] = "gone"
    except FileNotFoundError:
        what = "status of a run across machines" if folder.is_dir() else "folder"
        raise UserError(
            f"{folder}: no {what} is here; name a run directory, or the address of a server's metrics"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error})") from None
    return dict(tree)


def _is_process_alive(tree: Mapping[str, Any]) -> bool:
    """Whether its process runs; of another machine's nobody here can say."""
    if tree["host"] != socket.gethostname():
        return True
    return is_process_running(int(tree["pid"]))


# A server's small window: `/healthz`, `/metrics` for Prometheus, `/status` as JSON, over plain
# HTTP, for whoever watches it.

WAIT = 5.0  # seconds for an answer


@contextmanager
def serve_status(status: RunStatus, host: str, port: int) -> Iterator[int]:
    """Keep it open; yields the port, which 0 leaves to the system. Raises UserError if it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {"/healthz": _health, "/metrics": _metrics, "/status": _status}
            page = pages.get(self.path.split("?")[0])
            code, kind, text = (
                page(status) if page else (404, "text/plain", f"choose from {', '.join(pages)}\n")
            )
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, message_format: str, *args: Any) -> None:
            """Nobody reads who asked."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(
            f"metrics.port: {port} of {host} cannot be had ({error.strerror}); take another"
        ) from None
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


def fetch_status(address: str) -> dict[str, Any]:
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


def _health(status: RunStatus) -> tuple[int, str, str]:
    """A server that has failed is not well; one that waits for nodes is."""
    tree = status.to_dict()
    return (
        503 if tree["phase"] == "failed" else 200,
        "application/json",
        json.dumps({"phase": tree["phase"]}) + "\n",
    )


def _metrics(status: RunStatus) -> tuple[int, str, str]:
    return 200, "text/plain; version=0.0.4", status.prometheus()


def _status(status: RunStatus) -> tuple[int, str, str]:
    return 200, "application/json", json.dumps(status.to_dict()) + "\n"
