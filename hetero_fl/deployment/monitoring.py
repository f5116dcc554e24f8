"""Log and status file of a server, and the log of the tasks of a site."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from hetero_fl.config.schema import STATISTIC_SUFFIXES
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.messages import versions
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import load_node_key
from hetero_fl.deployment.sites import EventFunction
from hetero_fl.deployment.transport import Envelope
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.processes import is_process_running
from hetero_fl.utils.serialization import check_entries, write_atomically

# Maximum number of characters of a log message.
MAX_MESSAGE_CHARS = 2000


class EventLog:
    """Log of the events of a server or node.

    Args:
        line_format: "text", or "json" for one object per line with `time` (UTC), `message` and
            fields such as `run`, `round` and `client`.
        stream: Output stream. If None, stderr is used.
        **fields: Fields that are added to all JSON lines.
    """

    def __init__(
        self, line_format: str = "text", stream: TextIO | None = None, **fields: Any
    ) -> None:
        self.line_format = line_format
        self.fields = fields
        self._stream = stream

    def __call__(self, line: str, **fields: Any) -> None:
        """Log an event.

        Args:
            line: Message of the event.
            **fields: Additional fields of a JSON line. Fields that are None are left out.
        """
        line = one_line(line, MAX_MESSAGE_CHARS)
        now = datetime.now(timezone.utc)
        if self.line_format == "json":
            known = {n: v for n, v in {**self.fields, **fields}.items() if v is not None}
            line = json.dumps(
                {"time": now.isoformat(timespec="milliseconds"), "message": line, **known}
            )
        else:
            line = f"{now.astimezone():%Y-%m-%d %H:%M:%S}  {line}"
        # In one call, because other threads write, too.
        print(f"{line}\n", end="", file=self._stream or sys.stderr, flush=True)


class LoggedNode:
    """Wrapper around a node that logs each task.

    Args:
        node: Node that answers the messages.
        log: Log with a line for each task.
    """

    def __init__(self, node: Node, log: EventLog) -> None:
        self._node = node
        self.log = log

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer a message (see `Node.handle`) and log the task if the message contains one."""
        start = time.monotonic()
        answer = self._node.handle(envelope)
        if envelope.head.get("ask") == "do":
            self._log_task(envelope, answer, time.monotonic() - start)
        return answer

    def _log_task(self, request: Envelope, answer: Envelope, seconds: float) -> None:
        what = one_line(request.head.get("what"), 20)
        run = one_line(request.head.get("run", ""), 64)
        round_idx = request.head.get("round")
        # An evaluation after a round has the index of the next round.
        number = round_idx + (what != "read") if isinstance(round_idx, int) else 0
        sizes = {"bytes_in": len(request.body), "bytes_out": len(answer.body)}
        line = f"round {number}: {what}: {answer.head.get('ask')!s} in {seconds:.2f} s"
        line += f", {sizes['bytes_in']:,} bytes received, {sizes['bytes_out']:,} bytes sent"
        self.log(line, run=run, round=number, task=what, seconds=round(seconds, 3), **sizes)


@contextmanager
def open_node(site: SiteConfig, folder: Path) -> Iterator[LoggedNode]:
    """Lock the folder of a site, and yield its node.

    Args:
        site: Configuration of the site.
        folder: Folder of the site.

    Raises:
        UserError: If the private key is invalid, another process uses the folder, or the audit log
            was changed.
    """
    key = None if site.key is None else load_node_key(Path(site.key))
    log = EventLog(site.logs, client=site.client)
    with lock_folder(folder) as notes:
        for line in notes:
            log(line)
        yield LoggedNode(Node(site, folder, log, key), log)


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
        log: Function that is called for each event. If None, events are only part of the status.

    Attributes:
        present: Function that returns the ids of the connected clients.
        log_heads: Function that returns the heads of the sites' audit logs, keyed by client.
    """

    def __init__(
        self, path: Path, clients: Collection[str], log: EventFunction | None = None
    ) -> None:
        self._path = path
        self._log = log
        self.present: Callable[[], Collection[str]] = tuple
        self.log_heads: Callable[[], Mapping[str, str]] = dict
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
            # For each client, whether it is connected and the time of the last change.
            "nodes": {client: {"here": False, "since": None} for client in sorted(clients)},
            "events": [],
        }

    def update(self, **known: Any) -> None:
        """Update entries of the status.

        Args:
            **known: New values of entries such as `phase` (waiting, running, done, interrupted or
                failed), `run` and `name`.
        """
        self._tree |= known
        self._write()

    def report(self, line: str, *, client: str | None = None) -> None:
        """Log an event, and add it to the recent events, of which the last 20 are kept.

        Args:
            line: Message of the event.
            client: Name of the client of the event, or None.
        """
        line = one_line(line)
        event = {"time": time.time(), "message": line}
        self.update(events=[*self._tree["events"], event][-MAX_EVENTS:])
        if self._log is not None:
            self._log(line, client=client)

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Add the record of a completed round to the status.

        The record of a round that is already part of the status is ignored.

        Args:
            record: Record in the format of a line of `metrics.jsonl`.
        """
        tree = self._tree
        # A resumed run repeats rounds after the last checkpoint.
        if record["round"] <= tree["round"]:
            return
        scores = {
            name: {m: v for m, v in record[name].items() if not m.endswith(STATISTIC_SUFFIXES)}
            for name in SCORE_KEYS
            if record.get(name)
        }
        self.update(
            round=record["round"],
            up_bytes=tree["up_bytes"] + record["up_bytes"],
            down_bytes=tree["down_bytes"] + record["down_bytes"],
            failures=tree["failures"] + len(record["failed"]),
            seconds=sum(record["seconds"].values()),
            epsilon=record.get("privacy", tree)["epsilon"],
            **scores,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the status as plain values.

        Times are in seconds since the epoch. The entry `seconds` is the duration of the last round.
        """
        now = time.time()
        present = self.present()
        logs = self.log_heads()
        for client, node in self._tree["nodes"].items():
            if node["here"] != (client in present):
                node |= {"here": client in present, "since": now}
            if client in logs:
                node["log"] = logs[client]
        return {**deepcopy(self._tree), "updated": now}

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
        has_ended = tree["phase"] in ("done", "failed", "interrupted")
        # The process is assumed to run on other machines.
        if not has_ended and tree["host"] == socket.gethostname():
            tree["phase"] = tree["phase"] if is_process_running(int(tree["pid"])) else "gone"
    except FileNotFoundError:
        what = f"{STATUS_FILE} not found" if folder.is_dir() else "folder not found"
        raise UserError(f"{folder}: {what}; expected the run directory of a federation") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / STATUS_FILE}: cannot be read ({error})") from None
    return dict(tree)
