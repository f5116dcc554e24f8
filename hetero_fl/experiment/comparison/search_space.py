"""The values that a search tries for each configuration key, and the budget of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetero_fl.utils.errors import ArgumentError
from hetero_fl.utils.text import split_top_level

if TYPE_CHECKING:
    import optuna

SIGNIFICANT_DIGITS = 3
"""Number of significant digits of a drawn number, if its range is not narrow."""

Space = Mapping[str, str | Sequence[Any]]
RESERVED = ("seed", "rounds", "algorithm.name", "name", "output")
"""Keys that a search sets itself."""


@dataclass(frozen=True)
class Choices:
    """A setting with a list of values.

    Attributes:
        values: The values, as text.
    """

    values: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that are checked before the search."""
        return self.values

    def suggest(self, trial: optuna.Trial, key: str) -> str:
        """Return the value of a trial, as text."""
        return str(trial.suggest_categorical(key, self.values))


@dataclass(frozen=True)
class Range:
    """A setting with a range of numbers.

    Attributes:
        low: Smallest value.
        high: Largest value.
        is_log: Whether values are drawn on a logarithmic scale.
        is_integer: Whether values are integers.
    """

    low: float
    high: float
    is_log: bool
    is_integer: bool

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that are checked before the search."""
        return self._text(self.low), self._text(self.high)

    def suggest(self, trial: optuna.Trial, key: str) -> str:
        """Return the value of a trial, as text.

        A number has at least three significant digits, and more in a narrow range, such as
        0.9..0.9999.
        """
        if self.is_integer:
            return str(trial.suggest_int(key, int(self.low), int(self.high), log=self.is_log))
        drawn = trial.suggest_float(key, self.low, self.high, log=self.is_log)
        largest = max(abs(self.low), abs(self.high))
        digits = SIGNIFICANT_DIGITS + int(math.log10(2 * largest / (self.high - self.low)))
        text = f"{drawn:.{digits}g}"
        return text if self.low <= float(text) <= self.high else self._text(drawn)

    def _text(self, value: float) -> str:
        return str(int(value)) if self.is_integer else repr(value)


def check_grid(keys: Iterable[str]) -> None:
    """Check the keys of a grid.

    Raises:
        ArgumentError: If the comparison sets a key itself.
    """
    for key in keys:
        if key in ("seed", "algorithm.name"):
            raise ArgumentError(f"grid: {key}: set by the comparison; remove it")


def parse_space(space: Space) -> dict[str, Choices | Range]:
    """Parse the values to search.

    Args:
        space: Values of each configuration key: `a,b,c` for a list, `low..high` for a range, and
            `low..high:log` for a range on a logarithmic scale. A list may also be a sequence.

    Raises:
        ArgumentError: If there is no key, or if values are invalid.

    Example:
        >>> parse_space({"algorithm.mu": "0.001..1:log"})
        {'algorithm.mu': Range(low=0.001, high=1.0, is_log=True, is_integer=False)}
    """
    if not space:
        raise ArgumentError("space: expected one or more keys, such as algorithm.mu=0.001..1:log")
    for key in space:
        if key in RESERVED or key.startswith("output."):
            raise ArgumentError(f"space: {key}: set by the comparison; remove it")
    return {key: _parse_values(key, values) for key, values in space.items()}


def _parse_values(key: str, text: str | Sequence[Any]) -> Choices | Range:
    if not isinstance(text, str):
        return _parse_sequence(key, text)
    low_text, dots, rest = text.partition("..")
    if not dots:
        values = tuple(split_top_level(text, ","))
        if len(values) < 2:
            raise ArgumentError(
                f"space: {key}: expected a,b,c or low..high or low..high:log, got '{text}'"
            )
        return Choices(values)
    high_text, colon, scale = rest.partition(":")
    try:
        low = float(low_text)
        high = float(high_text)
    except ValueError:
        raise ArgumentError(f"space: {key}: expected low..high, got '{text}'") from None
    if colon and scale != "log":
        raise ArgumentError(f"space: {key}: unknown scale '{scale}'; use low..high:log")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ArgumentError(f"space: {key}: low must be less than high, got '{text}'")
    if colon and low <= 0:
        raise ArgumentError(f"space: {key}: a logarithmic scale starts above 0, got '{low_text}'")
    is_integer = all(end.lstrip("+-").isdigit() for end in (low_text, high_text))
    return Range(low, high, bool(colon), is_integer)


def _parse_sequence(key: str, values: Sequence[Any]) -> Choices:
    try:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    except (TypeError, ValueError):
        texts = []
    if len(texts) < 2 or not isinstance(values, Sequence):
        raise ArgumentError(f"space: {key}: expected 'a,b,c' or 'low..high', got {values!r}")
    return Choices(tuple(texts))


@dataclass(frozen=True)
class Budget:
    """The budget of each method, of which at least one is set.

    Attributes:
        max_runs: Number of trials.
        max_hours: Hours of training, summed over the trials.
    """

    max_runs: int | None = None
    max_hours: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a number of runs, such as `20`, or of hours, such as `1.5h`.

        Raises:
            ArgumentError: If the text is neither.
        """
        number = text.removesuffix("h")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if value > 0 and number != text and math.isfinite(value):
            return cls(max_hours=value)
        if number == text and text.isdigit() and value >= 1:
            return cls(max_runs=int(text))
        raise ArgumentError(
            f"budget: expected a number of runs or hours, such as 20 or 1.5h, got '{text}'"
        )

    def allows(self, num_runs: int, hours: float) -> bool:
        """Return whether a method may start another trial.

        Args:
            num_runs: Number of trials that were started.
            hours: Hours of the trials that have ended.
        """
        if self.max_runs is not None:
            return num_runs < self.max_runs
        return self.max_hours is None or hours < self.max_hours
