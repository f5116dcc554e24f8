"""Choice of a row's settings, one after the other, from the validation scores of trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.league.archive import RunArchive
from benchmarks.league.protocol import Benchmark, BenchmarkRow, Tuning, Values


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
        remaining: Trials to run before the next choice. Empty if all settings are chosen.
        tuned: The values that were tried, in the order of the choices.
    """

    settings: Values
    remaining: list[Values] = field(default_factory=list)
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


def next_trials(row: BenchmarkRow, tuning: Tuning, scores: Mapping[str, float]) -> TunedSettings:
    """Choose the settings of a row as far as the scores of its trials allow.

    The learning rate is chosen first, with the first value of all other settings. The other
    settings are then chosen in order, each at the values chosen before. Finally, the learning rate
    is compared with its neighbors again, because its best value depends on the other settings.

    Args:
        row: The row.
        tuning: Learning rates to try, and further values of settings.
        scores: Mean validation score of finished trials, keyed by their settings as text. Larger is
            better.
    """
    settings: Values = dict.fromkeys(tuning.keys, tuning.learning_rates[0])
    settings |= {key: values[0] for key, values in row.tuned.items()}
    grids = [_Grid(LEARNING_RATE, tuning.keys, tuning.learning_rates, tuning.wider)]
    for key, values in row.tuned.items():
        grids.append(_Grid(key, [key], values, tuning.wider_settings.get(key, ())))
    grids.append(_Grid(FINAL_LEARNING_RATE, tuning.keys, (), tuning.wider))
    return _choose(row, settings, grids, scores)


def next_retuning_trials(
    row: BenchmarkRow,
    chosen: TunedSettings,
    retuned: Mapping[str, Sequence[Any]],
    scores: Mapping[str, float],
) -> TunedSettings:
    """Choose some settings of a row again, at the other settings of another federation.

    Args:
        row: The row.
        chosen: The settings that were chosen in the other federation.
        retuned: Values to try, keyed by setting, in order.
        scores: Mean validation score of finished trials, as in `next_trials`.
    """
    settings = chosen.settings | {key: values[0] for key, values in retuned.items()}
    grids = [_Grid(key, [key], values, ()) for key, values in retuned.items()]
    return _choose(row, settings, grids, scores)


class _Grid(NamedTuple):
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
    wider: Sequence[Any]


def _choose(
    row: BenchmarkRow, settings: Values, grids: Sequence[_Grid], scores: Mapping[str, float]
) -> TunedSettings:
    """Choose settings one after the other, starting with the given settings."""
    tuned: list[TunedKey] = []
    for name, keys, first_values, wider in grids:
        values = list(first_values) or [settings[keys[0]]]
        while True:
            trials = [settings | dict.fromkeys(keys, value) for value in values]
            texts = [":".join(row.overrides(trial)) for trial in trials]
            missing = [t for t, text in zip(trials, texts, strict=True) if text not in scores]
            if missing:
                return TunedSettings(settings, missing, tuple(tuned))
            reached = [scores[text] for text in texts]
            best = max(range(len(values)), key=lambda index: reached[index])
            added = _neighbor(values, values[best], wider)
            if added is None:
                break
            values.append(added)
        settings = trials[best]
        order = sorted(range(len(values)), key=lambda i: wider.index(values[i]) if wider else i)
        tuned.append(
            TunedKey(
                name,
                tuple(values[i] for i in order),
                tuple(reached[i] for i in order),
                values[best],
            )
        )
    return TunedSettings(settings, [], tuple(tuned))


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
    seeds = benchmark.protocol.tuning.seeds
    trials = RunArchive(archive / f"{federation.tuned_as or name}_tuning.csv")
    own_trials = RunArchive(archive / f"{name}_tuning.csv")
    choices = {}
    for row in benchmark.rows_of(name):
        choice = next_trials(row, benchmark.protocol.tuning, _mean_scores(row, seeds, trials))
        retuned = federation.retuned.get(row.name)
        if retuned and not choice.remaining:
            scores = _mean_scores(row, seeds, own_trials)
            choice = next_retuning_trials(row, choice, retuned, scores)
        choices[row.name] = choice
    return choices


def _mean_scores(row: BenchmarkRow, seeds: Sequence[int], trials: RunArchive) -> dict[str, float]:
    """Return the mean validation scores of the trials of a row that have run with all seeds."""
    scores: dict[str, list[float]] = {}
    for archived in trials.rows.values():
        if (archived["method"], archived["components"]) == (row.method, row.components):
            text = archived["validation_score"]
            scores.setdefault(archived["settings"], []).append(
                float(text) if text else float("-inf")
            )
    return {
        settings: sum(values) / len(values)
        for settings, values in scores.items()
        if len(values) >= len(seeds)
    }
