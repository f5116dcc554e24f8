"""Sampling of cohorts, either uniformly, among available clients or by utility (Oort)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hetero_fl.config.simulation import CohortConfig
from hetero_fl.federation.federation import FederationSpec, attempt_key
from hetero_fl.federation.simulation.devices import DAY, uniform
from hetero_fl.federation.simulation.schedule import Schedule, SimulationEnvironment
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import sample_numbers

# Number of clients whose availability is checked: at least MIN_CANDIDATES, and at least
# CANDIDATES_PER_CLIENT times the size of the cohort.
MIN_CANDIDATES = 1000
CANDIDATES_PER_CLIENT = 20
# Seconds of real time for which the server waits for connected clients, and between two checks.
MAX_WAIT = 2 * DAY
POLL_INTERVAL = 1.0
# Simulated time between two checks for online clients, as a fraction of a day, and maximum number
# of checks.
WAIT_SHARE = 1 / 24
MAX_WAITS = 48
# Fraction of new clients in the first round, factor of the fraction per round, and minimum fraction
# (Oort).
EXPLORATION = 0.9
EXPLORATION_DECAY = 0.98
MIN_EXPLORATION = 0.2
# To select n known clients, clients below this fraction of the n-th largest utility are excluded
# (Oort).
UTILITY_CUTOFF = 0.95
# Exponent of the penalty for slow clients (Oort's alpha).
PENALTY = 2.0


class ClientSampler:
    """Sampler of the cohorts of a run.

    Clients are sampled uniformly, uniformly among the available clients, or by utility.

    Sampling by utility follows Oort (Lai et al. 2021, Algorithm 1), except that the utility of a
    client with n examples is n times the mean loss. The paper uses n times the root mean squared
    loss of the examples, which clients do not report. Let T be the deadline or, without a deadline,
    the median duration of tasks. If the last task of a client took t > T seconds, the utility is
    multiplied by `(T / t)**2`. The utility of clients that were not sampled for a long time is
    increased. New clients are sampled uniformly.

    Args:
        environment: Conditions of the run, including the devices and the policy.

    Attributes:
        known: A list `[utility, duration of the last task in seconds, index of the last round]` for
            each client that has been sampled, keyed by client id. Empty unless sampling is by
            utility.
    """

    def __init__(self, environment: SimulationEnvironment) -> None:
        self.environment = environment
        self.federation = environment.devices.federation
        self.known: dict[str, list[float]] = {}
        self._min_clients = min_clients(environment.policy, self.federation)

    def sample(self, round_idx: int, attempt: int, at: float) -> tuple[list[str], float]:
        """Sample the cohort of a round.

        Args:
            round_idx: Index of the round, from 0.
            attempt: Number of earlier attempts at the round.
            at: Current time in seconds.

        Returns:
            Client ids in natural order, and the time at which the clients are available, in
            seconds.

        Raises:
            RunFailedError: If no client is online or, in a deployment, too few clients are
                connected within two days.
        """
        count = self.environment.num_sampled
        policy = self.environment.policy
        if policy.sampling == "uniform":
            return self.federation.sample_cohort(count, round_idx, attempt), at
        online, at = self._available_clients(count, round_idx, attempt, at)
        chosen = (
            self._select_by_utility(online, count, round_idx, attempt)
            if policy.sampling == "oort"
            else online
        )
        if len(chosen) > count:
            positions = sample_numbers(
                len(chosen),
                count,
                self.federation.seed,
                round_idx,
                "available",
                *attempt_key(attempt),
            )
            chosen = [chosen[i] for i in positions]
        return natural_order(chosen), at

    def _available_clients(
        self, count: int, round_idx: int, attempt: int, at: float
    ) -> tuple[list[str], float]:
        """Return the available clients in a large sample, and the time of the sample.

        The server waits until enough clients for a round are available. If enough clients are never
        available in a simulation, the first non-empty set of available clients is returned.
        """
        if self.environment.connected_clients is not None:
            return self._connected_cohort(self.environment.connected_clients, round_idx), at
        ids = self.federation.client_infos.clients.ids
        device = self.environment.devices.device
        num_candidates = min(len(ids), max(MIN_CANDIDATES, CANDIDATES_PER_CLIENT * count))
        first: tuple[list[str], float] | None = None
        for wait in range(MAX_WAITS):
            positions = sample_numbers(
                len(ids),
                num_candidates,
                self.federation.seed,
                round_idx,
                "online",
                wait,
                *attempt_key(attempt),
            )
            devices = {ids[i]: device(ids[i]) for i in positions}
            online = [c for c, candidate in devices.items() if candidate.next_online(at) == at]
            if len(online) >= self._min_clients:
                return online, at
            first = first or ((online, at) if online else None)
            at += WAIT_SHARE * max(candidate.day for candidate in devices.values())
        if first is not None:
            return first
        raise RunFailedError(
            f"round {round_idx + 1}: none of {num_candidates:,} clients was online within two days"
        )

    def _connected_cohort(
        self, connected: Callable[[], Collection[str]], round_idx: int
    ) -> list[str]:
        """Wait until enough clients are connected, and return the ids of the connected clients."""
        deadline = time.monotonic() + MAX_WAIT
        while len(clients := natural_order(connected())) < self._min_clients:
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"round {round_idx + 1}: {len(clients)} of at least {self._min_clients} "
                    f"clients connected within {MAX_WAIT / 3600:g} hours"
                )
            time.sleep(POLL_INTERVAL)
        return clients

    def _select_by_utility(
        self, online: list[str], count: int, round_idx: int, attempt: int
    ) -> list[str]:
        """Return known clients selected by utility, and new clients selected uniformly."""
        seed = self.federation.seed
        repeated = attempt_key(attempt)
        known = [client_id for client_id in online if client_id in self.known]
        new = [client_id for client_id in online if client_id not in self.known]
        exploration = max(MIN_EXPLORATION, EXPLORATION * EXPLORATION_DECAY**round_idx)
        num_new = min(len(new), max(round_half(exploration * count), count - len(known)))
        utility = self.utilities(known, round_idx)
        positions = sample_numbers(len(new), num_new, seed, round_idx, "explore", *repeated)
        chosen = [new[i] for i in positions]
        num_known = min(len(known), count - num_new)
        if num_known:
            cutoff = UTILITY_CUTOFF * sorted(utility.values(), reverse=True)[num_known - 1]
            pool = [client_id for client_id in known if utility[client_id] >= cutoff]
            # Weighted sampling without replacement: the largest u**(1/w) (Efraimidis and Spirakis
            # 2006).
            draws = {
                client_id: math.log(uniform(seed, round_idx, "exploit", client_id, *repeated))
                / max(utility[client_id], 1e-12)
                for client_id in pool
            }
            chosen += sorted(pool, key=draws.__getitem__, reverse=True)[:num_known]
        return chosen

    def utilities(self, client_ids: Sequence[str], round_idx: int) -> dict[str, float]:
        """Return the utilities of clients that were sampled before, keyed by client id.

        The product of loss and number of examples is divided by the maximum product over all known
        clients.

        Args:
            client_ids: Ids of clients in `known`.
            round_idx: Index of the round, from 0.
        """
        if not client_ids:
            return {}
        largest = max(utility for utility, _, _ in self.known.values()) or 1.0
        expected = (
            self.environment.policy.deadline
            or sorted(s for _, s, _ in self.known.values())[len(self.known) // 2]
        )
        utilities = {}
        for client_id in client_ids:
            utility, seconds, last_round = self.known[client_id]
            bonus = math.sqrt(0.1 * math.log(round_idx + 1) / max(1.0, last_round + 1))
            utilities[client_id] = (utility / largest + bonus) * (
                (expected / seconds) ** PENALTY if seconds > expected else 1.0
            )
        return utilities

    def update(self, schedule: Schedule, losses: Mapping[str, float], round_idx: int) -> None:
        """Update the utilities after a round.

        This method has no effect unless sampling is by utility.

        Args:
            schedule: Schedule of the round.
            losses: Training loss, keyed by client id. The utility of clients without a loss does
                not change.
            round_idx: Index of the round, from 0.
        """
        if self.environment.policy.sampling != "oort":
            return
        for client_id, task in schedule.tasks.items():
            before = self.known.get(client_id, [0.0, 0.0, 0.0])
            utility = (
                self.federation.client_infos[client_id].num_rows * max(0.0, losses[client_id])
                if client_id in losses
                else before[0]
            )
            # A task whose end was not observed counts as if it took twice as long as the round.
            end = task.end if task.end < math.inf else 2 * schedule.end - schedule.start
            self.known[client_id] = [
                utility,
                max(before[1], end - schedule.start)
                if client_id in schedule.failed
                else end - schedule.start,
                float(round_idx),
            ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"known": self.known} if self.known else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from the return value of `state_dict`."""
        self.known = state.get("known", {})


def min_clients(policy: CohortConfig, federation: FederationSpec) -> int:
    """Return the minimum number of clients that a round needs."""
    secure_sum = federation.channel.secure_sum
    return max(
        policy.least,
        secure_sum.min_survivors(federation.cohort) if secure_sum is not None else 1,
    )


def round_half(value: float) -> int:
    """Round a number to the nearest integer. Halves are rounded up."""
    return math.floor(value + 0.5)
