"""Differential privacy of clients at the server: noise on sums, and adaptive clipping bounds.

With `privacy.unit` "client" the sums and means that a method asks of `Uploads` are noised here, once,
where they are asked for. What a run spends is known before it begins
(`hetero_fl.experiment.privacy_budget`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.core.model_spec import Owner, Tensors, owners_of
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload
from hetero_fl.privacy.client_side import WITHIN, ClientPrivacy, PrivateFederation
from hetero_fl.privacy.mechanisms import reference_tensors, teacher_from_votes
from hetero_fl.utils.errors import UserError

# Means of which no single client can be read: noise once on the sum of bounded uploads, over a
# fixed denominator.
#
# With clipped updates Δ_k of weight one, μ the plain mean of what arrived, Σw how many that were
# and ref their mean reference,
#
#     ref + (μ − ref)·Σw / expected + N(0, deviation²) / expected  =  ref + (ΣΔ_k + N(0, deviation²)) / expected
#
# (McMahan et al. 2018, Algorithm 1, the estimator with a fixed denominator): a function of the
# mean, the weight and the references, so that it is the same after a plain and after a secure sum.
# How many came decides nothing but the sum. Clients that own a tensor in common may have received
# different ones (models of several architectures begin so): each group's moves from its own by the
# same noised update, for of what a client sends only the update is bounded.

Normal = Callable[..., Tensor]  # (what it is put on, standard deviation, *what for)


@dataclass
class SharedTensor:
    """One tensor that several clients may send: where the updates of each kind of them start, and how many are expected."""

    starts: dict[str, Tensor] = field(default_factory=dict)
    expected: float = 0.0

    @property
    def example(self) -> Tensor:
        """A tensor of its form."""
        return next(iter(self.starts.values()))

    def mean_start(self, senders_by_kind: Mapping[str, int]) -> Tensor:
        """The mean of where the updates of those who sent it started. `senders_by_kind`: how many of each kind sent the item."""
        if all(
            start is self.example or torch.equal(start, self.example)
            for start in self.starts.values()
        ):
            return self.example
        count = sum(senders_by_kind.get(kind, 0) for kind in self.starts)
        return torch.stack(
            [start * (senders_by_kind.get(kind, 0) / count) for kind, start in self.starts.items()]
        ).sum(0)


@dataclass
class SumNoise:
    """The noise of one round, and what its sums are divided by. The same question has the same answer.

    `deviation(item)`: of the noise on every number of the item's sum; `normal`: keyed draws of it; `kind(client_info)`: of a client, by
    name; `postprocess(item, mean)`: what a noised mean becomes.
    """

    deviation: Callable[[str], float]
    normal: Normal
    kind: Callable[[ClientInfo], str]
    postprocess: Callable[[str, Tensor], Tensor] = lambda name, mean: mean
    _singles: dict[str, SharedTensor] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)  # of class sums: their shape
    _senders: dict[str, dict[str, ClientInfo]] = field(default_factory=dict)  # by item and kind
    _owned: dict[str, dict[Owner, SharedTensor]] = field(default_factory=dict)
    _groups: dict[str, dict[str, dict[str, tuple[Owner, str]]]] = field(default_factory=dict)

    def expect(
        self,
        name: str,
        like: Item,
        received: Item | None,
        count: float,
        client_info: ClientInfo,
        group: str,
        common: tuple[str, ...],
    ) -> None:
        """So many more clients like this one, of a group, may send an item of this form, having received another of that name."""
        kind = self.kind(client_info)
        self._senders.setdefault(name, {})[kind] = client_info
        if isinstance(like.values, Tensor):
            one = self._singles.setdefault(
                name, SharedTensor({kind: torch.zeros_like(like.values)})
            )
            one.expected += count
            if isinstance(like.weight, Tensor):
                self._weights[name] = torch.zeros_like(like.weight)
            return
        starts = reference_tensors(like, received)
        for tensor, owner in owners_of(starts, group, common).items():
            owned = self._owned.setdefault(name, {}).setdefault(owner, SharedTensor())
            owned.starts[kind] = starts[tensor]
            owned.expected += count
            self._groups.setdefault(name, {}).setdefault(group, {}).setdefault(
                tensor, (owner, kind)
            )

    def senders(self, name: str) -> list[ClientInfo]:
        """Return one client of each kind that may send the item, whether or not any did."""
        return list(self._senders.get(name, {}).values())

    # Single tensors ------------------------------------------------------------------------------------------------
    def expects(self, name: str) -> bool:
        """Whether anybody may send single tensors of that name."""
        return name in self._singles

    def total(self, name: str, totals: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(Σ values·weight + noise, Σ weight): the expected number in place of the weights, but of class sums, whose weights
        are counts of rows and noised as well. `totals`: the plain totals; None if nobody sent any."""
        one = self._singles[name]
        values = one.example if totals is None else totals[0]
        values = values + self.normal(values, self.deviation(name), name, "values")
        if name not in self._weights:
            return values, torch.tensor(one.expected, dtype=values.dtype)
        weight = self._weights[name] if totals is None else totals[1]
        return values, (weight + self.normal(weight, self.deviation(name), name, "weight")).clamp(
            min=0
        )

    def mean(self, name: str, totals: tuple[Tensor, Tensor] | None) -> Tensor:
        """The noised total over its weight; nought where that is."""
        values, weight = self.total(name, totals)
        return self.postprocess(
            name, values / torch.where(weight > 0, weight, torch.ones_like(weight))
        )

    # Named tensors -------------------------------------------------------------------------------------------------
    def by_group(
        self,
        name: str,
        means: Mapping[str, Tensors],
        weights: Mapping[str, Mapping[str, float]],
        senders: Sequence[ClientInfo],
    ) -> dict[str, Tensors]:
        """For every group that could have sent something, whether or not it did, its noised means."""
        moved: dict[Owner, Tensor] = {}
        there = Counter(self.kind(client_info) for client_info in senders)
        groups = self._groups.get(name, {})
        for group, tensors in groups.items():
            for tensor, (owner, _) in tensors.items():
                if owner not in moved and tensor in means.get(group, {}):
                    one = self._owned[name][owner]
                    share = weights[group][tensor] / one.expected
                    moved[owner] = (means[group][tensor] - one.mean_start(there)) * share
        owners = {owner for tensors in groups.values() for owner, _ in tensors.values()}
        noise = {owner: self._noise(name, owner, moved.get(owner)) for owner in owners}
        return {
            group: {
                tensor: self._apply_update(self._owned[name][owner].starts[kind], moved.get(owner))
                + noise[owner]
                for tensor, (owner, kind) in tensors.items()
            }
            for group, tensors in groups.items()
        }

    def _noise(self, name: str, owner: Owner, update: Tensor | None) -> Tensor:
        """On the mean update, nought if nobody sent any."""
        one = self._owned[name][owner]
        like = torch.zeros_like(one.example) if update is None else update.to(one.example.dtype)
        return self.normal(like, self.deviation(name) / one.expected, name, *map(str, owner))

    @staticmethod
    def _apply_update(start: Tensor, update: Tensor | None) -> Tensor:
        return start if update is None else start + update

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """How many clients are expected behind each of these means."""
        owned = self._owned.get(name, {})
        groups = self._groups.get(name, {})
        return {
            g: {t: owned[owner].expected for t, (owner, _) in tensors.items()}
            for g, tensors in groups.items()
        }


# The server's side of privacy of clients: the bounds that a round's updates have, the noise on its
# sums, the next bounds.


ExpectedItems = Callable[[ClientInfo, Payload, int], Mapping[str, Item]]


class ServerPrivacy:
    """The server's side of privacy of clients, for one run.

    Args:
        client: The clients' side.
        federation: The federation.
        expected_items: Returns the form of a client's upload, given its broadcast and the round.
        per_round: Clients in a round; None: all.
    """

    def __init__(
        self,
        client: ClientPrivacy,
        federation: PrivateFederation,
        expected_items: ExpectedItems,
        per_round: int | None,
    ) -> None:
        self.client = client
        self.config = client.config
        self.federation = federation
        self.expected_items = expected_items
        population = len(federation.client_infos)
        self.cohort = min(per_round or population, population)  # expected number of clients
        self.share = self.cohort / population
        # Factors on each item's clipping bound: 1 unless bounds adapt.
        self.factors: dict[str, float] = dict.fromkeys(client.items, 1.0)

    @classmethod
    def from_federation(
        cls,
        client: ClientPrivacy | None,
        federation: PrivateFederation,
        expected_items: ExpectedItems,
        per_round: int | None,
    ) -> ServerPrivacy | None:
        """Return the server's side; None where the server adds no noise."""
        if client is None or client.config.unit != "client":
            return None
        return cls(client, federation, expected_items, per_round)

    def add_bounds(self, broadcast: Payload) -> Payload:
        """Add the round's clipping bounds to a broadcast, where they adapt."""
        if self.config.adaptive_clip is not None:
            broadcast.report = {**broadcast.report, **self.client.factors_item(self.factors)}
        return broadcast

    def sum_noise(self, received_by: Callable[[ClientInfo], Payload], round_idx: int) -> SumNoise:
        """Return the noise on a round's sums.

        Args:
            received_by: Returns what a client received.
            round_idx: The round.
        """
        privacy = self.config
        federation = self.federation
        specs = self.client.specs

        def draw(like: Tensor, deviation: float, *parts: str) -> Tensor:
            return federation.noise.normal(like, deviation, "server", round_idx, *parts)

        def deviation(name: str) -> float:
            if privacy.distributed:
                return 0.0  # clients have added it
            if name == WITHIN:
                # m bits, each as if it were one of m
                return self.count_noise() * math.sqrt(len(self.factors))
            return self.client.deviation(name, self.factors[name], self.update_noise_multiplier())

        def postprocess(name: str, votes: Tensor) -> Tensor:
            if not privacy.votes or not specs[name].says:
                return votes
            return teacher_from_votes(votes, specs[name].says)

        noise = SumNoise(
            deviation,
            draw,
            lambda client_info: federation.client_infos.profile(client_info.client_id).first,
            postprocess,
        )
        for profile in federation.client_infos.profiles:
            client_info = federation.client_infos[profile.first]
            received = received_by(client_info)
            expected = self.expected_items(client_info, received, round_idx)
            for name, like in expected.items():
                before = received.item(name) if name in received else None
                group = "" if specs[name].across else client_info.arch.spec_id
                count = profile.count * self.share
                noise.expect(name, like, before, count, client_info, group, federation.common)
        return noise

    def check_count_noise(self) -> None:
        """Raises UserError if counting the updates within bounds costs all there is."""
        privacy = self.config
        if privacy.adaptive_clip is None:
            return
        if (sigma := self.count_noise()) * 2 <= privacy.known_noise_multiplier:
            raise UserError(
                f"privacy.adaptive_clip.noise: found {sigma:g}, with which counting alone spends more than "
                f"privacy.noise_multiplier {privacy.known_noise_multiplier:g} allows; take more than {privacy.known_noise_multiplier / 2:.3g}"
            )

    def count_noise(self) -> float:
        """σ_b of the paper: what a count of bits would be noised with if there were one."""
        assert self.config.adaptive_clip is not None
        return self.config.adaptive_clip.noise or self.cohort / 20

    def update_noise_multiplier(self) -> float:
        """The multiplier that is left for the updates: z_Δ = (z⁻² − (2σ_b)⁻²)^(−½) (Andrew et al. 2021, theorem 1)."""
        multiplier = self.config.known_noise_multiplier
        if self.config.adaptive_clip is None:
            return multiplier
        return float((multiplier**-2 - (2 * self.count_noise()) ** -2) ** -0.5)

    def adapt_bounds(self, uploads: Uploads) -> None:
        """Each bound times exp(−η·(share of updates within it − γ)), the share noised (ibid., Algorithm 1)."""
        privacy = self.config
        if privacy.adaptive_clip is None:
            return
        wanted = privacy.adaptive_clip
        total = uploads.total(WITHIN)
        shares = (total[0] / total[1] + 0.5).tolist()  # what is sent is the bit less one half
        for name, share in zip(sorted(self.factors), shares, strict=True):
            self.factors[name] *= math.exp(-wanted.lr * (share - wanted.quantile))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return dict(self.factors)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The reverse."""
        self.factors = dict(state)
