"""Clients' simulated machines: made when asked for, from the key of the client's id, and not kept for anybody."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import Any

from hetero_fl.config.devices import AvailabilityConfig, DevicesConfig, QuantityConfig
from hetero_fl.errors import UserError, nearest
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.traces import NUMBERS, TAKES, Spans, Trace, read_traces
from hetero_fl.seeding import Key, key

DAY = 86400.0
NAMED = 20  # clients among whom a name that was misspelt is looked for


def uniform(*parts: Key) -> float:
    """A number in (0, 1) drawn by the parts."""
    return ((key(*parts) >> 11) + 0.5) / 2**52


def log_normal(median: float, sigma: float, *parts: Key) -> float:
    """A number drawn by the parts: median·exp(σz) with z standard normal."""
    return median * math.exp(sigma * NormalDist().inv_cdf(uniform(*parts))) if sigma else median


@dataclass(frozen=True)
class Device:
    """A machine. `speed` in FLOP/s, `up` and `down` in bytes/s, infinite where nothing takes time; `online`: its hours in a day
    of `day` seconds, none: always."""

    speed: float = math.inf
    up: float = math.inf
    down: float = math.inf
    jitter: float = 0.0
    failure: float = 0.0
    online: Spans = ()
    day: float = DAY

    def awake(self, at: float) -> float:
        """The first moment from `at` on at which it is online."""
        return self.finish(at, 0.0)

    def finish(self, at: float, busy: float) -> float:
        """When something that takes `busy` seconds is done, begun at `at`: it goes on only while the machine is online."""
        if not self.online:
            return at + busy
        each = sum(end - start for start, end in self.online)
        days = max(0, math.ceil(busy / each) - 1)  # whole ones; the rest ends within the day after
        busy, midnight = max(0.0, busy - days * each), at - at % self.day
        while True:
            for start, end in self.online:
                begin, until = max(at, midnight + start), midnight + end
                if until > begin:
                    if busy <= until - begin:
                        return begin + busy + days * self.day
                    busy -= until - begin
            midnight += self.day

    def time_until(self, at: float, end: float) -> float:
        """Seconds that it is online between the two."""
        if not self.online:
            return max(0.0, end - at)
        return max(0.0, self._online_before(end) - self._online_before(at))

    def _online_before(self, at: float) -> float:
        days, rest = divmod(at, self.day)
        return days * sum(e - s for s, e in self.online) + sum(max(0.0, min(e, rest) - s) for s, e in self.online)


class Devices:
    """Every client's machine, as the configuration, its file of traces and the client's own settings have it."""

    def __init__(self, federation: Federation, config: DevicesConfig, traces: list[Trace]) -> None:
        self.federation, self.config = federation, config
        self._named = {row["client"]: row for row in traces if row.get("client")}
        self._drawn = [row for row in traces if not row.get("client")]

    @classmethod
    def of(cls, federation: Federation, config: DevicesConfig | None) -> Devices:
        """The machines of a federation; without a configuration nothing takes time.

        Raises UserError for a file of traces that is not there, or not one.
        """
        config = config or DevicesConfig()
        traces = read_traces(config.file) if config.file is not None else []
        given = [n for n in NUMBERS if getattr(config, n) is not None and any(n in row for row in traces)]
        if given:
            raise UserError(f"devices.{given[0]}: {config.file} has a column {given[0]}, too; give one of them")
        day = config.availability.day if config.availability is not None else DAY
        for row in traces:
            if "online" in row and row["online"][-1][1] > day:
                raise UserError(
                    f"devices.file: {config.file}: online until {row['online'][-1][1]:g} of a day of {day:g} seconds"
                )
            if row.get("client") and row["client"] not in federation.cards:
                known = islice(federation.cards, NAMED)
                raise UserError(
                    f"devices.file: {config.file}: no client is called '{row['client']}'{nearest(row['client'], known)}"
                )
        return cls(federation, config, traces)

    def device(self, id: str) -> Device:
        """A client's machine. Raises KeyError for a stranger."""
        own, seed = self.federation.cards.kind(id).settings.machine, self.federation.seed
        trace = self._trace(id)
        found: dict[str, float] = {}
        for name in NUMBERS:
            given = next(
                (v for v in (getattr(own, name), trace.get(name), getattr(self.config, name)) if v is not None), None
            )
            if isinstance(given, QuantityConfig):
                given = log_normal(given.median, given.sigma, seed, "device", id, name)
            if given is not None:
                found[name] = given
        hours = own.availability or self.config.availability
        day = hours.day if hours is not None else DAY
        if own.availability is None and "online" in trace:
            online = trace["online"]
        else:
            online = _stretch(hours, uniform(seed, "device", id, "phase")) if hours is not None else ()
        return Device(**found, online=online, day=day)

    @property
    def fingerprint(self) -> str:
        """Of what the file of traces says, by its content."""
        rows = sorted(self._named.items()), self._drawn
        return hashlib.sha256(repr(rows).encode()).hexdigest() if any(rows) else ""

    def paces(self) -> Iterator[tuple[str, bool, bool]]:
        """For each kind of client, with each row of traces that it may have: an id, whether its tasks take time while it is
        online, and whether it always is."""
        named = Counter(self.federation.cards.kind(id).first for id in self._named)
        found = [(id, self.federation.cards.kind(id), row) for id, row in self._named.items()]
        for kind in self.federation.cards.kinds:
            if kind.count > named[kind.first]:
                found += [(kind.first, kind, row) for row in self._drawn or [Trace()]]
        for id, kind, trace in found:
            own = kind.settings.machine
            takes = any(getattr(s, n) for s in (own, self.config) for n in TAKES)
            takes = takes or any(trace.get(n, math.inf) < math.inf for n in TAKES)
            hours = own.availability or self.config.availability
            spans = trace.get("online") if own.availability is None else None
            yield id, takes, spans is None and (hours is None or hours.share == 1)

    def _trace(self, id: str) -> Mapping[str, Any]:
        if id in self._named:
            return self._named[id]
        if not self._drawn:
            return {}
        return self._drawn[key(self.federation.seed, "device", id, "trace") % len(self._drawn)]


def _stretch(hours: AvailabilityConfig, drawn: float) -> Spans:
    """The one stretch of the day, in two if it goes on over midnight."""
    if hours.share == 1:
        return ()
    start = (drawn if hours.phase is None else hours.phase) * hours.day
    end = start + hours.share * hours.day
    return ((start, end),) if end <= hours.day else ((0.0, end - hours.day), (start, hours.day))
