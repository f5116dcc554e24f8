"""The privacy budget of a run: what its rounds spend, known before they begin.

Cohorts are drawn by key, and a dry run of one round of each phase shows what a plan reads, so no
charge depends on training. A run spends as much, or less if a client drops out. The formulas are
in `hetero_fl.privacy.accounting`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

from hetero_fl.algorithms import Algorithm
from hetero_fl.config.privacy import PrivacyConfig
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

PROTECTED = {
    "record": "a training row",
    "client": "a client",
    "local": "a client, noised before its upload leaves",
}


@dataclass(frozen=True)
class PrivacyBudget:
    """The privacy that a run spends, round by round.

    Attributes:
        privacy: The configuration section.
        histories: After each round, the different histories that clients have by then.
    """

    privacy: PrivacyConfig
    histories: tuple[frozenset[History], ...]

    @classmethod
    def for_run(
        cls,
        privacy: PrivacyConfig,
        algorithm: Algorithm,
        federation: FederationSpec,
        rounds: int,
        per_round: int | None,
    ) -> PrivacyBudget:
        """Return the budget of a run.

        Raises:
            UserError: If the method reads private rows without noise.
        """
        run = DryRun(algorithm, federation)
        spent: dict[str, History] = {}
        charged_once: set[tuple[str, str]] = set()
        num_clients: Counter[History] = Counter()  # by history
        histories = []
        everyone = list(federation.client_infos.clients.ids) if privacy.poisson_cohorts else []
        rate = min(1.0, (per_round or len(everyone)) / max(1, len(everyone)))
        for round_idx in range(rounds):
            cohort = federation.sample_cohort(per_round, round_idx)
            charged = {c: run.exchange_cost(c, round_idx).charges for c in cohort}
            if everyone:  # each is charged for the chance that it took part
                charged = dict.fromkeys(everyone, (PrivacyCharge(rate),))
            for client_id, charges in charged.items():
                due = [c for c in charges if (client_id, c.once) not in charged_once]
                charged_once.update((client_id, c.once) for c in charges if c.once)
                before = spent.get(client_id, ())
                spent[client_id] = add_charges(before, due)
                num_clients[before] -= 1
                num_clients[spent[client_id]] += 1
            histories.append(frozenset(h for h, count in num_clients.items() if count > 0))
            if algorithm.uploads:
                run.aggregate(cohort, round_idx)
        return cls(privacy, tuple(histories))

    def solved_privacy(self) -> PrivacyConfig:
        """Return the section with its noise multiplier, which is solved for if only ε was given.

        Raises:
            UserError: If the first round costs more than the target.
        """
        target = self.privacy.target_epsilon
        privacy = self.privacy
        if privacy.noise_multiplier is None:
            assert target is not None  # one of them is given
            z = solve_noise_multiplier(
                self.histories[-1], target, privacy.delta, privacy.accountant
            )
            privacy = privacy.model_copy(update={"noise_multiplier": z})
        elif target is not None and (first := self.epsilon(1)) > target:
            raise UserError(
                f"privacy.noise_multiplier: found {privacy.known_noise_multiplier:g}, with which the "
                f"first round costs ε = {first:.3g}, more than privacy.target_epsilon {target:g}; "
                "leave it out, and it follows from the target"
            )
        return privacy

    def epsilon(self, rounds: int) -> float:
        """Return the largest ε of any client after so many rounds."""
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
        """Return a line on what is protected, and how far."""
        privacy = self.privacy
        rounds = self.affordable_rounds()
        return (
            f"privacy of {PROTECTED[privacy.unit]}: "
            f"noise multiplier {privacy.known_noise_multiplier:g}, "
            f"ε {self.epsilon(rounds):.3g} at δ {privacy.delta:g} after {rounds} rounds"
        )

    def affordable_rounds(self) -> int:
        """Return how many rounds fit into the target: all if there is none."""
        target = self.privacy.target_epsilon
        planned = len(self.histories)
        if target is None or self.epsilon(planned) <= target:
            return planned
        return bisect_right(range(planned), target, key=self.epsilon) - 1  # ε never falls
