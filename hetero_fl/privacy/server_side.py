"""Client-level differential privacy at the server: noise on sums, and adaptive clipping.

With `privacy.unit: client`, noise is added once to each sum and mean that a method requests from
`Uploads`. The privacy budget of a run is known in advance (`hetero_fl.experiment.privacy_budget`).
An upload consists of named items (`Item`). Clients of one kind have equal settings and models.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.uploads import (
    SINGLE,
    Combiner,
    Mean,
    MeanCombiner,
    Means,
    Owner,
    Upload,
    Uploads,
    owners_of_item,
)
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, Payload
from hetero_fl.privacy.client_side import (
    FACTOR,
    WITHIN_CLIP,
    ClientPrivacy,
    PrivateFederation,
    reference_tensors,
)
from hetero_fl.utils.errors import UserError

# Probability that the teacher assigns to the class with the most votes.
ELECTED_PROBABILITY = 0.9


@dataclass
class ExpectedItem:
    """Item that clients may send in a round.

    Attributes:
        references: Values to which clients add their updates, as an upload of one client of each
            kind, keyed by kind.
        starts: Owner of each tensor and its value at the first kind of client that may send it,
            keyed by architecture group and tensor name.
        expected: Expected number of clients that send a tensor, keyed by owner.
        weight: Zeros in the shape of the weights, or None if the weights are scalars.
    """

    references: dict[str, Upload] = field(default_factory=dict)
    starts: dict[str, dict[str, tuple[Owner, Tensor]]] = field(default_factory=dict)
    expected: dict[Owner, float] = field(default_factory=dict)
    weight: Tensor | None = None


class SumNoise:
    """Noise on the sums of one round, and the denominators of noisy means.

    Calls with equal arguments return equal noise.

    Args:
        privacy: Client-level privacy of the run.
        round_idx: Index of the round.

    Attributes:
        items: Items that clients may send, keyed by name.
    """

    def __init__(self, privacy: ServerPrivacy, round_idx: int) -> None:
        self.privacy = privacy
        self.round_idx = round_idx
        self.items: dict[str, ExpectedItem] = defaultdict(ExpectedItem)

    def expect(self, name: str, like: Item, received: Item | None, client_info: ClientInfo) -> None:
        """Register an item that clients of one kind may send.

        Args:
            name: Name of the item.
            like: Item with the names, shapes and dtypes of the tensors that the clients may send.
            received: Item of the same name that the clients received. If None, updates are added to
                zeros.
            client_info: One client of this kind.
        """
        federation = self.privacy.federation
        item = self.items[name]
        spec = self.privacy.client.specs[name]
        group, owners = owners_of_item(like, client_info.arch.spec_id, spec, federation.common)
        starts = (
            {"": torch.zeros_like(like.values)}
            if isinstance(like.values, Tensor)
            else reference_tensors(like, received)
        )
        reference = Payload({name: replace(like.with_tensors(starts), weight=1.0)})
        item.references[self.kind(client_info)] = Upload(client_info, reference)
        if isinstance(like.weight, Tensor):
            item.weight = torch.zeros_like(like.weight)
        count = federation.client_infos.profile(client_info.client_id).count
        for tensor, owner in owners.items():
            item.expected[owner] = item.expected.get(owner, 0.0) + count * self.privacy.share
            item.starts.setdefault(group, {}).setdefault(tensor, (owner, starts[tensor]))

    def combiner(self, name: str, exact: Combiner) -> NoisyCombiner:
        """Create a combiner that adds noise to the means of the combiner `exact`."""
        return NoisyCombiner(name, exact, self)

    def senders(self, name: str) -> list[ClientInfo]:
        """Return one client of each kind that may send the item `name`."""
        return [upload.client_info for upload in self.items[name].references.values()]

    def kind(self, client_info: ClientInfo) -> str:
        """Return the kind of a client, the id of the first client with equal settings."""
        return self.privacy.federation.client_infos.profile(client_info.client_id).first

    def normal(self, value: Tensor, name: str, *parts: str, divisor: float = 1.0) -> Tensor:
        """Sample the noise on the sum of an item.

        Args:
            value: Value to which the noise is added.
            name: Name of the item.
            *parts: Strings that identify the part of the item.
            divisor: Number by which the sum is divided.
        """
        deviation = self.privacy.deviation(name) / divisor
        noise = self.privacy.federation.noise
        return noise.normal(value, deviation, "server", self.round_idx, name, *parts)


class NoisyCombiner(Combiner):
    """Noisy means of an item for all tensors that clients may send.

    Noise is added to the sum of the clipped updates Δ_k, which have weight 1, and the sum is
    divided by the expected number of clients (McMahan et al. 2018, Algorithm 1, fixed denominator).
    With the mean μ of the uploads, the number Σw of the uploads and the mean ref of the values that
    clients received, the noisy mean is

        ref + (μ − ref)·Σw / expected + N(0, deviation²) / expected
            = ref + (ΣΔ_k + N(0, deviation²)) / expected,

    which can also be computed after secure aggregation. If no client sent a tensor, the result is
    the received value plus noise.

    Clients that share a tensor may have received different values. Because only updates are
    clipped, the same noisy update is then added to the received value of each group.

    Args:
        name: Name of the item.
        exact: Combiner that computes the means without noise.
        noise: Noise of the round.
    """

    def __init__(self, name: str, exact: Combiner, noise: SumNoise) -> None:
        self.name = name
        self._exact = exact
        self._noise = noise
        self._item = noise.items[name]
        privacy = noise.privacy
        # Means of the values that the senders received.
        self._received = MeanCombiner(name, privacy.client.specs[name], privacy.federation.common)

    @override
    def add(self, upload: Upload) -> None:
        self._received.add(self._item.references[self._noise.kind(upload.client_info)])
        self._exact.add(upload)

    @override
    def means(self) -> Means:
        exact = self._exact.means()
        if SINGLE in self._item.expected:
            return {"": {"": self._noisy_sum(exact.get("", {}).get(""))}}
        received = self._received.means()
        changes: dict[Owner, Tensor] = {}
        for group, named in exact.items():
            for tensor, mean in named.items():
                owner, _ = self._item.starts[group][tensor]
                share = float(mean.weight) / self._item.expected[owner]
                changes[owner] = (mean.value - received[group][tensor].value) * share
        return {
            group: {
                tensor: self._noisy_mean(owner, start, changes.get(owner))
                for tensor, (owner, start) in named_starts.items()
            }
            for group, named_starts in self._item.starts.items()
        }

    def _noisy_sum(self, exact: Mean | None) -> Mean:
        """Add noise to the sum of a single tensor and, for class sums, to the counts of rows."""
        _, total = self._item.starts[""][""]
        weight = self._item.weight
        expected = self._item.expected[SINGLE]
        if exact is not None:
            total, weight = exact.totals()
        total = total + self._noise.normal(total, self.name, "values")
        if self._item.weight is None or weight is None:
            weight = torch.tensor(expected, dtype=total.dtype)
        else:
            weight = (weight + self._noise.normal(weight, self.name, "weight")).clamp(min=0)
        mean = Mean.from_total(total, weight, expected)
        return replace(mean, value=self._noise.privacy.postprocess(self.name, mean.value))

    def _noisy_mean(self, owner: Owner, start: Tensor, change: Tensor | None) -> Mean:
        """Add the mean update of a tensor and noise to a received value."""
        expected = self._item.expected[owner]
        change = torch.zeros_like(start) if change is None else change
        noise = self._noise.normal(change, self.name, *map(str, owner), divisor=expected)
        return Mean(start + change + noise, expected, expected)


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
            # All numbers have the same length, so that the size of the report does not vary. They
            # can be converted back without rounding errors.
            factors = {FACTOR + name: f"{f:.16e}" for name, f in sorted(self.factors.items())}
            broadcast.report = {**broadcast.report, **factors}
        return broadcast

    def sum_noise(self, received_by: Callable[[ClientInfo], Payload], round_idx: int) -> SumNoise:
        """Return the noise on the sums of a round.

        Args:
            received_by: Function that returns the payload that a client received.
            round_idx: Index of the round.
        """
        noise = SumNoise(self, round_idx)
        for profile in self.federation.client_infos.profiles:
            client_info = self.federation.client_infos[profile.first]
            received = received_by(client_info)
            expected = self.expected_items(client_info, received, round_idx)
            for name, like in expected.items():
                noise.expect(name, like, received.items_by_name.get(name), client_info)
        return noise

    def deviation(self, name: str) -> float:
        """Return the standard deviation of the noise on the sum of an item.

        With the setting `distributed`, it is 0, because the clients have already added the noise.
        """
        if self.config.distributed:
            return 0.0
        if name == WITHIN_CLIP:
            # The m bits of an upload are one vector of norm √m/2.
            return self.count_noise() * math.sqrt(len(self.factors))
        return self.client.deviation(name, self.factors[name], self.update_noise_multiplier())

    def postprocess(self, name: str, mean: Tensor) -> Tensor:
        """Return the teacher of the noisy votes, or other noisy means unchanged.

        Args:
            name: Name of the item.
            mean: Noisy mean. Votes have the shape `[D, C]`. The class with the most votes has the
                probability 0.9, and the other classes have equal probabilities.
        """
        kind = self.client.specs[name].prediction_type
        if not self.config.votes or not kind:
            return mean
        p = torch.full_like(mean, (1 - ELECTED_PROBABILITY) / max(1, mean.shape[-1] - 1))
        p.scatter_(-1, mean.argmax(-1, keepdim=True), ELECTED_PROBABILITY)
        return p if kind == "probabilities" else p.log()

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

        Raises:
            UserError: If releasing the number of updates within bounds leaves no budget for the
                updates.
        """
        multiplier = self.config.known_noise_multiplier
        if self.config.adaptive_clip is None:
            return multiplier
        sigma = self.count_noise()
        if sigma * 2 <= multiplier:
            raise UserError(
                f"privacy.adaptive_clip.noise: must be > {multiplier / 2:.3g}, half of the noise "
                f"multiplier, got {sigma:g}"
            )
        return float((multiplier**-2 - (2 * sigma) ** -2) ** -0.5)

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
