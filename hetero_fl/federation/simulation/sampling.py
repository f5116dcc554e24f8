"""Sample cohorts among clients that are not always available, or by their utility (Oort)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hetero_fl.federation.federation import attempt_key
from hetero_fl.federation.simulation.devices import DAY, uniform
from hetero_fl.federation.simulation.schedule import Schedule, SimulationEnvironment
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import sample_numbers

# clients, or so many times those who are wanted: among them somebody online is looked for
CANDIDATES = (1000, 20)
# real seconds: how long the server waits if nobody is there, and how often it looks
LONGEST = 2 * DAY
LOOK = 1.0
# of a day: how long the server waits if nobody is online, and how often
WAIT = 1 / 24
PATIENCE = 48
# share of newcomers in the first round, its factor by round, its least (Oort)
EXPLORE = 0.9
DECAY = 0.98
LEAST = 0.2
CUT = 0.95  # of the last chosen utility: who has less is not drawn (Oort)
PENALTY = 2.0  # exponent for those who are too slow (Oort's alpha)


class ClientSampler:
    """Draws the cohorts of a run. `Oort` (Lai et al., OSDI 2021): a client's utility is n·loss, where the paper takes n times the
    root of the mean squared loss of its examples, which it does not tell; clients slower than the deadline (none: the median of
    those seen) count (T/t)² of it; who was not seen for long gains the paper's bonus; newcomers are drawn evenly.
    """

    def __init__(self, environment: SimulationEnvironment) -> None:
        self.environment = environment
        self.federation = environment.devices.federation
        # id -> [utility, seconds, round] of those invited so far (Oort)
        self.known: dict[str, list[float]] = {}

    def sample(self, round_idx: int, attempt: int, at: float) -> tuple[list[str], float]:
        """Who is invited, in id order, and when: later than `at` if nobody is online before.

        Raises RunFailedError if nobody is for two days.
        """
        count = self.environment.num_sampled
        policy = self.environment.policy
        if policy.sampling == "uniform":
            return self.federation.sample_cohort(count, round_idx, attempt), at
        online, at = self._online(count, round_idx, attempt, at)
        chosen = (
            self._select_by_utility(online, count, round_idx, attempt)
            if policy.sampling == "oort"
            else online
        )
        if len(chosen) > count:
            drawn = sample_numbers(
                len(chosen),
                count,
                self.federation.seed,
                round_idx,
                "available",
                *attempt_key(attempt),
            )
            chosen = [chosen[i] for i in drawn]
        return natural_order(chosen), at

    def _online(
        self, count: int, round_idx: int, attempt: int, at: float
    ) -> tuple[list[str], float]:
        """Clients who are online, of a sample large enough; and when they are: as many as a round needs,
        if they ever are. Where time is real: who is there, now."""
        if self.environment.connected_clients is not None:
            return self._connected_cohort(self.environment.connected_clients, round_idx), at
        ids = self.federation.client_infos.clients.ids
        device = self.environment.devices.device
        looked = min(len(ids), max(CANDIDATES[0], CANDIDATES[1] * count))
        first: tuple[list[str], float] | None = None
        for wait in range(PATIENCE):
            drawn = sample_numbers(
                len(ids),
                looked,
                self.federation.seed,
                round_idx,
                "online",
                wait,
                *attempt_key(attempt),
            )
            machines = {ids[i]: device(ids[i]) for i in drawn}
            here = [id for id, machine in machines.items() if machine.next_online(at) == at]
            if len(here) >= self._min_clients:
                return here, at
            first = first or ((here, at) if here else None)
            at += WAIT * max(machine.day for machine in machines.values())
        if first is not None:
            return first
        raise RunFailedError(
            f"round {round_idx + 1}: none of {looked:,} clients is online at any time of two days"
        )

    @property
    def _min_clients(self) -> int:
        """Clients without whom nothing can come of a round."""
        secret = self.federation.channel.secure_sum
        return max(
            self.environment.policy.least,
            secret.min_survivors(self.federation.cohort) if secret is not None else 1,
        )

    def _connected_cohort(
        self, connected: Callable[[], Collection[str]], round_idx: int
    ) -> list[str]:
        """Who is there, once enough are that something can come of a round."""
        least = self._min_clients
        until = time.monotonic() + LONGEST
        while len(there := natural_order(connected())) < least:
            if time.monotonic() > until:
                raise RunFailedError(
                    f"round {round_idx + 1}: {len(there)} of {least} clients were there for {LONGEST / 3600:g} hours"
                )
            time.sleep(LOOK)
        return there

    def _select_by_utility(
        self, online: list[str], count: int, round_idx: int, attempt: int
    ) -> list[str]:
        """Oort's choice among those online: known ones by utility, and some newcomers."""
        seed = self.federation.seed
        again = attempt_key(attempt)
        known = [id for id in online if id in self.known]
        fresh = [id for id in online if id not in self.known]
        explore = max(LEAST, EXPLORE * DECAY**round_idx)
        new = min(len(fresh), max(round_half(explore * count), count - len(known)))
        utility = self.utilities(known, round_idx)
        chosen = [
            fresh[i] for i in sample_numbers(len(fresh), new, seed, round_idx, "explore", *again)
        ]
        wanted = min(len(known), count - new)
        if wanted:
            cut = CUT * sorted(utility.values(), reverse=True)[wanted - 1]
            pool = [id for id in known if utility[id] >= cut]
            # without replacement, by weight: the largest of u^(1/w) (Efraimidis and Spirakis 2006)
            draw = {
                id: math.log(uniform(seed, round_idx, "exploit", id, *again))
                / max(utility[id], 1e-12)
                for id in pool
            }
            chosen += sorted(pool, key=draw.__getitem__, reverse=True)[:wanted]
        return chosen

    def utilities(self, ids: Sequence[str], round_idx: int) -> dict[str, float]:
        """What is to be expected of clients that were invited before; the most that anybody told counts one."""
        if not ids:
            return {}
        most = max(worth for worth, _, _ in self.known.values()) or 1.0
        slow = (
            self.environment.policy.deadline
            or sorted(s for _, s, _ in self.known.values())[len(self.known) // 2]
        )
        found = {}
        for id in ids:
            worth, seconds, last = self.known[id]
            bonus = math.sqrt(0.1 * math.log(round_idx + 1) / max(1.0, last + 1))
            found[id] = (worth / most + bonus) * (
                (slow / seconds) ** PENALTY if seconds > slow else 1.0
            )
        return found

    def update(self, schedule: Schedule, losses: Mapping[str, float], round_idx: int) -> None:
        """What a round told of those who were invited; kept where it decides whom to invite."""
        if self.environment.policy.sampling != "oort":
            return
        for id, task in schedule.tasks.items():
            before = self.known.get(id, [0.0, 0.0, 0.0])
            worth = (
                self.federation.client_infos[id].num_rows * max(0.0, losses[id])
                if id in losses
                else before[0]
            )
            # never seen: too slow
            ends = task.end if task.end < math.inf else 2 * schedule.end - schedule.start
            self.known[id] = [
                worth,
                max(before[1], ends - schedule.start)
                if id in schedule.failed
                else ends - schedule.start,
                float(round_idx),
            ]

    def state_dict(self) -> dict[str, Any]:
        """What it knows, for a checkpoint."""
        return {"known": self.known} if self.known else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.known = state.get("known", {})


def round_half(value: float) -> int:
    """The nearest whole number, halves up."""
    return math.floor(value + 0.5)
