"""How a run across machines stands: who is here, which round, what was sent; for people, for files, for Prometheus."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hetero_fl.errors import UserError
from hetero_fl.experiment.deployment.messages import versions
from hetero_fl.files import write_atomically

FILE = "status.json"  # in the run directory
EVENTS = 20  # of the last ones
READ = ("personal", "global", "server")
SPREAD = ("_std", "_worst", "_undefined")


class Status:
    """What the server knows of its run at this moment; every change goes to a small file.

    Args:
        path: the run directory, which is not made for it.
        clients: those that are expected.
    """

    def __init__(self, path: Path, clients: Collection[str]) -> None:
        self._path, self._changing = path, threading.RLock()
        self._present: Callable[[], Collection[str]] = tuple
        self._logs: Callable[[], Mapping[str, str]] = dict
        self._nodes: dict[str, tuple[bool, float | None]] = dict.fromkeys(clients, (False, None))  # here? since when?
        self._events: list[dict[str, Any]] = []
        self._tree: dict[str, Any] = {
            "phase": "waiting", "run": None, "name": None, "algorithm": None, "rounds": 0, "round": 0,
            "up_bytes": 0, "down_bytes": 0, "failures": 0, "seconds": None, "epsilon": None,
            **dict.fromkeys(READ), "pid": os.getpid(), "host": socket.gethostname(), "versions": versions(),
        }  # fmt: skip

    @property
    def round(self) -> int:
        """The last one that is complete."""
        return int(self._tree["round"])

    def set(self, **known: Any) -> None:
        """Something else is known: `phase` (waiting, running, stopping, done, interrupted, failed), `run`, `name` …"""
        with self._changing:
            self._tree |= known
            self._write()

    def watch(self, present: Callable[[], Collection[str]]) -> None:
        """Whom to ask who is here."""
        self._present = present

    def watch_logs(self, logs: Callable[[], Mapping[str, str]]) -> None:
        """Set the function that returns the audit log heads."""
        self._logs = logs

    def happened(self, line: str) -> None:
        """Something happened."""
        with self._changing:
            self._events = [*self._events, {"time": time.time(), "message": line}][-EVENTS:]
            self._write()

    def record(self, record: Mapping[str, Any]) -> None:
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
            tree["epsilon"] = record["privacy"]["epsilon"] if "privacy" in record else tree["epsilon"]
            for name in READ:
                if scores := record.get(name):
                    tree[name] = {m: v for m, v in scores.items() if not m.endswith(SPREAD)}
            self._write()

    def tree(self) -> dict[str, Any]:
        """All of it as plain values; times are seconds since 1970, `seconds` those of the last round."""
        with self._changing:
            now, present = time.time(), set(self._present())
            for client, (here, _) in self._nodes.items():
                if here != (client in present):
                    self._nodes[client] = not here, now
            logs = self._logs()
            nodes = {
                client: {"here": here, "since": since, **({"log": logs[client]} if client in logs else {})}
                for client, (here, since) in sorted(self._nodes.items())
            }
            return {**self._tree, "nodes": nodes, "events": self._events, "updated": now}

    def prometheus(self) -> str:
        """The same in Prometheus's text format."""
        tree = self.tree()
        here = sum(node["here"] for node in tree["nodes"].values())
        about = {name: tree[name] or "" for name in ("run", "name", "algorithm", "phase")} | tree["versions"]
        found = [
            _family("info", "gauge", "the run", [(about, 1)]),
            _family("rounds", "gauge", "rounds that are to be held", [({}, tree["rounds"])]),
            _family("rounds_completed", "gauge", "rounds that are complete", [({}, tree["round"])]),
            _family("nodes", "gauge", "nodes that are here, and that are not",
                    [({"state": "here"}, here), ({"state": "gone"}, len(tree["nodes"]) - here)]),
            _family("bytes_total", "counter", "encoded payloads, at the server",
                    [({"direction": "up"}, tree["up_bytes"]), ({"direction": "down"}, tree["down_bytes"])]),
            _family("failures_total", "counter", "uploads that were asked for and not used", [({}, tree["failures"])]),
        ]  # fmt: skip
        if tree["seconds"] is not None:
            found.append(_family("round_seconds", "gauge", "of the last round", [({}, tree["seconds"])]))
        if tree["epsilon"] is not None:
            found.append(_family("privacy_epsilon", "gauge", "what the run has spent", [({}, tree["epsilon"])]))
        scores = [
            ({"of": name, "metric": metric}, value)
            for name in READ
            for metric, value in (tree[name] or {}).items()
            if value is not None
        ]
        if scores:
            found.append(_family("score", "gauge", "of the last evaluation, mean over clients", scores))
        return "\n".join(found) + "\n"

    def _write(self) -> None:
        if (self._path / "config.yaml").exists():  # before, there is no run directory
            with suppress(OSError):  # the run needs none of it
                write_atomically(self._path / FILE, (json.dumps(self.tree(), indent=1) + "\n").encode())


def read_status(folder: Path) -> dict[str, Any]:
    """The file in a run directory; of a server that was killed since, `phase` is `gone`. Raises UserError."""
    try:
        tree = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if tree["phase"] not in ("done", "failed", "interrupted") and not _alive(tree):
            tree["phase"] = "gone"
    except FileNotFoundError:
        what = "status of a run across machines" if folder.is_dir() else "folder"
        raise UserError(
            f"{folder}: no {what} is here; name a run directory, or the address of a server's metrics"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error})") from None
    return dict(tree)


def _alive(tree: Mapping[str, Any]) -> bool:
    """Whether its process runs; of another machine's nobody here can say."""
    if tree["host"] != socket.gethostname():
        return True
    try:
        os.kill(int(tree["pid"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _family(name: str, kind: str, about: str, samples: Sequence[tuple[Mapping[str, Any], float]]) -> str:
    name = f"hetero_fl_{name}"
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        told = ",".join(f'{label}="{_escaped(str(text))}"' for label, text in labels.items())
        lines.append(f"{name}{{{told}}} {value}" if told else f"{name} {value}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
