"""Ids of clients in the order in which people count, without a list of them.

The ids of a group follow from its name and its size; those of several groups are merged by stretches, so that the i-th of a
million is found from a handful of numbers.
"""

from __future__ import annotations

import heapq
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


# The package natsort has no option that leaves text as it is: it sorts accented letters by their
# decomposed form, and ids that differ in leading zeros only are equal to it.
def natural_key(name: str) -> tuple[list[Any], str]:
    """Return a key that sorts in natural order: `site_2` before `site_10`. Equal keys, equal ids."""
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", name))], name


def natural_order(ids: Iterable[str]) -> list[str]:
    """Sorted as people count: the one order in which sums are taken and data is dealt."""
    return sorted(ids, key=natural_key)


@dataclass(frozen=True)
class IdSeries:
    """The ids of one group: `name_1`, `name_2` … with zeros in front to equal width, or the name alone if it is one."""

    name: str
    count: int

    @property
    def width(self) -> int:
        """Digits of every number."""
        return len(str(self.count))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> str:
        if not 0 <= place < self.count:
            raise IndexError(place)
        return self.name if self.count == 1 else f"{self.name}_{place + 1:0{self.width}}"

    def __iter__(self) -> Iterator[str]:
        if self.count == 1:
            return iter([self.name])
        prefix = f"{self.name}_"
        width = self.width
        return (prefix + str(number).zfill(width) for number in range(1, self.count + 1))

    def position(self, client_id: str) -> int | None:
        """The place of an id, None if it is not of this series."""
        if self.count == 1:
            return 0 if client_id == self.name else None
        number = client_id.removeprefix(f"{self.name}_")
        if (
            len(number) == len(client_id)
            or len(number) != self.width
            or not (number.isascii() and number.isdigit())
        ):
            return None
        return int(number) - 1 if 1 <= int(number) <= self.count else None


class ClientIds:
    """The ids of several series, as people count. Holds one entry for each stretch that comes from one series.

    Raises ValueError with the id that two series have.
    """

    def __init__(self, series: Sequence[IdSeries]) -> None:
        self._series = series
        self._starts: list[int] = []  # of the stretches, in the whole
        self._stretches: list[tuple[int, int]] = []  # number of the series, place in it
        self._count = 0
        heads = [(natural_key(s[0]), number, 0) for number, s in enumerate(series)]
        heapq.heapify(heads)
        while heads:
            _, number, place = heapq.heappop(heads)
            mine = series[number]
            end = bisect_left(mine, heads[0][0], place, key=natural_key) if heads else len(mine)
            if end == place:
                raise ValueError(mine[place])
            self._starts.append(self._count)
            self._stretches.append((number, place))
            self._count += end - place
            if end < len(mine):
                heapq.heappush(heads, (natural_key(mine[end]), number, end))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(index)
        stretch = bisect_right(self._starts, index) - 1
        number, place = self._stretches[stretch]
        return self._series[number][place + index - self._starts[stretch]]

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(self._count))
