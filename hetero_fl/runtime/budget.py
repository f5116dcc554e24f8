"""What a run spends of its clients' privacy, known before it begins: who takes part is drawn by key, what a plan reads is seen in
a dry run. What really happens spends as much, or less where a client drops out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.privacy.accounting import Charge, History, added, solve, worst
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.errors import UserError
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.invitation import draw_cohort
from hetero_fl.runtime.price import DryRun


@dataclass(frozen=True)
class Budget:
    """Of each round, the histories that clients have after it: how many different ones there are, not whose."""

    privacy: PrivacyConfig
    after: tuple[frozenset[History], ...]

    @classmethod
    def of(
        cls, privacy: PrivacyConfig, algorithm: Algorithm, federation: Federation, rounds: int, per_round: int | None
    ) -> Budget:
        """The budget of so many rounds. Raises UserError for a method that reads private rows otherwise than noised."""
        run = DryRun(algorithm, federation)
        spent: dict[str, History] = {}
        once: set[tuple[str, str]] = set()
        held: Counter[History] = Counter()
        after = []
        everyone = list(federation.cards.clients.ids) if privacy.poisson_cohorts else []
        rate = min(1.0, (per_round or len(everyone)) / max(1, len(everyone)))
        for round in range(rounds):
            cohort = draw_cohort(federation, per_round, round)
            charged = {id: run.exchange(id, round).charges for id in cohort}
            if everyone:  # each is charged for the chance that it took part
                charged = dict.fromkeys(everyone, (Charge(rate),))
            for id, charges in charged.items():
                due = [c for c in charges if (id, c.once) not in once]
                once.update((id, c.once) for c in charges if c.once)
                before = spent.get(id, ())
                spent[id] = added(before, due)
                held[before] -= 1
                held[spent[id]] += 1
            after.append(frozenset(history for history, count in held.items() if count > 0))
            if algorithm.uploads:
                run.aggregate(cohort, round)
        return cls(privacy, tuple(after))

    def solved(self) -> PrivacyConfig:
        """The section with its noise multiplier, solved for where only ε was given. Raises UserError if the first round costs
        more than there is."""
        privacy, target = self.privacy, self.privacy.target_epsilon
        if privacy.noise_multiplier is None:
            assert target is not None  # one of them is given
            z = solve(self.after[-1], target, privacy.delta, privacy.accountant)
            privacy = privacy.model_copy(update={"noise_multiplier": z})
        elif target is not None and (first := self.epsilon(1)) > target:
            raise UserError(
                f"privacy.noise_multiplier: found {privacy.z:g}, with which the first round costs ε = {first:.3g}, more than "
                f"privacy.target_epsilon {target:g}; leave it out, and it follows from the target"
            )
        return privacy

    def epsilon(self, rounds: int) -> float:
        """The largest ε of any client after so many rounds."""
        if rounds == 0:
            return 0.0
        privacy = self.privacy
        return worst(self.after[rounds - 1], privacy.z, privacy.delta, privacy.accountant)

    def told(self) -> str:
        """A line on what is protected, and how far."""
        privacy, rounds = self.privacy, self.affordable()
        of = {"record": "a training row", "client": "a client", "local": "a client, noised at home"}[privacy.unit]
        return (
            f"privacy of {of}: noise multiplier {privacy.z:g}, ε {self.epsilon(rounds):.3g} at δ {privacy.delta:g} after "
            f"{rounds} rounds"
        )

    def affordable(self) -> int:
        """How many rounds fit into the target; all of them where there is none."""
        target, low, high = self.privacy.target_epsilon, 0, len(self.after)
        if target is None or self.epsilon(high) <= target:
            return high
        while high - low > 1:  # ε never falls
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= target else (low, middle)
        return low
