"""Sampling of cohorts, either uniformly or among available clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from hetero_fl.config.simulation import CohortConfig
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.devices import DAY
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
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


class ClientSampler:
    """Sampler of the cohorts of a run.

    Clients are sampled uniformly, or uniformly among the available clients.

    Args:
        environment: Conditions of the run, including the devices and the policy.
    """

    def __init__(self, environment: SimulationEnvironment) -> None:
        self.environment = environment
        self.federation = environment.devices.federation
        self._min_clients = min_clients(environment.policy, self.federation)

    def sample(self, round_idx: int, at: float) -> tuple[list[str], float]:
        """Sample the cohort of a round.

        Args:
            round_idx: Index of the round, from 0.
            at: Current time in seconds.

        Returns:
            Client ids in natural order, and the time at which the clients are available, in
            seconds.

        Raises:
            RunFailedError: If no client is online or, in a deployment, too few clients are
                connected within two days.
        """
        count = self.environment.num_sampled
        if self.environment.policy.sampling == "uniform":
            return self.federation.sample_cohort(count, round_idx), at
        chosen, at = self._available_clients(count, round_idx, at)
        if len(chosen) > count:
            key = (self.federation.seed, round_idx, "available")
            chosen = [chosen[i] for i in sample_numbers(len(chosen), count, *key)]
        return natural_order(chosen), at

    def _available_clients(self, count: int, round_idx: int, at: float) -> tuple[list[str], float]:
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
            key = (self.federation.seed, round_idx, "online", wait)
            positions = sample_numbers(len(ids), num_candidates, *key)
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


def min_clients(policy: CohortConfig, federation: FederationSpec) -> int:
    """Return the minimum number of clients that a round needs."""
    secure_sum = federation.channel.secure_sum
    return max(
        policy.least,
        secure_sum.min_survivors(federation.cohort) if secure_sum is not None else 1,
    )
