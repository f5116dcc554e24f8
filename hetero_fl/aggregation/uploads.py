"""Aggregation of the uploads of a round by weighted means or robust rules.

An upload consists of items (see `hetero_fl.core.payload.Item`). Uploads are accumulated in the
order of client ids. Items that are declared with `use="each"` are also stored individually. Robust
rules (`hetero_fl.robustness.rules`) can replace the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from hetero_fl.aggregation.means import ItemSum, OwnerMeans, mean_of_items
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Item, ItemSpec, MissingItemError, Payload
from hetero_fl.robustness.robust_means import (
    PARAMETERS,
    AggregationRules,
    RobustItemMeans,
    RobustModelMeans,
)
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order


class CombineNoise(Protocol):
    """Interface of the noise that client-level differential privacy adds to the sums of a round."""

    def expects(self, name: str) -> bool:
        """Return whether clients may upload a single-tensor item with this name."""

    def total(self, name: str, totals: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the noisy totals Σ w v and Σ w of a single-tensor item.

        Args:
            name: Name of the item.
            totals: The totals without noise. If None, no client sent the item, and noise is added
                to zeros.
        """

    def mean(self, name: str, totals: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the noisy mean of a single-tensor item. See `total` for the arguments."""

    def by_group(
        self,
        name: str,
        means: Mapping[str, Tensors],
        weights: Mapping[str, Mapping[str, float]],
        senders: Sequence[ClientInfo],
    ) -> dict[str, Tensors]:
        """Return the noisy means of named tensors for every group whose clients may send the item.

        Args:
            name: Name of the item.
            means: Means without noise, keyed by group and tensor name. Groups that did not send the
                item are missing.
            weights: Total weight of each mean, keyed by group and tensor name.
            senders: The clients that sent the item.
        """

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the expected number of clients in each mean, keyed by group and tensor name."""

    def senders(self, name: str) -> list[ClientInfo]:
        """Return one client of each set of clients with equal settings that may send the item."""


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


class Uploads:
    """Uploads of a round, with methods for their means and sums.

    Args:
        uploads: The first uploads, in any order. Further uploads are added by `add`.
        specs: Declarations of the method's items, keyed by name. If None, items of any name are
            accepted.
        common: Prefixes of the names of tensors that are averaged across architectures.
        rules: Robust aggregation rules. If None, items are averaged.
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
        rules: AggregationRules | None = None,
        noise: CombineNoise | None = None,
    ) -> None:
        self._specs = specs or {}
        self._common = common
        self._rules = rules
        self._noise = noise
        self.aggregated_items: set[tuple[str, str]] = set()
        self._kept: list[Upload] = []
        self._senders: dict[str, list[ClientInfo]] = {}
        self._tensors: dict[str, ItemSum | RobustItemMeans] = {}
        self._models: dict[str, OwnerMeans | RobustModelMeans] = {}
        self._count = 0
        by_client = {u.client: u for u in uploads}
        for client in natural_order(by_client):
            self.add(by_client[client])

    @classmethod
    def from_sums(
        cls,
        count: int,
        senders: Mapping[str, list[ClientInfo]],
        items: Mapping[str, ItemSum],
        models: Mapping[str, OwnerMeans],
        *,
        specs: Mapping[str, ItemSpec],
        noise: CombineNoise | None = None,
    ) -> Uploads:
        """Create the uploads of a round from sums over clients, as after secure aggregation.

        Args:
            count: Number of clients in the sums.
            senders: Clients that sent each item, keyed by item name.
            items: Accumulators of single-tensor items, keyed by item name.
            models: Means of named tensors, keyed by item name.
            specs: Declarations of the method's items, keyed by name.
            noise: Noise that is added to every sum. If None, no noise is added.
        """
        uploads = cls(specs=specs, noise=noise)
        uploads._count = count
        uploads._senders = dict(senders)
        uploads._tensors = dict(items)
        uploads._models = dict(models)
        return uploads

    def __len__(self) -> int:
        return self._count

    def add(self, upload: Upload) -> None:
        """Add an upload.

        Uploads must be added in the order of client ids, because the order affects the rounding of
        sums.
        """
        self._count += 1
        kept_items = {}
        for name in upload.payload:
            self._senders.setdefault(name, []).append(upload.client_info)
            if self._spec(name).use == "each":
                kept_items[name] = upload.payload.item(name)
            if self._spec(name).use != "each" or self._uses_rule(name):
                self._accumulate(name, upload)
        if any(spec.use == "each" for spec in self._specs.values()):
            self._kept.append(replace(upload, payload=Payload(kept_items)))

    def _spec(self, name: str) -> ItemSpec:
        return self._specs.get(name, ItemSpec("params"))

    def _uses_rule(self, name: str) -> bool:
        return self._rules is not None and self._rules.applies_to(self._spec(name))

    def _accumulate(self, name: str, upload: Upload) -> None:
        item = upload.payload.item(name)
        rules = self._rules if self._uses_rule(name) else None
        if isinstance(item.values, Tensor):
            if name not in self._tensors:
                # Rules for parameters need named tensors, so they do not apply to a single tensor.
                is_parameter = item.kind in PARAMETERS
                self._tensors[name] = (
                    RobustItemMeans(name, rules) if rules and not is_parameter else ItemSum()
                )
            self._tensors[name].add(item)
        else:
            if name not in self._models:
                client_infos = self._senders[name]
                self._models[name] = (
                    RobustModelMeans(name, rules, client_infos, self._common)
                    if rules
                    else OwnerMeans(self._common)
                )
            group = "" if self._spec(name).across_architectures else upload.group
            self._models[name].add(group, item.values, float(item.weight))

    def _prepare_aggregate(self, name: str) -> None:
        """Accumulate the stored uploads of an item when the mean or sum is first requested."""
        self._check_declared(name)
        if (
            self._spec(name).use == "each"
            and name not in self._tensors
            and name not in self._models
        ):
            for upload in self.containing(name):
                self._accumulate(name, upload)

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
            The mean, or None if no client sent the item. If `noise` is set and clients may send the
            item, the noisy mean is returned in both cases.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        self._prepare_aggregate(name)
        self.aggregated_items.add((name, self._spec(name).kind))
        if self._noise is not None and self._noise.expects(name):
            return self._noise.mean(
                name, self._tensors[name].total if name in self._tensors else None
            )
        return self._tensors[name].mean if name in self._tensors else None

    def total(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the totals Σ w v and Σ w of a single-tensor item, with noise if `noise` is set.

        For values that are already sums, the first total is Σ v.

        Raises:
            MissingItemError: If the method does not declare the item.
            KeyError: If no client sent the item and no noise is added to the sum.
        """
        self._prepare_aggregate(name)
        # No robust rule applies to a total. A note names the counts that are not protected.
        if self._spec(name).kind == "counts":
            self.aggregated_items.add((name, "counts"))
        if self._noise is not None and self._noise.expects(name):
            return self._noise.total(
                name, self._tensors[name].total if name in self._tensors else None
            )
        return self._tensors[name].total

    def mean_by_group(self, name: str) -> dict[str, Tensors]:
        """Return the mean of each named tensor of an item.

        The means are keyed by architecture group and tensor name. A mean is computed over the
        clients that sent the tensor. If the item was declared with `across_architectures`, the only
        group is "". If `noise` is set, the means are noisy, and groups that may send the item are
        included even if no client did. Otherwise, the result is empty if no client sent the item.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        self._prepare_aggregate(name)
        self.aggregated_items.add((name, "models"))
        means = self._models[name].by_group() if name in self._models else {}
        if self._noise is None:
            return means
        weights = self._models[name].weights_by_group() if name in self._models else {}
        return self._noise.by_group(name, means, weights, self._senders.get(name, []))

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the total weight of each mean of `mean_by_group`, with the same keys.

        If `noise` is set, the expected number of clients is returned instead.
        """
        self._prepare_aggregate(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].weights_by_group() if name in self._models else {}

    def counts_by_group(self, name: str) -> Mapping[str, Mapping[str, float]]:
        """Return the number of uploads in each mean of `mean_by_group`, with the same keys.

        If `noise` is set, the expected number is returned instead.
        """
        self._prepare_aggregate(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].counts_by_group() if name in self._models else {}

    def consensus(self, name: str, predictions: Mapping[str, Item]) -> Tensor | None:
        """Aggregate predictions that the server computed from individual uploads.

        Args:
            name: Name of the predictions, for notes that too few clients sent them.
            predictions: Items of kind `rows` with values of shape `[N, C]`, keyed by client id.

        Returns:
            The mean or the result of the robust rule for `rows`. None if `predictions` is empty.
        """
        self.aggregated_items.add((name, "rows"))
        client_ids = natural_order(predictions)
        if self._rules is None or not self._rules.applies_to(ItemSpec("rows")):
            ordered = [predictions[client_id] for client_id in client_ids]
            return mean_of_items(ordered) if ordered else None
        robust_means = RobustItemMeans(name, self._rules)
        for client_id in client_ids:
            robust_means.add(predictions[client_id])
        return robust_means.mean if client_ids else None

    def with_uploads(self, uploads: Iterable[Upload], specs: Mapping[str, ItemSpec]) -> Uploads:
        """Create an `Uploads` object with other uploads and the same robust rules.

        The items in `specs` are added to `aggregated_items` of this object.

        Args:
            uploads: The other uploads, for example decompressed copies of the uploads in this
                object.
            specs: Declarations of the items of the other uploads, keyed by name.
        """
        derived = Uploads(uploads, specs, rules=self._rules)
        self.aggregated_items |= {(name, "models") for name in specs}
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
