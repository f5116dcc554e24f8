"""Conditions of a simulated run, and the schedule of a synchronous round in simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from hetero_fl.config.schema import Config
from hetero_fl.config.simulation import CohortConfig, DeviceConfig, FaultsConfig
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.devices import Devices, Timing, uniform
from hetero_fl.federation.simulation.faults import NO_FAULT, FaultOutcome, Faults

# Maximum number of clients for which a deadline is checked.
MAX_CHECKED = 1000

# Function that returns the number of bytes sent to a client and sent by the client.
Sizes = Callable[[str], tuple[int, int]]


@dataclass(frozen=True)
class SimulationEnvironment:
    """Conditions of a run: devices, faults and the policy for rounds.

    Attributes:
        policy: Policy for the sampling of cohorts and for rounds with too few uploads.
        devices: Devices of the clients.
        timing: Durations of tasks.
        faults: Faults of tasks.
        per_round: Number of uploads for which a round waits. If None, a round waits for all
            uploads.
        simulated: Whether time and faults are simulated.
        connected_clients: Function that returns the ids of the connected clients. None if clients
            are not on other machines.
    """

    policy: CohortConfig
    devices: Devices
    timing: Timing
    faults: Faults
    per_round: int | None
    simulated: bool
    connected_clients: Callable[[], Collection[str]] | None = None

    @classmethod
    def from_config(
        cls,
        federation: FederationSpec,
        config: Config,
        connected_clients: Callable[[], Collection[str]] | None = None,
    ) -> SimulationEnvironment:
        """Create the conditions that a configuration describes.

        If clients are on other machines, devices and faults are not simulated.

        Args:
            federation: The federation.
            config: The configuration.
            connected_clients: Function that returns the ids of the connected clients. Ignored
                unless clients are on other machines.
        """
        policy = config.cohort
        is_distributed = federation.data.is_distributed
        devices = Devices(federation, None if is_distributed else config.devices)
        settings = (config.devices, config.faults, policy.deadline)
        has_settings = any(setting is not None for setting in settings)
        return cls(
            policy=policy,
            devices=devices,
            timing=Timing(devices),
            faults=Faults(None if is_distributed else config.faults, devices),
            per_round=config.clients.per_round,
            simulated=not is_distributed and (_has_own_machines(federation) or has_settings),
            connected_clients=connected_clients if is_distributed else None,
        )

    @property
    def num_sampled(self) -> int:
        """Number of clients sampled for a round."""
        return self.policy.num_sampled(self.per_round, len(self.devices.federation.client_infos))

    @property
    def on_too_few(self) -> str:
        """Policy for rounds with too few uploads, such as "skip" or "fail"."""
        return str(
            self.policy.too_few
            or ("skip" if self.simulated or self.connected_clients is not None else "fail")
        )

    def notes(self) -> list[str]:
        """Return messages about settings that have no effect or probably an unintended effect.

        The result is empty if clients are on other machines.
        """
        if self.devices.federation.data.is_distributed:
            return []
        policy = self.policy
        faults = self.faults.config
        timing = list(self.devices.timing_of_profiles())
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
                by_availability and self.per_round is None,
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
        return [line for applies, line in rules if applies] + self._unreachable_deadline()

    def _unreachable_deadline(self) -> list[str]:
        """Return a list with a message if no client can finish training before the deadline."""
        policy = self.policy
        client_infos = self.devices.federation.client_infos
        if policy.deadline is None:
            return []
        shortest = min(
            self.timing.training_seconds(client_id, 0)
            for client_id in islice(client_infos, MAX_CHECKED)
        )
        if shortest <= policy.deadline:
            return []
        return [
            f"cohort.deadline: no client can meet {policy.deadline:g} s; training takes the "
            f"fastest client {shortest:.3g} s"
        ]


def _has_own_machines(federation: FederationSpec) -> bool:
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
    if _has_own_machines(federation):
        unused.append("machine")
    return [f"{', '.join(unused)}: no effect, because time is not simulated"] if unused else []


@dataclass(frozen=True)
class ScheduledTask:
    """Task of one client in a round.

    Attributes:
        client: The client's id.
        outcome: The fault of the task.
        end: Time at which the server observes the end of the task, in seconds. Infinite if the
            server does not observe the end.
    """

    client: str
    outcome: FaultOutcome = NO_FAULT
    end: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Schedule of a round's tasks.

    The collector of the uploads records what happens in the round (see `UploadCollector`).

    Attributes:
        tasks: Task of each client, keyed by client id.
        start: Time at which the round begins, in seconds.
        end: Time at which the round ends, in seconds.
        computing: Ids of clients whose uploads arrive in time, including corrupted uploads. Only
            the tasks of these clients are computed.
        failed: Reasons why the tasks of clients fail, keyed by client id.
        late: Ids of clients whose uploads arrive too late.
    """

    tasks: dict[str, ScheduledTask]
    start: float
    end: float
    computing: list[str]
    failed: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    @property
    def num_expected(self) -> int:
        """Number of usable uploads, if training of no client diverges."""
        return sum(self.tasks[client].outcome.kind != "corrupted" for client in self.computing)

    @property
    def protocol_clients(self) -> set[str]:
        """Ids of the clients that participate in the exchanges before training.

        Clients that fail before training do not participate.
        """
        return {client for client, task in self.tasks.items() if task.outcome.kind != "before"}

    @property
    def wasted_uploads(self) -> list[str]:
        """Ids of clients that send an upload without effect because of a fault.

        Such uploads are lost, delayed beyond the end of the round or duplicated. Slow clients are
        not included, because a client that is still training when the round ends sends no upload.
        """
        sent = [
            c
            for c, task in self.tasks.items()
            if task.outcome.kind == "lost" or (task.outcome.kind == "late" and c in self.late)
        ]
        return [*sent, *(c for c in self.computing if self.tasks[c].outcome.kind == "twice")]

    def record(self, failed: Collection[str], late: Collection[str]) -> list[list[object]]:
        """Return a list `[client, start, end, outcome]` for each task, with times in seconds.

        Args:
            failed: Ids of clients that failed or whose uploads were refused.
            late: Ids of clients that had not replied when the round ended.
        """
        rows: list[list[object]] = []
        for client, task in self.tasks.items():
            if client in failed:
                outcome = "failed"
            elif client in late:
                outcome = "late"
            else:
                outcome = "arrived"
            rows.append([client, self.start, min(task.end, self.end), outcome])
        return rows


def immediate_schedule(cohort: Sequence[str], at: float = 0.0) -> Schedule:
    """Create a schedule in which tasks take no time and all uploads arrive.

    Args:
        cohort: Ids of the clients.
        at: Time at which the round begins and ends, in seconds.
    """
    return Schedule(
        {client: ScheduledTask(client, end=at) for client in cohort}, at, at, list(cohort)
    )


def make_schedule(
    cohort: Sequence[str], environment: SimulationEnvironment, sizes: Sizes, at: float, number: int
) -> Schedule:
    """Create the schedule of a simulated round.

    The round ends when enough usable uploads have arrived, when the outcomes of all tasks are
    known, or at the deadline. The server observes a failure when it happens. The server observes
    the loss of an upload at the expected time of arrival or, if there is a deadline, not at all.

    Args:
        cohort: Ids of the clients.
        environment: The conditions of the run.
        sizes: Function that returns the number of bytes sent to a client and sent by the client.
        at: Time at which the round begins, in seconds.
        number: Number of the tasks, which seeds random draws.
    """
    policy = environment.policy
    deadline = math.inf if policy.deadline is None else at + policy.deadline
    tasks = {
        client: _schedule_task(client, environment, sizes(client), at, number, deadline=deadline)
        for client in cohort
    }
    on_time = [
        t
        for t in tasks.values()
        if not t.outcome.is_failure and t.outcome.kind != "corrupted" and t.end <= deadline
    ]
    num_required = min(len(cohort), environment.per_round or len(cohort))
    # If several uploads arrive at the same time, their order is random in each round.
    seed = environment.devices.federation.seed
    on_time.sort(key=lambda task: (task.end, uniform(seed, "turn", task.client, number)))
    last = min(deadline, max((task.end for task in tasks.values()), default=at))
    end = on_time[num_required - 1].end if on_time and len(on_time) >= num_required else last
    accepted = {task.client for task in on_time[:num_required]}
    schedule = Schedule(tasks, at, end, [])
    for client, task in tasks.items():
        if task.outcome.is_failure:
            schedule.failed[client] = task.outcome.description
        elif client in accepted or (task.outcome.kind == "corrupted" and task.end <= end):
            schedule.computing.append(client)
        else:
            schedule.late.append(client)
    return schedule


def _schedule_task(
    client_id: str,
    environment: SimulationEnvironment,
    size: tuple[int, int],
    at: float,
    number: int,
    *,
    deadline: float,
) -> ScheduledTask:
    fault = environment.faults.outcome(client_id, number)
    stages = environment.timing.task_times(client_id, *size, at, number)
    ends = {
        "before": stages.received,
        "during": stages.received + fault.completed_share * (stages.trained - stages.received),
        "after": stages.trained,
        "lost": stages.arrived if deadline == math.inf else math.inf,
    }
    return ScheduledTask(client_id, fault, ends.get(fault.kind, stages.arrived + fault.delay))
