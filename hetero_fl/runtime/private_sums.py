"""The server's side of privacy of clients: the bounds that a round's updates have, the noise on its sums, the next bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from hetero_fl.aggregation.noised import SumNoise
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.channel.privacy.votes import elected
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.errors import UserError
from hetero_fl.payload import Payload
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.protection import WITHIN, Protection
from hetero_fl.state import Card


class PrivateSums:
    """Of one run. `factors`: on each item's `clip`, one unless they adapt; with the round's number all its state."""

    def __init__(self, expectations: Expectations, per_round: int | None) -> None:
        self.expectations, population = expectations, len(expectations.federation.cards)
        self.cohort = min(per_round or population, population)  # expected
        self.share = self.cohort / population
        self.protection: Protection = expectations.protection
        self.factors: dict[str, float] = dict.fromkeys(self.protection.items, 1.0)

    @property
    def privacy(self) -> PrivacyConfig | None:
        """The section, if it asks for noise at the server."""
        privacy = self.protection.privacy
        return privacy if privacy is not None and privacy.unit == "client" else None

    def announce(self, broadcast: Payload) -> Payload:
        """A broadcast with the round's bounds, where they adapt."""
        if self.privacy is not None and self.privacy.adaptive_clip is not None:
            broadcast.report = {**broadcast.report, **self.protection.told(self.factors)}
        return broadcast

    def noise(self, asked: Callable[[Card], Payload], round: int) -> SumNoise | None:
        """The noise of a round's sums. `asked`: what a client was sent."""
        privacy, federation = self.privacy, self.expectations.federation
        if privacy is None:
            return None
        normal = federation.noise.normal

        def draw(like: Tensor, deviation: float, *parts: str) -> Tensor:
            return normal(like, deviation, "server", round, *parts)

        def deviation(name: str) -> float:
            if privacy.distributed:
                return 0.0  # it is in what came
            if name == WITHIN:
                return self.sigma(privacy) * math.sqrt(len(self.factors))  # m bits, each as if it were one of m
            return self.protection.deviation(name, self.factors[name], self.z(privacy))

        specs = self.protection.specs

        def elect(name: str, votes: Tensor) -> Tensor:
            return elected(votes, specs[name].says) if privacy.votes and specs[name].says else votes

        noise = SumNoise(deviation, draw, lambda card: federation.cards.kind(card.id).first, elect)
        for kind in federation.cards.kinds:
            card = federation.cards[kind.first]
            got = asked(card)
            for name, like in self.expectations.of(card, got, round).items():
                before = got.item(name) if name in got else None
                group = "" if specs[name].across else card.arch.id
                noise.expect(name, like, before, kind.count * self.share, card, group, federation.common)
        return noise

    def check(self) -> None:
        """Raises UserError if counting the updates within bounds costs all there is."""
        privacy = self.privacy
        if privacy is None or privacy.adaptive_clip is None:
            return
        if (sigma := self.sigma(privacy)) * 2 <= privacy.z:
            raise UserError(
                f"privacy.adaptive_clip.noise: found {sigma:g}, with which counting alone spends more than "
                f"privacy.noise_multiplier {privacy.z:g} allows; take more than {privacy.z / 2:.3g}"
            )

    def sigma(self, privacy: PrivacyConfig) -> float:
        """σ_b of the paper: what a count of bits would be noised with if there were one."""
        assert privacy.adaptive_clip is not None
        return privacy.adaptive_clip.noise or self.cohort / 20

    def z(self, privacy: PrivacyConfig) -> float:
        """The multiplier that is left for the updates: z_Δ = (z⁻² − (2σ_b)⁻²)^(−½) (Andrew et al. 2021, theorem 1)."""
        if privacy.adaptive_clip is None:
            return privacy.z
        return float((privacy.z**-2 - (2 * self.sigma(privacy)) ** -2) ** -0.5)

    def adapt(self, uploads: Uploads) -> None:
        """Each bound times exp(−η·(share of updates within it − γ)), the share noised (ibid., Algorithm 1)."""
        privacy = self.privacy
        if privacy is None or privacy.adaptive_clip is None:
            return
        wanted, total = privacy.adaptive_clip, uploads.total(WITHIN)
        shares = (total[0] / total[1] + 0.5).tolist()  # what is sent is the bit less one half
        for name, share in zip(sorted(self.factors), shares, strict=True):
            self.factors[name] *= math.exp(-wanted.lr * (share - wanted.quantile))

    def tree(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self.factors)

    def restore(self, tree: Mapping[str, float]) -> None:
        """The reverse."""
        self.factors = dict(tree)
