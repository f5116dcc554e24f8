"""Simulated conditions of a run: devices, online times, durations of tasks, and faults."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import Literal, NamedTuple

from hetero_fl.config.schema import Config
from hetero_fl.config.simulation import (
    AvailabilityConfig,
    CohortConfig,
    DeviceConfig,
    DevicesConfig,
    FaultsConfig,
    QuantityConfig,
)
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
FaultKind = Literal["fine", "before", "during", "after", "lost", "late", "twice", "corrupted"]
# Faults after which no upload arrives at the server.
FAILURES: dict[str, str] = {
    "before": "failed before training",
    "during": "failed during training",
    "after": "failed after training",
    "lost": "upload lost",
}
# Largest number of bytes changed in a corrupted upload.
MAX_CHANGED_BYTES = 8
# Maximum number of clients for which a deadline is checked.
MAX_CHECKED = 1000


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


class TaskTimes(NamedTuple):
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
        day = DAY
        online: Spans = ()
        if (hours := own.availability or self.config.availability) is not None:
            day = hours.day
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


@dataclass(frozen=True)
class FaultOutcome:
    """Simulated fault of a task.

    Attributes:
        kind: Kind of the fault. "fine" if there is no fault.
        delay: Delay of the upload in seconds, in addition to the normal duration of the task.
        completed_share: Fraction of the training that is completed if the task fails during
            training.
    """

    kind: FaultKind = "fine"
    delay: float = 0.0
    completed_share: float = 1.0

    @property
    def failure(self) -> str:
        """Why no upload arrives at the server. Empty if one arrives."""
        return FAILURES.get(self.kind, "")


NO_FAULT = FaultOutcome()


class Faults:
    """Simulated faults of all tasks.

    The fault of a task depends only on the seed of the run, the client id and the number of the
    task.

    Args:
        config: Probabilities of faults. If None, the probabilities are 0.
        devices: Devices of the clients, which have additional failure probabilities.
    """

    def __init__(self, config: FaultsConfig | None, devices: Devices) -> None:
        self.config = config or FaultsConfig()
        self.devices = devices

    def outcome(self, client_id: str, task: int) -> FaultOutcome:
        """Return the fault of a task. Repeated calls return the same fault.

        Args:
            client_id: The client.
            task: Number of the task.
        """
        key = (self.devices.federation.seed, "fate", client_id, task)
        share = uniform(*key, "share")
        if uniform(*key, "device") < self.devices.device(client_id).failure:
            return FaultOutcome("during", completed_share=share)
        drawn = uniform(*key)
        below = 0.0
        for kind, probability in self.config.probabilities.items():
            below += probability
            if drawn < below:
                delay = self.config.delay if kind == "late" else 0.0
                return FaultOutcome(
                    kind,  # type: ignore[arg-type]  # a key of a mapping is any string
                    delay=delay,
                    completed_share=share,
                )
        return NO_FAULT


def flip_bytes(body: bytes, *parts: Key) -> bytes:
    """Return a copy of a byte string in which 1 to `MAX_CHANGED_BYTES` bytes are changed.

    Args:
        body: The byte string. If the byte string is empty, a zero byte is returned.
        *parts: Values that seed the random draws.
    """
    if not body:
        return b"\0"
    changed = bytearray(body)
    for i in range(1 + stream_key(*parts, "bytes") % MAX_CHANGED_BYTES):
        position = stream_key(*parts, i, "place") % len(changed)
        changed[position] ^= 1 + stream_key(*parts, i, "bits") % 255
    if bytes(changed) == body:
        # Two changes of the same byte can cancel each other.
        return bytes([body[0] ^ 1]) + body[1:]
    return bytes(changed)


def is_simulated(federation: FederationSpec, config: Config) -> bool:
    """Return whether the tasks of a run take simulated time or fail at random.

    Time is always simulated in asynchronous runs, unless clients are on other machines.
    """
    if federation.data.is_distributed:
        return False
    settings = (config.devices, config.faults, config.cohort.deadline)
    has_settings = has_own_machines(federation) or any(s is not None for s in settings)
    return has_settings or config.runtime.mode == "async"


def simulation_notes(federation: FederationSpec, config: Config) -> list[str]:
    """Return messages about settings that have no effect or probably an unintended effect.

    The result is empty if clients are on other machines.

    Args:
        federation: The federation.
        config: The configuration.
    """
    if federation.data.is_distributed:
        return []
    policy = config.cohort
    faults = config.faults or FaultsConfig()
    devices = Devices(federation, config.devices)
    timing = list(devices.timing_of_profiles())
    by_availability = policy.sampling == "available"
    waits_for_all = policy.deadline is None and policy.over_selection == 1
    always_online = all(is_always_online for _, _, is_always_online in timing)
    takes_time = any(tasks_take_time for _, tasks_take_time, _ in timing)
    is_instant = always_online and not takes_time and faults == FaultsConfig()
    rules = [
        (
            waits_for_all and faults.late > 0,
            "faults.late: without cohort.deadline or cohort.over_selection, a round waits for "
            "late uploads",
        ),
        (
            by_availability and config.clients.per_round is None,
            "cohort.sampling: without clients.per_round, all online clients are sampled",
        ),
        (
            by_availability and always_online,
            "cohort.sampling: available is equivalent to uniform, because all clients are "
            "always online; set devices.availability",
        ),
        (
            policy.deadline is not None and is_instant,
            "cohort.deadline: has no effect, because tasks take no time; set devices.speed, "
            "devices.up or devices.down",
        ),
        (
            faults.delay != FaultsConfig().delay and not faults.late,
            "faults.delay: has no effect, because faults.late is 0",
        ),
    ]
    return [line for applies, line in rules if applies] + _unreachable_deadline(devices, policy)


def _unreachable_deadline(devices: Devices, policy: CohortConfig) -> list[str]:
    """Return a list with a message if no client can finish training before the deadline."""
    if policy.deadline is None:
        return []
    shortest = min(
        devices.training_seconds(client_id, 0)
        for client_id in islice(devices.federation.client_infos, MAX_CHECKED)
    )
    if shortest <= policy.deadline:
        return []
    return [
        f"cohort.deadline: no client can meet {policy.deadline:g} s; training takes the "
        f"fastest client {shortest:.3g} s"
    ]


def has_own_machines(federation: FederationSpec) -> bool:
    """Return whether the settings of any client describe a device."""
    profiles = federation.client_infos.profiles
    return any(profile.settings.machine != DeviceConfig() for profile in profiles)


def unused_simulation_keys(federation: FederationSpec, config: Config) -> list[str]:
    """Return a message about the simulation settings, which have no effect in a deployment.

    The message is returned as a list of one element. If there are no such settings, the list is
    empty.

    Args:
        federation: The federation.
        config: The configuration of the deployment.
    """
    unused = [name for name in ("devices", "faults") if getattr(config, name) is not None]
    if has_own_machines(federation):
        unused.append("machine")
    return [f"{', '.join(unused)}: no effect, because time is not simulated"] if unused else []
