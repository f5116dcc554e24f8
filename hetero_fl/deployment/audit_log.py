"""The tamper-evident audit log of a site, and the usage that it accounts for."""

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

# What was asked of a site and what left it: a JSON line a message, each with the SHA-256 of the
# line before it.
#
# With the node's key each line is signed, and the signature of the last one covers all before it:
# without the key nobody can change, insert or append a line. The number of lines and the hash of
# the last one are in a second file, `….head`, so that an end that was cut off is noticed. A process
# that can write both files can still restore an earlier state; a copy of the head elsewhere shows
# that. A line is on disk before the answer that it tells of leaves; what was spent is counted from
# the lines.

FIRST = "0" * 64  # before the first line
# bytes of the head: a number and a hash, in a fixed width, so that it is replaced in one write
HEAD = 96
ABOUT = b"hetero_fl audit line\n"  # before what is signed: no message passes for a line
SIGNED = b', "signature": "'  # between a line's content and its signature, in hexadecimal digits
LONGEST = 500  # characters of a text in a line
MOST_DIGITS = 18  # of a line's number
MOST_LISTED = 32  # texts of a list in a line
REPEATED = "again"  # the outcome of a message that had been answered before

Entry = dict[str, Any]

# Fields of a line, and of each entry of `spent`.
FIELDS: dict[str, type] = {
    "n": int, "time": str, "in": int, "out": int, "outcome": str, "before": str,
    "run": str, "ask": str, "what": str, "task": str, "asked": str, "round": int, "kinds": list, "spent": list,
}  # fmt: skip
REQUIRED = ("n", "time", "in", "out", "outcome", "before")
CHARGE: dict[str, type] = {"noise": float, "rate": float, "steps": int}


class AuditLog:
    """A log that is written on.

    Args:
        path: The file.
        key: The node's private key, with which lines are signed; none: they are not.

    Raises:
        UserError: If the log was changed, so that its counts are not reliable.
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
        """Write a line about a message and flush it to disk.

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
        """All lines, those of earlier processes too. Raises UserError as above."""
        return _read(self.path, self._public)[0]

    @property
    def head(self) -> str:
        """The number of lines and the hash of the last one, `N:HASH`; keep a copy of it elsewhere."""
        return f"{self._count}:{self._last}"

    @property
    def _public(self) -> EllipticCurvePublicKey | None:
        return None if self._key is None else self._key.public_key()

    def _read_lines_of_others(self) -> None:
        """Read a file that has changed since: another process of this site may have appended lines.

        A new line vouches for all before it, so each of them must be signed, and the lines that this process knows must
        still be there.
        """
        self._catch_up(f"{self._count}:{self._last}", since=self._count)

    def _catch_up(self, noted: str | None = None, since: int | None = None) -> None:
        _, self._count, self._last = _read(self.path, self._public, noted, since)
        if self.path.exists() and self.path.stat().st_size > (whole := _complete_length(self.path)):
            # half a line of a process that was killed; nothing has left with it
            os.truncate(self.path, whole)
        self._stamp = _file_identity(self.path)

    def _write(self, line: bytes) -> None:
        """Append a line to the file and flush it to disk; if that fails, remove what was written of it."""
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
        # Not flushed to disk: after a loss of power it may be behind the lines, never ahead.
        handle = os.open(_head_of(self.path), os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(f"{self._count} {self._last}".ljust(HEAD - 1).encode() + b"\n")


def verify(
    path: Path, key: EllipticCurvePublicKey | None = None, head: str | None = None
) -> list[Entry]:
    """Read the entries of a log and check them.

    Args:
        path: The file.
        key: The public key of the node that wrote it; without it a line that somebody appended is not noticed.
        head: `N:HASH` as it was noted at an earlier time: line N must be the same still.

    Raises:
        UserError: A line was changed, removed, moved, cut off, or not written with that key; the line is named.
    """
    # false also for a name that is too long
    if not os.path.exists(path) and not os.path.exists(_head_of(path)):
        raise UserError(
            f"{path}: no such file; a node keeps its log beside its state, as audit.jsonl"
        )
    return _read(path, key, head)[0]


def verified_head(path: Path) -> str:
    """`N:HASH` of a log that was verified."""
    return ":".join(map(str, _read(path)[1:]))


def format_entries(entries: Iterable[Entry]) -> list[str]:
    """A line for people on each message."""
    made = []
    for entry in entries:
        what = " ".join(str(entry[name]) for name in ("ask", "what") if entry.get(name))
        number = entry.get("round")  # models are read when a round is complete
        turn = f"round {number + (entry.get('what') != 'read')}" if isinstance(number, int) else ""
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
        made.append(printable("  ".join(part for part in parts if part)))
    return made


@dataclass(frozen=True)
class TrafficTotals:
    """Bytes of a run's tasks: `up` and `down` as the server counts them, each task once."""

    up: int
    down: int


def traffic_totals(entries: Iterable[Entry], run: str | None = None) -> TrafficTotals:
    """Sums over the tasks of a run (None: of all): what came with them, and what left in uploads. A task is counted when it first
    comes, its upload when that first leaves; that it was sent again, or before its node could take it, is in the log alone."""
    came: dict[str, int] = {}
    left: dict[str, int] = {}
    for entry in entries:
        if (
            "asked" not in entry
            or entry["outcome"].startswith("lost")
            or run not in (None, entry.get("run"))
        ):
            continue
        came.setdefault(entry["asked"], entry["in"])
        if entry.get("what") != "read" and entry["outcome"] in ("done", REPEATED):
            left.setdefault(entry["asked"], entry["out"])
    return TrafficTotals(sum(left.values()), sum(came.values()))


# The chain -----------------------------------------------------------------------------------------------------------
def _read(
    path: Path,
    key: EllipticCurvePublicKey | None = None,
    noted: str | None = None,
    since: int | None = None,
) -> tuple[list[Entry], int, str]:
    """Read and check a log.

    Whole lines beyond the head, and half a line, are those of a process that was killed while it wrote.

    Args:
        path: The file.
        key: Public key of the site.
        noted: `N:HASH` of a line that must be there.
        since: Every line after this number must be signed; by default the last line.

    Returns:
        The entries, how many, and the hash of the last line.
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
                f"{path}: line {number}: found number {entry['n']} there; a line is missing, or was moved"
            )
        if entry["before"] != last:
            raise UserError(
                f"{path}: line {max(1, number - 1)}: it was changed after it had been written"
            )
        entries.append(entry)
        last = _hash(line)
        if number == count and last != head:
            raise UserError(f"{path}: line {number}: it was changed after it had been written")
        hashes.append(last)
    if len(lines) < count:
        what = f"{count} lines were written, {len(lines)} are there"
        raise UserError(f"{path}: line {len(lines) + 1}: {what}; the end was cut off")
    if key is not None:
        for number in range(len(lines) if since is None else since + 1, len(lines) + 1):
            _check_signature(path, lines, number, key)
    if noted is not None:
        _check_known_head(path, hashes, noted)
    return entries, len(lines), last


def _entry(line: bytes, where: str) -> Entry:
    """Return a line's entry. Raises UserError unless it has the fields that `append` writes, with their types."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: it was changed and cannot be read")
    for name, kind in FIELDS.items():
        if not _has_type(entry.get(name), kind) and (name in entry or name in REQUIRED):
            found = one_line(entry[name], 60) if name in entry else "nothing"
            raise UserError(
                f"{where}: {name}: found {found}; expected {kind.__name__}; it was changed"
            )
    if not all(isinstance(kind, str) for kind in entry.get("kinds", [])):
        raise UserError(f"{where}: kinds: expected a list of str; it was changed")
    for charge in entry.get("spent", []):
        if not isinstance(charge, dict) or not all(
            _has_type(charge.get(name), kind) for name, kind in CHARGE.items()
        ):
            raise UserError(
                f"{where}: spent: found {one_line(charge, 60)}; expected {', '.join(CHARGE)}; it was changed"
            )
    return entry


def _has_type(value: Any, kind: type) -> bool:
    """Whether a value of a line has a type; an integer has at most 64 bits."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return kind in (int, float) and value.bit_length() <= 64
    return isinstance(value, kind)


def _check_signature(
    path: Path, lines: list[bytes], number: int, key: EllipticCurvePublicKey
) -> None:
    """Raise UserError unless the line of this number, from 1, is signed with this key. It vouches for all lines before it."""
    if number == 0:
        return
    line, _, rest = lines[number - 1].rpartition(SIGNED)
    try:
        # Exactly as it was written: `bytes.fromhex` also reads capitals and spaces, which would change the line's hash.
        digits = rest.decode().removesuffix('"}\n')
        signature = bytes.fromhex(digits)
        if signature.hex() != digits:
            raise ValueError("expected lower-case hexadecimal digits")
        key.verify(signature, ABOUT + line + b"}", ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise UserError(f"{path}: line {number}: it is not signed with this site's key") from None


def _check_known_head(path: Path, hashes: list[str], noted: str) -> None:
    """Raise UserError unless the line whose number and hash were noted is still there."""
    number, _, found = noted.partition(":")
    if not number.isdecimal() or len(number) > MOST_DIGITS or len(found) != len(FIRST):
        raise UserError(
            f"head: found '{one_line(noted, 90)}'; expected N:HASH as `hetero-fl node --audit` prints it"
        )
    if int(number) > len(hashes):
        raise UserError(
            f"{path}: line {number} was noted, {len(hashes)} lines are there; the end was cut off"
        )
    if [FIRST, *hashes][int(number)] != found:
        raise UserError(
            f"{path}: line {number}: it is not the one that was noted; another history was written"
        )


def _shorten_value(value: Any) -> Any:
    """A value without long texts: what a server sends can be as long as it likes."""
    if isinstance(value, str):
        return one_line(value, LONGEST)
    return (
        [_shorten_value(each) for each in value[:MOST_LISTED]] if isinstance(value, list) else value
    )


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
            f"{path}: line 1: {head.name}, which says how many lines there are, is gone"
        ) from None
    except OSError as error:
        raise UserError(f"{head}: cannot be read ({error.strerror})") from None
    except ValueError:
        pass
    raise UserError(f"{path}: line 1: {head.name} was changed and cannot be read")


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    """Return the identity, size and modification time of a file, None if there is none: they differ after a change."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _bytes(path: Path) -> bytes:
    """Return a log's content, empty if there is no file. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _complete_length(path: Path) -> int:
    """Bytes of the whole lines."""
    return _bytes(path).rfind(b"\n") + 1


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _now() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


# What a site has done in a run, and spent and sent in all runs, as its audit log tells.

TRAIN = "train"
ANSWERED = ("done", "failed")  # outcomes of a task that was carried out
MAX_KNOWN_TASKS = 1024  # tasks that are known by the server's name for them

Spent = tuple[tuple[float, float, int], ...]  # (noise multiplier, rate, steps), sorted


@dataclass
class SiteUsage:
    """Grows with every line of the log; holds a few bytes of each."""

    run: str
    sent: int = 0  # bytes of all answers to everybody
    # this run's tasks that were carried out, by what was asked
    answered: set[bytes] = field(default_factory=set)
    trained: set[bytes] = field(default_factory=set)  # those of them that it trained for
    # by the server's name, the newest at the end
    tasks: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    # what was released for the whole of this run
    one_time_charges: set[str] = field(default_factory=set)
    # (noise multiplier, rate) -> mechanisms
    steps: dict[tuple[float, float], int] = field(default_factory=dict)

    @classmethod
    def from_log(cls, entries: Iterable[Entry], run: str) -> SiteUsage:
        """As a log has it."""
        made = cls(run)
        for entry in entries:
            made.add_entry(entry)
        return made

    def add_entry(self, entry: Entry) -> None:
        """One more line."""
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
        """What will have been spent with these, too."""
        return tuple(sorted((*at, count) for at, count in add_steps(self.steps, charges).items()))


def add_steps(
    steps: Mapping[tuple[float, float], int], charges: Iterable[Mapping[str, Any]]
) -> dict[tuple[float, float], int]:
    """Mechanisms and some more."""
    made = dict(steps)
    for charge in charges:
        at = (float(charge["noise"]), float(charge["rate"]))
        made[at] = made.get(at, 0) + int(charge["steps"])
    return made
