"""Simulated devices of clients: speeds, online times and durations of tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

from hetero_fl.config.simulation import AvailabilityConfig, DevicesConfig, QuantityConfig
from hetero_fl.engine.templates import training_flops as operations
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.utils.seeding import Key, stream_key

# Settings that determine the duration of tasks.
DURATION_FIELDS = ("speed", "up", "down")
NUMBERS = (*DURATION_FIELDS, "jitter", "failure")
# Sorted, disjoint intervals [start, end) in seconds of the day.
Spans = tuple[tuple[float, float], ...]
# Seconds of a day.
DAY = 86400.0


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


@dataclass(frozen=True)
class TaskTimes:
    """Times of the stages of a task, in simulated seconds.

    Attributes:
        received: Time at which the client has received the broadcast.
        trained: Time at which the client has finished training.
        arrived: Time at which the upload arrives at the server, unless a fault prevents it.
    """

    received: float
    trained: float
    arrived: float


class Devices:
    """Simulated devices of all clients, which are computed on request, and durations of tasks.

    The settings of a client take precedence over the configuration of devices. A task takes
    `down_bytes / down + operations / speed + up_bytes / up` seconds, where `operations` is the
    number of floating-point operations. The time in which the client is offline is added.

    Args:
        federation: The federation.
        config: The configuration of devices. If None, only the settings of the clients determine
            the devices.
    """

    def __init__(self, federation: FederationSpec, config: DevicesConfig | None) -> None:
        self.federation = federation
        self.config = config or DevicesConfig()

    def device(self, client_id: str) -> Device:
        """Return the device of a client.

        Raises:
            KeyError: If the client does not exist.
        """
        own = self.federation.client_infos.profile(client_id).settings.machine
        seed = self.federation.seed
        values: dict[str, float] = {}
        for name in NUMBERS:
            value = getattr(own, name)
            if value is None:
                value = getattr(self.config, name)
            if isinstance(value, QuantityConfig):
                value = log_normal(value.median, value.sigma, seed, "device", client_id, name)
            if value is not None:
                values[name] = value
        hours = own.availability or self.config.availability
        day = hours.day if hours is not None else DAY
        online: Spans = ()
        if hours is not None:
            online = _online_hours(hours, uniform(seed, "device", client_id, "phase"))
        return Device(**values, online=online, day=day)

    def training_seconds(self, client_id: str, task: int) -> float:
        """Return the duration of a client's local training in seconds, without offline time.

        Args:
            client_id: The client.
            task: Number of the task, which seeds the random factor of the duration
                (`Device.jitter`).
        """
        device = self.device(client_id)
        factor = log_normal(1.0, device.jitter, self.federation.seed, "jitter", client_id, task)
        return factor * operations(self.federation.client_infos[client_id]) / device.speed

    def task_times(
        self, client_id: str, down_bytes: int, up_bytes: int, at: float, task: int | None
    ) -> TaskTimes:
        """Return the times of a task's stages.

        Args:
            client_id: The client.
            down_bytes: Size of the broadcast in bytes.
            up_bytes: Size of the upload in bytes.
            at: Time of the assignment in seconds.
            task: Number of the task, which seeds the random factor of the duration
                (`Device.jitter`). If None, the client does not train.
        """
        device = self.device(client_id)
        received = device.finish_time(at, down_bytes / device.down)
        training = 0.0 if task is None else self.training_seconds(client_id, task)
        trained = device.finish_time(received, training)
        return TaskTimes(received, trained, device.finish_time(trained, up_bytes / device.up))

    def timing_of_profiles(self) -> Iterator[tuple[str, bool, bool]]:
        """Yield the timing of each client profile.

        Clients with the same settings have the same profile (see `ClientProfile`).

        Yields:
            Id of an example client, whether tasks take time while the client is online, and whether
            the client is always online.
        """
        for profile in self.federation.client_infos.profiles:
            own = profile.settings.machine
            takes_time = any(getattr(s, n) for s in (own, self.config) for n in DURATION_FIELDS)
            hours = own.availability or self.config.availability
            yield profile.first, takes_time, hours is None or hours.share == 1


def _online_hours(hours: AvailabilityConfig, random_phase: float) -> Spans:
    """Return the online hours of a day. Hours that include midnight are two intervals."""
    if hours.share == 1:
        return ()
    start = (random_phase if hours.phase is None else hours.phase) * hours.day
    end = start + hours.share * hours.day
    return ((start, end),) if end <= hours.day else ((0.0, end - hours.day), (start, hours.day))
