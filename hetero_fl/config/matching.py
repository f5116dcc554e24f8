"""Which kinds of clients a group has under patterns of ids, counted digit by digit instead of id by id.

A client's settings depend on its turn in its group and on which overrides match its id, each with a turn of its own where
it names several models. Ids of a group differ in their digits only. So a block of ids, 10^k with the first digits in common,
is known by what the patterns have read so far and by the turns at its beginning, and blocks alike are counted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from hetero_fl.order import Series

State = frozenset[int]  # places in a pattern that the text so far may have come to
Turns = tuple[int, ...]  # of the group, then of each override
Key = tuple[int, ...]  # the same for one client, -1 where an override does not match: what its settings follow from
Found = dict[Key, tuple[int, int]]  # how many such clients, and where the first is


class Pattern:
    """A shell-style pattern, as `fnmatch.fnmatchcase` understands it, that reads a text bit by bit."""

    def __init__(self, text: str) -> None:
        self.text, self._parts = text, list(_parts(text))
        self._known: dict[tuple[State, str], State] = {}
        self.start = self._with_gaps({0})

    def read(self, state: State, text: str) -> State:
        """Where it stands after more of the text."""
        for char in text:
            if (state, char) not in self._known:
                on = {p + 1 for p in state if p < len(self._parts) and fnmatchcase(char, self._parts[p])}
                stay = {p for p in state if p < len(self._parts) and self._parts[p] == "*"}
                self._known[state, char] = self._with_gaps(on | stay)
            state = self._known[state, char]
        return state

    def accepts(self, state: State) -> bool:
        """Whether the text so far matches."""
        return len(self._parts) in state

    def _with_gaps(self, places: set[int]) -> State:
        for place in sorted(places):
            while place < len(self._parts) and self._parts[place] == "*":
                place += 1
                places.add(place)
        return frozenset(places)


def _parts(text: str) -> Iterator[str]:
    """A pattern's parts, each for one character, but for stars."""
    at = 0
    while at < len(text):
        end = at + 1
        if text[at] == "[":
            close = text.find("]", at + 2 + (text[at + 1 : at + 2] == "!"))
            end = close + 1 if close >= 0 else end
        yield text[at:end]
        at = end


class Blocks:
    """The clients of one series, under patterns.

    Args:
        cycles: after how many clients the turns begin anew: of the group, then of each pattern's override.
        begin: the turns of the series' first client.
    """

    def __init__(self, series: Series, patterns: Sequence[Pattern], cycles: Turns, begin: Turns) -> None:
        self._series, self._patterns, self._cycles, self._begin = series, patterns, cycles, begin
        self._known: dict[tuple[int, tuple[State, ...], Turns], tuple[Found, Turns]] = {}

    def turns(self, place: int) -> Turns:
        """The turns of the client at that place; at the end of the series: those of the next one's first."""
        turns = self._begin
        for _, digits, states in self._blocks(place):
            turns = self._block(digits, states, turns)[1]
        return turns

    def kinds(self) -> Found:
        """The keys that occur, with the number of their clients and the place of the first."""
        found: Found = {}
        turns = self._begin
        for place, digits, states in self._blocks(len(self._series)):
            inside, turns = self._block(digits, states, turns)
            _add(found, inside, place)
        return found

    def _blocks(self, stop: int) -> Iterator[tuple[int, int, tuple[State, ...]]]:
        """The places below `stop` in blocks: where one begins, its free digits, what the patterns have read before them."""
        if len(self._series) == 1:
            if stop:
                yield 0, 0, self._read(self._series.name)
            return
        number = 1
        while number <= stop:
            digits = 0
            while number % 10 ** (digits + 1) == 0 and number + 10 ** (digits + 1) <= stop + 1:
                digits += 1
            id = self._series[number - 1]
            yield number - 1, digits, self._read(id[: len(id) - digits])
            number += 10**digits

    def _read(self, text: str) -> tuple[State, ...]:
        return tuple(p.read(p.start, text) for p in self._patterns)

    def _block(self, digits: int, states: tuple[State, ...], turns: Turns) -> tuple[Found, Turns]:
        known = (digits, states, turns)
        if known not in self._known:
            self._known[known] = self._count(digits, states, turns)
        return self._known[known]

    def _count(self, digits: int, states: tuple[State, ...], turns: Turns) -> tuple[Found, Turns]:
        if digits == 0:
            hits = [True, *(p.accepts(s) for p, s in zip(self._patterns, states, strict=True))]
            key = tuple(t if hit else -1 for t, hit in zip(turns, hits, strict=True))
            after = tuple((t + hit) % c for t, hit, c in zip(turns, hits, self._cycles, strict=True))
            return {key: (1, 0)}, after
        found: Found = {}
        for digit in range(10):
            deeper = tuple(p.read(s, str(digit)) for p, s in zip(self._patterns, states, strict=True))
            inside, turns = self._block(digits - 1, deeper, turns)
            _add(found, inside, digit * 10 ** (digits - 1))
        return found, turns


def _add(found: Found, more: Found, place: int) -> None:
    for key, (count, first) in more.items():
        had = found.get(key)
        found[key] = (count, place + first) if had is None else (had[0] + count, had[1])
