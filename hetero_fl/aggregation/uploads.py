"""Aggregation of the uploads of a round: one combiner for each item of the uploads.

An upload consists of items (see `hetero_fl.core.payload.Item`). Uploads are added in the order of
client ids. Items that are declared with `use="each"` are stored individually. The combiner of an
item computes weighted means over the owners of each tensor, that is, the clients whose models
contain the tensor, unless a robust rule (`hetero_fl.aggregation.robust_means`) or secure
aggregation replaces the means. Only the means and the current upload are in memory. Client-level
privacy adds noise (`hetero_fl.privacy.server_side`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import SUM_KINDS, Item, ItemSpec, MissingItemError, Payload
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_key


@dataclass(frozen=True)
class Mean:
    """Mean of a tensor over clients.

    Attributes:
        value: The mean.
        weight: Sum of the weights.
        count: Number of uploads in the mean, or the expected number under client-level privacy.
        total: The sum Σ w v. If None, the sum is computed from the mean.
    """

    value: Tensor
    weight: float | Tensor
    count: float
    total: Tensor | None = None

    @classmethod
    def from_total(cls, total: Tensor, weight: Tensor, count: float) -> Mean:
        """Create a mean from the totals Σ w v and Σ w.

        Where the sum of the weights is zero, the mean is the sum Σ w v.
        """
        divisor = torch.where(weight > 0, weight, torch.ones_like(weight))
        return cls(total / divisor, weight, count, total)

    def totals(self) -> tuple[Tensor, Tensor]:
        """Return the totals Σ w v and Σ w."""
        like = self.value
        weight = torch.as_tensor(self.weight, dtype=like.dtype, device=like.device)
        return (like * weight if self.total is None else self.total), weight


class RunningMean:
    """Running weighted mean of tensors of the same shape.

    While all weights are scalars, the mean starts at the first term and is interpolated toward each
    further term by the term's share of the total weight so far. If all terms are equal, the mean is
    therefore bit-identical to the terms. While all weights are zero, the mean is unweighted. After
    a positive weight, terms of weight zero have no effect.

    If a weight is a tensor, or terms are already sums, totals are accumulated instead.

    Attributes:
        weight: Sum of the weights.
        count: Number of terms.
    """

    def __init__(self) -> None:
        self.weight: float | Tensor = 0.0
        self.count = 0
        # The mean or, once the weight is a tensor, the total.
        self._value: Tensor | None = None
        # Whether `_value` may be modified in place: it was created by `add` and not yet returned.
        self._is_owned = False

    def result(self) -> Mean:
        """Return the mean of the terms so far. There must be at least one term.

        Later calls of `add` do not modify the returned tensors in place.
        """
        assert self._value is not None
        self._is_owned = False
        if isinstance(self.weight, Tensor):
            return Mean.from_total(self._value, self.weight, self.count)
        return Mean(self._value, self.weight, self.count)

    def add(self, value: Tensor, weight: float | Tensor, is_sum: bool = False) -> None:
        """Add a term to the mean without modifying `value` in place.

        Args:
            value: The term.
            weight: Weight of the term. A tensor is broadcast against the term.
            is_sum: Whether the term is a sum that is already multiplied by the weight.
        """
        self.count += 1
        if is_sum or isinstance(weight, Tensor) or isinstance(self.weight, Tensor):
            self._add_total(value, weight, is_sum)
            return
        if weight == 0 and self.weight > 0:
            return
        self.weight += weight
        # 1 for the first term with a positive weight: it replaces all terms of weight zero.
        share = weight / self.weight if self.weight > 0 else 1 / self.count
        if self._value is None or share == 1:
            self._value = value
            self._is_owned = False
        elif self._is_owned:
            self._value.lerp_(value, share)
        else:
            self._value = torch.lerp(self._value, value, share)
            self._is_owned = True

    def _add_total(self, value: Tensor, weight: float | Tensor, is_sum: bool) -> None:
        weight = torch.as_tensor(weight, dtype=value.dtype, device=value.device)
        total = value if is_sum else value * weight
        if self._value is not None:
            earlier_total, earlier_weight = self.result().totals()
            total = earlier_total + total
            weight = earlier_weight + weight
        self._value = total
        self.weight = weight


# Means keyed by architecture group and tensor name. A single tensor has the group "" and the
# name "".
Means: TypeAlias = dict[str, dict[str, Mean]]
# Name and shape of a tensor, and the architecture group of the model. The group is "" for tensors
# that are averaged across groups.
Owner = tuple[str, tuple[int, ...], str]
# Owner of all single tensors of an item, which must have the same shape.
SINGLE: Owner = ("", (), "")


@dataclass(frozen=True)
class Upload:
    """Upload of one client.

    Attributes:
        client_info: Information on the client.
        payload: The uploaded items.
        staleness_weight: Factor by which the weights were multiplied because the upload is stale. 1
            for a current upload.
    """

    client_info: ClientInfo
    payload: Payload
    staleness_weight: float = 1.0

    @property
    def client(self) -> str:
        """Id of the client."""
        return self.client_info.client_id

    @property
    def group(self) -> str:
        """Architecture group of the client's model."""
        return self.client_info.arch.spec_id


def discount_upload(payload: Payload, factor: float) -> Payload:
    """Multiply the weights of an upload, and the values that are already sums, by a factor.

    Returns:
        A new payload, or `payload` itself if the factor is 1.
    """
    if factor == 1:
        return payload
    return Payload(
        {name: _discount_item(payload.item(name), factor) for name in payload}, payload.report
    )


def _discount_item(item: Item, factor: float) -> Item:
    if item.kind not in SUM_KINDS:
        return replace(item, weight=item.weight * factor)
    scaled = item.with_tensors({name: t * factor for name, t in item.tensors.items()})
    return replace(scaled, weight=item.weight * factor)


class Combiner(Protocol):
    """Interface of the combination of one item over the clients of a round."""

    def add(self, upload: Upload) -> None:
        """Add the item of an upload. Uploads are added in the order of client ids."""

    def means(self) -> Means:
        """Return the mean of each tensor, keyed by architecture group and tensor name."""


# Function that creates the combiner of an item from the name and the declaration of the item, and
# the prefixes of the names of tensors that are averaged across architectures.
CombinerFactory: TypeAlias = Callable[[str, ItemSpec, Sequence[str]], Combiner]


class CombineNoise(Protocol):
    """Interface of the noise that client-level differential privacy adds to the sums of a round."""

    def combiner(self, name: str, exact: Combiner) -> Combiner:
        """Create a combiner that adds noise to the means of another combiner.

        Args:
            name: Name of the item.
            exact: Combiner without noise.
        """

    def senders(self, name: str) -> list[ClientInfo]:
        """Return one client of each set of clients with equal settings that may send the item."""


def owners_of(
    tensors: Mapping[str, Tensor], group: str, common: tuple[str, ...]
) -> dict[str, Owner]:
    """Return the owner of each tensor of a model, keyed by tensor name.

    Tensors with equal owners are averaged.

    Args:
        tensors: Tensors of the model, keyed by name.
        group: Architecture group of the client's model.
        common: Prefixes of the names of tensors that are averaged across groups.
    """
    return {
        name: (name, tuple(tensor.shape), "" if name.startswith(common) else group)
        for name, tensor in tensors.items()
    }


def owners_of_item(
    item: Item, group: str, spec: ItemSpec, common: Sequence[str]
) -> tuple[str, dict[str, Owner]]:
    """Return the group in which an item is combined, and the owner of each tensor by its name.

    Args:
        item: The item.
        group: Architecture group of the sender.
        spec: Declaration of the item.
        common: Prefixes of the names of tensors that are averaged across architectures.
    """
    if isinstance(item.values, Tensor):
        return "", {"": SINGLE}
    group = "" if spec.across_architectures else group
    return group, owners_of(item.values, group, tuple(common))


class MeanCombiner(Combiner):
    """Weighted mean of each tensor of an item over the owners of the tensor.

    Tensors are averaged within the architecture groups of the clients. Tensors whose name starts
    with a prefix in `common` are averaged over all groups with the same name and shape.

    Args:
        name: Name of the item.
        spec: Declaration of the item.
        common: Prefixes of the names of tensors that are averaged across architectures.
    """

    def __init__(self, name: str, spec: ItemSpec, common: Sequence[str] = ()) -> None:
        self.name = name
        self.spec = spec
        self.common = common
        self._running: dict[Owner, RunningMean] = defaultdict(RunningMean)
        self._groups: dict[str, dict[str, Owner]] = {}

    @override
    def add(self, upload: Upload) -> None:
        item = upload.payload.item(self.name)
        is_single = isinstance(item.values, Tensor)
        weight = item.weight if is_single else float(item.weight)
        is_sum = is_single and item.kind in SUM_KINDS
        for name, owner in self.register(upload).items():
            self._running[owner].add(item.tensors[name], weight, is_sum)

    @override
    def means(self) -> Means:
        return self.by_group({owner: mean.result() for owner, mean in self._running.items()})

    def register(self, upload: Upload) -> dict[str, Owner]:
        """Record which tensors a group sends, and return the owner of each tensor by its name."""
        item = upload.payload.item(self.name)
        group, owners = owners_of_item(item, upload.group, self.spec, self.common)
        self._groups.setdefault(group, {}).update(owners)
        return owners

    def by_group(self, means: Mapping[Owner, Mean]) -> Means:
        """Arrange means by architecture group and tensor name.

        Args:
            means: Means keyed by owner. Owners without a mean are left out of the result.
        """
        return {
            group: {tensor: means[owner] for tensor, owner in owners.items() if owner in means}
            for group, owners in self._groups.items()
        }


class Uploads:
    """Uploads of a round, with methods for their means and sums.

    Args:
        uploads: The first uploads, in any order. Further uploads are added by `add`.
        specs: Declarations of the method's items, keyed by name. If None, items of any name are
            accepted.
        common: Prefixes of the names of tensors that are averaged across architectures.
        new_combiner: Function that creates the combiner of an item, such as
            `AggregationRules.combiner`. By default, items are averaged.
        noise: Noise that is added to every sum. If None, no noise is added.

    Attributes:
        aggregated_items: Names of the aggregated items, each with the kind of the aggregation:
            "models" for named tensors of architecture groups, otherwise the kind of the item. The
            kind determines which robust rule applies to the item.
    """

    def __init__(
        self,
        uploads: Iterable[Upload] = (),
        specs: Mapping[str, ItemSpec] | None = None,
        common: Sequence[str] = (),
        new_combiner: CombinerFactory = MeanCombiner,
        noise: CombineNoise | None = None,
    ) -> None:
        self._specs = specs or {}
        self._common = common
        self._combiner_factory = new_combiner
        self._noise = noise
        self.aggregated_items: set[tuple[str, str]] = set()
        self._kept: list[Upload] = []
        self._senders: dict[str, list[ClientInfo]] = {}
        self._combiners: dict[str, Combiner] = {}
        # Means of items that were requested since the last upload.
        self._means: dict[str, Means] = {}
        self._count = 0
        by_client = {upload.client: upload for upload in uploads}
        for client in sorted(by_client, key=natural_key):
            self.add(by_client[client])

    def __len__(self) -> int:
        return self._count

    def add(self, upload: Upload) -> None:
        """Add an upload.

        Uploads must be added in the order of client ids, because the order affects the rounding of
        sums.
        """
        self._count += 1
        self._means = {}
        kept_items = {}
        for name in upload.payload:
            self._senders.setdefault(name, []).append(upload.client_info)
            if self._spec(name).use == "each":
                kept_items[name] = upload.payload.item(name)
                continue
            if name not in self._combiners:
                self._combiners[name] = self._new_combiner(name)
            self._combiners[name].add(upload)
        if any(spec.use == "each" for spec in self._specs.values()):
            self._kept.append(replace(upload, payload=Payload(kept_items)))

    def _spec(self, name: str) -> ItemSpec:
        return self._specs.get(name, ItemSpec("params"))

    def _new_combiner(self, name: str) -> Combiner:
        combiner = self._combiner_factory(name, self._spec(name), self._common)
        return combiner if self._noise is None else self._noise.combiner(name, combiner)

    def _item_means(self, name: str) -> Means:
        """Return the means of an item, which are computed when they are first requested.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        self._check_declared(name)
        if name not in self._means:
            combiner = self._combiners.get(name) or self._new_combiner(name)
            if self._spec(name).use == "each":
                for upload in self.containing(name):
                    combiner.add(upload)
            self._means[name] = combiner.means()
        return self._means[name]

    def _single_mean(self, name: str) -> Mean | None:
        return self._item_means(name).get("", {}).get("")

    def _check_declared(self, name: str) -> None:
        if self._specs and name not in self._specs:
            raise MissingItemError(
                f"item {name!r} is not declared in `uploads`{suggest_or_list(name, self._specs)}"
            )

    def senders(self, name: str) -> list[ClientInfo]:
        """Return the clients that sent the item.

        If `noise` is set, the senders are not revealed: the result contains one client of each set
        of clients with equal settings that may send the item.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        self._check_declared(name)
        if self._noise is not None:
            return self._noise.senders(name)
        return list(self._senders.get(name, []))

    def is_available(self, name: str) -> bool:
        """Return whether a client sent the item or, if `noise` is set, may send the item.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        return bool(self.senders(name))

    def mean(self, name: str) -> Tensor | None:
        """Return the elementwise mean of a single-tensor item, or the result of the robust rule.

        Returns:
            The mean, or None if no client sent the item or a robust rule needs more clients. If
            `noise` is set and clients may send the item, the noisy mean is returned in any case.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        mean = self._single_mean(name)
        self.aggregated_items.add((name, self._spec(name).kind))
        return None if mean is None or mean.count == 0 else mean.value

    def total(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the totals Σ w v and Σ w of a single-tensor item, with noise if `noise` is set.

        For values that are already sums, the first total is Σ v.

        Raises:
            MissingItemError: If the method does not declare the item.
            KeyError: If no client sent the item and no noise is added to the sum.
        """
        mean = self._single_mean(name)
        # No robust rule applies to a total. A note names the counts that are not protected.
        if self._spec(name).kind == "counts":
            self.aggregated_items.add((name, "counts"))
        if mean is None:
            raise KeyError(name)
        return mean.totals()

    def mean_by_group(self, name: str) -> dict[str, Tensors]:
        """Return the mean of each named tensor of an item.

        The means are keyed by architecture group and tensor name. A mean is computed over the
        clients that sent the tensor. If the item was declared with `across_architectures`, the only
        group is "". If `noise` is set, the means are noisy, and groups that may send the item are
        included even if no client did. Otherwise, the result is empty if no client sent the item.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        means = self._item_means(name)
        self.aggregated_items.add((name, "models"))
        return {g: {n: mean.value for n, mean in named.items()} for g, named in means.items()}

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the total weight of each mean of `mean_by_group`, with the same keys.

        If `noise` is set, the expected number of clients is returned instead.
        """
        means = self._item_means(name).items()
        return {group: {n: float(m.weight) for n, m in named.items()} for group, named in means}

    def counts_by_group(self, name: str) -> Mapping[str, Mapping[str, float]]:
        """Return the number of uploads in each mean of `mean_by_group`, with the same keys.

        If `noise` is set, the expected number is returned instead.
        """
        means = self._item_means(name)
        return {g: {n: m.count for n, m in named.items()} for g, named in means.items()}

    def consensus(self, name: str, predictions: Mapping[str, Item]) -> Tensor | None:
        """Aggregate predictions that the server computed from individual uploads.

        Args:
            name: Name of the predictions, for notes that too few clients sent them.
            predictions: Items of kind `rows` with values of shape `[N, C]`, keyed by client id.

        Returns:
            The mean or the result of the robust rule for `rows`. None if `predictions` is empty.
        """
        uploads = {upload.client: upload for upload in self._kept}
        derived = [replace(uploads[c], payload=Payload({name: p})) for c, p in predictions.items()]
        return self.with_uploads(derived, {name: ItemSpec("rows")}).mean(name)

    def with_uploads(self, uploads: Iterable[Upload], specs: Mapping[str, ItemSpec]) -> Uploads:
        """Create an `Uploads` object with other uploads and the same robust rules.

        Means of the other uploads are recorded in `aggregated_items` of this object.

        Args:
            uploads: The other uploads, for example decompressed copies of the uploads in this
                object.
            specs: Declarations of the items of the other uploads, keyed by name.
        """
        derived = Uploads(uploads, specs, new_combiner=self._combiner_factory)
        derived.aggregated_items = self.aggregated_items
        return derived

    @property
    def each(self) -> Sequence[Upload]:
        """The individual uploads, with the items that are declared with `use="each"`.

        Raises:
            UserError: If there are uploads but no item is declared with `use="each"`.
        """
        if self._count and all(spec.use != "each" for spec in self._specs.values()):
            raise UserError("uploads.each: no item of this method is declared with use='each'")
        return tuple(self._kept)

    def containing(self, name: str) -> list[Upload]:
        """Return the individual uploads that contain an item declared with `use="each"`.

        Raises:
            MissingItemError: If the method does not declare the item.
            UserError: If the item is declared with another value of `use`.
        """
        self._check_declared(name)
        if name in self._specs and self._specs[name].use != "each":
            raise UserError(f"uploads.containing: item '{name}' is not declared with use='each'")
        return [u for u in self._kept if name in u.payload]
