"""Privacy budget of a run, which is computed before training.

The cohorts of all rounds are known in advance because client sampling depends only on the seed.
Dry runs show which private rows the clients read. If clients drop out, the actual privacy cost is
lower. The formulas are in `hetero_fl.privacy.accounting`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.config.protection import PrivacyConfig
from hetero_fl.federation.cost import DryRun
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.privacy.accounting import (
    History,
    PrivacyCharge,
    add_charges,
    solve_noise_multiplier,
    worst_epsilon,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import pluralize

PROTECTED = {
    "record": "a training row",
    "client": "a client",
    "local": "a client, with noise added before upload",
}


@dataclass(frozen=True)
class PrivacyBudget:
    """Privacy cost of a run after each round.

    Args:
        privacy: Section `privacy` of the configuration.
        histories: For each round, the distinct histories of privacy charges of all clients, up to
            and including this round.
    """

    privacy: PrivacyConfig
    histories: tuple[frozenset[History], ...]

    @classmethod
    def for_run(
        cls,
        privacy: PrivacyConfig,
        algorithm: Algorithm,
        federation: FederationSpec,
        *,
        rounds: int,
        per_round: int | None,
    ) -> PrivacyBudget:
        """Compute the privacy charges of each round with dry runs, and the noise multiplier.

        Args:
            privacy: Section `privacy` of the configuration.
            algorithm: The algorithm.
            federation: The federation.
            rounds: Number of rounds.
            per_round: Number of clients that are sampled in each round. If None, all clients take
                part.

        Raises:
            UserError: If the method reads private rows without noise, the noise multiplier is set
                and the first round exceeds the target ε, or opacus is required and not installed.
        """
        run = DryRun(algorithm, federation)
        spent: dict[str, History] = {}
        charged_once: set[tuple[str, str]] = set()
        num_clients: Counter[History] = Counter()
        histories = []
        poisson_clients = (
            list(federation.client_infos.clients.ids) if privacy.poisson_cohorts else []
        )
        rate = min(1.0, (per_round or len(poisson_clients)) / max(1, len(poisson_clients)))
        for round_idx in range(rounds):
            cohort = federation.sample_cohort(per_round, round_idx)
            charged = {c: run.client_cost(c, round_idx).charges for c in cohort}
            # With Poisson sampling, each client is charged in every round, at the sampling rate.
            if poisson_clients:
                charged = dict.fromkeys(poisson_clients, (PrivacyCharge(rate),))
            for client_id, charges in charged.items():
                due = [c for c in charges if (client_id, c.once) not in charged_once]
                charged_once.update((client_id, c.once) for c in charges if c.once)
                before = spent.get(client_id, ())
                spent[client_id] = add_charges(before, due)
                num_clients[before] -= 1
                num_clients[spent[client_id]] += 1
            histories.append(frozenset(h for h, count in num_clients.items() if count > 0))
            if algorithm.uploads and cohort:
                run.aggregate(cohort, round_idx)
        return cls(privacy, tuple(histories))._solved()

    def _solved(self) -> PrivacyBudget:
        """Return the budget with a noise multiplier.

        If the noise multiplier is not set, the smallest multiplier that meets the target ε in all
        rounds is computed.

        Raises:
            UserError: If the noise multiplier is set and the first round exceeds the target ε, or
                if opacus is required and not installed.
        """
        privacy = self.privacy
        target = privacy.target_epsilon
        if privacy.noise_multiplier is None:
            # The schema requires a noise multiplier or a target.
            assert target is not None
            noise_multiplier = solve_noise_multiplier(
                self.histories[-1], target, privacy.delta, privacy.accountant
            )
            solved = privacy.model_copy(update={"noise_multiplier": noise_multiplier})
            return replace(self, privacy=solved)
        if target is not None and (first := self.epsilon(1)) > target:
            raise UserError(
                f"privacy.noise_multiplier: {privacy.noise_multiplier:g} is too small: the "
                f"first round costs ε = {first:.3g}, more than privacy.target_epsilon={target:g}; "
                "remove it to derive it from the target"
            )
        return self

    def spent(self, rounds: int) -> dict[str, Any]:
        """Return the privacy cost of the first `rounds` rounds.

        Returns:
            The entry `privacy` of a record in `metrics.jsonl`, with the keys `epsilon`, `delta` and
            `unit`.
        """
        return {
            "epsilon": self.epsilon(rounds),
            "delta": self.privacy.delta,
            "unit": self.privacy.unit,
        }

    def epsilon(self, rounds: int) -> float:
        """Return the largest ε over all clients after `rounds` rounds."""
        if rounds == 0:
            return 0.0
        privacy = self.privacy
        return worst_epsilon(
            self.histories[rounds - 1],
            privacy.known_noise_multiplier,
            privacy.delta,
            privacy.accountant,
        )

    def description(self) -> str:
        """Describe the privacy unit, the noise multiplier and the total ε in one line."""
        privacy = self.privacy
        rounds = self.affordable_rounds()
        return (
            f"privacy of {PROTECTED[privacy.unit]}: "
            f"noise multiplier {privacy.known_noise_multiplier:g}, "
            f"ε {self.epsilon(rounds):.3g} at δ {privacy.delta:g} "
            f"after {pluralize(rounds, 'round')}"
        )

    def affordable_rounds(self) -> int:
        """Return the largest number of rounds that does not exceed the target ε.

        Without a target, the planned number of rounds is returned.
        """
        target = self.privacy.target_epsilon
        planned = len(self.histories)
        if target is None or self.epsilon(planned) <= target:
            return planned
        # ε is non-decreasing in the number of rounds.
        return bisect_right(range(planned), target, key=self.epsilon) - 1
