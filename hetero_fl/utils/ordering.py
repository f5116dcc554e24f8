"""Client ids in natural order, without storing a list of all ids.

The ids of a group of clients follow from the name and the size of the group. The ids of several
groups are merged as a few ranges, so the i-th of a million ids is found quickly.
"""

from __future__ import annotations

import heapq
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


# The package natsort is not used because it normalizes accented letters and treats ids as equal if
# they differ only in leading zeros.
def natural_key(name: str) -> tuple[list[Any], str]:
    """Return a sort key for natural order, in which `site_2` precedes `site_10`.

    Different names have different keys.
    """
    # Numbers are compared as digits without leading zeros, of which Python converts 4,300 at most.
    parts = re.split(r"0*([0-9]+)", name)
    return [(len(p), p) if i % 2 else p for i, p in enumerate(parts)], name


def natural_order(ids: Iterable[str]) -> list[str]:
    """Sort ids in natural order, in which `site_2` precedes `site_10`.

    Sums over clients are computed and data is assigned to clients in this order.

    Example:
        >>> from hetero_fl.utils.ordering import natural_order
        >>> natural_order(["site_10", "site_2"])
        ['site_2', 'site_10']
    """
    return sorted(ids, key=natural_key)


@dataclass(frozen=True)
class IdSeries:
    """The ids of a group of clients: `name_1`, `name_2`, …, padded with zeros to equal width.

    If the group has a single client, the id is the name of the group.

    Args:
        name: Name of the group.
        count: Number of clients.
    """

    name: str
    count: int

    @property
    def width(self) -> int:
        """Number of digits of the number in each id."""
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
        """Return the position of an id, or None if the series does not contain the id."""
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


class ClientIds(Sequence[str]):
    """The ids of several `IdSeries` in natural order, stored as ranges of the series.

    Args:
        series: The series.

    Raises:
        ValueError: If two series contain the same id. The message consists of this id.
    """

    def __init__(self, series: Sequence[IdSeries]) -> None:
        self._series = series
        # For each range: the position of the first id, and the series of this id with the position
        # in the series.
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int]] = []
        self._count = 0
        heads = [(natural_key(ids[0]), number, 0) for number, ids in enumerate(series)]
        heapq.heapify(heads)
        while heads:
            _, number, start = heapq.heappop(heads)
            ids = series[number]
            end = bisect_left(ids, heads[0][0], start, key=natural_key) if heads else len(ids)
            if end == start:
                raise ValueError(ids[start])
            self._starts.append(self._count)
            self._ranges.append((number, start))
            self._count += end - start
            if end < len(ids):
                heapq.heappush(heads, (natural_key(ids[end]), number, end))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        range_idx = bisect_right(self._starts, index) - 1
        number, start = self._ranges[range_idx]
        return self._series[number][start + index - self._starts[range_idx]]

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(self._count))
