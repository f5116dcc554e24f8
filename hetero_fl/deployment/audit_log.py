"""Tamper-evident audit log of a site, and the privacy and traffic usage computed from the log.

Each answered message is one JSON line that contains the SHA-256 hash of the previous line and is
signed with the node's key. A line and its hash form a head, `N:HASH`. The newest head is kept in a
file next to the log, so that a log that was cut is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA384
from pydantic import ConfigDict, Field, NonNegativeFloat, ValidationError, create_model

from hetero_fl.communication.protocol import Traffic
from hetero_fl.privacy.accounting import History, PrivacyCharge, add_charges
from hetero_fl.utils.errors import ArgumentError, UserError, one_line, printable
from hetero_fl.utils.serialization import write_atomically

# Hash before the first line.
INITIAL_HASH = "0" * 64
HEAD_PATTERN = re.compile(r"(\d{1,18})[: ]([0-9a-f]{64})")
# Prefix of the signed bytes, so that signatures of other data are not valid for a line.
SIGNATURE_CONTEXT = b"hetero_fl audit line\n"
# Maximum number of characters of a string in a line.
MAX_STRING_CHARS = 500
# Maximum number of list entries in a line.
MAX_LIST_ENTRIES = 32
# Outcome of a task that was already answered.
REPEATED = "again"
# Names of tasks in a formatted log that differ from those in messages.
TASK_NAMES = {"read": "evaluate"}

Entry = dict[str, Any]

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, lt=2**64)]
_Charge = create_model(
    "_Charge",
    __config__=_STRICT,
    noise=(NonNegativeFloat, ...),
    rate=(NonNegativeFloat, ...),
    steps=(_Count, ...),
    once=(str, ...),
)
# Types and defaults of the fields of a line.
_FIELDS: dict[str, Any] = {
    "n": (_Count, ...),
    "time": (str, ...),
    "in": (_Count, ...),
    "out": (_Count, ...),
    "outcome": (str, ...),
    "before": (str, ...),
    "code": (str, ""),
    "run": (str, ""),
    "ask": (str, ""),
    "what": (str, ""),
    "task": (str, ""),
    # Digest of a task.
    "asked": (Annotated[str, Field(pattern="^([0-9a-f]{2})*$")], ""),
    # A server may have asked for a negative round.
    "round": (Annotated[int, Field(gt=-(2**64), lt=2**64)], 0),
    "kinds": (list[str], []),
    "spent": (list[_Charge], []),
}
_Line = create_model("_Line", __config__=_STRICT, **_FIELDS)


class AuditLog:
    """Append-only audit log of a node. The log has one writer at a time.

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
        self._identity: tuple[int, int, int] | None = None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.entries()
        # If the process is killed after the first line, the log still has a head.
        self._write_head()

    def append(self, **fields: Any) -> Entry:
        """Append a line about a message and flush the log to disk.

        Args:
            **fields: Fields of the line. Long strings and lists are shortened.

        Returns:
            The written entry.

        Raises:
            OSError: If the line cannot be written.
            UserError: If the log was changed.
        """
        if _file_identity(self.path) != self._identity:
            self.entries()
        short = {name: _shorten_value(value) for name, value in fields.items()}
        entry: Entry = {
            "n": self._count + 1,
            "time": _format_time(time.time()),
            **short,
            "before": self._last,
        }
        if self._key is not None:
            entry["signature"] = self._key.sign(_signed_bytes(entry), ECDSA(SHA384())).hex()
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._write(line)
        self._count += 1
        self._last = _hash(line)
        self._identity = _file_identity(self.path)
        self._write_head()
        return entry

    @property
    def head(self) -> str:
        """Number of lines and hash of the last line, in the format `N:HASH`."""
        return f"{self._count}:{self._last}"

    def entries(self) -> list[Entry]:
        """Return all entries, including those of earlier processes.

        Raises:
            UserError: If the log was changed, or does not contain the lines that this process
                knows.
        """
        public = None if self._key is None else self._key.public_key()
        entries, head = _read(self.path, public, self.head)
        length = _content(self.path).rfind(b"\n") + 1
        if self.path.exists() and self.path.stat().st_size > length:
            # Remove the incomplete line of a killed process or a full disk. Its answer was never
            # sent.
            os.truncate(self.path, length)
        self._count = len(entries)
        self._last = head.partition(":")[2]
        self._identity = _file_identity(self.path)
        return entries

    def _write(self, line: bytes) -> None:
        """Append a line and flush the log to disk. If this fails, part of the line may remain."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _write_head(self) -> None:
        write_atomically(_head_path(self.path), self.head.encode(), private=True)


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
    if not os.path.exists(path):
        raise UserError(f"{path}: not found; the log of a node is audit.jsonl in the site's folder")
    return _read(path, key, head)[0]


def verified_head(path: Path) -> str:
    """Verify a log and return the head, which is used to verify the log again later.

    Returns:
        The number of lines and the hash of the last line, in the format `N:HASH`.

    Raises:
        UserError: If the log was changed.
    """
    return _read(path)[1]


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


def traffic_totals(entries: Iterable[Entry], run: str | None = None) -> Traffic:
    """Return the numbers of bytes exchanged for the tasks in a log.

    Each task is counted once, in the same way as at the server. Repeated broadcasts and uploads of
    the same task are not counted.

    Args:
        entries: Entries of the log.
        run: ID of a run. If None, the tasks of all runs are counted.
    """
    received: dict[str, int] = {}
    sent: dict[str, int] = {}
    for entry in entries:
        if "asked" not in entry or run not in (None, entry.get("run")):
            continue
        received.setdefault(entry["asked"], entry["in"])
        if entry.get("what") != "read" and entry["outcome"] in ("done", REPEATED):
            sent.setdefault(entry["asked"], entry["out"])
    return Traffic(sum(sent.values()), sum(received.values()))


def _read(
    path: Path, key: EllipticCurvePublicKey | None = None, known_head: str | None = None
) -> tuple[list[Entry], str]:
    """Read and verify a log.

    The incomplete last line of a killed process is left out.

    Args:
        path: Path of the log.
        key: Public key of the site. If None, signatures are not checked.
        known_head: Earlier head, `N:HASH`, which the log must contain, in addition to the head next
            to the log.

    Returns:
        The entries and the head.

    Raises:
        UserError: If the log was changed.
    """
    lines = _content(path).split(b"\n")[:-1]
    entries: list[Entry] = []
    hashes = [INITIAL_HASH]
    for number, line in enumerate(lines, 1):
        entry = _entry(line, f"{path}: line {number}")
        if entry["n"] != number:
            raise UserError(
                f"{path}: line {number}: expected number {number}, got {entry['n']}; "
                "a line was removed or moved"
            )
        if entry["before"] != hashes[-1]:
            raise UserError(f"{path}: line {max(1, number - 1)}: changed after it was written")
        entries.append(entry)
        hashes.append(_hash(line + b"\n"))
    head_path = _head_path(path)
    stored_head = _content(head_path).decode(errors="replace").strip()
    if (lines or stored_head) and HEAD_PATTERN.fullmatch(stored_head) is None:
        problem = "damaged" if stored_head else "missing or empty"
        raise UserError(f"{head_path}: {problem}; restore this file, which has the newest head")
    for head in (stored_head, known_head):
        if head:
            _check_head(path, hashes, head)
    # The signature of the last line covers all earlier lines.
    if key is not None and entries:
        _check_signature(path, entries[-1], key)
    return entries, f"{len(entries)}:{hashes[-1]}"


def _entry(line: bytes, where: str) -> Entry:
    """Parse a line.

    Raises:
        UserError: If a field is missing or has a wrong type.
    """
    try:
        _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = ": ".join(str(part) for part in (*first["loc"], first["msg"]))
        raise UserError(f"{where}: {name}; the line was changed") from None
    entry: Entry = json.loads(line)
    return entry


def _check_signature(path: Path, entry: Entry, key: EllipticCurvePublicKey) -> None:
    try:
        signature = bytes.fromhex(str(entry.get("signature")))
        key.verify(signature, _signed_bytes(entry), ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise UserError(f"{path}: line {entry['n']}: not signed with this site's key") from None


def _signed_bytes(entry: Entry) -> bytes:
    """Return the bytes of an entry that its signature covers."""
    content = {name: value for name, value in entry.items() if name != "signature"}
    return SIGNATURE_CONTEXT + json.dumps(content, ensure_ascii=False).encode()


def _check_head(path: Path, hashes: list[str], head: str) -> None:
    """Check that a log contains an earlier head.

    Args:
        path: Path of the log.
        hashes: The hash before the first line, and the hash of each line.
        head: The earlier head.

    Raises:
        UserError: If the log does not contain the head, or the head is malformed.
    """
    match = HEAD_PATTERN.fullmatch(head)
    if match is None:
        raise ArgumentError(
            f"{path}: head: expected N:HASH as printed by `hetero-fl audit-log`, "
            f"got '{one_line(head, 90)}'"
        )
    number = int(match[1])
    if number >= len(hashes):
        raise UserError(
            f"{path}: line {len(hashes)}: expected at least {number} lines, "
            f"got {len(hashes) - 1}; the log was truncated"
        )
    if hashes[number] != match[2]:
        raise UserError(f"{path}: line {number}: differs from a known head; the log was rewritten")


def _shorten_value(value: Any) -> Any:
    """Return a value with long strings and lists shortened."""
    if isinstance(value, str):
        return one_line(value, MAX_STRING_CHARS)
    if isinstance(value, list):
        return [_shorten_value(each) for each in value[:MAX_LIST_ENTRIES]]
    return value


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _file_identity(path: Path) -> tuple[int, int, int] | None:
    """Return the inode, size and modification time of a file, or None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _content(path: Path) -> bytes:
    """Return the content of a file, or empty bytes if the file does not exist.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _format_time(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


TRAIN = "train"
# Kind of the reply to a request that the protocol refused.
REFUSED = "refused"
# Outcomes of a completed task.
ANSWERED = ("done", "failed")
# Maximum number of tasks whose names are stored.
MAX_KNOWN_TASKS = 1024


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
        spent: Privacy mechanisms of all runs, as sorted tuples (noise multiplier, sampling rate,
            number of steps).
    """

    run: str
    sent: int = 0
    answered: set[bytes] = field(default_factory=set)
    trained: set[bytes] = field(default_factory=set)
    tasks: OrderedDict[str, bytes] = field(default_factory=OrderedDict)
    one_time_charges: set[str] = field(default_factory=set)
    spent: History = ()

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
        """Update the usage with an entry of the log."""
        self.sent += entry["out"]
        charges = entry.get("spent", ())
        self.spent = self.with_charges(charges)
        if entry.get("run") != self.run or "asked" not in entry or entry["outcome"] == REPEATED:
            return
        self.one_time_charges |= {charge["once"] for charge in charges} - {""}
        digest = bytes.fromhex(entry["asked"])
        self.tasks[entry.get("task", "")] = digest
        if len(self.tasks) > MAX_KNOWN_TASKS:
            self.tasks.popitem(last=False)
        # A request that the protocol refused before training has cost nothing.
        if entry["outcome"] in ANSWERED and entry.get("kinds") != [REFUSED]:
            self.answered.add(digest)
            if entry.get("what") == TRAIN:
                self.trained.add(digest)

    def with_charges(self, charges: Iterable[Mapping[str, Any]]) -> History:
        """Return the privacy mechanisms of all runs, including additional charges.

        Args:
            charges: Additional charges, as in entries of the log.

        Returns:
            Sorted tuples (noise multiplier, sampling rate, number of steps).
        """
        added = [PrivacyCharge(c["rate"], c["steps"], scale=c["noise"]) for c in charges]
        return add_charges(self.spent, added)
