"""Simulated devices of clients: traces, speeds and durations of tasks."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

from hetero_fl.config.simulation import WIDEST, AvailabilityConfig, DevicesConfig, QuantityConfig
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.batches import full_step_count
from hetero_fl.engine.templates import training_flops as operations
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.seeding import Key, stream_key

# Files of traces: a CSV of devices, a row each. A mistake in one is a line that names the file, the
# row and the column.

DURATION_FIELDS = ("speed", "up", "down")  # what time follows from
NUMBERS = (*DURATION_FIELDS, "jitter", "failure")
COLUMNS = ("client", *NUMBERS, "online")
MEANT = {
    **dict.fromkeys(DURATION_FIELDS, "a number above 0, such as 1.0e+8"),
    "jitter": f"a number from 0 to {WIDEST:g}",
    "failure": "a chance from 0 to 1",
    "online": "stretches of seconds of the day, in order and apart, such as 0-21600;64800-86400",
}
Spans = tuple[tuple[float, float], ...]  # [from, to) in seconds of the day, in order and apart
Trace = dict[str, Any]


def read_traces(path: str) -> list[Trace]:
    """The rows of a CSV of devices. Raises UserError in one line that names the file and the row."""
    where = f"devices.file: {path}"
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = [name.strip() for name in rows.fieldnames or ()]
            _check_columns(where, names)
            made = [_parse_row(f"{where}, row {number}", row) for number, row in enumerate(rows, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if not made:
        raise UserError(f"{where}: no rows")
    whose = Counter(row["client"] for row in made if "client" in row)
    if again := next((id for id, rows in whose.items() if rows > 1), None):
        raise UserError(f"{where}: two rows are of client '{again}'; give each client one")
    return made


def _check_columns(where: str, names: list[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            if other := next((mark for mark in (";", "\t") if mark in name), None):
                mark = "a semicolon" if other == ";" else "a tabulator"
                raise UserError(
                    f"{where}: found {mark} between the columns' names; separate them with commas"
                )
            raise UserError(f"{where}: unknown column '{name}'{suggest_or_list(name, COLUMNS)}")
        if names.count(name) > 1:
            raise UserError(f"{where}: two columns are called '{name}'")


def _parse_row(where: str, row: Mapping[str | None, Any]) -> Trace:
    made: Trace = {}
    if None in row:
        raise UserError(
            f"{where}: more values than columns; commas stand between values alone, semicolons between stretches of `online`"
        )
    for name, text in row.items():
        assert name is not None
        if text is None:
            raise UserError(
                f"{where}: fewer values than columns; leave empty what is not known: 1.0e+8,,"
            )
        name = name.strip()
        text = text.strip()
        try:
            if text:
                made[name] = (
                    text
                    if name == "client"
                    else _parse_spans(text)
                    if name == "online"
                    else _parse_number(name, text)
                )
        except ValueError:
            raise UserError(
                f"{where}, column {name}: found '{text}'; write {MEANT[name]}"
            ) from None
    return made


def _parse_number(name: str, text: str) -> float:
    value = float(text)
    lowest = 0.0
    highest = {"failure": 1.0, "jitter": WIDEST}.get(name, math.inf)
    if not lowest <= value <= highest or (value == 0 and name in DURATION_FIELDS):
        raise ValueError(text)
    return value


def _parse_spans(text: str) -> Spans:
    spans = sorted((float(a), float(b)) for a, b in (part.split("-") for part in text.split(";")))
    apart = all(a[1] <= b[0] for a, b in pairwise(spans))
    if not apart or not all(0 <= start < end < math.inf for start, end in spans):
        raise ValueError(text)
    return tuple(spans)


# Clients' simulated machines: made when asked for, from the key of the client's id, and not kept
# for anybody.

DAY = 86400.0
NAMED = 20  # clients among whom a name that was misspelt is looked for


def uniform(*parts: Key) -> float:
    """A number in (0, 1) drawn by the parts."""
    return ((stream_key(*parts) >> 11) + 0.5) / 2**52


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

    def next_online(self, at: float) -> float:
        """The first moment from `at` on at which it is online."""
        return self.finish_time(at, 0.0)

    def finish_time(self, at: float, busy: float) -> float:
        """When something that takes `busy` seconds is done, begun at `at`: it goes on only while the machine is online."""
        if not self.online:
            return at + busy
        each = sum(end - start for start, end in self.online)
        days = max(0, math.ceil(busy / each) - 1)  # whole ones; the rest ends within the day after
        busy = max(0.0, busy - days * each)
        midnight = at - at % self.day
        while True:
            for start, end in self.online:
                begin = max(at, midnight + start)
                until = midnight + end
                if until > begin:
                    if busy <= until - begin:
                        return begin + busy + days * self.day
                    busy -= until - begin
            midnight += self.day

    def online_seconds(self, at: float, end: float) -> float:
        """Seconds that it is online between the two."""
        if not self.online:
            return max(0.0, end - at)
        return max(0.0, self._online_before(end) - self._online_before(at))

    def _online_before(self, at: float) -> float:
        days, rest = divmod(at, self.day)
        return days * sum(e - s for s, e in self.online) + sum(
            max(0.0, min(e, rest) - s) for s, e in self.online
        )


class Devices:
    """Every client's machine, as the configuration, its file of traces and the client's own settings have it."""

    def __init__(
        self, federation: FederationSpec, config: DevicesConfig, traces: list[Trace]
    ) -> None:
        self.federation = federation
        self.config = config
        self._named = {row["client"]: row for row in traces if row.get("client")}
        self._drawn = [row for row in traces if not row.get("client")]

    @classmethod
    def from_config(cls, federation: FederationSpec, config: DevicesConfig | None) -> Devices:
        """The machines of a federation; without a configuration nothing takes time.

        Raises UserError for a file of traces that is not there, or not one.
        """
        config = config or DevicesConfig()
        traces = read_traces(config.file) if config.file is not None else []
        given = [
            n for n in NUMBERS if getattr(config, n) is not None and any(n in row for row in traces)
        ]
        if given:
            raise UserError(
                f"devices.{given[0]}: {config.file} has a column {given[0]}, too; give one of them"
            )
        day = config.availability.day if config.availability is not None else DAY
        for row in traces:
            if "online" in row and row["online"][-1][1] > day:
                raise UserError(
                    f"devices.file: {config.file}: online until {row['online'][-1][1]:g} of a day of {day:g} seconds"
                )
            if row.get("client") and row["client"] not in federation.client_infos:
                known = islice(federation.client_infos, NAMED)
                raise UserError(
                    f"devices.file: {config.file}: no client is called '{row['client']}'{suggest_or_list(row['client'], known)}"
                )
        return cls(federation, config, traces)

    def device(self, client_id: str) -> Device:
        """A client's machine. Raises KeyError for a stranger."""
        own = self.federation.client_infos.profile(client_id).settings.machine
        seed = self.federation.seed
        trace = self._trace(client_id)
        found: dict[str, float] = {}
        for name in NUMBERS:
            given = next(
                (
                    v
                    for v in (getattr(own, name), trace.get(name), getattr(self.config, name))
                    if v is not None
                ),
                None,
            )
            if isinstance(given, QuantityConfig):
                given = log_normal(given.median, given.sigma, seed, "device", client_id, name)
            if given is not None:
                found[name] = given
        hours = own.availability or self.config.availability
        day = hours.day if hours is not None else DAY
        if own.availability is None and "online" in trace:
            online = trace["online"]
        else:
            online = (
                _online_hours(hours, uniform(seed, "device", client_id, "phase"))
                if hours is not None
                else ()
            )
        return Device(**found, online=online, day=day)

    @property
    def fingerprint(self) -> str:
        """Of what the file of traces says, by its content."""
        rows = sorted(self._named.items()), self._drawn
        return hashlib.sha256(repr(rows).encode()).hexdigest() if any(rows) else ""

    def timing_of_profiles(self) -> Iterator[tuple[str, bool, bool]]:
        """For each kind of client, with each row of traces that it may have: an id, whether its tasks take time while it is
        online, and whether it always is."""
        named = Counter(self.federation.client_infos.profile(id).first for id in self._named)
        found = [
            (id, self.federation.client_infos.profile(id), row) for id, row in self._named.items()
        ]
        for kind in self.federation.client_infos.profiles:
            if kind.count > named[kind.first]:
                found += [(kind.first, kind, row) for row in self._drawn or [Trace()]]
        for id, kind, trace in found:
            own = kind.settings.machine
            takes = any(getattr(s, n) for s in (own, self.config) for n in DURATION_FIELDS)
            takes = takes or any(trace.get(n, math.inf) < math.inf for n in DURATION_FIELDS)
            hours = own.availability or self.config.availability
            spans = trace.get("online") if own.availability is None else None
            yield id, takes, spans is None and (hours is None or hours.share == 1)

    def _trace(self, client_id: str) -> Mapping[str, Any]:
        if client_id in self._named:
            return self._named[client_id]
        if not self._drawn:
            return {}
        return self._drawn[
            stream_key(self.federation.seed, "device", client_id, "trace") % len(self._drawn)
        ]


def _online_hours(hours: AvailabilityConfig, drawn: float) -> Spans:
    """The one stretch of the day, in two if it goes on over midnight."""
    if hours.share == 1:
        return ()
    start = (drawn if hours.phase is None else hours.phase) * hours.day
    end = start + hours.share * hours.day
    return ((start, end),) if end <= hours.day else ((0.0, end - hours.day), (start, hours.day))


# How long a task takes in simulated time: arithmetic on what is known before it is computed, never
# the clock.


@dataclass(frozen=True)
class TaskTimes:
    """When a task's parts are done, in simulated seconds since the run began."""

    sampled: float
    received: float  # the broadcast is there
    trained: float
    arrived: float  # the upload is at the server, if nothing befalls it


class Timing:
    """Durations of clients' tasks: down/bandwidth + operations/speed + up/bandwidth, while the client is online."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.federation = devices.federation

    def training_seconds(self, client_id: str, task: int) -> float:
        """Seconds that a client's whole local training takes, while it is online. `task`: its number, for the jitter."""
        device = self.devices.device(client_id)
        factor = log_normal(1.0, device.jitter, self.federation.seed, "jitter", client_id, task)
        return factor * operations(self.federation.client_infos[client_id]) / device.speed

    def task_times(
        self,
        client_id: str,
        down_bytes: int,
        up_bytes: int,
        at: float,
        task: int,
        step_share: float = 1.0,
    ) -> TaskTimes:
        """A task that is given out at `at`; `step_share`: the share of the steps that it does."""
        device = self.devices.device(client_id)
        received = device.finish_time(at, down_bytes / device.down)
        trained = device.finish_time(received, step_share * self.training_seconds(client_id, task))
        return TaskTimes(at, received, trained, device.finish_time(trained, up_bytes / device.up))

    def share_in_time(
        self, client_id: str, down_bytes: int, up_bytes: int, at: float, task: int, deadline: float
    ) -> float:
        """The share of the steps after which the upload still arrives by `deadline`: at most 1, 0 if there is time for none."""
        device = self.devices.device(client_id)
        spare = (
            device.online_seconds(at, deadline) - down_bytes / device.down - up_bytes / device.up
        )
        whole = self.training_seconds(client_id, task)
        return 1.0 if spare >= whole else max(0.0, spare / whole)


def local_steps(client_info: ClientInfo) -> int:
    """Steps of a client's whole local training in a round."""
    s = client_info.settings
    return full_step_count(client_info.num_rows, s.batch_size, s.epochs, s.steps)
