"""Write, read and lock the files of a run, which remain readable after a crash at any time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from hetero_fl.config.describe import to_yaml
from hetero_fl.config.load import parse_yaml
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import (
    check_entries,
    check_name,
    make_folder,
    sha256_of,
    write_atomically,
)

VERSION = 1
LOCK = ".lock"
LOG = "log.txt"
CHECKSUMS = "SHA256SUMS"
METRICS = "metrics.jsonl"
# Files that every finished run has, in addition to its summary.
ALWAYS = ("config.yaml", "environment.json", METRICS, "details.json")
# Validation scores whose best models are saved.
BEST_MODELS = ("personal", "global")
# Files that can be created again from the others.
DERIVED = ("report.html", "plots/*.png")
# Folder of the nodes of a federation on one machine.
SITES = "sites"
# Keys in the files of former versions, and the keys as which they are read.
FORMER_KEYS = {
    "unread": "absent",
    "anew": "reset",  # style: ok (former name)
    "liars": "malicious",  # style: ok (former name)
    "read": "evaluated_when",
}
# Files that may exist if the creation of a run directory was interrupted.
UNFINISHED = {"environment.json", ".environment.json.tmp", ".config.yaml.tmp", LOCK, LOG, SITES}

Json = dict[str, Any]


@contextmanager
def lock_folder(folder: Path) -> Iterator[list[str]]:
    """Create a folder if necessary and lock it against other processes.

    The operating system releases the lock when the process ends. The empty file `.lock` remains.
    On file systems without locks, the folder is not locked.

    Args:
        folder: Folder to lock.

    Yields:
        List of lines for the log. The list contains a warning if the file system has no locks.
        Otherwise, it is empty.

    Raises:
        UserError: If another process has locked the folder, or if the folder is not writable.
    """
    make_folder(folder)
    lock = _folder_lock(folder)
    notes = []
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: in use by another process; wait for it to end or choose another folder"
        ) from None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise UserError(
                f"{folder}: not writable ({error.strerror}); choose another folder"
            ) from None
        notes = [
            f"{folder}: the file system has no locks; do not start a second process in this folder"
        ]
    try:
        yield notes
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether another process has locked a folder.

    If this cannot be determined, for example on a file system without locks, False is returned.
    """
    if not (folder / LOCK).is_file():
        return False
    lock = _folder_lock(folder)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _folder_lock(folder: Path) -> BaseFileLock:
    # The fallback is a plain file that would remain after a crash.
    return FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)


def has_run(path: Path) -> bool:
    """Return whether a folder contains a run, finished or not.

    Raises:
        UserError: If the folder contains results but no configuration.
    """
    if (path / "config.yaml").is_file():
        return True
    if (path / METRICS).is_file() or (path / "summary.json").is_file():
        raise UserError(f"{path / 'config.yaml'}: missing; without it the run cannot be resumed")
    return False


def check_vacant(
    path: Path,
    alternatives: str = ", or resume the run that it contains (--resume, or resume=True)",
) -> None:
    """Check that a run directory can be created.

    Args:
        path: The run directory.
        alternatives: End of the error message.

    Raises:
        UserError: If the path exists and is neither an empty folder nor the result of an
            interrupted creation.
    """
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= UNFINISHED):
        raise UserError(f"{path}: already exists; choose another folder{alternatives}")


class RunDirectory:
    """The folder of a run.

    The folder contains `config.yaml` (the resolved configuration), `environment.json`,
    `metrics.jsonl` (one line per round), `summary.json`, `details.json` (data about each client for
    the report), `log.txt`, `plots/`, `models/`, `checkpoint/` and `report.html`. `environment.json`
    contains the version of the layout and marks the folder as a run directory. `SHA256SUMS`
    contains the checksums of a finished run. `summary.json` is written last and marks the run as
    finished.

    Args:
        path: Path of the folder. The constructor does not access the folder.

    Attributes:
        path: Path of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Hash of the lines of metrics that this instance wrote, or kept when it resumed the run.
        self._metrics_hash = hashlib.sha256()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> RunDirectory:
        """Create a run directory.

        `config.yaml` is written last and marks the creation as complete.

        Args:
            path: Path of the folder.
            config: The resolved configuration.
            environment: Versions, machine and id of the run.

        Raises:
            UserError: If the path exists and is neither an empty folder nor the result of an
                interrupted creation.
        """
        run = cls(path)
        check_vacant(run.path)
        make_folder(run.path)
        run.write_json("environment.json", {"run_directory_version": VERSION, **environment})
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open an existing run directory.

        Raises:
            UserError: If the path is not a run directory, if its version is not supported, or if an
                entry is a pipe, a device or a link that leaves the folder.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(
                f"{run.path}: folder not found; expected a run directory, such as runs/NAME"
            )
        check_entries(run.path)
        if not (run.path / "environment.json").is_file():
            raise UserError(f"{run.path}: not a run directory (it has no environment.json)")
        version = run.environment().get("run_directory_version")
        if version != VERSION:
            raise UserError(
                f"{run.path}: run directory of version {version}; "
                f"this release reads version {VERSION}"
            )
        return run

    @property
    def plots(self) -> Path:
        """The path of the folder with plots."""
        return self.path / "plots"

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically and return the path.

        An existing file is replaced.
        """
        target = self.path / name
        write_atomically(target, text.encode())
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file atomically and return the path.

        An existing file is replaced.

        Raises:
            ValueError: If the content contains NaN or infinity, which JSON does not support.
        """
        return self.write_text(name, _json_text(content))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace `config.yaml` atomically."""
        self.write_text("config.yaml", to_yaml(config, width=110))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the record of a round to `metrics.jsonl` and flush the file to disk.

        Raises:
            ValueError: If the record contains NaN or infinity.
        """
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with open(self.path / METRICS, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._metrics_hash.update(line)

    def metrics_checksum(self) -> str:
        """Return the SHA-256 checksum of the lines of `metrics.jsonl` that the run has committed.

        Later changes to the file by other processes do not affect the checksum.
        """
        return self._metrics_hash.hexdigest()

    def rewind_metrics(self, completed: int) -> None:
        """Remove all lines of `metrics.jsonl` after the first `completed` rounds.

        A resumed run writes the removed lines again.
        """
        kept = b"".join(self.lines()[:completed])
        if (self.path / METRICS).exists():
            write_atomically(self.path / METRICS, kept)
        self._metrics_hash = hashlib.sha256(kept)

    def lines(self) -> list[bytes]:
        """Return the complete lines of `metrics.jsonl` as bytes.

        An incomplete last line is ignored. If the file is missing, the list is empty.

        Raises:
            UserError: If the file cannot be read.
        """
        try:
            content = (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path / METRICS}: cannot be read ({error.strerror})") from None
        return [line + b"\n" for line in content.split(b"\n")[:-1]]

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return (self.path / "summary.json").exists()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `SHA256SUMS` and then `summary.json`, which marks the run as finished."""
        text = _json_text(summary)
        names = [*ALWAYS, *map(self.name_of, self.all_model_files())]
        sums = {name: sha256_of(self.path / name) for name in names}
        sums[METRICS] = self.metrics_checksum()
        sums["summary.json"] = hashlib.sha256(text.encode()).hexdigest()
        lines = (f"{checksum}  {name}\n" for name, checksum in sorted(sums.items()))
        self.write_text(CHECKSUMS, "".join(lines))
        self.write_text("summary.json", text)

    def reopen(self) -> None:
        """Delete the results of a finished run, so that the run can continue with more rounds.

        The summary is deleted first, so that an interrupted call leaves an unfinished run.
        """
        for name in ("summary.json", CHECKSUMS, "details.json"):
            (self.path / name).unlink(missing_ok=True)
        derived = (path for name in DERIVED for path in self.path.glob(name))
        for path in (*self.all_model_files(), *derived):
            path.unlink()

    def models_folder(self, best: str = "") -> Path:
        """Return the folder of the last models, or of the models that are best on validation rows.

        Args:
            best: `personal` or `global`, for the models of the round with the best local or global
                validation score. Empty for the last models.
        """
        return self.path / "models" / f"best_{best}" if best else self.path / "models"

    def model_files(self, best: str = "") -> list[Path]:
        """Return the files of the saved models, sorted (see `models_folder`)."""
        return sorted(self.models_folder(best).glob("*.safetensors"))

    def all_model_files(self) -> list[Path]:
        """Return the files of all saved models, the last and the best ones, sorted."""
        return sorted((self.path / "models").rglob("*.safetensors"))

    def name_of(self, path: Path) -> str:
        """Return the name of a file, relative to the directory and with slashes."""
        return path.relative_to(self.path).as_posix()

    def checksums(self) -> dict[str, str]:
        """Return the checksums in `SHA256SUMS`, keyed by file name.

        If the file is missing, the dictionary is empty.

        Raises:
            UserError: If the file is damaged.
        """
        if not (self.path / CHECKSUMS).exists():
            return {}
        sums = {}
        for number, line in enumerate(self.read_text(CHECKSUMS).splitlines(), 1):
            match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
            if match is None:
                raise UserError(
                    f"{self.path / CHECKSUMS}: line {number}: expected a checksum and a file name"
                )
            check_name(match[2], f"{self.path / CHECKSUMS}: line {number}")
            sums[match[2]] = match[1]
        return sums

    def summary(self) -> Json:
        """Return the content of `summary.json`.

        Raises:
            UserError: If the run has not finished, or the file cannot be read.
        """
        return self._json("summary.json")

    def details(self) -> Json:
        """Return the content of `details.json`, such as labels and errors of each client.

        Raises:
            UserError: If the file cannot be read.
        """
        return self._json("details.json")

    def environment(self) -> Json:
        """Return the content of `environment.json`, such as versions and the machine.

        Raises:
            UserError: If the file cannot be read.
        """
        return self._json("environment.json")

    def config(self) -> Json:
        """Return the resolved configuration in `config.yaml` as plain values.

        If the content is not a mapping, the result is empty.

        Raises:
            UserError: If the file cannot be read or is not valid YAML.
        """
        text = self.read_text("config.yaml")
        try:
            content = _parse_yaml(text)
        # Parsers raise errors of many types.
        except Exception as error:
            raise UserError(
                f"{self.path / 'config.yaml'}: not valid YAML ({str(error).partition('. See')[0]})"
            ) from None
        return deepcopy(content) if isinstance(content, dict) else {}

    def metrics(self) -> list[Json]:
        """Return the records in `metrics.jsonl` in order, see `lines`.

        Raises:
            UserError: If the file cannot be read, or if the lines are not the records of
                consecutive rounds.
        """
        records = []
        for number, line in enumerate(self.lines(), 1):
            where = f"{self.path / METRICS}: line {number}"
            try:
                record = _with_current_keys(json.loads(line))
                record["round"] += 0
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise UserError(f"{where}: expected the record of a round") from None
            if record["round"] != number:
                raise UserError(f"{where}: expected round {number}, got round {record['round']}")
            records.append(record)
        return records

    def read_text(self, name: str) -> str:
        """Return the text of a file.

        Raises:
            UserError: If the file is missing or is not UTF-8 text.
        """
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not text"
            raise UserError(f"{self.path / name}: cannot be read ({why})") from None

    def _json(self, name: str) -> Json:
        text = self.read_text(name)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name}: not valid JSON ({error})") from None
        if not isinstance(content, dict):
            raise UserError(
                f"{self.path / name}: expected an object, got a {type(content).__name__}"
            )
        return _with_current_keys(content)


def _with_current_keys(content: Json) -> Json:
    """Rename the keys of former versions in the content of a file or in the record of a round."""
    renamed = {FORMER_KEYS.get(key, key): value for key, value in content.items()}
    if isinstance(attacks := renamed.get("attacks"), dict):
        renamed["attacks"] = _with_current_keys(attacks)
    return renamed


def _json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


@lru_cache(maxsize=4)
def _parse_yaml(text: str) -> Any:
    """Parse YAML and cache the result, because a run reads its configuration several times.

    The result is shared and must not be modified.
    """
    return parse_yaml(text)
