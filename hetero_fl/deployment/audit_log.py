"""Tamper-evident audit log of a site, and the privacy and traffic usage computed from the log.

Each answered message is one JSON line that contains the SHA-256 hash of the previous line and is
signed with the node's key. A `.head` file contains the number of lines and the hash of the last
line, so that a truncated log is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA384
from filelock import FileLock

from hetero_fl.utils.errors import ArgumentError, UserError, one_line, printable

# Hash before the first line.
INITIAL_HASH = "0" * 64
# Size of the head file in bytes. The size is fixed, so that a single write replaces the content.
HEAD_BYTES = 96
# Prefix of the signed bytes, so that signatures of other data are not valid for a line.
SIGNATURE_CONTEXT = b"hetero_fl audit line\n"
# Separator between the content of a line and its signature in hexadecimal digits.
SIGNATURE_FIELD = b', "signature": "'
# Maximum number of characters of a string in a line.
MAX_STRING_CHARS = 500
# Maximum number of digits of a line number.
MAX_NUMBER_DIGITS = 18
# Maximum number of list entries in a line.
MAX_LIST_ENTRIES = 32
# Outcome of a task that was already answered.
REPEATED = "again"
# Names of tasks in a formatted log that differ from those in messages.
TASK_NAMES = {"read": "evaluate"}

Entry = dict[str, Any]

# Fields of a line and their types.
FIELDS: dict[str, type] = {
    "n": int,
    "time": str,
    "in": int,
    "out": int,
    "outcome": str,
    "code": str,
    "before": str,
    "run": str,
    "ask": str,
    "what": str,
    "task": str,
    "asked": str,
    "round": int,
    "kinds": list,
    "spent": list,
}
REQUIRED = ("n", "time", "in", "out", "outcome", "before")
# Fields of each entry of `spent`.
CHARGE: dict[str, type] = {"noise": float, "rate": float, "steps": int}


class AuditLog:
    """Append-only audit log of a node.

    Args:
        path: Path of the log. The folder is created if it does not exist.
        key: Private key of the node, which signs the lines. If None, lines are not signed.

    Raises:
        UserError: If the log was changed.
    """

    def __init__(self, path: Path, key: EllipticCurvePrivateKey | None = None) -> None:
        self.path = path
        self._key = key
        self._count = 0
        self._last = INITIAL_HASH
        self._stamp: tuple[int, int, int] | None = None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock():
            self._catch_up()
            self._set_head()

    def append(self, **fields: Any) -> Entry:
        """Append a line about a message and flush the log to disk.

        Args:
            **fields: Fields of the line. Long strings and lists are shortened.

        Returns:
            The written entry.

        Raises:
            OSError: If the line cannot be written.
            UserError: If known lines were changed, or if another process appended lines that are
                not signed with the key.
        """
        with self._lock():
            if (
                _head(self.path) != (self._count, self._last)
                or _file_identity(self.path) != self._stamp
            ):
                self._read_new_lines()
            short = {name: _shorten_value(value) for name, value in fields.items()}
            entry: Entry = {
                "n": self._count + 1,
                "time": _format_time(time.time()),
                **short,
                "before": self._last,
            }
            line = (
                self._sign(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()) + b"\n"
            )
            self._write(line)
            self._count = self._count + 1
            self._last = _hash(line)
            self._stamp = _file_identity(self.path)
            self._set_head()
        return entry

    def entries(self) -> list[Entry]:
        """Return all entries, including those of earlier processes.

        Raises:
            UserError: If the log was changed.
        """
        return _read(self.path, self._public)[0]

    @property
    def head(self) -> str:
        """Number of lines and hash of the last line, in the format `N:HASH`."""
        return f"{self._count}:{self._last}"

    @property
    def _public(self) -> EllipticCurvePublicKey | None:
        return None if self._key is None else self._key.public_key()

    def _read_new_lines(self) -> None:
        """Read the lines that another process of this site appended.

        Each new line must be signed, and the known lines must be unchanged.
        """
        self._catch_up(f"{self._count}:{self._last}", since=self._count)

    def _catch_up(self, known_head: str | None = None, since: int | None = None) -> None:
        _, self._count, self._last = _read(self.path, self._public, known_head, since)
        length = _complete_length(self.path)
        if self.path.exists() and self.path.stat().st_size > length:
            # Remove the incomplete line of a killed process, whose answer was never sent.
            os.truncate(self.path, length)
        self._stamp = _file_identity(self.path)

    def _write(self, line: bytes) -> None:
        """Append a line and flush the log to disk, or remove the partial line if this fails."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        before = os.fstat(handle).st_size
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, before)
            raise

    def _sign(self, line: bytes) -> bytes:
        if self._key is None:
            return line
        signature = self._key.sign(SIGNATURE_CONTEXT + line, ECDSA(SHA384()))
        return line[:-1] + SIGNATURE_FIELD + signature.hex().encode() + b'"}'

    def _lock(self) -> FileLock:
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o600)

    def _set_head(self) -> None:
        # The file is not flushed to disk. After a power failure it may describe fewer lines than
        # the log has, but never more.
        handle = os.open(_head_of(self.path), os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(f"{self._count} {self._last}".ljust(HEAD_BYTES - 1).encode() + b"\n")


def verify(
    path: Path, key: EllipticCurvePublicKey | None = None, head: str | None = None
) -> list[Entry]:
    """Verify a log and return the entries.

    Args:
        path: Path of the log.
        key: Public key of the node that wrote the log. If None, forged lines at the end of the log
            are not detected.
        head: Earlier head, `N:HASH`, which the log must contain.

    Raises:
        UserError: If the log does not exist, or if a line was changed, removed, moved or not signed
            with the key. The message names the line.
    """
    # Unlike Path.exists, os.path.exists accepts names that are too long.
    if not os.path.exists(path) and not os.path.exists(_head_of(path)):
        raise UserError(f"{path}: not found; the log of a node is audit.jsonl in the site's folder")
    return _read(path, key, head)[0]


def verified_head(path: Path) -> str:
    """Verify a log and return the head, which is used to verify the log again later.

    Returns:
        The number of lines and the hash of the last line, in the format `N:HASH`.

    Raises:
        UserError: If the log was changed.
    """
    return ":".join(map(str, _read(path)[1:]))


def format_entries(entries: Iterable[Entry]) -> list[str]:
    """Format each entry as a readable line."""
    lines = []
    for entry in entries:
        # A request for a task is shown as the task.
        task = str(entry.get("what") or "")
        action = TASK_NAMES.get(task, task) or str(entry.get("ask") or "")
        # An evaluation after a round has the index of the next round.
        round_idx = entry.get("round")
        round_name = ""
        if isinstance(round_idx, int):
            round_name = f"round {round_idx + (entry.get('what') != 'read')}"
        sent = ", ".join(entry.get("kinds", ()))
        sizes = f"{entry['in']:,} in, {entry['out']:,} out" + (f" ({sent})" if sent else "")
        parts = (
            str(entry["n"]),
            entry["time"],
            str(entry.get("run", ""))[:8],
            round_name,
            action,
            sizes,
            str(entry["outcome"]),
        )
        lines.append(printable("  ".join(part for part in parts if part)))
    return lines


def refused_configurations(entries: Iterable[Entry]) -> int:
    """Return the number of configurations that the site read and refused in the last 24 hours."""
    start = _format_time(time.time() - 86400)
    # Only refusals due to `allows.refusals` have the code "policy" without a key.
    return sum(
        entry.get("ask") == "terms"
        and entry["time"] >= start
        and entry.get("code", "policy") != "policy"
        for entry in entries
    )


@dataclass(frozen=True)
class TrafficTotals:
    """Numbers of bytes exchanged for tasks.

    Each task is counted once, in the same way as at the server.

    Args:
        up: Bytes of uploads.
        down: Bytes of broadcasts.
    """

    up: int
    down: int


def traffic_totals(entries: Iterable[Entry], run: str | None = None) -> TrafficTotals:
    """Return the numbers of bytes exchanged for the tasks in a log.

    Repeated broadcasts and uploads of the same task are not counted.

    Args:
        entries: Entries of the log.
        run: ID of a run. If None, the tasks of all runs are counted.
    """
    received: dict[str, int] = {}
    sent: dict[str, int] = {}
    for entry in entries:
        if (
            "asked" not in entry
            or entry["outcome"].startswith("lost")
            or run not in (None, entry.get("run"))
        ):
            continue
        received.setdefault(entry["asked"], entry["in"])
        if entry.get("what") != "read" and entry["outcome"] in ("done", REPEATED):
            sent.setdefault(entry["asked"], entry["out"])
    return TrafficTotals(sum(sent.values()), sum(received.values()))


def _read(
    path: Path,
    key: EllipticCurvePublicKey | None = None,
    known_head: str | None = None,
    since: int | None = None,
) -> tuple[list[Entry], int, str]:
    """Read and verify a log.

    A process that was killed may leave lines that the head does not include, and an incomplete last
    line.

    Args:
        path: Path of the log.
        key: Public key of the site. If None, signatures are not checked.
        known_head: Earlier head, `N:HASH`, which the log must contain.
        since: Number of a line after which every line must be signed. If None, only the last line
            must be signed, because this signature covers all earlier lines.

    Returns:
        The entries, the number of lines, and the hash of the last line.

    Raises:
        UserError: If the log was changed.
    """
    lines = _bytes(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    count, head = _head(path)
    entries: list[Entry] = []
    hashes: list[str] = []
    last = INITIAL_HASH
    for number, line in enumerate(lines, 1):
        entry = _entry(line, f"{path}: line {number}")
        if entry["n"] != number:
            raise UserError(
                f"{path}: line {number}: expected number {number}, got {entry['n']}; "
                "a line was removed or moved"
            )
        if entry["before"] != last:
            raise UserError(f"{path}: line {max(1, number - 1)}: changed after it was written")
        entries.append(entry)
        last = _hash(line)
        if number == count and last != head:
            raise UserError(f"{path}: line {number}: changed after it was written")
        hashes.append(last)
    if len(lines) < count:
        what = f"expected {count} lines, got {len(lines)}"
        raise UserError(f"{path}: line {len(lines) + 1}: {what}; the log was truncated")
    if key is not None:
        for number in range(len(lines) if since is None else since + 1, len(lines) + 1):
            _check_signature(path, lines, number, key)
    if known_head is not None:
        _check_known_head(path, hashes, known_head)
    return entries, len(lines), last


def _entry(line: bytes, where: str) -> Entry:
    """Parse a line.

    Raises:
        UserError: If a field is missing or has a wrong type.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object; the line was changed")
    for name, kind in FIELDS.items():
        if not _has_type(entry.get(name), kind) and (name in entry or name in REQUIRED):
            found = one_line(entry[name], 60) if name in entry else "no value"
            raise UserError(
                f"{where}: {name}: expected {kind.__name__}, got {found}; the line was changed"
            )
    if not all(isinstance(kind, str) for kind in entry.get("kinds", [])):
        raise UserError(f"{where}: kinds: expected a list of strings; the line was changed")
    for charge in entry.get("spent", []):
        if not isinstance(charge, dict) or not all(
            _has_type(charge.get(name), kind) for name, kind in CHARGE.items()
        ):
            raise UserError(
                f"{where}: spent: expected {', '.join(CHARGE)}, got {one_line(charge, 60)}; "
                "the line was changed"
            )
    return entry


def _has_type(value: Any, kind: type) -> bool:
    """Return whether a value is of type `kind` and, if it is an integer, fits into 64 bits."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return kind in (int, float) and value.bit_length() <= 64
    return isinstance(value, kind)


def _check_signature(
    path: Path, lines: list[bytes], number: int, key: EllipticCurvePublicKey
) -> None:
    """Check the signature of line `number`, counted from 1.

    Raises:
        UserError: If the line is not signed with the key.
    """
    if number == 0:
        return
    line, _, rest = lines[number - 1].rpartition(SIGNATURE_FIELD)
    try:
        # `bytes.fromhex` also accepts upper-case digits and spaces, which would change the hash of
        # the line but not the signature.
        digits = rest.decode().removesuffix('"}\n')
        signature = bytes.fromhex(digits)
        if signature.hex() != digits:
            raise ValueError("expected lower-case hexadecimal digits")
        key.verify(signature, SIGNATURE_CONTEXT + line + b"}", ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise UserError(f"{path}: line {number}: not signed with this site's key") from None


def _check_known_head(path: Path, hashes: list[str], known_head: str) -> None:
    """Check that a log contains an earlier head.

    Raises:
        UserError: If the log does not contain the head, or the head is malformed.
    """
    number, _, found = known_head.partition(":")
    if not number.isdecimal() or len(number) > MAX_NUMBER_DIGITS or len(found) != len(INITIAL_HASH):
        raise ArgumentError(
            f"head: expected N:HASH as printed by `hetero-fl audit-log`, "
            f"got '{one_line(known_head, 90)}'"
        )
    if int(number) > len(hashes):
        raise UserError(
            f"{path}: expected at least {number} lines, got {len(hashes)}; the log was truncated"
        )
    if [INITIAL_HASH, *hashes][int(number)] != found:
        raise UserError(
            f"{path}: line {number}: differs from the given head; the log was rewritten"
        )


def _shorten_value(value: Any) -> Any:
    """Return a value with long strings and lists shortened."""
    if isinstance(value, str):
        return one_line(value, MAX_STRING_CHARS)
    if isinstance(value, list):
        return [_shorten_value(each) for each in value[:MAX_LIST_ENTRIES]]
    return value


def _head(path: Path) -> tuple[int, str]:
    head = _head_of(path)
    try:
        count, last = head.read_text(encoding="ascii").split()
        if count.isdecimal() and len(last) == len(INITIAL_HASH):
            return int(count), last
    except FileNotFoundError:
        if not path.exists() or path.stat().st_size == 0:
            return 0, INITIAL_HASH
        raise UserError(
            f"{path}: {head.name} not found, which contains the number of lines; restore it"
        ) from None
    except OSError as error:
        raise UserError(f"{head}: cannot be read ({error.strerror})") from None
    except ValueError:
        pass
    raise UserError(
        f"{path}: {head.name}: expected a number of lines and a hash; the file was changed"
    )


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    """Return the inode, size and modification time of a file, or None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _bytes(path: Path) -> bytes:
    """Return the content of a log, or empty bytes if the file does not exist.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _complete_length(path: Path) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    return _bytes(path).rfind(b"\n") + 1


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _format_time(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


TRAIN = "train"
# Outcomes of a completed task.
ANSWERED = ("done", "failed")
# Maximum number of tasks whose names are stored.
MAX_KNOWN_TASKS = 1024

# Sorted tuples (noise multiplier, sampling rate, number of steps).
Spent = tuple[tuple[float, float, int], ...]


@dataclass
class SiteUsage:
    """Completed tasks of a site in one run, and privacy and traffic usage of the site in all runs.

    Args:
        run: ID of the run.
        sent: Number of bytes of all answers in all runs.
        answered: Digests of the completed tasks of this run.
        trained: Digests of the completed training tasks of this run.
        tasks: Digests of the most recent tasks of this run, keyed by the name that the server
            assigned, newest last.
        one_time_charges: Names of the one-time charges that have been made in this run.
        steps: Number of steps in all runs, keyed by (noise multiplier, sampling rate).
    """

    run: str
    sent: int = 0
    answered: set[bytes] = field(default_factory=set)
    trained: set[bytes] = field(default_factory=set)
    tasks: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    one_time_charges: set[str] = field(default_factory=set)
    steps: dict[tuple[float, float], int] = field(default_factory=dict)

    @classmethod
    def from_log(cls, entries: Iterable[Entry], run: str) -> SiteUsage:
        """Compute the usage from the entries of a log.

        Args:
            entries: Entries of the log, oldest first.
            run: ID of the run.
        """
        usage = cls(run)
        for entry in entries:
            usage.add_entry(entry)
        return usage

    def add_entry(self, entry: Entry) -> None:
        """Update the usage with an entry of the log.

        Raises:
            UserError: If the entry of a task lacks a field, or its digest is not hexadecimal.
        """
        charges = entry.get("spent", ())
        is_task = entry.get("run") == self.run and "asked" in entry and entry["outcome"] != REPEATED
        if is_task:
            try:
                digest = bytes.fromhex(entry["asked"])
                task = entry["task"]
                one_time = {charge["once"] for charge in charges} - {""}
            except (KeyError, ValueError, TypeError):
                raise UserError(
                    f"audit log: line {entry['n']}: expected task, asked in hexadecimal digits and "
                    "spent with once; the line was changed"
                ) from None
        self.sent += entry["out"]
        self.steps = add_steps(self.steps, charges)
        if not is_task:
            return
        self.one_time_charges |= one_time
        self.tasks[task] = digest
        if len(self.tasks) > MAX_KNOWN_TASKS:
            self.tasks.popitem(last=False)
        if entry["outcome"] in ANSWERED:
            self.answered.add(digest)
            if entry.get("what") == TRAIN:
                self.trained.add(digest)

    def with_charges(self, charges: Iterable[Mapping[str, Any]]) -> Spent:
        """Return the privacy mechanisms of all runs, including additional charges.

        Args:
            charges: Additional charges, as in entries of the log.

        Returns:
            Sorted tuples (noise multiplier, sampling rate, number of steps).
        """
        total = add_steps(self.steps, charges)
        return tuple(sorted((*mechanism, count) for mechanism, count in total.items()))


def add_steps(
    steps: Mapping[tuple[float, float], int], charges: Iterable[Mapping[str, Any]]
) -> dict[tuple[float, float], int]:
    """Return the number of steps of each privacy mechanism after additional charges.

    Args:
        steps: Number of steps so far, keyed by (noise multiplier, sampling rate).
        charges: Additional charges, as in entries of the log.
    """
    total = dict(steps)
    for charge in charges:
        mechanism = (float(charge["noise"]), float(charge["rate"]))
        total[mechanism] = total.get(mechanism, 0) + int(charge["steps"])
    return total
