"""Log, status file and HTTP metrics of a server."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.error import URLError
from urllib.request import urlopen

from typing_extensions import override

from hetero_fl.config.schema import STATISTIC_SUFFIXES
from hetero_fl.deployment.messages import versions
from hetero_fl.reporting.http_pages import Page, serve_pages
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.processes import is_process_running
from hetero_fl.utils.serialization import check_entries, write_atomically

if TYPE_CHECKING:
    from prometheus_client import Metric

# Maximum number of characters of a log message.
MAX_MESSAGE_CHARS = 2000


class EventLog:
    """Thread-safe log of the events of a server or node.

    Args:
        line_format: "text", or "json" for one object per line with `time` (UTC), `message` and
            fields such as `run`, `round` and `client`.
        stream: Output stream. If None, stderr is used.
        **fields: Fields that are added to all JSON lines. Fields that are None are left out.

    Attributes:
        quiet: Whether output is suppressed.
    """

    def __init__(
        self, line_format: str = "text", stream: TextIO | None = None, **fields: Any
    ) -> None:
        self.line_format = line_format
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self._stream = stream
        self._writing = threading.Lock()
        self.quiet = False

    def __call__(self, line: str, **fields: Any) -> None:
        """Log an event.

        Args:
            line: Message of the event.
            **fields: Additional fields of a JSON line. Fields that are None are left out.
        """
        line = one_line(line, MAX_MESSAGE_CHARS)
        if self.line_format == "json":
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            known = {
                name: value
                for name, value in {**self.fields, **fields}.items()
                if value is not None
            }
            line = json.dumps({"time": now, "message": line, **known})
        else:
            line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}"
        if self.quiet:
            return
        with self._writing:
            print(line, file=self._stream or sys.stderr, flush=True)


class LineStream(io.TextIOBase):
    """Text stream that writes each line to a log, except empty lines.

    Args:
        log: Log to which the lines are written.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._incomplete = ""

    @override
    def write(self, text: str) -> int:
        *lines, self._incomplete = (self._incomplete + text).split("\n")
        for line in lines:
            if line.strip():
                self._log(line)
        return len(text)


# Name of the status file in the run directory.
STATUS_FILE = "status.json"
# Number of recent events in the status.
MAX_EVENTS = 20
SCORE_KEYS = ("personal", "global", "server")


class RunStatus:
    """Current status of a run at the server, written to a file after every change.

    Args:
        path: Run directory. The status file is not written until `config.yaml` exists.
        clients: Names of the expected clients.
    """

    def __init__(self, path: Path, clients: Collection[str]) -> None:
        self._path = path
        self._changing = threading.RLock()
        self._present: Callable[[], Collection[str]] = tuple
        self._logs: Callable[[], Mapping[str, str]] = dict
        # For each client, whether it is connected and the time of the last change.
        self._nodes: dict[str, tuple[bool, float | None]] = dict.fromkeys(clients, (False, None))
        self._events: list[dict[str, Any]] = []
        self._tree: dict[str, Any] = {
            "phase": "waiting",
            "run": None,
            "name": None,
            "algorithm": None,
            "rounds": 0,
            "round": 0,
            "up_bytes": 0,
            "down_bytes": 0,
            "failures": 0,
            "seconds": None,
            "epsilon": None,
            **dict.fromkeys(SCORE_KEYS),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "versions": versions(),
        }

    def update(self, **known: Any) -> None:
        """Update entries of the status.

        Args:
            **known: New values of entries such as `phase` (waiting, running, stopping, done,
                interrupted or failed), `run` and `name`.
        """
        with self._changing:
            self._tree |= known
            self._write()

    def set_presence_source(self, present: Callable[[], Collection[str]]) -> None:
        """Set the function that returns the ids of the connected clients."""
        self._present = present

    def set_log_source(self, logs: Callable[[], Mapping[str, str]]) -> None:
        """Set the function that returns the heads of the sites' audit logs, keyed by client."""
        self._logs = logs

    def add_event(self, line: str) -> None:
        """Add a line to the recent events, of which the last 20 are kept."""
        with self._changing:
            self._events = [*self._events, {"time": time.time(), "message": line}][-MAX_EVENTS:]
            self._write()

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Add the record of a completed round to the status.

        The record of a round that is already part of the status is ignored.

        Args:
            record: Record in the format of a line of `metrics.jsonl`.
        """
        with self._changing:
            tree = self._tree
            # A resumed run repeats rounds after the last checkpoint.
            if record["round"] <= tree["round"]:
                return
            tree["round"] = record["round"]
            for name in ("up_bytes", "down_bytes"):
                tree[name] += record[name]
            tree["failures"] += len(record["failed"])
            tree["seconds"] = sum(record["seconds"].values())
            tree["epsilon"] = (
                record["privacy"]["epsilon"] if "privacy" in record else tree["epsilon"]
            )
            for name in SCORE_KEYS:
                if scores := record.get(name):
                    tree[name] = {
                        m: v for m, v in scores.items() if not m.endswith(STATISTIC_SUFFIXES)
                    }
            self._write()

    def to_dict(self) -> dict[str, Any]:
        """Return the status as plain values.

        Times are in seconds since the epoch. The entry `seconds` is the duration of the last round.
        """
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
        """Return the status in the text format of Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self).decode()

    def collect(self) -> Iterator[Metric]:
        """Yield the available metrics, as the collector protocol of prometheus_client requires."""
        from prometheus_client import Metric

        tree = self.to_dict()
        here = sum(node["here"] for node in tree["nodes"].values())
        states = [({"state": "here"}, here), ({"state": "gone"}, len(tree["nodes"]) - here)]
        sent = [({"direction": name}, tree[f"{name}_bytes"]) for name in ("up", "down")]
        about = {name: tree[name] or "" for name in ("run", "name", "algorithm", "phase")}
        scores = [
            ({"of": name, "metric": metric}, value)
            for name in SCORE_KEYS
            for metric, value in (tree[name] or {}).items()
        ]
        families: Sequence[tuple[str, str, str, Sequence[tuple[Mapping[str, Any], Any]]]] = (
            ("info", "gauge", "the run", [(about | tree["versions"], 1)]),
            ("rounds", "gauge", "rounds of the run", [({}, tree["rounds"])]),
            ("rounds_completed", "gauge", "completed rounds", [({}, tree["round"])]),
            ("nodes", "gauge", "nodes by whether they are connected", states),
            ("bytes_total", "counter", "bytes of encoded payloads at the server", sent),
            ("failures_total", "counter", "missing or failed uploads", [({}, tree["failures"])]),
            ("round_seconds", "gauge", "duration of the last round", [({}, tree["seconds"])]),
            ("privacy_epsilon", "gauge", "ε spent by the run", [({}, tree["epsilon"])]),
            ("score", "gauge", "mean over clients in the last evaluation", scores),
        )
        for name, kind, description, samples in families:
            family = Metric(f"hetero_fl_{name}".removesuffix("_total"), description, kind)
            for labels, value in samples:
                if value is not None:
                    texts = {label: str(text) for label, text in labels.items()}
                    family.add_sample(f"hetero_fl_{name}", texts, value)
            if family.samples:
                yield family

    def _write(self) -> None:
        # Before the configuration is written, the run directory does not exist.
        if (self._path / "config.yaml").exists():
            # The run continues if the status cannot be written.
            with suppress(OSError):
                write_atomically(
                    self._path / STATUS_FILE, (json.dumps(self.to_dict(), indent=1) + "\n").encode()
                )


def read_status(folder: Path) -> dict[str, Any]:
    """Read the status file in a run directory.

    Returns:
        The status. The entry `phase` is "gone" if the server process was killed.

    Raises:
        UserError: If the file does not exist or cannot be read.
    """
    check_entries(folder)
    try:
        tree = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
        if tree["phase"] not in ("done", "failed", "interrupted") and not _is_process_alive(tree):
            tree["phase"] = "gone"
    except FileNotFoundError:
        what = f"{STATUS_FILE} not found" if folder.is_dir() else "folder not found"
        raise UserError(
            f"{folder}: {what}; expected a run directory of a server, or the address of its metrics"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / STATUS_FILE}: cannot be read ({error})") from None
    return dict(tree)


def _is_process_alive(tree: Mapping[str, Any]) -> bool:
    """Return whether the server process is running, which is assumed on other machines."""
    if tree["host"] != socket.gethostname():
        return True
    return is_process_running(int(tree["pid"]))


# Timeout of a status request in seconds.
TIMEOUT = 5.0


@contextmanager
def serve_status(status: RunStatus, host: str, port: int) -> Iterator[int]:
    """Serve `/healthz`, `/metrics` (Prometheus) and `/status` (JSON) over plain HTTP.

    Args:
        status: The status to serve.
        host: Address to listen on.
        port: Port to listen on. If 0, any free port is used.

    Yields:
        The port on which the server listens.

    Raises:
        UserError: If the port is not available.
    """
    pages: dict[str, Callable[[], Page]] = {
        "/healthz": lambda: _health(status),
        "/metrics": lambda: Page(status.prometheus(), "text/plain; version=0.0.4"),
        "/status": lambda: Page(json.dumps(status.to_dict()) + "\n"),
    }
    with ExitStack() as stack:
        try:
            listening = stack.enter_context(serve_pages(pages, host, port))
        except OSError as error:
            raise UserError(
                f"metrics.port: {port} is not available at {host} ({error.strerror}); "
                "choose another"
            ) from None
        yield listening


def fetch_status(address: str) -> dict[str, Any]:
    """Fetch the status of a server over HTTP.

    Args:
        address: Address of the server's metrics, with or without `http://`.

    Raises:
        UserError: If the server does not answer.
    """
    base = address if "://" in address else f"http://{address}"
    try:
        with urlopen(f"{base.rstrip('/')}/status", timeout=TIMEOUT) as answer:
            tree = json.loads(answer.read())
    except (URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise UserError(
            f"{address}: no answer from a server ({why}); expected its host and the metrics.port "
            "of its file"
        ) from None
    return dict(tree)


def _health(status: RunStatus) -> Page:
    """Return HTTP status 503 for a failed run and 200 otherwise, including a waiting run."""
    phase = status.to_dict()["phase"]
    return Page(json.dumps({"phase": phase}) + "\n", status=503 if phase == "failed" else 200)
