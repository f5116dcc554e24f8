"""The course of one synchronous round in simulated time, known before anything is computed: who is on time, who is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from hetero_fl.runtime.conditions import Conditions
from hetero_fl.runtime.devices import uniform
from hetero_fl.runtime.faults import FINE, Fate
from hetero_fl.runtime.timing import local_steps

Sizes = Callable[[str], tuple[int, int]]  # client id -> bytes down, bytes up


@dataclass(frozen=True)
class Task:
    """One client's part in a round: what befalls it, its share of the steps, and when the server sees the end of it, in simulated
    seconds (infinite: never)."""

    client: str
    fate: Fate = FINE
    work: float = 1.0
    ends: float = 0.0


@dataclass
class Schedule:
    """A round's tasks. Those `asked` are computed: whose uploads arrive in time, corrupted ones included. Of the others the
    computing would have no effect: they failed, or came late."""

    tasks: dict[str, Task]
    start: float
    end: float
    asked: list[str]
    failed: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)

    @property
    def expected(self) -> int:
        """Uploads that can be used, as long as nobody diverges."""
        return sum(self.tasks[client].fate.what != "corrupted" for client in self.asked)

    @property
    def there(self) -> set[str]:
        """Who is there until it trains, and answers what a protocol asks before that: whoever does not fail before it."""
        return {client for client, task in self.tasks.items() if task.fate.what != "before"}

    @property
    def in_vain(self) -> list[str]:
        """Whose uploads were sent for nothing: lost and delayed ones, and second copies. Who is merely slow gives up when the
        round is closed."""
        sent = [
            c
            for c, task in self.tasks.items()
            if task.fate.what == "lost" or (task.fate.what == "late" and c in self.late)
        ]
        return [*sent, *(c for c in self.asked if self.tasks[c].fate.what == "twice")]

    def record(self, failed: Collection[str]) -> list[list[object]]:
        """Each task as `[client, start, end, what came of it]`, seconds; none goes on beyond the round's end. `failed`: those
        that did, the refused ones among them."""
        rows: list[list[object]] = []
        for client, task in self.tasks.items():
            what = "failed" if client in failed else "late" if client in self.late else "arrived"
            rows.append([client, self.start, min(task.ends, self.end), what])
        return rows


def ideal(cohort: Sequence[str], at: float = 0.0) -> Schedule:
    """Nothing takes time, as far as is known before, and all are on time."""
    return Schedule({client: Task(client, ends=at) for client in cohort}, at, at, list(cohort))


def schedule(cohort: Sequence[str], conditions: Conditions, sizes: Sizes, at: float, number: int) -> Schedule:
    """What will come of inviting the cohort at `at`; `number`: of these tasks, for their draws.

    The server waits for as many usable uploads as it wants, else until it knows what became of everybody, else until the
    deadline. A failure is seen when it happens; a lost upload when it should have come, or, with a deadline, never.
    """
    policy = conditions.policy
    closing = math.inf if policy.deadline is None else at + policy.deadline
    tasks = {client: _task(client, conditions, sizes(client), at, number, closing) for client in cohort}
    good = [t for t in tasks.values() if not t.fate.fails and t.fate.what != "corrupted" and t.ends <= closing]
    wanted = min(len(cohort), conditions.per_round or len(cohort))
    seed = conditions.devices.federation.seed  # of equal machines other ones are first from round to round
    good.sort(key=lambda task: (task.ends, uniform(seed, "turn", task.client, number)))
    waited = min(closing, max((task.ends for task in tasks.values()), default=at))
    end = good[wanted - 1].ends if good and len(good) >= wanted else waited
    taken = {task.client for task in good[:wanted]}
    made = Schedule(tasks, at, end, [])
    for client, task in tasks.items():
        if task.fate.fails:
            made.failed[client] = task.fate.why
        elif client in taken or (task.fate.what == "corrupted" and task.ends <= end):
            made.asked.append(client)
        else:
            made.late.append(client)
    return made


def _task(id: str, conditions: Conditions, size: tuple[int, int], at: float, number: int, closing: float) -> Task:
    timing, fate, work = conditions.timing, conditions.faults.fate(id, number), 1.0
    if conditions.policy.partial_work:
        work = timing.share_in_time(id, *size, at, number, closing)
        if int(work * local_steps(conditions.devices.federation.cards[id])) < 1:
            return Task(id, fate, 0.0, math.inf)  # no time for a single step
    stages = timing.stages(id, *size, at, number, work)
    arrived = min(stages.arrived, closing) if work < 1 else stages.arrived  # round-off makes nobody late
    ends = {
        "before": stages.received,
        "during": stages.received + fate.share * (stages.trained - stages.received),
        "after": stages.trained,
        "lost": arrived if closing == math.inf else math.inf,
    }
    return Task(id, fate, work, ends.get(fate.what, arrived + fate.by))
