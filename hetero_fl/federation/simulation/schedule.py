"""Simulated conditions of a round, and its schedule in simulated time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

from hetero_fl.config.schema import Config
from hetero_fl.config.simulation import CohortConfig, DeviceConfig, FaultsConfig
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.devices import Devices, Timing, local_steps, uniform
from hetero_fl.federation.simulation.faults import NO_FAULT, FaultOutcome, Faults

# The conditions under which a run is held: clients' machines, what goes wrong, and how a round
# deals with it.

LOOKED = 1000  # clients among whom somebody quick enough is looked for


@dataclass(frozen=True)
class SimulationEnvironment:
    """`simulated`: whether rounds take simulated time and arrivals are counted; `connected_clients`: where clients are on their own machines
    and time is real, who is there now."""

    policy: CohortConfig
    devices: Devices
    timing: Timing
    faults: Faults
    per_round: int | None  # clients whose uploads a round is meant to have; none: everybody's
    simulated: bool
    connected_clients: Callable[[], Collection[str]] | None = None

    @classmethod
    def from_config(
        cls,
        federation: FederationSpec,
        config: Config,
        connected_clients: Callable[[], Collection[str]] | None = None,
    ) -> SimulationEnvironment:
        """The conditions that a configuration describes.

        Where clients are on machines of their own, what would be simulated is left out.
        """
        policy = config.cohort
        per_round = config.clients.per_round
        apart = federation.data.is_distributed
        own = any(
            kind.settings.machine != DeviceConfig() for kind in federation.client_infos.profiles
        )
        devices = Devices.from_config(federation, None if apart else config.devices)
        faults = Faults(None if apart else config.faults, devices)
        settings = (config.devices, config.faults, policy.deadline)
        simulated = not apart and (own or any(found is not None for found in settings))
        connected = connected_clients if apart else None
        return cls(policy, devices, Timing(devices), faults, per_round, simulated, connected)

    @property
    def num_sampled(self) -> int:
        """How many clients are invited to a round."""
        return self.policy.num_sampled(self.per_round, len(self.devices.federation.client_infos))

    @property
    def on_too_few(self) -> str:
        """What is done about a round with too few uploads."""
        return str(
            self.policy.too_few
            or ("skip" if self.simulated or self.connected_clients is not None else "fail")
        )

    def notes(self) -> list[str]:
        """Return lines on settings that are possible but perhaps not meant."""
        if self.devices.federation.data.is_distributed:
            return []
        policy = self.policy
        faults = self.faults.config
        machines = list(self.devices.timing_of_profiles())
        by_availability = policy.sampling == "available"
        waits = policy.deadline is None and policy.over_selection == 1
        always_online = all(always for _, _, always in machines)
        takes_time = any(takes for _, takes, _ in machines)
        instant = always_online and not takes_time and faults == FaultsConfig()
        rules = [
            (
                waits and faults.late > 0,
                "faults.late: without cohort.deadline or over_selection a round waits for what is late",
            ),
            (
                by_availability and self.per_round is None,
                "cohort.sampling: without clients.per_round all clients that are online are invited",
            ),
            (
                by_availability and always_online,
                "cohort.sampling: available, but all clients are always online "
                "(`devices.availability`): as uniform",
            ),
            (
                policy.deadline is not None and instant,
                "cohort.deadline: no task takes any time, so none misses it; give `devices` a speed, "
                "up or down",
            ),
            (
                faults.delay != FaultsConfig().delay and not faults.late,
                "faults.delay: is for uploads that are late, but faults.late is 0",
            ),
            (
                policy.attempts != CohortConfig().attempts and policy.too_few != "repeat",
                "cohort.attempts: is for cohort.too_few: repeat",
            ),
        ]
        return [line for applies, line in rules if applies] + self._unreachable_deadline()

    def _unreachable_deadline(self) -> list[str]:
        """A deadline that training alone would miss, whoever is invited."""
        policy = self.policy
        client_infos = self.devices.federation.client_infos
        if policy.deadline is None:
            return []
        least = {
            id: local_steps(client_infos[id]) if policy.partial_work else 1
            for id in islice(client_infos, LOOKED)
        }
        quickest = min(self.timing.training_seconds(id, 0) / steps for id, steps in least.items())
        if quickest <= policy.deadline:
            return []
        what = "a single step" if policy.partial_work else "training"
        return [
            f"cohort.deadline: found {policy.deadline:g} s, but {what} takes the quickest client {quickest:.3g} s"
        ]


def unused_simulation_keys(federation: FederationSpec, config: Config) -> list[str]:
    """What a configuration says for simulations, and a run on machines of its own has no use for; in one line, if anything."""
    found = [name for name in ("devices", "faults") if getattr(config, name) is not None]
    found += (
        ["machine"]
        if any(kind.settings.machine != DeviceConfig() for kind in federation.client_infos.profiles)
        else []
    )
    found += ["cohort.partial_work"] if config.cohort.partial_work else []
    return [f"not used, as nobody's time is simulated: {', '.join(found)}"] if found else []


# The course of one synchronous round in simulated time, known before anything is computed: who is
# on time, who is not.

Sizes = Callable[[str], tuple[int, int]]  # client id -> bytes down, bytes up


@dataclass(frozen=True)
class ScheduledTask:
    """One client's part in a round: what befalls it, its share of the steps, and when the server sees the end of it, in simulated
    seconds (infinite: never)."""

    client: str
    outcome: FaultOutcome = NO_FAULT
    step_share: float = 1.0
    end: float = 0.0


@dataclass
class Schedule:
    """A round's tasks. Those `computing` are computed: whose uploads arrive in time, corrupted ones included. Of the others the
    computing would have no effect: they failed, or came late."""

    tasks: dict[str, ScheduledTask]
    start: float
    end: float
    computing: list[str]
    failed: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    @property
    def num_expected(self) -> int:
        """Uploads that can be used, as long as nobody diverges."""
        return sum(self.tasks[client].outcome.kind != "corrupted" for client in self.computing)

    @property
    def protocol_clients(self) -> set[str]:
        """Who is there until it trains, and answers what a protocol asks before that: whoever does not fail before it."""
        return {client for client, task in self.tasks.items() if task.outcome.kind != "before"}

    @property
    def wasted_uploads(self) -> list[str]:
        """Whose uploads were sent for nothing: lost and delayed ones, and second copies. Who is merely slow gives up when the
        round is closed."""
        sent = [
            c
            for c, task in self.tasks.items()
            if task.outcome.kind == "lost" or (task.outcome.kind == "late" and c in self.late)
        ]
        return [*sent, *(c for c in self.computing if self.tasks[c].outcome.kind == "twice")]

    def record(self, failed: Collection[str]) -> list[list[object]]:
        """Each task as `[client, start, end, what came of it]`, seconds; none goes on beyond the round's end. `failed`: those
        that did, the refused ones among them."""
        rows: list[list[object]] = []
        for client, task in self.tasks.items():
            what = "failed" if client in failed else "late" if client in self.late else "arrived"
            rows.append([client, self.start, min(task.end, self.end), what])
        return rows


def immediate_schedule(cohort: Sequence[str], at: float = 0.0) -> Schedule:
    """Nothing takes time, as far as is known before, and all are on time."""
    return Schedule(
        {client: ScheduledTask(client, end=at) for client in cohort}, at, at, list(cohort)
    )


def make_schedule(
    cohort: Sequence[str], environment: SimulationEnvironment, sizes: Sizes, at: float, number: int
) -> Schedule:
    """What will come of inviting the cohort at `at`; `number`: of these tasks, for their draws.

    The server waits for as many usable uploads as it wants, else until it knows what became of everybody, else until the
    deadline. A failure is seen when it happens; a lost upload when it should have come, or, with a deadline, never.
    """
    policy = environment.policy
    closing = math.inf if policy.deadline is None else at + policy.deadline
    tasks = {
        client: _schedule_task(client, environment, sizes(client), at, number, closing)
        for client in cohort
    }
    good = [
        t
        for t in tasks.values()
        if not t.outcome.is_failure and t.outcome.kind != "corrupted" and t.end <= closing
    ]
    wanted = min(len(cohort), environment.per_round or len(cohort))
    # of equal machines other ones are first from round to round
    seed = environment.devices.federation.seed
    good.sort(key=lambda task: (task.end, uniform(seed, "turn", task.client, number)))
    waited = min(closing, max((task.end for task in tasks.values()), default=at))
    end = good[wanted - 1].end if good and len(good) >= wanted else waited
    taken = {task.client for task in good[:wanted]}
    made = Schedule(tasks, at, end, [])
    for client, task in tasks.items():
        if task.outcome.is_failure:
            made.failed[client] = task.outcome.description
        elif client in taken or (task.outcome.kind == "corrupted" and task.end <= end):
            made.computing.append(client)
        else:
            made.late.append(client)
    return made


def _schedule_task(
    client_id: str,
    environment: SimulationEnvironment,
    size: tuple[int, int],
    at: float,
    number: int,
    closing: float,
) -> ScheduledTask:
    timing = environment.timing
    fate = environment.faults.outcome(client_id, number)
    work = 1.0
    if environment.policy.partial_work:
        work = timing.share_in_time(client_id, *size, at, number, closing)
        if int(work * local_steps(environment.devices.federation.client_infos[client_id])) < 1:
            return ScheduledTask(client_id, fate, 0.0, math.inf)  # no time for a single step
    stages = timing.task_times(client_id, *size, at, number, work)
    # round-off makes nobody late
    arrived = min(stages.arrived, closing) if work < 1 else stages.arrived
    ends = {
        "before": stages.received,
        "during": stages.received + fate.completed_share * (stages.trained - stages.received),
        "after": stages.trained,
        "lost": arrived if closing == math.inf else math.inf,
    }
    return ScheduledTask(client_id, fate, work, ends.get(fate.kind, arrived + fate.delay))
