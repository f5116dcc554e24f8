"""The run directory: the files that a run leaves behind, written so that a crash at any moment leaves them readable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import sha256_of, write_atomically

VERSION = 1
LOCK = ".lock"
LOG = "log.txt"
CHECKSUMS = "SHA256SUMS"
METRICS = "metrics.jsonl"
ALWAYS = ("config.yaml", "environment.json", METRICS, "details.json")  # of a finished run
DERIVED = ("report.html", "plots/*.png")  # can be made again from the other files
SITES = "sites"  # of a federation on one machine: what its nodes keep
# of a creation cut short
UNFINISHED = {"environment.json", ".environment.json.tmp", ".config.yaml.tmp", LOCK, SITES}

Json = dict[str, Any]


@contextmanager
def lock_folder(folder: Path) -> Iterator[list[str]]:
    """Hold a folder, which is made if it is not there, against other processes; yields lines for the log.

    The operating system ends the hold with the process, however that ends; the empty file `.lock` stays and means nothing.
    Where the file system has no locks nothing is held, and the line says so. Raises UserError if another process holds the
    folder, or it cannot be written to.
    """
    _make_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        held = _try_lock(lock)
    except Timeout:
        raise UserError(
            f"{folder}: another process is at work there; let it end, or choose another --out"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror}); choose another --out"
        ) from None
    try:
        yield (
            []
            if held
            else [
                f"{folder}: its file system has no locks; see to it that no second process works there"
            ]
        )
    finally:
        lock.release()


def _try_lock(lock: BaseFileLock) -> bool:
    """Whether the operating system holds it now; not where the file system has no locks. Raises Timeout and OSError."""
    with warnings.catch_warnings():
        # told by the line in the log
        warnings.filterwarnings("ignore", message="flock not supported")
        lock.acquire()
    if isinstance(lock, SoftFileLock):  # a plain file outlives a kill: worse than none
        lock.release()
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Return whether another process is at work in a folder; False where that cannot be told."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        _try_lock(lock)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def has_run(path: Path) -> bool:
    """Return whether a run was begun in a folder. Raises UserError if it was, and has no configuration any more."""
    if (path / "config.yaml").is_file():
        return True
    if (path / METRICS).is_file() or (path / "summary.json").is_file():
        raise UserError(f"{path / 'config.yaml'}: missing; without it the run cannot be resumed")
    return False


def check_vacant(path: Path, besides: str = ", or --resume if it is an interrupted run") -> None:
    """Raises UserError if the path is taken by anything but an empty folder, or one whose creation was interrupted."""
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= UNFINISHED):
        raise UserError(f"{path}: exists already; choose another --out{besides}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); choose another --out"
        ) from None


class RunDirectory:
    """One run's folder.

    It holds `config.yaml` (resolved), `environment.json`, `metrics.jsonl` (a line a round), `summary.json`,
    `details.json` (what the report shows of each client), `log.txt`, `plots/`, `models/`, `checkpoint/`, `report.html`.
    `environment.json` names the layout's version, and so marks a folder as a run directory. `SHA256SUMS` holds the
    checksums of a finished run, and `summary.json`, written last, marks it as finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._written: hashlib._Hash | None = None  # over metrics.jsonl

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> RunDirectory:
        """A new run directory with the resolved configuration and a description of the machine.

        `config.yaml` is written last: where it is, the folder is complete. Raises UserError if the path is taken by
        anything but an empty folder, or one in which this was interrupted.
        """
        run = cls(path)
        check_vacant(run.path)
        _make_folder(run.path)
        run.write_json("environment.json", {"run_directory_version": VERSION, **environment})
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """An existing run directory. Raises UserError if there is none, or one of another version."""
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(
                f"{run.path}: no such folder; expected a run directory, such as runs/NAME"
            )
        if not (run.path / "environment.json").is_file():
            raise UserError(f"{run.path}: not a run directory (it has no environment.json)")
        version = run.environment().get("run_directory_version")
        if version != VERSION:
            raise UserError(
                f"{run.path}: run directory version {version}; this release reads version {VERSION}"
            )
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
        return self.write_text(name, _json_text(content))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace `config.yaml` in one step."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110)
        self.write_text("config.yaml", text)

    # Rounds ------------------------------------------------------------------------------------------------------
    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a round's line to `metrics.jsonl`; it is on the disk when this returns. Raises ValueError for NaN."""
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        checksum = self._checksum()
        with open(self.path / METRICS, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        checksum.update(line)

    def metrics_checksum(self) -> str:
        """Return the SHA-256 of `metrics.jsonl` as this process has written it, or found it first."""
        return self._checksum().hexdigest()

    def rewind_metrics(self, completed: int) -> None:
        """Drop the lines of rounds after `completed`, and a last line torn by a crash; a resume writes them anew."""
        kept = b"".join(self.lines()[:completed])
        if (self.path / METRICS).exists():
            write_atomically(self.path / METRICS, kept)
        self._written = hashlib.sha256(kept)

    def lines(self) -> list[bytes]:
        """Return the complete lines of `metrics.jsonl` as bytes; none if there is no such file.

        Raises:
            UserError: If it cannot be read.
        """
        try:
            content = (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path / METRICS}: cannot be read ({error.strerror})") from None
        return [line + b"\n" for line in content.split(b"\n")[:-1]]

    def _checksum(self) -> hashlib._Hash:
        if self._written is None:
            self._written = hashlib.sha256(b"".join(self.lines()))
        return self._written

    # The end -----------------------------------------------------------------------------------------------------
    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return (self.path / "summary.json").exists()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `SHA256SUMS`, and `summary.json` last: where that is, all results are complete."""
        text = _json_text(summary)
        names = [*ALWAYS, *(f"models/{path.name}" for path in self.model_files())]
        sums = {name: sha256_of(self.path / name) for name in names}
        sums[METRICS] = self.metrics_checksum()
        sums["summary.json"] = hashlib.sha256(text.encode()).hexdigest()
        lines = (f"{checksum}  {name}\n" for name, checksum in sorted(sums.items()))
        self.write_text(CHECKSUMS, "".join(lines))
        self.write_text("summary.json", text)

    def reopen(self) -> None:
        """Remove what finishing has left: more rounds follow. The summary goes first, the rest is incomplete without it."""
        for name in ("summary.json", CHECKSUMS, "details.json"):
            (self.path / name).unlink(missing_ok=True)
        for path in (*self.model_files(), *(p for name in DERIVED for p in self.path.glob(name))):
            path.unlink()

    def model_files(self) -> list[Path]:
        """Return the files of the saved models, sorted."""
        return sorted((self.path / "models").glob("*.safetensors"))

    def checksums(self) -> dict[str, str]:
        """Return what `SHA256SUMS` says, by file name; empty if there is no such file. Raises UserError if it is damaged."""
        if not (self.path / CHECKSUMS).exists():
            return {}
        sums = {}
        for number, line in enumerate(self.read_text(CHECKSUMS).splitlines(), 1):
            match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
            if match is None:
                raise UserError(
                    f"{self.path / CHECKSUMS}: line {number} is not a checksum and a file name"
                )
            sums[match[2]] = match[1]
        return sums

    # Reading -----------------------------------------------------------------------------------------------------
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
            content = _parse_yaml(self.read_text("config.yaml"))
        except (
            yaml.YAMLError,
            ValueError,
            RecursionError,
        ) as error:  # no such day, too many digits, nested too deeply
            raise UserError(f"{self.path / 'config.yaml'}: not YAML ({error})") from None
        return deepcopy(content) if isinstance(content, dict) else {}

    def metrics(self) -> list[Json]:
        """The records of `metrics.jsonl`, in order; a last line that a crash has cut is left out."""
        lines = self.read_text(METRICS).split("\n")
        complete = lines[:-1]
        records = []
        for number, line in enumerate(complete, 1):
            where = f"{self.path / METRICS}: line {number}"
            try:
                record = json.loads(line)
                record["round"] += 0
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(f"{where} is not a round's record") from None
            if record["round"] != number:
                raise UserError(f"{where} is of round {record['round']}; expected round {number}")
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
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise UserError(
                f"{self.path / name}: found a {type(content).__name__}, expected an object"
            )
        return content


def _json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


@lru_cache(maxsize=4)
def _parse_yaml(text: str) -> Any:
    """Return what a YAML text says; callers copy it. A run reads its configuration several times."""
    return yaml.safe_load(text)
