"""Read a run that may be in progress: only new lines are parsed, and damage is reported."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hetero_fl.reporting.formatting import TEST_NAMES, algorithm_name
from hetero_fl.reporting.run_directory import LOG, METRICS, RunDirectory, is_locked
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.serialization import check_entries

# Seconds between two checks of the lock of a run directory.
LOCK_SECONDS = 5.0
# Number of bytes at the end of the log in which the reason of a failure is searched.
LOG_TAIL = 4096
_FAILURE = re.compile(r"^[\d-]+ [\d:]+  failed: (.*)$", re.MULTILINE)


Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class LiveRound:
    """A completed round. Bytes and seconds are totals up to this round.

    Args:
        number: Number of the round, from 1.
        up_bytes: Bytes sent by clients.
        down_bytes: Bytes sent to clients.
        seconds: Time, which is simulated if the run simulates devices.
        train_loss: Mean training loss over the clients.
        epsilon: Privacy cost, or None without differential privacy.
        failed: Ids of the clients whose uploads were not used.
        means: Means over clients with their statistics, keyed by test and metric. Empty if the
            round was not evaluated.
        validation: The same on validation rows.
        clients: Scores, keyed by client id, test and metric.
    """

    number: int
    up_bytes: int
    down_bytes: int
    seconds: float
    train_loss: float | None
    epsilon: float | None
    failed: tuple[str, ...]
    means: Mapping[str, Scores]
    validation: Mapping[str, Scores]
    clients: Mapping[str, Mapping[str, Scores | None]]

    @classmethod
    def from_record(cls, record: Mapping[str, Any], before: LiveRound | None) -> LiveRound:
        """Convert a line of `metrics.jsonl`.

        Args:
            record: The record of the round.
            before: The round before, or None for the first round.

        Raises:
            UserError: If the record is not that of the next round.
        """
        number = 1 if before is None else before.number + 1
        try:
            found = int(record["round"])
            losses = [loss for loss in record["train_loss"].values() if loss is not None]
            seconds = sum(record["seconds"].values()) + (before.seconds if before else 0.0)
            if "simulated" in record:
                seconds = record["simulated"]["end"]
            parsed = cls(
                number=number,
                up_bytes=int(record["up_bytes"]) + (before.up_bytes if before else 0),
                down_bytes=int(record["down_bytes"]) + (before.down_bytes if before else 0),
                seconds=float(seconds),
                train_loss=sum(losses) / len(losses) if losses else None,
                epsilon=(record.get("privacy") or {}).get("epsilon"),
                failed=tuple(map(str, record["failed"])),
                means=_read_means(record),
                validation=_read_means(record.get("validation") or {}),
                clients={
                    client: {test: dict(scores) for test, scores in tests.items() if scores}
                    for client, tests in (record.get("clients") or {}).items()
                },
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
            raise UserError("expected the record of a round") from None
        if found != number:
            raise UserError(f"expected round {number}, got round {found}")
        return parsed


def _read_means(scores: Mapping[str, Any]) -> dict[str, Scores]:
    return {name: dict(scores[name]) for name in TEST_NAMES if scores.get(name)}


class LiveRun:
    """A run directory whose run may be in progress.

    Args:
        path: The run directory.

    Attributes:
        path: The run directory.
        key: Short text that identifies the run in addresses.
        config: The resolved configuration as plain values.
        state: `running`, `finished`, `interrupted` or `failed`.
        problem: Why the run failed, or which file is damaged. Otherwise empty.
        models: Names of the clients' models, keyed by client id. Empty until the run has finished.
        rounds: The completed rounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = sha256(str(path.resolve()).encode()).hexdigest()[:12]
        self.config: dict[str, Any] = {}
        self.state = "running"
        self.problem = ""
        self.models: dict[str, str] = {}
        self.rounds: list[LiveRound] = []
        self._directory = RunDirectory(path)
        self._offset = 0
        self._last_line = b""
        self._lock_checked = float("-inf")
        self._is_locked = False

    @property
    def algorithm(self) -> str:
        """Display name of the method."""
        section = self.config.get("algorithm")
        name = section.get("name") if isinstance(section, dict) else None
        return algorithm_name(name) if isinstance(name, str) else "?"

    @property
    def planned(self) -> int | None:
        """The number of rounds in the configuration, or None if it is unknown."""
        rounds = self.config.get("rounds")
        return rounds if isinstance(rounds, int) else None

    def refresh(self) -> None:
        """Read what has been written since the last call."""
        self.problem = ""
        try:
            check_entries(self.path)
        except UserError as error:
            self.state, self.problem = "failed", one_line(error)
            return
        try:
            self.config = self._directory.config()
            self._read_metrics()
        # A damaged file may have any content, and must not hide the other runs.
        except Exception as error:
            self.problem = one_line(error)
        self._read_state()

    def _read_metrics(self) -> None:
        """Parse the new complete lines of `metrics.jsonl`.

        A resumed run may have replaced the file by one with fewer lines.

        Raises:
            UserError: If a line is not the record of the next round.
        """
        path = self.path / METRICS
        try:
            with open(path, "rb") as file:
                if self._is_replaced(file):
                    self._start_over()
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            # The first round has not been completed.
            self._start_over()
            return
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        for line in new.split(b"\n")[:-1]:
            where = f"{path}: line {len(self.rounds) + 1}"
            before = self.rounds[-1] if self.rounds else None
            try:
                self.rounds.append(LiveRound.from_record(json.loads(line), before))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            except (ValueError, RecursionError):
                raise UserError(f"{where}: not valid JSON") from None
            self._offset += len(line) + 1
            self._last_line = line + b"\n"

    def _start_over(self) -> None:
        self.rounds = []
        self._offset = 0
        self._last_line = b""

    def _is_replaced(self, file: Any) -> bool:
        """Return whether the file does not continue with the line that was read last."""
        file.seek(self._offset - len(self._last_line))
        return bool(file.read(len(self._last_line)) != self._last_line)

    def _read_state(self) -> None:
        if self._directory.finished:
            if self.state != "finished" or not self.models:
                self.models = self._read_models()
            self.state = "finished"
            return
        self.models = {}
        now = time.monotonic()
        # The check locks the directory for a moment, so it must be rare.
        if now - self._lock_checked > LOCK_SECONDS:
            self._is_locked = is_locked(self.path)
            self._lock_checked = now
        if self._is_locked:
            self.state = "running"
            return
        reason = self._failure()
        self.state = "failed" if reason else "interrupted"
        self.problem = self.problem or reason

    def _read_models(self) -> dict[str, str]:
        try:
            clients = self._directory.summary()["clients"]
            return {str(client["id"]): str(client["model"]) for client in clients}
        except (UserError, KeyError, TypeError):
            return {}

    def _failure(self) -> str:
        """Return the error that ended the run, if it is the last event of the log."""
        try:
            with open(self.path / LOG, "rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - LOG_TAIL))
                tail = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        failures = list(_FAILURE.finditer(tail))
        if not failures or re.search(r"^[\d-]+ [\d:]+  ", tail[failures[-1].end() :], re.MULTILINE):
            return ""
        return one_line(failures[-1][1])
