"""Archive of a benchmark: a row for each run, and the configuration of each row of the tables."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_fl.algorithms import register_algorithm
from hetero_fl.config import resolve_config
from hetero_fl.config.base import dropped_key
from hetero_fl.config.describe import resume_relevant
from hetero_fl.config.errors import section_at
from hetero_fl.config.schema import Config
from hetero_fl.experiment.benchmark.protocol import BenchmarkRow
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import UserError

PUBLISHED = Path("configs/benchmark")
"""Folder of the published benchmark, relative to the repository."""
PUBLISHED_ARCHIVE = Path("docs/benchmark")
"""Folder of its archive."""
Key = tuple[str, ...]

KEY_COLUMNS = ("method", "components", "settings", "seed")
"""Columns that identify a run in its file."""
DIGITS = 6
"""Number of significant digits of archived numbers."""
IGNORED_KEYS = ("data.path", "data.root", "name", "seed")
"""Keys that differ between machines or runs without changing the results of a seed."""


def archive_folder(folder: str | Path, archive: str | Path | None) -> Path:
    """Return the folder of the archive, by default that of the published benchmark.

    Args:
        folder: Folder of the benchmark.
        archive: The given folder, if any.

    Raises:
        UserError: If no folder is given and the benchmark is not the published one, whose archive
            must not be mixed with others.
    """
    if archive is not None:
        return Path(archive)
    if Path(folder) != PUBLISHED:
        raise UserError(f"{folder}: requires a folder for its results (--archive, or archive=)")
    return PUBLISHED_ARCHIVE


class RunArchive:
    """A CSV file with a row for each run, to which rows are added.

    Args:
        path: The file, which need not exist.

    Attributes:
        rows: The rows of the file, with values as text, keyed by the values of `KEY_COLUMNS`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, str]] = {}
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self.rows[tuple(row[name] for name in KEY_COLUMNS)] = row

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, which replaces an earlier row of the same run."""
        texts = {name: _text(value) for name, value in row.items()}
        self.rows[tuple(texts[name] for name in KEY_COLUMNS)] = texts
        self._write()

    def arrange(self, keys: Sequence[Key]) -> None:
        """Order the rows by a list of keys, and remove rows whose keys are not listed."""
        kept = {key: self.rows[key] for key in keys if key in self.rows}
        if list(kept) != list(self.rows):
            self.rows = kept
            self._write()

    def _write(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        partial.replace(self.path)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def flatten_config(config: Config) -> dict[str, Any]:
    """Return the resolved configuration with a key path for each value.

    Keys that do not affect the results of a seed are left out.
    """
    plain = resume_relevant(resolve_config(config)) | {"rounds": config.rounds}
    flat = dict(_leaves(plain, ""))
    return {key: value for key, value in sorted(flat.items()) if key not in IGNORED_KEYS}


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(path, value)]
    prefix = f"{path}." if path else ""
    return [leaf for key, child in value.items() for leaf in _leaves(child, f"{prefix}{key}")]


def _was_dropped(key: str, value: Any, recorded: Mapping[str, Any]) -> bool:
    """Return whether a recorded key no longer exists and its value had no effect."""
    *place, name = key.split(".")
    is_setting = place == ["algorithm"]
    section = register_algorithm[recorded["algorithm.name"]] if is_setting else None
    former = dropped_key(section or section_at(Config, place), name)
    return former is not None and former.ignores(value)


@dataclass(frozen=True)
class RowConfig:
    """The resolved configuration of a row, as returned by `flatten_config`.

    Attributes:
        values: The configuration with the fixed settings of the row.
        defaults: The configuration of the same method without these settings.
    """

    values: dict[str, Any]
    defaults: dict[str, Any]

    @classmethod
    def resolve(
        cls,
        source: Mapping[str, Any],
        overrides: Sequence[str],
        row: BenchmarkRow,
        allow_code: bool | CodePermission = False,
    ) -> RowConfig:
        """Resolve the configuration of a row in a federation.

        Args:
            source: Content of the federation's configuration file.
            overrides: Overrides of the federation, as `key.path=value`.
            row: The row.
            allow_code: Whether code that the row names may be executed.

        Raises:
            UserError: If a setting is invalid.
        """
        method = f"algorithm.name={row.method}"
        values, defaults = (
            flatten_config(load_config(source, [*overrides, *settings], allow_code))
            for settings in (row.variant.overrides, [method])
        )
        return cls(values, defaults)


class ConfigArchive:
    """A JSON file with the resolved configuration of each row, before settings are tuned.

    A recorded configuration is up to date if the current code has the same value for each of its
    keys. Keys that were dropped later are ignored if they had their default values. Keys that were
    introduced later are ignored unless the row sets them, because their defaults do not change
    results.

    Args:
        path: The file, which need not exist.

    Attributes:
        configs: The flat configurations, keyed by row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configs: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.configs = {
                row: {**content["common"], **own} for row, own in content["rows"].items()
            }

    def outdated(self, current: Mapping[str, RowConfig]) -> dict[str, str]:
        """Return the rows whose recorded configuration differs from the current one.

        Args:
            current: The current configurations, keyed by row. Rows that are not recorded are
                ignored.

        Returns:
            The first differing key with both values, keyed by row.
        """
        found = {}
        for row, recorded in self.configs.items():
            now = current.get(row)
            if now is None:
                continue
            added = {key: now.defaults.get(key) for key in now.values.keys() - recorded.keys()}
            for key, value in {**recorded, **added}.items():
                if now.values.get(key) != value and not _was_dropped(key, value, recorded):
                    found[row] = f"{key}: {value} in the archive, {now.values.get(key)} now"
                    break
        return found

    def update(self, current: Mapping[str, RowConfig]) -> None:
        """Record the current configurations, except those that are recorded and up to date."""
        stale = self.outdated(current)
        before = self.configs
        self.configs = {
            row: before[row] if row in before and row not in stale else config.values
            for row, config in current.items()
        }
        if self.configs != before:
            self._write()

    def hash_of(self, row: str, settings: str) -> str:
        """Return a hash of a row's configuration and its tuned settings, 12 hexadecimal digits."""
        text = json.dumps([self.configs[row], settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _write(self) -> None:
        configs = list(self.configs.values())
        shared = {
            key: value
            for key, value in configs[0].items()
            if all(key in config and config[key] == value for config in configs)
        }
        own = {
            row: {key: value for key, value in config.items() if key not in shared}
            for row, config in self.configs.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"common": shared, "rows": own}, indent=1, ensure_ascii=False)
        self.path.write_text(text + "\n", encoding="utf-8")
