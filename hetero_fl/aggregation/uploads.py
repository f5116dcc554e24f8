"""The uploads of a round, and their weighted means over the owners of each element.

Uploads are accumulated in the order of client ids as they arrive; items declared with `use="each"`
are also kept individually. Robust rules (`hetero_fl.robustness.rules`) can replace the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hetero_fl.aggregation.means import ItemSum, OwnerMeans, mean_of_items
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, MissingItemError, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.robustness.robust_means import (
    PARAMETERS,
    AggregationRules,
    RobustItemMeans,
    RobustModelMeans,
)
from hetero_fl.robustness.rules import root_models
from hetero_fl.utils.errors import UserError, suggest_or_list
from hetero_fl.utils.ordering import natural_order


class CombineNoise(Protocol):
    """Interface for the noise of client-level differential privacy on the sums of a round."""

    def expects(self, name: str) -> bool:
        """Return whether clients may send a single tensor as the item with this name."""

    def total(self, name: str, totals: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the totals of values and weights with noise; `totals` is None without uploads."""

    def mean(self, name: str, totals: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the mean with noise; `totals` is None without uploads."""

    def by_group(
        self,
        name: str,
        means: Mapping[str, Tensors],
        weights: Mapping[str, Mapping[str, float]],
        senders: Sequence[ClientInfo],
    ) -> dict[str, Tensors]:
        """Return the means with noise, for every group whose clients may have sent the item.

        Args:
            name: Name of the item.
            means: Means by group and tensor name, for groups that sent the item.
            weights: Sum of the weights of each mean.
            senders: The clients that sent the item.
        """

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the expected number of clients in each mean, by group and tensor name."""

    def senders(self, name: str) -> list[ClientInfo]:
        """Return one client of each profile that may send the item."""


@dataclass(frozen=True)
class Upload:
    """The upload of one client.

    Attributes:
        client_info: The client.
        payload: The items.
        staleness_weight: Factor by which all weights were multiplied because of staleness.
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
    """The uploads of a round and their means and sums.

    Args:
        uploads: Uploads, which are added in the order of client ids. Further uploads can be added
            later.
        specs: The items that the method declares, by name.
        common: Prefixes of the names of tensors that are averaged across architectures.
        rules: Robust aggregation rules that replace the mean.
        noise: Noise that is added to every sum.

    Attributes:
        aggregated_items: Items whose mean or sum has been requested, as pairs of name and kind.
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
        self._staleness_weights: dict[str, list[float]] = {}
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
        """Create the uploads of a round from sums, if individual uploads are not known.

        Args:
            count: Number of clients.
            senders: The clients that sent each item.
            items: Sums of single-tensor items by name.
            models: Means of named tensors by item name.
            specs: The items that the method declares, by name.
            noise: Noise that is added to every sum.
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
        """Add an upload; uploads must be added in the order of their client ids."""
        self._count += 1
        kept_items = {}
        for name in upload.payload:
            self._senders.setdefault(name, []).append(upload.client_info)
            self._staleness_weights.setdefault(name, []).append(upload.staleness_weight)
            if self._spec(name).use == "each":
                kept_items[name] = upload.payload.item(name)
            if self._spec(name).use != "each" or self._uses_rule(name):
                self._accumulate(name, upload)
        if any(spec.use == "each" for spec in self._specs.values()):
            self._kept.append(Upload(upload.client_info, Payload(kept_items)))

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
                    RobustItemMeans(name, rules, self._senders[name])
                    if rules and not is_parameter
                    else ItemSum()
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
        """Accumulate the kept uploads of an item when its mean or sum is first requested."""
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

        With noise, which hides the senders, return one client of each profile that may send it.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        self._check_declared(name)
        if self._noise is not None:
            return self._noise.senders(name)
        return list(self._senders.get(name, []))

    def is_available(self, name: str) -> bool:
        """Return whether a client sent the item or, with noise, may have sent it."""
        return bool(self.senders(name))

    def staleness_weights(self, name: str) -> list[float]:
        """Return the staleness weight of each client in `senders`; 1 in synchronous rounds."""
        return list(self._staleness_weights.get(name, [1.0] * len(self.senders(name))))

    def mean(self, name: str) -> Tensor | None:
        """Return the elementwise mean of a single-tensor item, or None if no client sent it."""
        self._prepare_aggregate(name)
        self.aggregated_items.add((name, self._spec(name).kind))
        if self._noise is not None and self._noise.expects(name):
            return self._noise.mean(
                name, self._tensors[name].total if name in self._tensors else None
            )
        return self._tensors[name].mean if name in self._tensors else None

    def total(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the totals Σ w v and Σ w of a single-tensor item.

        Raises:
            KeyError: If no client sent the item.
        """
        self._prepare_aggregate(name)
        if self._spec(name).kind == "counts":
            self.aggregated_items.add((name, "counts"))
        if self._noise is not None and self._noise.expects(name):
            return self._noise.total(
                name, self._tensors[name].total if name in self._tensors else None
            )
        return self._tensors[name].total

    def mean_by_group(self, name: str) -> dict[str, Tensors]:
        """Return the mean of each named tensor of an item over its owners, by architecture group.

        If the item was declared with `across_architectures`, there is one group "".
        """
        self._prepare_aggregate(name)
        self.aggregated_items.add((name, "models"))
        means = self._models[name].by_group() if name in self._models else {}
        if self._noise is None:
            return means
        weights = self._models[name].weights_by_group() if name in self._models else {}
        return self._noise.by_group(name, means, weights, self._senders.get(name, []))

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the sum of the weights of each tensor that `mean_by_group` returns."""
        self._prepare_aggregate(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].weights_by_group() if name in self._models else {}

    def counts_by_group(self, name: str) -> Mapping[str, Mapping[str, float]]:
        """Return the number of uploads of each tensor that `mean_by_group` returns.

        With noise, this is the expected number.
        """
        self._prepare_aggregate(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].counts_by_group() if name in self._models else {}

    def consensus(self, name: str, predictions: Mapping[str, Item]) -> Tensor | None:
        """Return the mean of predictions that the server computed from individual uploads.

        Args:
            name: Name of the item, under which robust aggregation rules keep their state.
            predictions: Predictions of each client by id, shape `[N, C]`.

        Returns:
            The mean, computed as for items of kind "rows"; None without predictions.
        """
        self.aggregated_items.add((name, "rows"))
        client_ids = natural_order(predictions)
        if self._rules is None or not self._rules.applies_to(ItemSpec("rows")):
            ordered = [predictions[client_id] for client_id in client_ids]
            return mean_of_items(ordered) if ordered else None
        client_infos = {upload.client: upload.client_info for upload in self._kept}
        senders = [client_infos[client_id] for client_id in client_ids]
        robust_means = RobustItemMeans(name, self._rules, senders)
        for client_id in client_ids:
            robust_means.add(predictions[client_id])
        return robust_means.mean if client_ids else None

    def with_uploads(self, uploads: Iterable[Upload], specs: Mapping[str, ItemSpec]) -> Uploads:
        """Create uploads that are aggregated by the same robust rules.

        Args:
            uploads: The uploads, for example decompressed copies of the present ones.
            specs: Declarations of the items of these uploads, by name.
        """
        derived = Uploads(uploads, specs, rules=self._rules)
        self.aggregated_items |= {(name, "models") for name in specs}
        return derived

    def prepare(self, server: Participant) -> Plan[None]:
        """Train the root models that some robust rules need, before models are aggregated.

        Args:
            server: A copy of the server, which must not be used afterwards.
        """
        for models in self._models.values():
            if isinstance(models, RobustModelMeans) and models.rules.of_parameters.uses_root:
                models.roots = yield from root_models(server, models.sent)

    @property
    def each(self) -> Sequence[Upload]:
        """The individual uploads, with the items that are declared with `use="each"`.

        Raises:
            UserError: If no item is declared with `use="each"`.
        """
        if self._count and all(spec.use != "each" for spec in self._specs.values()):
            raise UserError("uploads.each: no item of this method is declared with use='each'")
        return tuple(self._kept)

    def containing(self, name: str) -> list[Upload]:
        """Return the individual uploads that contain an item declared with `use="each"`.

        Raises:
            UserError: If the item is not declared with `use="each"`.
        """
        self._check_declared(name)
        if name in self._specs and self._specs[name].use != "each":
            raise UserError(f"uploads.containing: item '{name}' is not declared with use='each'")
        return [u for u in self._kept if name in u.payload]
