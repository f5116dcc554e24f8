"""Archive of a benchmark: a row for each run, and the configuration of each row of the tables."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetero_fl.config import Config, resolve_config, resume_relevant
from hetero_fl.experiment.configuration import describe_changes

Key = tuple[str, ...]

KEY_COLUMNS = ("method", "components", "settings", "seed")
"""Columns that identify a run in its file."""
DIGITS = 6
"""Number of significant digits of archived numbers."""
IGNORED_KEYS = ("data.path", "data.root", "name", "seed")
"""Keys that differ between machines or runs without changing the results of a seed."""


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
    # A mapping with periods in its keys, such as names of columns, has one key path.
    if not isinstance(value, Mapping) or not value or any("." in str(key) for key in value):
        return [(path, value)]
    prefix = f"{path}." if path else ""
    return [leaf for key, child in value.items() for leaf in _leaves(child, f"{prefix}{key}")]


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration whose leaves are the given values, keyed by key path."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = value
    return tree


class ConfigArchive:
    """A JSON file with the resolved configuration of each row, before settings are tuned.

    A recorded configuration is up to date if the current code has the same value for each key. Keys
    that were removed or introduced later are ignored if they have their default values, which do
    not change results.

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

    def outdated(self, current: Mapping[str, Config]) -> dict[str, str]:
        """Return the rows whose recorded configuration differs from the current one.

        Args:
            current: The current configurations, keyed by row. Rows that are not recorded are
                ignored.

        Returns:
            The differences in one line (see `describe_changes`), keyed by row.
        """
        found = {}
        for row in self.configs.keys() & current.keys():
            now = dict(_leaves(resolve_config(current[row]), ""))
            saved = {key: now[key] for key in IGNORED_KEYS} | self.configs[row]
            if differs := describe_changes(_nest(saved), _nest(now)):
                found[row] = differs
        return found

    def update(self, current: Mapping[str, Config]) -> None:
        """Record the current configurations, except those that are recorded and up to date."""
        stale = self.outdated(current)
        before = self.configs
        self.configs = {
            row: before[row] if row in before and row not in stale else flatten_config(config)
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
