"""Choice of a row's settings, one after the other, from the validation scores of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.league.archive import RunArchive
from benchmarks.league.protocol import Benchmark, BenchmarkRow, Tuning, Values
from hetero_fl.experiment.comparison.jobs import Point
from hetero_fl.utils.text import split_top_level


@dataclass(frozen=True)
class TunedKey:
    """The values that were tried for a setting.

    Attributes:
        key: The setting. `LEARNING_RATE` and `FINAL_LEARNING_RATE` stand for all keys of the
            learning rate, before and after the other settings are chosen.
        values: The values, in order.
        scores: Mean validation score of each value.
        chosen: The value with the best score, the first in a tie.
    """

    key: str
    values: tuple[Any, ...]
    scores: tuple[float, ...]
    chosen: Any


@dataclass(frozen=True)
class TunedSettings:
    """The settings of a row, as far as they have been chosen.

    Attributes:
        settings: The chosen settings.
        remaining: Points to run before the next choice. Empty if all settings are chosen.
        tuned: The values that were tried, in the order of the choices.
    """

    settings: Values
    remaining: list[Point] = field(default_factory=list)
    tuned: tuple[TunedKey, ...] = ()

    @property
    def is_interior(self) -> bool:
        """Whether the chosen learning rate is neither the smallest nor the largest tried."""
        rates = next(
            key for key in reversed(self.tuned) if key.key in (LEARNING_RATE, FINAL_LEARNING_RATE)
        )
        return rates.chosen not in (rates.values[0], rates.values[-1])

    @property
    def score(self) -> float:
        """Mean validation score of the chosen settings."""
        return max(self.tuned[-1].scores)


LEARNING_RATE = "learning rate"
FINAL_LEARNING_RATE = "learning rate, at the other values"


@dataclass(frozen=True)
class SettingGrid:
    """Values to try for one setting.

    Attributes:
        name: Name of the setting in `TunedKey`.
        keys: The keys that are set to the value.
        values: The values that are tried first. If empty, the value chosen before.
        wider: Further values, in ascending order.
    """

    name: str
    keys: Sequence[str]
    values: Sequence[Any]
    wider: Sequence[Any] = ()


@dataclass(frozen=True)
class Coordinate:
    """A tuner that chooses settings one after the other, each at the values chosen before.

    Args:
        row: The row of the benchmark.
        start: Values before the first choice.
        grids: Values to try, in the order of the choices.
    """

    row: BenchmarkRow
    start: Values
    grids: Sequence[SettingGrid]

    @classmethod
    def for_row(cls, row: BenchmarkRow, tuning: Tuning) -> Coordinate:
        """Create the tuner of a row.

        The learning rate is chosen first, with the first value of all other settings. Finally, it
        is compared with its neighbors again, because its best value depends on the other settings.
        """
        start: Values = dict.fromkeys(tuning.keys, tuning.learning_rates[0])
        start |= {key: values[0] for key, values in row.tuned.items()}
        grids = [SettingGrid(LEARNING_RATE, tuning.keys, tuning.learning_rates, tuning.wider)]
        for key, values in row.tuned.items():
            grids.append(SettingGrid(key, [key], values, tuning.wider_settings.get(key, ())))
        grids.append(SettingGrid(FINAL_LEARNING_RATE, tuning.keys, (), tuning.wider))
        return cls(row, start, grids)

    @classmethod
    def again(
        cls, row: BenchmarkRow, chosen: Values, retuned: Mapping[str, Sequence[Any]]
    ) -> Coordinate:
        """Create a tuner that chooses some settings again, at other settings that were chosen.

        Args:
            row: The row.
            chosen: The settings that were chosen in another federation.
            retuned: Values to try, keyed by setting, in order.
        """
        start = chosen | {key: values[0] for key, values in retuned.items()}
        return cls(row, start, [SettingGrid(key, [key], found) for key, found in retuned.items()])

    def choose(self, ratings: Mapping[Point, float]) -> TunedSettings:
        """Choose the settings as far as the ratings allow.

        Args:
            ratings: Mean validation score of each point that was tried.
        """
        settings = self.start
        tuned: list[TunedKey] = []
        for grid in self.grids:
            values = list(grid.values) or [settings[grid.keys[0]]]
            while True:
                tried = [settings | dict.fromkeys(grid.keys, value) for value in values]
                points = [self.row.overrides(found) for found in tried]
                missing = [point for point in points if point not in ratings]
                if missing:
                    return TunedSettings(settings, missing, tuple(tuned))
                scores = [ratings[point] for point in points]
                best = scores.index(max(scores))
                added = _neighbor(values, values[best], grid.wider)
                if added is None:
                    break
                values.append(added)
            settings = tried[best]
            tuned.append(_tuned_key(grid, values, scores, best))
        return TunedSettings(settings, [], tuple(tuned))


def _tuned_key(
    grid: SettingGrid, values: Sequence[Any], scores: Sequence[float], best: int
) -> TunedKey:
    order = sorted(
        range(len(values)), key=lambda i: grid.wider.index(values[i]) if grid.wider else i
    )
    ordered = tuple(values[i] for i in order)
    return TunedKey(grid.name, ordered, tuple(scores[i] for i in order), values[best])


def _neighbor(tried: Sequence[Any], best: Any, wider: Sequence[Any]) -> Any:
    """Return the next value to try, or None if both neighbors of the best value were tried."""
    if not wider:
        return None
    index = wider.index(best)
    neighbors = wider[max(0, index - 1) : index + 2]
    return next((value for value in neighbors if value not in tried), None)


def choices_of(benchmark: Benchmark, name: str, archive: Path) -> dict[str, TunedSettings]:
    """Choose the settings of the rows of a federation from its archived trials.

    Args:
        benchmark: The benchmark.
        name: Name of the federation.
        archive: Folder of the archive.

    Returns:
        The settings, keyed by name of the row. A federation with `tuned_as` has the settings of the
        other federation, and its remaining trials while these settings are incomplete.
    """
    federation = benchmark.federations[name]
    tuning = benchmark.protocol.tuning
    trials = RunArchive(archive / f"{federation.tuned_as or name}_tuning.csv")
    own_trials = RunArchive(archive / f"{name}_tuning.csv")
    choices = {}
    for row in benchmark.rows_of(name):
        ratings = _archived_ratings(row, len(tuning.seeds), trials)
        choice = Coordinate.for_row(row, tuning).choose(ratings)
        retuned = federation.retuned.get(row.name)
        if retuned and not choice.remaining:
            ratings = _archived_ratings(row, len(tuning.seeds), own_trials)
            choice = Coordinate.again(row, choice.settings, retuned).choose(ratings)
        choices[row.name] = choice
    return choices


def _archived_ratings(row: BenchmarkRow, num_seeds: int, trials: RunArchive) -> dict[Point, float]:
    """Return the mean score of the points of a row that have run with all seeds."""
    scores: dict[Point, list[float]] = {}
    for archived in trials.rows.values():
        if (archived["method"], archived["components"]) == (row.method, row.components):
            point = tuple(split_top_level(archived["settings"], ":"))
            scores.setdefault(point, []).append(float(archived["validation_score"] or "-inf"))
    return {
        point: sum(found) / len(found) for point, found in scores.items() if len(found) >= num_seeds
    }
