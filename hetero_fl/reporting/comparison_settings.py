"""The settings that each method of a comparison ran with, in words, and where each of them was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from hetero_fl.reporting.wording import algorithm_name

TITLE = "Settings"
DEFAULTS = "defaults"


@dataclass(frozen=True)
class Setting:
    """A setting that is not the method's default, and where it was written."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class UsedSettings:
    """Settings by label of the method, and a sentence on those of the configuration's `algorithm` section."""

    methods: tuple[tuple[str, tuple[Setting, ...]], ...] = ()
    note: str = ""

    def lines(self) -> list[tuple[str, str]]:
        """Return (methods, settings) for reading; methods at their defaults share the first line."""
        plain = [algorithm_name(label) for label, settings in self.methods if not settings]
        tuned = [(algorithm_name(label), in_words(settings)) for label, settings in self.methods if settings]
        return [*([(", ".join(plain), DEFAULTS)] if plain else []), *tuned]


def in_words(settings: Sequence[Setting]) -> str:
    """Return settings as one line, those of one origin together: `a = 1, b = 2 (variant); c = 3 (grid)`."""
    parts = []
    for origin, found in groupby(settings, key=lambda setting: setting.origin):
        parts.append(f"{', '.join(f'{s.key} = {s.value}' for s in found)} ({origin})")
    return "; ".join(parts)
