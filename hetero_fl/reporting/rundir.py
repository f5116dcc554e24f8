"""The run directory: the files that a run leaves behind, written so that a crash at any moment leaves them readable."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from hetero_fl.errors import UserError
from hetero_fl.files import write_atomically

VERSION = 1
LOCK, LOG = ".lock", "log.txt"
SITES = "sites"  # of a federation on one machine: what its nodes keep
UNFINISHED = {"environment.json", ".environment.json.tmp", ".config.yaml.tmp", LOCK, SITES}  # of a creation cut short

Json = dict[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[list[str]]:
    """Hold a folder, which is made if it is not there, against other processes; yields lines for the log.

    The operating system ends the hold with the process, however that ends; the empty file `.lock` stays and means nothing.
    Where the file system has no locks nothing is held, and the line says so. Raises UserError if another process holds the
    folder, or it cannot be written to.
    """
    _make(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        held = _acquired(lock)
    except Timeout:
        raise UserError(f"{folder}: another process is at work there; let it end, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another --out") from None
    try:
        yield [] if held else [f"{folder}: its file system has no locks; see to it that no second process works there"]
    finally:
        lock.release()


def _acquired(lock: BaseFileLock) -> bool:
    """Whether the operating system holds it now; not where the file system has no locks. Raises Timeout and OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flock not supported")  # told by the line in the log
        lock.acquire()
    if isinstance(lock, SoftFileLock):  # a plain file outlives a kill: worse than none
        lock.release()
        return False
    return True


def check_vacant(path: Path, besides: str = ", or --resume if it is an interrupted run") -> None:
    """Raises UserError if the path is taken by anything but an empty folder, or one whose creation was interrupted."""
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= UNFINISHED):
        raise UserError(f"{path}: exists already; choose another --out{besides}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from None


class RunDirectory:
    """One run's folder.

    It holds `config.yaml` (resolved), `environment.json`, `metrics.jsonl` (a line a round), `summary.json`,
    `details.json` (what the report shows of each client), `log.txt`, `plots/`, `models/`, `checkpoint/`, `report.html`.
    `environment.json` names the layout's version, and so marks a folder as a run directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, config: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> RunDirectory:
        """A new run directory with the resolved configuration and a description of the machine.

        `config.yaml` is written last: where it is, the folder is complete. Raises UserError if the path is taken by
        anything but an empty folder, or one in which this was interrupted.
        """
        run = cls(path)
        check_vacant(run.path)
        _make(run.path)
        run.write_json("environment.json", {"run_directory_version": VERSION, **environment})
        run.write_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110))
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """An existing run directory. Raises UserError if there is none, or one of another version."""
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"{run.path}: no such folder; expected a run directory, such as runs/NAME")
        if not (run.path / "environment.json").is_file():
            raise UserError(f"{run.path}: not a run directory (it has no environment.json)")
        version = run.environment().get("run_directory_version")
        if version != VERSION:
            raise UserError(f"{run.path}: run directory version {version}; this release reads version {VERSION}")
        return run

    @property
    def log(self) -> Path:
        """Where the log lines go."""
        return self.path / LOG

    @property
    def plots(self) -> Path:
        """Where the pictures go."""
        return self.path / "plots"

    def write_text(self, name: str, text: str) -> Path:
        """Replace a file in one step: after a crash it holds the old text or the new, never half of one."""
        target = self.path / name
        write_atomically(target, text.encode())
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Replace a JSON file in one step. Raises ValueError for NaN and infinities, which JSON does not have."""
        return self.write_text(name, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a round's line to `metrics.jsonl`; it is on the disk when this returns. Raises ValueError for NaN."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        with open(self.path / "metrics.jsonl", "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def rewind_metrics(self, completed: int) -> None:
        """Drop the lines of rounds after `completed`, and a last line torn by a crash; a resume writes them anew."""
        if (self.path / "metrics.jsonl").exists():
            kept = [record for record in self.metrics() if record["round"] <= completed]
            text = "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in kept)
            self.write_text("metrics.jsonl", text)

    def summary(self) -> Json:
        """`summary.json`. Raises UserError if the run has not written it."""
        return self._json("summary.json")

    def details(self) -> Json:
        """`details.json`: labels, rows, models, confusion and calibration by client."""
        return self._json("details.json")

    def environment(self) -> Json:
        """`environment.json`: versions, machine, layout version."""
        return self._json("environment.json")

    def config(self) -> Json:
        """`config.yaml`, resolved, as plain values."""
        try:
            content = yaml.safe_load(self.read_text("config.yaml"))
        except yaml.YAMLError as error:
            raise UserError(f"{self.path / 'config.yaml'}: not YAML ({error})") from None
        return content if isinstance(content, dict) else {}

    def metrics(self) -> list[Json]:
        """The records of `metrics.jsonl`, in order; a last line that a crash has cut is left out."""
        lines = self.read_text("metrics.jsonl").split("\n")
        complete, records = lines[:-1], []
        for number, line in enumerate(complete, 1):
            try:
                record = json.loads(line)
                record["round"] += 0
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{self.path / 'metrics.jsonl'}: line {number} is not a round's record") from None
            records.append(record)
        return records

    def read_text(self, name: str) -> str:
        """A file's text. Raises UserError if it is missing or not text."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not text"
            raise UserError(f"{self.path / name}: cannot be read ({why})") from None

    def _json(self, name: str) -> Json:
        try:
            content = json.loads(self.read_text(name))
        except ValueError as error:
            raise UserError(f"{self.path / name}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: found a {type(content).__name__}, expected an object")
        return content
