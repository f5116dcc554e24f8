"""Scores of published tables that a CPU can replicate, and the settings of the replications.

The tables are in `published.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import TypeAdapter

# Placeholder in overrides for the data file of the table.
FILE = "{file}"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        method: Name of the method.
        changes: Overrides of the configuration.
        mean: Published mean, or None.
        deviation: Published standard deviation, or None.
        mended: Mean and standard deviation that the authors published after they corrected an error
            in their code, or None.
        minutes: Duration of a run on one core of the machine described in benchmarks/README.md.
        seeds: Number of requested seeds that are used, starting with the first. If None, all
            requested seeds are used.
    """

    method: str
    changes: tuple[str, ...]
    mean: float | None = None
    deviation: float | None = None
    mended: tuple[float, float] | None = None
    minutes: float = 1.0
    seeds: int | None = None


@dataclass(frozen=True)
class Table:
    """A published table.

    Attributes:
        name: Name of the table.
        title: Title of the table.
        config: Name of the configuration file without suffix.
        file: Name of the data file.
        accuracy: Accuracy that corresponds to the paper: "personal", "global" or "server".
        rows: Rows of the table.
        seeds: Default seeds.
        held: Whether the paper's code evaluates each model on the classes of its client only.
    """

    name: str
    title: str
    config: str
    file: str
    accuracy: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    held: bool = False

    @property
    def third_figure(self) -> str:
        """Name of the accuracy that is recorded next to those of the last and selected round."""
        return "held" if self.held else "best_test_round"


def read_tables(path: Path) -> dict[str, Table]:
    """Read tables from a YAML file, keyed by name."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = {name: {"name": name, **table} for name, table in content.items()}
    return TypeAdapter(dict[str, Table]).validate_python(named)


TABLES = read_tables(Path(__file__).with_suffix(".yaml"))
