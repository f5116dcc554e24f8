"""Simulated devices of clients: device files, speeds and durations of tasks.

A trace is a row of a device file, which describes one device.
"""

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

# Columns that determine the duration of tasks.
DURATION_FIELDS = ("speed", "up", "down")
NUMBERS = (*DURATION_FIELDS, "jitter", "failure")
COLUMNS = ("client", *NUMBERS, "online")
# Description of the valid values for error messages, keyed by column.
VALID_VALUES = {
    **dict.fromkeys(DURATION_FIELDS, "a number > 0, such as 1.0e+8"),
    "jitter": f"a number from 0 to {WIDEST:g}",
    "failure": "a probability from 0 to 1",
    "online": "disjoint intervals in seconds of the day, such as 0-21600;64800-86400",
}
# Sorted, disjoint intervals [start, end) in seconds of the day.
Spans = tuple[tuple[float, float], ...]
# Parsed row of a device file, keyed by column.
Trace = dict[str, Any]
# Seconds of a day.
DAY = 86400.0
# Number of client ids that are compared with a misspelled one to suggest a correction.
MAX_SUGGESTED_FROM = 20


def read_traces(path: str) -> list[Trace]:
    """Read a device file in CSV format.

    Args:
        path: Path of the file.

    Returns:
        The rows. Missing values are omitted.

    Raises:
        UserError: If the file cannot be read or contains no rows, or if a column, a value or a
            client id is invalid or occurs twice.
    """
    where = f"devices.file: {path}"
    try:
        with Path(path).expanduser().open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = [name.strip() for name in rows.fieldnames or ()]
            _check_columns(where, names)
            traces = [
                _parse_row(f"{where}, row {number}", row) for number, row in enumerate(rows, 2)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if not traces:
        raise UserError(f"{where}: contains no rows")
    counts = Counter(trace["client"] for trace in traces if "client" in trace)
    for client_id, count in counts.items():
        if count > 1:
            raise UserError(
                f"{where}: expected one row per client, got {count} for client '{client_id}'"
            )
    return traces


def _check_columns(where: str, names: list[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            for separator, description in ((";", "semicolons"), ("\t", "tabs")):
                if separator in name:
                    raise UserError(
                        f"{where}: expected column names separated by commas, got {description}"
                    )
            raise UserError(f"{where}: unknown column '{name}'{suggest_or_list(name, COLUMNS)}")
        if names.count(name) > 1:
            raise UserError(f"{where}: duplicate column '{name}'")


def _parse_row(where: str, row: Mapping[str | None, Any]) -> Trace:
    trace: Trace = {}
    if None in row:
        raise UserError(
            f"{where}: more values than columns; separate intervals of `online` by semicolons"
        )
    for column, value in row.items():
        assert column is not None
        if value is None:
            raise UserError(
                f"{where}: fewer values than columns; leave missing values empty, as in 1.0e+8,,"
            )
        name = column.strip()
        text = value.strip()
        if not text:
            continue
        try:
            trace[name] = _parse_value(name, text)
        except ValueError:
            raise UserError(
                f"{where}, column {name}: expected {VALID_VALUES[name]}, got '{text}'"
            ) from None
    return trace


def _parse_value(name: str, text: str) -> str | Spans | float:
    if name == "client":
        return text
    if name == "online":
        return _parse_spans(text)
    return _parse_number(name, text)


def _parse_number(name: str, text: str) -> float:
    value = float(text)
    lowest = 0.0
    highest = {"failure": 1.0, "jitter": WIDEST}.get(name, math.inf)
    if not lowest <= value <= highest or (value == 0 and name in DURATION_FIELDS):
        raise ValueError(text)
    return value


def _parse_spans(text: str) -> Spans:
    spans = sorted((float(a), float(b)) for a, b in (part.split("-") for part in text.split(";")))
    are_disjoint = all(a[1] <= b[0] for a, b in pairwise(spans))
    if not are_disjoint or not all(0 <= start < end < math.inf for start, end in spans):
        raise ValueError(text)
    return tuple(spans)


def uniform(*parts: Key) -> float:
    """Return a uniformly distributed number in (0, 1).

    Args:
        *parts: Values that seed the random draw.
    """
    return ((stream_key(*parts) >> 11) + 0.5) / 2**52


def log_normal(median: float, sigma: float, *parts: Key) -> float:
    """Return a log-normally distributed number.

    Args:
        median: Median of the distribution.
        sigma: Standard deviation of the logarithm. If 0, the median is returned.
        *parts: Values that seed the random draw.
    """
    return median * math.exp(sigma * NormalDist().inv_cdf(uniform(*parts))) if sigma else median


@dataclass(frozen=True)
class Device:
    """Simulated device of a client.

    Attributes:
        speed: Speed of training in FLOP/s. If infinite, training takes no time.
        up: Upload bandwidth in bytes/s. If infinite, uploads take no time.
        down: Download bandwidth in bytes/s. If infinite, downloads take no time.
        jitter: Standard deviation of the logarithm of the training time.
        failure: Probability that a task fails.
        online: Intervals of the day in which the device is online, in seconds. If empty, the device
            is always online.
        day: Length of a day in seconds.
    """

    speed: float = math.inf
    up: float = math.inf
    down: float = math.inf
    jitter: float = 0.0
    failure: float = 0.0
    online: Spans = ()
    day: float = DAY

    def next_online(self, at: float) -> float:
        """Return the earliest time from `at` on at which the device is online, in seconds."""
        return self.finish_time(at, 0.0)

    def finish_time(self, at: float, busy: float) -> float:
        """Return the time at which work is finished, in seconds.

        Work pauses while the device is offline.

        Args:
            at: Time at which the work begins, in seconds.
            busy: Duration of the work without pauses, in seconds.
        """
        if not self.online:
            return at + busy
        each = sum(end - start for start, end in self.online)
        # Skip whole days. The work ends on the day after the skipped days.
        days = max(0, math.ceil(busy / each) - 1)
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
        """Return the number of seconds from `at` to `end` in which the device is online.

        The result is 0 if `end` is before `at`.
        """
        if not self.online:
            return max(0.0, end - at)
        return max(0.0, self._online_before(end) - self._online_before(at))

    def _online_before(self, at: float) -> float:
        days, rest = divmod(at, self.day)
        return days * sum(e - s for s, e in self.online) + sum(
            max(0.0, min(e, rest) - s) for s, e in self.online
        )


class Devices:
    """Simulated devices of all clients, which are computed on request.

    The settings of a client take precedence over the device file, and the device file takes
    precedence over the configuration of devices.

    Args:
        federation: The federation.
        config: The configuration of devices.
        traces: Rows of the device file. Rows without a client id are assigned at random to the
            clients without a row.
    """

    def __init__(
        self, federation: FederationSpec, config: DevicesConfig, traces: list[Trace]
    ) -> None:
        self.federation = federation
        self.config = config
        self._named = {row["client"]: row for row in traces if row.get("client")}
        self._drawn = [row for row in traces if not row.get("client")]

    @classmethod
    def from_config(cls, federation: FederationSpec, config: DevicesConfig | None) -> Devices:
        """Create the devices that a configuration describes.

        Args:
            federation: The federation.
            config: The configuration of devices. If None, only the settings of the clients
                determine the devices.

        Raises:
            UserError: If the device file cannot be read or contradicts the configuration.
        """
        config = config or DevicesConfig()
        traces = read_traces(config.file) if config.file is not None else []
        duplicates = [
            n for n in NUMBERS if getattr(config, n) is not None and any(n in row for row in traces)
        ]
        if duplicates:
            raise UserError(
                f"devices.{duplicates[0]}: cannot be combined with column '{duplicates[0]}' of "
                f"{config.file}; remove one of them"
            )
        day = config.availability.day if config.availability is not None else DAY
        for row in traces:
            if "online" in row and row["online"][-1][1] > day:
                raise UserError(
                    f"devices.file: {config.file}: `online` must be <= {day:g}, the seconds of a "
                    f"day, got {row['online'][-1][1]:g}"
                )
            if row.get("client") and row["client"] not in federation.client_infos:
                known = islice(federation.client_infos, MAX_SUGGESTED_FROM)
                raise UserError(
                    f"devices.file: {config.file}: unknown client '{row['client']}'"
                    f"{suggest_or_list(row['client'], known)}"
                )
        return cls(federation, config, traces)

    def device(self, client_id: str) -> Device:
        """Return the device of a client.

        Raises:
            KeyError: If the client does not exist.
        """
        own = self.federation.client_infos.profile(client_id).settings.machine
        seed = self.federation.seed
        trace = self._trace(client_id)
        values: dict[str, float] = {}
        for name in NUMBERS:
            candidates = (getattr(own, name), trace.get(name), getattr(self.config, name))
            value = next((v for v in candidates if v is not None), None)
            if isinstance(value, QuantityConfig):
                value = log_normal(value.median, value.sigma, seed, "device", client_id, name)
            if value is not None:
                values[name] = value
        hours = own.availability or self.config.availability
        day = hours.day if hours is not None else DAY
        online: Spans = ()
        if own.availability is None and "online" in trace:
            online = trace["online"]
        elif hours is not None:
            online = _online_hours(hours, uniform(seed, "device", client_id, "phase"))
        return Device(**values, online=online, day=day)

    @property
    def fingerprint(self) -> str:
        """Hash of the content of the device file, or "" if there is no file."""
        rows = sorted(self._named.items()), self._drawn
        return hashlib.sha256(repr(rows).encode()).hexdigest() if any(rows) else ""

    def timing_of_profiles(self) -> Iterator[tuple[str, bool, bool]]:
        """Yield the timing of each combination of a client profile and a row of the device file.

        Clients with the same settings have the same profile (see `ClientProfile`). Only rows that
        may apply to a client of the profile are considered.

        Yields:
            Id of an example client, whether tasks take time while the client is online, and whether
            the client is always online.
        """
        client_infos = self.federation.client_infos
        num_named = Counter(client_infos.profile(client_id).first for client_id in self._named)
        combinations = [
            (client_id, client_infos.profile(client_id), row)
            for client_id, row in self._named.items()
        ]
        for profile in client_infos.profiles:
            if profile.count > num_named[profile.first]:
                combinations += [(profile.first, profile, row) for row in self._drawn or [Trace()]]
        for client_id, profile, trace in combinations:
            own = profile.settings.machine
            takes_time = any(getattr(s, n) for s in (own, self.config) for n in DURATION_FIELDS)
            takes_time = takes_time or any(
                trace.get(n, math.inf) < math.inf for n in DURATION_FIELDS
            )
            hours = own.availability or self.config.availability
            spans = trace.get("online") if own.availability is None else None
            yield client_id, takes_time, spans is None and (hours is None or hours.share == 1)

    def _trace(self, client_id: str) -> Mapping[str, Any]:
        if client_id in self._named:
            return self._named[client_id]
        if not self._drawn:
            return {}
        return self._drawn[
            stream_key(self.federation.seed, "device", client_id, "trace") % len(self._drawn)
        ]


def _online_hours(hours: AvailabilityConfig, random_phase: float) -> Spans:
    """Return the online hours of a day. Hours that include midnight are two intervals."""
    if hours.share == 1:
        return ()
    start = (random_phase if hours.phase is None else hours.phase) * hours.day
    end = start + hours.share * hours.day
    return ((start, end),) if end <= hours.day else ((0.0, end - hours.day), (start, hours.day))


@dataclass(frozen=True)
class TaskTimes:
    """Times of the stages of a task, in simulated seconds.

    Attributes:
        sampled: Time at which the client is sampled.
        received: Time at which the client has received the broadcast.
        trained: Time at which the client has finished training.
        arrived: Time at which the upload arrives at the server, unless a fault prevents it.
    """

    sampled: float
    received: float
    trained: float
    arrived: float


class Timing:
    """Durations of tasks, which depend on the devices and the sizes of messages.

    A task takes `down_bytes / down + operations / speed + up_bytes / up` seconds, where
    `operations` is the number of floating-point operations. The time in which the client is offline
    is added.

    Args:
        devices: Devices of the clients.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.federation = devices.federation

    def training_seconds(self, client_id: str, task: int) -> float:
        """Return the duration of a client's local training in seconds, without offline time.

        Args:
            client_id: The client.
            task: Number of the task, which seeds the random factor of the duration
                (`Device.jitter`).
        """
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
        *,
        step_share: float = 1.0,
    ) -> TaskTimes:
        """Return the times of a task's stages.

        Args:
            client_id: The client.
            down_bytes: Size of the broadcast in bytes.
            up_bytes: Size of the upload in bytes.
            at: Time of the assignment in seconds.
            task: Number of the task, which seeds the random factor of the duration
                (`Device.jitter`).
            step_share: Fraction of the local training steps that the client performs.
        """
        device = self.devices.device(client_id)
        received = device.finish_time(at, down_bytes / device.down)
        trained = device.finish_time(received, step_share * self.training_seconds(client_id, task))
        return TaskTimes(at, received, trained, device.finish_time(trained, up_bytes / device.up))

    def share_in_time(
        self,
        client_id: str,
        down_bytes: int,
        up_bytes: int,
        at: float,
        task: int,
        *,
        deadline: float,
    ) -> float:
        """Return the largest fraction of local training after which the upload arrives in time.

        Args:
            client_id: The client.
            down_bytes: Size of the broadcast in bytes.
            up_bytes: Size of the upload in bytes.
            at: Time of the assignment in seconds.
            task: Number of the task, which seeds the random factor of the duration
                (`Device.jitter`).
            deadline: Time at which the upload must have arrived, in seconds.

        Returns:
            A fraction from 0 to 1. 0 if the upload cannot arrive in time even without training.
        """
        device = self.devices.device(client_id)
        available = (
            device.online_seconds(at, deadline) - down_bytes / device.down - up_bytes / device.up
        )
        required = self.training_seconds(client_id, task)
        return 1.0 if available >= required else max(0.0, available / required)


def local_steps(client_info: ClientInfo) -> int:
    """Return the number of local training steps of a client in a round."""
    s = client_info.settings
    return full_step_count(client_info.num_rows, s.batch_size, s.epochs, s.steps)
