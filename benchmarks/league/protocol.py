"""The files that define a benchmark: a protocol, and one file for each federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from hetero_fl.config.base import ConfigSection
from hetero_fl.core.metrics import CLASSIFICATION, MANY, RANKING, RARE, REGRESSION
from hetero_fl.experiment.comparison.jobs import Variant
from hetero_fl.experiment.comparison.study import read_section
from hetero_fl.utils.errors import UserError, check_names

PROTOCOL = "protocol.yaml"
"""Name of the file with the protocol, next to the files of the federations."""
LAST_ROUND_ONLY = 1_000_000
"""Number of rounds between evaluations, larger than the number of rounds of any run."""
SCORE_COLUMNS = [
    f"{test}_last_{metric}"
    for test in ("global", "personal", "server")
    for metric in dict.fromkeys((*CLASSIFICATION, *REGRESSION, *RARE, *MANY, *RANKING))
]
"""Columns of the archive with mean scores."""
MAIN_GROUP = "Federations"
"""Heading of the main tables, over whose federations methods are ranked."""

Values = dict[str, Any]
"""Values of tuned settings, keyed by setting."""
Seeds = Annotated[list[NonNegativeInt], Field(min_length=1)]


class BenchmarkRow(ConfigSection):
    """A row of the benchmark's tables: a method with fixed and tuned settings.

    Attributes:
        method: Name of the method.
        components: Name of the group of settings, such as `none` or `all`.
        settings: Fixed settings, as in a variant of `compare` (`setting=value`).
        tuned: Values to try for each tuned setting, keyed by setting. The first value is used while
            the learning rate is tuned.
    """

    method: str
    components: str
    settings: list[str] = []
    tuned: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @property
    def name(self) -> str:
        """Unique name of the row, such as `fedavg/all`."""
        return f"{self.method}/{self.components}"

    @property
    def variant(self) -> Variant:
        """The method and its fixed settings."""
        return Variant.parse(":".join([self.method, *self.settings]))

    def overrides(self, settings: Values) -> tuple[str, ...]:
        """Return tuned settings as overrides of a configuration, `key.path=value`."""
        entries = [f"{key}={_plain(value)}" for key, value in settings.items()]
        return Variant.parse(":".join([self.method, *entries])).overrides[1:]


def _plain(value: Any) -> str:
    """Return a value as in an override, with lists as `[a,b]`."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


class Tuning(ConfigSection):
    """The choice of settings by validation scores of separate seeds.

    Attributes:
        seeds: Seeds of the tuning runs, which are not reported.
        keys: The configuration keys that are set to the learning rate.
        learning_rates: Learning rates to try, in ascending order.
        wider: Learning rates in ascending order, which contain `learning_rates`. The next value is
            tried if the best learning rate is the smallest or the largest that was tried.
        wider_settings: Values in ascending order of other settings, which are tried in the same
            way, keyed by setting.
    """

    seeds: Seeds
    keys: Annotated[list[str], Field(min_length=1)]
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=3)]
    wider: list[PositiveFloat]
    wider_settings: dict[str, list[float]] = {}

    @model_validator(mode="after")
    def _check_values(self) -> Tuning:
        for name, values in {"wider": self.wider, **self.wider_settings}.items():
            if values != sorted(set(values)):
                raise ValueError(f"{name}: expected ascending values")
        first = self.learning_rates[0]
        begin = self.wider.index(first) if first in self.wider else len(self.wider)
        if self.wider[begin : begin + len(self.learning_rates)] != self.learning_rates:
            raise ValueError("learning_rates: expected neighboring values of wider")
        return self


class PrimaryFamily(ConfigSection):
    """The tests of the main claim, which are fixed before the runs.

    Attributes:
        method: The method that is compared with the others.
        against: The other methods.
        components: Group of settings of all these methods.
        metric: Column of the archive.
        federations: Names of the federations.
    """

    method: str
    against: Annotated[list[str], Field(min_length=1)]
    components: str
    metric: str
    federations: Annotated[list[str], Field(min_length=1)]


class Protocol(ConfigSection):
    """Methods, seeds, tuning and tests, which are common to all federations.

    Attributes:
        seeds: Seeds of the reported runs.
        tuning: How settings are chosen.
        overrides: Changes to the configuration of each federation, as `key.path=value`.
        components: Title of each group of settings in tables, keyed by name. An empty title is not
            shown.
        rows: The rows of the tables.
        primary: The tests of the main claim.
    """

    seeds: Seeds
    tuning: Tuning
    overrides: list[str] = []
    components: dict[str, str] = {}
    rows: Annotated[list[BenchmarkRow], Field(min_length=1)]
    primary: PrimaryFamily

    @model_validator(mode="after")
    def _check_seeds_and_rows(self) -> Protocol:
        for row in self.rows:
            for key, values in row.tuned.items():
                wider = self.tuning.wider_settings.get(key)
                if wider is not None and not set(values) <= set(wider):
                    raise ValueError(
                        f"tuning.wider_settings.{key}: must contain the values of {row.name}"
                    )
        if shared := sorted(set(self.seeds) & set(self.tuning.seeds)):
            raise ValueError(f"tuning.seeds: {shared[0]} is also a reported seed")
        names = [row.name for row in self.rows]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"rows: {repeated[0]} is listed twice")
        return self


class BenchmarkFederation(ConfigSection):
    """A federation of the benchmark.

    Attributes:
        title: Title of the federation in tables. In the group of compressed federations, the text
            after the last comma names the compression in plots.
        group: Group of the federation. The tables of the page contain the main group.
        config: Path of the configuration file, relative to the folder of the benchmark.
        overrides: Changes to the configuration, as `key.path=value`.
        rows: Names of the rows to run, `method` or `method/components`. If None, all rows are run.
        left_out: Reasons why rows are not run, keyed by `method` or `method/components`.
        tuned_as: Name of the federation whose tuned settings are used. If None, settings are tuned
            in this federation.
        retuned: Values of settings that are tuned again in this federation, at the other settings
            of `tuned_as`, keyed by name of the row and setting.
    """

    title: str
    group: str = MAIN_GROUP
    config: Path
    overrides: list[str] = []
    rows: list[str] | None = None
    left_out: dict[str, str] = {}
    tuned_as: str | None = None
    retuned: dict[str, dict[str, Annotated[list[Any], Field(min_length=1)]]] = {}

    def selects(self, row: BenchmarkRow) -> bool:
        """Return whether a row of the protocol is run in this federation."""
        names = (row.method, row.name)
        is_listed = self.rows is None or any(name in self.rows for name in names)
        return is_listed and not any(name in self.left_out for name in names)


@dataclass(frozen=True)
class Benchmark:
    """A protocol and the federations to which it is applied.

    Args:
        protocol: The protocol.
        federations: The federations, keyed by name.
    """

    protocol: Protocol
    federations: dict[str, BenchmarkFederation]

    @classmethod
    def load(cls, folder: Path) -> Benchmark:
        """Load a benchmark from a folder.

        Args:
            folder: Folder with `protocol.yaml` and one file for each federation. Files called
                `*_base.yaml` are configurations to which federations refer.

        Raises:
            UserError: If a file is missing or invalid.
        """
        if not (folder / PROTOCOL).is_file():
            found = f"contains no {PROTOCOL}" if folder.is_dir() else "folder not found"
            raise UserError(f"{folder}: {found}; choose the folder of a benchmark")
        protocol = read_section(folder / PROTOCOL, Protocol)
        federations = {}
        for path in sorted(folder.glob("*.yaml")):
            if path.name != PROTOCOL and not path.stem.endswith("_base"):
                federation = read_section(path, BenchmarkFederation)
                config = folder / federation.config
                federations[path.stem] = federation.model_copy(update={"config": config})
        benchmark = cls(protocol, federations)
        for name in federations:
            benchmark._check_federation(name, folder / f"{name}.yaml")
        benchmark._check_primary(folder / PROTOCOL)
        return benchmark

    def rows_of(self, name: str) -> list[BenchmarkRow]:
        """Return the rows that are run in a federation."""
        return [row for row in self.protocol.rows if self.federations[name].selects(row)]

    def federation_overrides(self, name: str) -> list[str]:
        """Return the overrides of all runs of a federation, as `key.path=value`.

        Only the last round is evaluated. With one thread, results do not depend on the number of
        cores.
        """
        return [
            *self.federations[name].overrides,
            *self.protocol.overrides,
            f"evaluation.every={LAST_ROUND_ONLY}",
            "output.plots=false",
            "output.report=false",
            "output.best_models=false",
            "runtime.threads=1",
        ]

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the names of the selected federations, after those that they are tuned as.

        Args:
            names: Names of federations. If empty, all federations are selected.

        Raises:
            UserError: If a name is unknown.
        """
        check_names(names, self.federations, "unknown federation")
        chosen = list(names) or list(self.federations)
        needed = [tuned_as for n in chosen if (tuned_as := self.federations[n].tuned_as)]
        return sorted(
            dict.fromkeys([*chosen, *needed]),
            key=lambda name: self.federations[name].tuned_as is not None,
        )

    def _check_federation(self, name: str, where: Path) -> None:
        """Raise UserError if a federation names a row or a federation that does not exist."""
        federation = self.federations[name]
        rows = {row_name for row in self.protocol.rows for row_name in (row.method, row.name)}
        for key in ("rows", "left_out"):
            check_names(getattr(federation, key) or (), rows, f"{where}: {key}: unknown row")
        selected = [row.name for row in self.rows_of(name)]
        check_names(federation.retuned, selected, f"{where}: retuned: unknown row")
        tuned_as = federation.tuned_as
        if tuned_as is None:
            if federation.retuned:
                raise UserError(
                    f"{where}: retuned: requires tuned_as, the federation to start from"
                )
            return
        others = set(self.federations) - {name}
        check_names([tuned_as], others, f"{where}: tuned_as: unknown federation")
        if other := self.federations[tuned_as].tuned_as:
            raise UserError(f"{where}: tuned_as: {tuned_as} is itself tuned as {other}")

    def _check_primary(self, where: Path) -> None:
        """Raise UserError if a test of the primary family cannot have runs."""
        primary = self.protocol.primary
        check_names(
            primary.federations,
            self.federations,
            f"{where}: primary.federations: unknown federation",
        )
        check_names([primary.metric], SCORE_COLUMNS, f"{where}: primary.metric: unknown column")
        for key, methods in {"method": [primary.method], "against": primary.against}.items():
            for name in primary.federations:
                rows = [row.name for row in self.rows_of(name)]
                check_names(
                    [f"{method}/{primary.components}" for method in methods],
                    rows,
                    f"{where}: primary.{key}: {name} has no row",
                )
