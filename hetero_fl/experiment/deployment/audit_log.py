"""What was asked of a site and what left it: a JSON line a message, each with the SHA-256 of the line before it.

The number of lines and the hash of the last one stand in a second file, `….head`, so that an end that was cut off is missed, too.
Whoever can write both files can write another history; they are for a site's own eyes, and for whoever is shown a copy of the
head. A line is on disk before the answer that it tells of leaves; what was spent is counted from the lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from hetero_fl.errors import UserError

FIRST = "0" * 64  # before the first line
HEAD = 96  # bytes of the head: a number and a hash, in a fixed width, so that it is replaced in one write
AGAIN = "again"  # the outcome of a message that had been answered before

Entry = dict[str, Any]


class AuditLog:
    """A log that is written on. Raises UserError for one that was tampered with: what it counts cannot be counted on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._alone():
            _, count, last = _read(path)
            if path.exists() and path.stat().st_size > (whole := _whole(path)):
                os.truncate(path, whole)  # half a line of a process that was killed; nothing has left with it
            self._set_head(count, last)

    def append(self, **about: Any) -> Entry:
        """Put down a message. Raises OSError if it cannot be."""
        with self._alone():
            count, last = _head(self.path)
            entry: Entry = {"n": count + 1, "time": _now(), **about, "before": last}
            line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._set_head(count + 1, _hash(line))
        return entry

    def entries(self) -> list[Entry]:
        """All lines, those of earlier processes too. Raises UserError as above."""
        return _read(self.path)[0]

    def _alone(self) -> FileLock:
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o600)

    def _set_head(self, count: int, last: str) -> None:
        handle = os.open(_head_of(self.path), os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(f"{count} {last}".ljust(HEAD - 1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def verify(path: Path) -> list[Entry]:
    """The entries of a log. Raises UserError, naming the line, for one that was changed, removed, moved or cut off."""
    if not path.exists() and not _head_of(path).exists():
        raise UserError(f"{path}: no such file; a node keeps its log beside its state, as audit.jsonl")
    return _read(path)[0]


def shown(entries: Iterable[Entry]) -> list[str]:
    """A line for people on each message."""
    made = []
    for entry in entries:
        what = " ".join(str(entry[name]) for name in ("ask", "what") if entry.get(name))
        turn = f"round {entry['round'] + 1}" if isinstance(entry.get("round"), int) else ""
        sent = ", ".join(entry.get("kinds", ()))
        sizes = f"{entry['in']:,} in, {entry['out']:,} out" + (f" ({sent})" if sent else "")
        parts = (
            str(entry["n"]),
            entry["time"],
            str(entry.get("run", ""))[:8],
            turn,
            what,
            sizes,
            str(entry["outcome"]),
        )
        made.append("  ".join(part for part in parts if part))
    return made


@dataclass(frozen=True)
class Totals:
    """Bytes of a run's tasks: `up` and `down` as the server counts them, each task once."""

    up: int
    down: int


def totals(entries: Iterable[Entry], run: str | None = None) -> Totals:
    """Sums over the tasks of a run (None: of all): what came with them, and what left in uploads. A task is counted when it first
    comes, its upload when that first leaves; that it was sent again, or before its node could take it, is in the log alone."""
    came: dict[str, int] = {}
    left: dict[str, int] = {}
    for entry in entries:
        if "asked" not in entry or entry["outcome"].startswith("lost") or run not in (None, entry.get("run")):
            continue
        came.setdefault(entry["asked"], entry["in"])
        if entry.get("what") != "read" and entry["outcome"] in ("done", AGAIN):
            left.setdefault(entry["asked"], entry["out"])
    return Totals(sum(left.values()), sum(came.values()))


# The chain -----------------------------------------------------------------------------------------------------------
def _read(path: Path) -> tuple[list[Entry], int, str]:
    """Entries, how many, and the hash of the last line. A whole line beyond the head, or half a one, is that of a process
    which was killed as it wrote."""
    data = path.read_bytes() if path.exists() else b""
    lines = data.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    count, head = _head(path)
    entries: list[Entry] = []
    last = FIRST
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            found, before = entry["n"], entry["before"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number}: it was changed and cannot be read") from None
        if found != number:
            raise UserError(f"{path}: line {number}: found number {found} there; a line is missing, or was moved")
        if before != last:
            raise UserError(f"{path}: line {max(1, number - 1)}: it was changed after it had been written")
        entries.append(entry)
        last = _hash(line)
        if number == count and last != head:
            raise UserError(f"{path}: line {number}: it was changed after it had been written")
    if not count <= len(lines) <= count + 1:
        what = f"{count} lines were written, {len(lines)} are there"
        raise UserError(
            f"{path}: line {min(count, len(lines)) + 1}: {what}; the end was cut off, or something was put to it"
        )
    return entries, len(lines), last


def _head(path: Path) -> tuple[int, str]:
    head = _head_of(path)
    try:
        count, last = head.read_text(encoding="ascii").split()
        if len(last) == len(FIRST):
            return int(count), last
    except FileNotFoundError:
        if not path.exists() or path.stat().st_size == 0:
            return 0, FIRST
        raise UserError(f"{path}: line 1: {head.name}, which says how many lines there are, is gone") from None
    except ValueError:
        pass
    raise UserError(f"{path}: line 1: {head.name} was changed and cannot be read")


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _whole(path: Path) -> int:
    """Bytes of the whole lines."""
    return path.read_bytes().rfind(b"\n") + 1


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _now() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
