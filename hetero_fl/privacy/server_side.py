"""Client-level differential privacy at the server: noise on sums, and adaptive clipping.

With `privacy.unit: client`, noise is added once to each sum and mean that a method requests from
`Uploads`. The privacy budget of a run is known in advance (`hetero_fl.experiment.privacy_budget`).
An upload consists of named items (`Item`). Clients of one kind have equal settings and models.
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
from hetero_fl.privacy.client_side import WITHIN_CLIP, ClientPrivacy, PrivateFederation
from hetero_fl.privacy.mechanisms import reference_tensors, teacher_from_votes
from hetero_fl.utils.errors import UserError

# Returns the noise for a value, given the value, a standard deviation and strings that identify the
# purpose of the noise.
Normal = Callable[..., Tensor]


@dataclass
class SharedTensor:
    """Tensor that several clients may send.

    Args:
        starts: Values to which clients add their updates, keyed by kind of client.
        expected: Expected number of clients that send the tensor.
    """

    starts: dict[str, Tensor] = field(default_factory=dict)
    expected: float = 0.0

    @property
    def example(self) -> Tensor:
        """Tensor with the shape, dtype and device of the shared tensor."""
        return next(iter(self.starts.values()))

    def mean_start(self, senders_by_kind: Mapping[str, int]) -> Tensor:
        """Return the mean of `starts` over the clients that sent the tensor.

        Args:
            senders_by_kind: Number of clients of each kind that sent the item.
        """
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
    """Noise on the sums of one round, and the denominators of noisy means.

    Noise is added to the sum of the clipped updates Δ_k, which have weight 1, and the sum is
    divided by the expected number of clients (McMahan et al. 2018, Algorithm 1, fixed denominator).
    With the mean μ of the uploads, the number Σw of the uploads and the mean ref of the values that
    clients received, the noisy mean is

        ref + (μ − ref)·Σw / expected + N(0, deviation²) / expected
            = ref + (ΣΔ_k + N(0, deviation²)) / expected,

    which can also be computed after secure aggregation. Repeated requests return equal results.

    Clients that share a tensor may have received different values. Because only updates are
    clipped, the same noisy update is then added to the received value of each group.

    Args:
        deviation: Function that returns the standard deviation of the noise on the sum of an item.
        normal: Function that returns the noise for a value. Calls with equal arguments return equal
            noise.
        kind: Function that returns the kind of a client.
        postprocess: Function that transforms the noisy mean of an item, given the name of the item
            and the mean. By default, the mean is unchanged.
    """

    deviation: Callable[[str], float]
    normal: Normal
    kind: Callable[[ClientInfo], str]
    postprocess: Callable[[str, Tensor], Tensor] = lambda _name, mean: mean
    _singles: dict[str, SharedTensor] = field(default_factory=dict)
    # Zeros in the shape of the weights of class sums, keyed by item name.
    _weights: dict[str, Tensor] = field(default_factory=dict)
    # One client of each kind, keyed by item name and kind.
    _senders: dict[str, dict[str, ClientInfo]] = field(default_factory=dict)
    _owned: dict[str, dict[Owner, SharedTensor]] = field(default_factory=dict)
    _groups: dict[str, dict[str, dict[str, tuple[Owner, str]]]] = field(default_factory=dict)

    def expect(
        self,
        name: str,
        like: Item,
        *,
        received: Item | None,
        count: float,
        client_info: ClientInfo,
        group: str,
        common: tuple[str, ...],
    ) -> None:
        """Register an item that clients of one kind may send.

        Args:
            name: Name of the item.
            like: Item with the names, shapes and dtypes of the tensors that the clients may send.
            received: Item of the same name that the clients received. If None, updates are added to
                zeros.
            count: Expected number of clients of this kind in the round.
            client_info: One client of this kind.
            group: Architecture group of the item's tensors.
            common: Prefixes of the names of tensors that are averaged across architectures.
        """
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
        """Return one client of each kind that may send the item `name`."""
        return list(self._senders.get(name, {}).values())

    def expects(self, name: str) -> bool:
        """Return whether clients may send an item `name` that consists of a single tensor."""
        return name in self._singles

    def total(self, name: str, totals: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the noisy sum of an item's values, and the sum of the weights.

        Args:
            name: Name of the item, which has a single tensor.
            totals: Sums of values and weights without noise. If None, no client sent the item, and
                both sums are 0.

        Returns:
            The noisy sum of values times weights, and the expected number of clients. For class
            sums, the second element is the noisy sum of the weights, which are counts of rows.
        """
        shared = self._singles[name]
        values = shared.example if totals is None else totals[0]
        values = values + self.normal(values, self.deviation(name), name, "values")
        if name not in self._weights:
            return values, torch.tensor(shared.expected, dtype=values.dtype)
        weight = self._weights[name] if totals is None else totals[1]
        weight = weight + self.normal(weight, self.deviation(name), name, "weight")
        return values, weight.clamp(min=0)

    def mean(self, name: str, totals: tuple[Tensor, Tensor] | None) -> Tensor:
        """Divide the noisy sum of an item by the sum of the weights.

        Where the sum of the weights is 0, the noisy sum is returned. See `total` for the arguments.
        """
        values, weight = self.total(name, totals)
        mean = values / torch.where(weight > 0, weight, torch.ones_like(weight))
        return self.postprocess(name, mean)

    def by_group(
        self,
        name: str,
        means: Mapping[str, Tensors],
        weights: Mapping[str, Mapping[str, float]],
        senders: Sequence[ClientInfo],
    ) -> dict[str, Tensors]:
        """Return the noisy means of named tensors for all groups that may send the item.

        Args:
            name: Name of the item.
            means: Means without noise, keyed by group and tensor name. A group is missing if none
                of its clients sent the item.
            weights: Weights of these means, keyed by group and tensor name.
            senders: Clients that sent the item.

        Returns:
            Noisy means, keyed by group and tensor name. If no client sent a tensor, the result is
            the received value plus noise.
        """
        updates: dict[Owner, Tensor] = {}
        senders_by_kind = Counter(self.kind(client_info) for client_info in senders)
        groups = self._groups.get(name, {})
        for group, tensors in groups.items():
            for tensor, (owner, _) in tensors.items():
                if owner not in updates and tensor in means.get(group, {}):
                    shared = self._owned[name][owner]
                    share = weights[group][tensor] / shared.expected
                    start = shared.mean_start(senders_by_kind)
                    updates[owner] = (means[group][tensor] - start) * share
        owners = {owner for tensors in groups.values() for owner, _ in tensors.values()}
        noise = {owner: self._noise(name, owner, updates.get(owner)) for owner in owners}
        return {
            group: {
                tensor: self._apply_update(
                    self._owned[name][owner].starts[kind], updates.get(owner)
                )
                + noise[owner]
                for tensor, (owner, kind) in tensors.items()
            }
            for group, tensors in groups.items()
        }

    def _noise(self, name: str, owner: Owner, update: Tensor | None) -> Tensor:
        """Return the noise on a mean update, which is None if no client sent the tensor."""
        one = self._owned[name][owner]
        like = torch.zeros_like(one.example) if update is None else update.to(one.example.dtype)
        return self.normal(like, self.deviation(name) / one.expected, name, *map(str, owner))

    @staticmethod
    def _apply_update(start: Tensor, update: Tensor | None) -> Tensor:
        return start if update is None else start + update

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the expected number of clients for each noisy mean of an item.

        The numbers are keyed by group and tensor name.
        """
        owned = self._owned.get(name, {})
        groups = self._groups.get(name, {})
        return {
            g: {t: owned[owner].expected for t, (owner, _) in tensors.items()}
            for g, tensors in groups.items()
        }


# Returns items with the names, shapes and dtypes of a client's upload, given the client, the
# broadcast to the client and the round index.
ExpectedItems = Callable[[ClientInfo, Payload, int], Mapping[str, Item]]


class ServerPrivacy:
    """Noise on sums and adaptive clipping bounds at the server, for one run.

    Args:
        client: Clipping and privacy charges at the clients.
        federation: Federation of the run.
        expected_items: Function that returns items with the names, shapes and dtypes of a client's
            upload.
        per_round: Number of clients in a round. If None, all clients participate.

    Attributes:
        cohort: Expected number of clients in a round.
        share: Probability with which each client is sampled in a round.
        factors: Factors on the clipping bounds, keyed by item name. All factors are 1 without
            adaptive clipping.
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
        self.cohort = min(per_round or population, population)
        self.share = self.cohort / population
        self.factors: dict[str, float] = dict.fromkeys(client.items, 1.0)

    @classmethod
    def from_federation(
        cls,
        client: ClientPrivacy | None,
        federation: PrivateFederation,
        expected_items: ExpectedItems,
        per_round: int | None,
    ) -> ServerPrivacy | None:
        """Return an instance for a run, or None without `privacy.unit: client`.

        Args:
            client: Clipping and privacy charges at the clients. If None, None is returned.
            federation: Federation of the run.
            expected_items: See `ServerPrivacy`.
            per_round: Number of clients in a round. If None, all clients participate.
        """
        if client is None or client.config.unit != "client":
            return None
        return cls(client, federation, expected_items, per_round)

    def add_bounds(self, broadcast: Payload) -> Payload:
        """Add the factors on the clipping bounds to a broadcast in place, and return the broadcast.

        Without adaptive clipping, the broadcast is not changed.
        """
        if self.config.adaptive_clip is not None:
            broadcast.report = {**broadcast.report, **self.client.factors_item(self.factors)}
        return broadcast

    def sum_noise(self, received_by: Callable[[ClientInfo], Payload], round_idx: int) -> SumNoise:
        """Return the noise on the sums of a round.

        With the setting `distributed`, the standard deviation is 0, because the clients have
        already added the noise.

        Args:
            received_by: Function that returns the payload that a client received.
            round_idx: Index of the round.
        """
        privacy = self.config
        federation = self.federation
        specs = self.client.specs

        def draw(like: Tensor, deviation: float, *parts: str) -> Tensor:
            return federation.noise.normal(like, deviation, "server", round_idx, *parts)

        def deviation(name: str) -> float:
            if privacy.distributed:
                # The clients have added the noise.
                return 0.0
            if name == WITHIN_CLIP:
                # The m bits of an upload are one vector of norm √m/2.
                return self.count_noise() * math.sqrt(len(self.factors))
            return self.client.deviation(name, self.factors[name], self.update_noise_multiplier())

        def postprocess(name: str, votes: Tensor) -> Tensor:
            if not privacy.votes or not specs[name].prediction_type:
                return votes
            return teacher_from_votes(votes, specs[name].prediction_type)

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
                group = "" if specs[name].across_architectures else client_info.arch.spec_id
                count = profile.count * self.share
                noise.expect(
                    name,
                    like,
                    received=before,
                    count=count,
                    client_info=client_info,
                    group=group,
                    common=federation.common,
                )
        return noise

    def check_count_noise(self) -> None:
        """Check that adaptive clipping does not use the whole privacy budget.

        Raises:
            UserError: If releasing the number of updates within bounds leaves no budget for the
                updates.
        """
        privacy = self.config
        if privacy.adaptive_clip is None:
            return
        multiplier = privacy.known_noise_multiplier
        if (sigma := self.count_noise()) * 2 <= multiplier:
            raise UserError(
                f"privacy.adaptive_clip.noise: must be > {multiplier / 2:.3g}, half of the noise "
                f"multiplier, got {sigma:g}"
            )

    def count_noise(self) -> float:
        """Return σ_b, the standard deviation of the noise on the number of updates within bounds.

        This is the setting `adaptive_clip.noise`. If this setting is None, σ_b is 1/20 of the
        cohort size (Andrew et al. 2021). Adaptive clipping must be enabled.
        """
        assert self.config.adaptive_clip is not None
        return self.config.adaptive_clip.noise or self.cohort / 20

    def update_noise_multiplier(self) -> float:
        """Return the noise multiplier of the updates.

        With adaptive clipping, this is z_Δ = (z⁻² − (2σ_b)⁻²)^(−½) (Andrew et al. 2021, theorem 1),
        because the number of updates within bounds uses a part of the privacy budget. Otherwise,
        this is the noise multiplier z of the run.
        """
        multiplier = self.config.known_noise_multiplier
        if self.config.adaptive_clip is None:
            return multiplier
        return float((multiplier**-2 - (2 * self.count_noise()) ** -2) ** -0.5)

    def adapt_bounds(self, uploads: Uploads) -> None:
        """Adapt the clipping bounds to the norms of the updates in a round.

        Each bound is multiplied by exp(−η·(b − γ)), where η is the setting `lr`, b is the noisy
        share of updates within the bound, and γ is the setting `quantile` (Andrew et al. 2021,
        Algorithm 1). Without adaptive clipping, the bounds are not changed.
        """
        config = self.config.adaptive_clip
        if config is None:
            return
        total = uploads.total(WITHIN_CLIP)
        # Clients send the bit minus 1/2.
        shares = (total[0] / total[1] + 0.5).tolist()
        for name, share in zip(sorted(self.factors), shares, strict=True):
            self.factors[name] *= math.exp(-config.lr * (share - config.quantile))

    def state_dict(self) -> dict[str, float]:
        """Return the factors on the clipping bounds, for a checkpoint."""
        return dict(self.factors)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the factors on the clipping bounds from a checkpoint."""
        self.factors = dict(state)
