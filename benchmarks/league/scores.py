"""Scores of a benchmark, read from its archive."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from hetero_fl.reporting.comparison.significance import PairedDifference, holm, paired_difference
from hetero_fl.reporting.formatting import algorithm_name

RowName = tuple[str, str]
"""Name of a method, and name of its group of settings, such as `("fedavg", "all")`."""

TEXT = ("method", "components", "settings", "commit", "config_hash")
"""Columns of the archive that contain text."""


@dataclass(frozen=True)
class FederationScores:
    """The archived runs of a federation.

    Args:
        name: Name of the federation.
        title: Title of the federation in tables.
        frame: One row for each run, with the columns of the archive.
    """

    name: str
    title: str
    frame: pd.DataFrame

    @classmethod
    def read(cls, name: str, title: str, path: Path) -> FederationScores:
        """Read the archive of a federation, which is empty if the file does not exist."""
        if not path.exists():
            return cls(name, title, pd.DataFrame(columns=["method", "components", "seed"]))
        frame = pd.read_csv(
            path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=""
        )
        frame["settings"] = frame["settings"].fillna("")
        return cls(name, title, frame)

    def with_seeds(self, seeds: Collection[int]) -> FederationScores:
        """Return the runs with the given seeds of the rows that have a run with each seed."""
        frame = self.frame[self.frame["seed"].isin(list(seeds))]
        complete = frame.groupby(["method", "components"])["seed"].transform(
            lambda found: set(seeds) <= set(found)
        )
        return replace(self, frame=frame[complete.astype(bool)])

    def without_runs(self) -> FederationScores:
        """Return an empty copy."""
        return replace(self, frame=self.frame[:0])

    @cached_property
    def rows(self) -> list[RowName]:
        """The rows of the benchmark that have runs, in the order of the archive."""
        pairs = zip(self.frame["method"], self.frame["components"], strict=True)
        return list(dict.fromkeys(pairs))

    def by_seed(self, row: RowName, column: str) -> dict[int, float]:
        """Return the values of a column for a row, keyed by seed. Missing values are left out."""
        method, components = row
        mine = self.frame[
            (self.frame["method"] == method) & (self.frame["components"] == components)
        ]
        if column not in mine:
            return {}
        values = mine.set_index("seed")[column].dropna()
        return {int(seed): float(value) for seed, value in values.items()}

    def mean(self, row: RowName, column: str) -> float | None:
        """Return the mean of a column over the seeds of a row, or None without values."""
        values = self.by_seed(row, column).values()
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class PrimaryTest:
    """A test of the primary family.

    Attributes:
        federation: Title of the federation.
        other: Name of the other method.
        difference: The difference of the main method from the other.
        p_holm: p-value with Holm's correction over the whole family, including tests that have no
            runs yet.
    """

    federation: str
    other: str
    difference: PairedDifference
    p_holm: float


def primary_tests(
    federations: Sequence[FederationScores],
    method: str,
    against: Sequence[str],
    components: str,
    metric: str,
) -> list[PrimaryTest]:
    """Compute the tests of the primary family that have enough runs.

    Args:
        federations: The federations of the family.
        method: The main method.
        against: The methods with which it is compared.
        components: Group of settings of all methods.
        metric: Column of the scores. Larger is better.
    """
    found = []
    for federation in federations:
        own = federation.by_seed((method, components), metric)
        for other in against:
            difference = paired_difference(own, federation.by_seed((other, components), metric))
            if difference is not None:
                found.append((federation.title, other, difference))
    corrected = holm(
        [difference.p for *_, difference in found], num_tests=len(federations) * len(against)
    )
    return [
        PrimaryTest(title, other, difference, p)
        for (title, other, difference), p in zip(found, corrected, strict=True)
    ]


def row_title(row: RowName, names: Mapping[str, str]) -> str:
    """Return the title of a row, such as `FedAvg + components`.

    Args:
        row: The row.
        names: Title of each group of settings. An empty title is not shown.
    """
    method, components = row
    title = names.get(components, components)
    return algorithm_name(method) + (f" + {title}" if title else "")


@dataclass(frozen=True)
class CostPoint:
    """A row of the benchmark in a plot of scores against costs.

    Attributes:
        method: Title of the method.
        kind: Title of the settings, such as "components, 8 bits".
        cost: Cost of a run.
        score: Mean score in percent.
        deviation: Standard deviation of the score over seeds.
    """

    method: str
    kind: str
    cost: float
    score: float
    deviation: float


@dataclass(frozen=True)
class Effect:
    """The effect of a method's components on two metrics.

    Attributes:
        method: Title of the method.
        before: Mean scores without components, in percent.
        after: Mean scores with components, in percent.
    """

    method: str
    before: tuple[float, float]
    after: tuple[float, float]
