"""The tamper-evident audit log of a site, and the usage that it accounts for.

Each message is a JSON line with the SHA-256 of the previous line, signed with the node's key. The
number of lines and the last hash are also in a `.head` file, which reveals a truncated log.
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

from hetero_fl.utils.errors import UserError, one_line, printable

# Hash before the first line.
FIRST = "0" * 64
# Bytes of the head file, a fixed width so that one write replaces it.
HEAD = 96
# Prefix of the signed bytes, so that no other signed message can pass for a line.
ABOUT = b"hetero_fl audit line\n"
# Between a line's content and its signature in hexadecimal digits.
SIGNED = b', "signature": "'
# Characters of a string in a line.
LONGEST = 500
# Digits of a line number.
MOST_DIGITS = 18
# Entries of a list in a line.
MOST_LISTED = 32
# Outcome of a message that was answered before.
REPEATED = "again"

Entry = dict[str, Any]

# Fields of a line, and of each entry of `spent`.
FIELDS: dict[str, type] = {
    "n": int,
    "time": str,
    "in": int,
    "out": int,
    "outcome": str,
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
CHARGE: dict[str, type] = {"noise": float, "rate": float, "steps": int}


class AuditLog:
    """An audit log to which lines are appended.

    Args:
        path: Path of the log.
        key: The node's private key, which signs the lines. None: they are not signed.

    Raises:
        UserError: If the log was changed.
    """

    def __init__(self, path: Path, key: EllipticCurvePrivateKey | None = None) -> None:
        self.path = path
        self._key = key
        self._count = 0
        self._last = FIRST
        self._stamp: tuple[int, int, int] | None = None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock():
            self._catch_up()
            self._set_head()

    def append(self, **about: Any) -> Entry:
        """Append a line about a message and flush it to disk.

        Args:
            **about: Fields of the line.

        Returns:
            The entry.

        Raises:
            OSError: If it cannot be written.
            UserError: If the log was changed since this process read it.
        """
        with self._lock():
            if (
                _head(self.path) != (self._count, self._last)
                or _file_identity(self.path) != self._stamp
            ):
                self._read_lines_of_others()
            short = {name: _shorten_value(value) for name, value in about.items()}
            entry: Entry = {"n": self._count + 1, "time": _now(), **short, "before": self._last}
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
        """Number of lines and hash of the last one, `N:HASH`; a copy elsewhere proves the log."""
        return f"{self._count}:{self._last}"

    @property
    def _public(self) -> EllipticCurvePublicKey | None:
        return None if self._key is None else self._key.public_key()

    def _read_lines_of_others(self) -> None:
        """Read lines that another process of this site appended.

        All of them must be signed, and the known lines must be unchanged.
        """
        self._catch_up(f"{self._count}:{self._last}", since=self._count)

    def _catch_up(self, noted: str | None = None, since: int | None = None) -> None:
        _, self._count, self._last = _read(self.path, self._public, noted, since)
        if self.path.exists() and self.path.stat().st_size > (whole := _complete_length(self.path)):
            # An incomplete line of a process that was killed; its answer was never sent.
            os.truncate(self.path, whole)
        self._stamp = _file_identity(self.path)

    def _write(self, line: bytes) -> None:
        """Append a line and flush it to disk; remove a partial line if that fails."""
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
        signature = self._key.sign(ABOUT + line, ECDSA(SHA384()))
        return line[:-1] + SIGNED + signature.hex().encode() + b'"}'

    def _lock(self) -> FileLock:
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o600)

    def _set_head(self) -> None:
        # Not flushed to disk: after a power failure it may be behind the lines, never ahead.
        handle = os.open(_head_of(self.path), os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(f"{self._count} {self._last}".ljust(HEAD - 1).encode() + b"\n")


def verify(
    path: Path, key: EllipticCurvePublicKey | None = None, head: str | None = None
) -> list[Entry]:
    """Verify a log and return its entries.

    Args:
        path: Path of the log.
        key: Public key of the node that wrote it. None: appended lines are not detected.
        head: An earlier head, `N:HASH`; line N must still be the same.

    Raises:
        UserError: If a line was changed, removed, moved or not signed with the key; the message
            names the line.
    """
    # Unlike Path.exists, os.path.exists accepts names that are too long.
    if not os.path.exists(path) and not os.path.exists(_head_of(path)):
        raise UserError(f"{path}: not found; the log of a node is audit.jsonl in the site's folder")
    return _read(path, key, head)[0]


def verified_head(path: Path) -> str:
    """Verify a log and return its head, `N:HASH`."""
    return ":".join(map(str, _read(path)[1:]))


def format_entries(entries: Iterable[Entry]) -> list[str]:
    """Return a readable line for each entry."""
    lines = []
    for entry in entries:
        what = " ".join(str(entry[name]) for name in ("ask", "what") if entry.get(name))
        # Models are evaluated when a round is complete.
        round_idx = entry.get("round")
        turn = ""
        if isinstance(round_idx, int):
            turn = f"round {round_idx + (entry.get('what') != 'read')}"
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
        lines.append(printable("  ".join(part for part in parts if part)))
    return lines


@dataclass(frozen=True)
class TrafficTotals:
    """Bytes of a run's tasks as the server counts them, each task once.

    Args:
        up: Bytes of uploads.
        down: Bytes of broadcasts.
    """

    up: int
    down: int


def traffic_totals(entries: Iterable[Entry], run: str | None = None) -> TrafficTotals:
    """Return the traffic of the tasks in a log.

    A task counts when it first arrives, an upload when it is first sent; repetitions do not count.

    Args:
        entries: Entries of the log.
        run: ID of a run. None: all runs.
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
    noted: str | None = None,
    since: int | None = None,
) -> tuple[list[Entry], int, str]:
    """Read and check a log.

    Lines beyond the head and an incomplete last line are left by a process that was killed.

    Args:
        path: Path of the log.
        key: Public key of the site.
        noted: An earlier head, `N:HASH`, which the log must contain.
        since: Every line after this number must be signed; by default the last line.

    Returns:
        The entries, their number, and the hash of the last line.
    """
    lines = _bytes(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    count, head = _head(path)
    entries: list[Entry] = []
    hashes: list[str] = []
    last = FIRST
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
        what = f"expected {count} lines, found {len(lines)}"
        raise UserError(f"{path}: line {len(lines) + 1}: {what}; the log was truncated")
    if key is not None:
        for number in range(len(lines) if since is None else since + 1, len(lines) + 1):
            _check_signature(path, lines, number, key)
    if noted is not None:
        _check_known_head(path, hashes, noted)
    return entries, len(lines), last


def _entry(line: bytes, where: str) -> Entry:
    """Return a line's entry.

    Raises:
        UserError: Unless it has the fields that `append` writes, with their types.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: changed; not a JSON object")
    for name, kind in FIELDS.items():
        if not _has_type(entry.get(name), kind) and (name in entry or name in REQUIRED):
            found = one_line(entry[name], 60) if name in entry else "nothing"
            raise UserError(
                f"{where}: {name}: expected {kind.__name__}, got {found}; the line was changed"
            )
    if not all(isinstance(kind, str) for kind in entry.get("kinds", [])):
        raise UserError(f"{where}: kinds: expected a list of str; the line was changed")
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
    """Return whether a value has a type; integers must fit into 64 bits."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return kind in (int, float) and value.bit_length() <= 64
    return isinstance(value, kind)


def _check_signature(
    path: Path, lines: list[bytes], number: int, key: EllipticCurvePublicKey
) -> None:
    """Check that a line, counted from 1, is signed with a key; it covers all earlier lines.

    Raises:
        UserError: If it is not.
    """
    if number == 0:
        return
    line, _, rest = lines[number - 1].rpartition(SIGNED)
    try:
        # `bytes.fromhex` also accepts capitals and spaces, which would change the line's hash.
        digits = rest.decode().removesuffix('"}\n')
        signature = bytes.fromhex(digits)
        if signature.hex() != digits:
            raise ValueError("expected lower-case hexadecimal digits")
        key.verify(signature, ABOUT + line + b"}", ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise UserError(f"{path}: line {number}: not signed with this site's key") from None


def _check_known_head(path: Path, hashes: list[str], noted: str) -> None:
    """Check that a log contains an earlier head.

    Raises:
        UserError: If it does not, or the head is malformed.
    """
    number, _, found = noted.partition(":")
    if not number.isdecimal() or len(number) > MOST_DIGITS or len(found) != len(FIRST):
        raise UserError(
            f"head: expected N:HASH as printed by `hetero-fl node --audit`, "
            f"got '{one_line(noted, 90)}'"
        )
    if int(number) > len(hashes):
        raise UserError(
            f"{path}: expected at least {number} lines, found {len(hashes)}; the log was truncated"
        )
    if [FIRST, *hashes][int(number)] != found:
        raise UserError(
            f"{path}: line {number}: differs from the given head; the log was rewritten"
        )


def _shorten_value(value: Any) -> Any:
    """Return a value with strings and lists shortened."""
    if isinstance(value, str):
        return one_line(value, LONGEST)
    if isinstance(value, list):
        return [_shorten_value(each) for each in value[:MOST_LISTED]]
    return value


def _head(path: Path) -> tuple[int, str]:
    head = _head_of(path)
    try:
        count, last = head.read_text(encoding="ascii").split()
        if count.isdecimal() and len(last) == len(FIRST):
            return int(count), last
    except FileNotFoundError:
        if not path.exists() or path.stat().st_size == 0:
            return 0, FIRST
        raise UserError(
            f"{path}: line 1: {head.name}, which has the number of lines, is missing"
        ) from None
    except OSError as error:
        raise UserError(f"{head}: cannot be read ({error.strerror})") from None
    except ValueError:
        pass
    raise UserError(f"{path}: line 1: {head.name} was changed and cannot be read")


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    """Return the inode, size and modification time of a file; None if it does not exist."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _bytes(path: Path) -> bytes:
    """Return a log's content, empty if it does not exist.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _complete_length(path: Path) -> int:
    """Return the number of bytes of the complete lines."""
    return _bytes(path).rfind(b"\n") + 1


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _now() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


TRAIN = "train"
# Outcomes of a completed task.
ANSWERED = ("done", "failed")
# Number of tasks that are known by the server's name.
MAX_KNOWN_TASKS = 1024

# Sorted (noise multiplier, rate, steps).
Spent = tuple[tuple[float, float, int], ...]


@dataclass
class SiteUsage:
    """Activity of a site in one run, and its spending and traffic over all runs.

    Args:
        run: ID of the run.
        sent: Bytes of all answers in all runs.
        answered: Digests of this run's completed tasks.
        trained: Digests of this run's completed training tasks.
        tasks: By the server's name, the task's digest; newest last.
        one_time_charges: Releases that are charged once in this run.
        steps: By (noise multiplier, sampling rate), the number of steps in all runs.
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
        """Return the usage from the entries of a log."""
        usage = cls(run)
        for entry in entries:
            usage.add_entry(entry)
        return usage

    def add_entry(self, entry: Entry) -> None:
        """Add an entry of the log."""
        self.sent += entry["out"]
        charges = entry.get("spent", ())
        self.steps = add_steps(self.steps, charges)
        if entry.get("run") != self.run or "asked" not in entry or entry["outcome"] == REPEATED:
            return
        self.one_time_charges.update(c["once"] for c in charges if c["once"])
        asked = bytes.fromhex(entry["asked"])
        self.tasks[entry["task"]] = asked
        if len(self.tasks) > MAX_KNOWN_TASKS:
            self.tasks.popitem(last=False)
        if entry["outcome"] in ANSWERED:
            self.answered.add(asked)
            if entry.get("what") == TRAIN:
                self.trained.add(asked)

    def with_charges(self, charges: Iterable[Mapping[str, Any]]) -> Spent:
        """Return what has been spent, together with further charges."""
        return tuple(sorted((*at, count) for at, count in add_steps(self.steps, charges).items()))


def add_steps(
    steps: Mapping[tuple[float, float], int], charges: Iterable[Mapping[str, Any]]
) -> dict[tuple[float, float], int]:
    """Return the numbers of steps after further charges."""
    total = dict(steps)
    for charge in charges:
        mechanism = (float(charge["noise"]), float(charge["rate"]))
        total[mechanism] = total.get(mechanism, 0) + int(charge["steps"])
    return total
