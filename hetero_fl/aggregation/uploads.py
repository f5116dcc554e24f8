"""The uploads of a round, and the one rule by which they are combined: the weighted mean over the owners of each element.

That rule is FedAvg within an architecture, partial sharing, and the mean of predictions at once. Uploads are added in
client-id order, so that the order of arrival changes no bit, and are folded into means as they come; what a method declares
with `use="each"` is kept whole besides. Where liars have to be borne, another rule stands in for the mean
(`hetero_fl.robustness.rules`), and the methods do not know: for it, all that it governs is kept until it is asked for.
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
    """Noise on the sums of a round, where clients are private."""

    def expects(self, name: str) -> bool:
        """Return whether clients may send single tensors under this item name."""

    def total(self, name: str, totals: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the noised totals of values and weights; `totals` is None if nobody sent any."""

    def mean(self, name: str, totals: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the noised mean."""

    def by_group(
        self,
        name: str,
        means: Mapping[str, Tensors],
        weights: Mapping[str, Mapping[str, float]],
        senders: Sequence[ClientInfo],
    ) -> dict[str, Tensors]:
        """Return the noised means of named tensors, for every group that may have sent some."""

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """Return the expected number of clients behind each of these means."""

    def senders(self, name: str) -> list[ClientInfo]:
        """Return one client of each kind that may send the item."""


@dataclass(frozen=True)
class Upload:
    """What one client sent. `staleness_weight`: what its staleness has left of every weight in it."""

    client_info: ClientInfo
    payload: Payload
    staleness_weight: float = 1.0

    @property
    def client(self) -> str:
        """The sender's id."""
        return self.client_info.client_id

    @property
    def group(self) -> str:
        """The architecture group of the sender's model."""
        return self.client_info.arch.spec_id


class Uploads:
    """What arrived in a round.

    Args:
        uploads: in hand; more can be added, in client-id order.
        specs: what the method declares of its items; those used one by one are kept.
        common: prefixes of tensors that are averaged across architectures.
        rules: what stands in for the mean; None: nothing does.
        noise: what is added to every sum, and what takes the place of its weight.
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
        self.combined: set[tuple[str, str]] = set()
        """What was asked for in one piece: names of items, each with the kind of what it was combined as."""
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
        specs: Mapping[str, ItemSpec],
        noise: CombineNoise | None = None,
    ) -> Uploads:
        """The uploads of so many clients of which only the sums are known, by item; none of them is kept one by one."""
        made = cls(specs=specs, noise=noise)
        made._count = count
        made._senders = dict(senders)
        made._tensors = dict(items)
        made._models = dict(models)
        return made

    def __len__(self) -> int:
        return self._count

    def add(self, upload: Upload) -> None:
        """Fold one more upload in, or keep it. Clients come in the order of their ids."""
        self._count += 1
        whole = {}
        for name in upload.payload:
            self._senders.setdefault(name, []).append(upload.client_info)
            self._staleness_weights.setdefault(name, []).append(upload.staleness_weight)
            if self._spec(name).use == "each":
                whole[name] = upload.payload.item(name)
            if self._spec(name).use != "each" or self._uses_rule(name):
                self._fold(name, upload)
        if any(spec.use == "each" for spec in self._specs.values()):
            self._kept.append(Upload(upload.client_info, Payload(whole)))

    def _spec(self, name: str) -> ItemSpec:
        return self._specs.get(name, ItemSpec("params"))

    def _uses_rule(self, name: str) -> bool:
        return self._rules is not None and self._rules.applies_to(self._spec(name))

    def _fold(self, name: str, upload: Upload) -> None:
        item = upload.payload.item(name)
        rules = self._rules if self._uses_rule(name) else None
        if isinstance(item.values, Tensor):
            if name not in self._tensors:
                # a tensor apart from its model: no rule is for these
                whole = item.kind in PARAMETERS
                self._tensors[name] = (
                    RobustItemMeans(name, rules, self._senders[name])
                    if rules and not whole
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
            group = "" if self._spec(name).across else upload.group
            self._models[name].add(group, item.values, float(item.weight))

    def _folded(self, name: str) -> None:
        """Fold what was kept one by one, where its mean is asked for after all."""
        self._declared(name)
        if (
            self._spec(name).use == "each"
            and name not in self._tensors
            and name not in self._models
        ):
            for upload in self.having(name):
                self._fold(name, upload)

    def _declared(self, name: str) -> None:
        if self._specs and name not in self._specs:
            raise MissingItemError(
                f"item {name!r} is not declared in `uploads`{suggest_or_list(name, self._specs)}"
            )

    def senders(self, name: str) -> list[ClientInfo]:
        """Return the clients that sent the item; under noise, which hides them, one of each kind that may have.

        Raises:
            MissingItemError: If the method does not declare the item.
        """
        self._declared(name)
        if self._noise is not None:
            return self._noise.senders(name)
        return list(self._senders.get(name, []))

    def is_available(self, name: str) -> bool:
        """Whether there is something to combine: somebody sent it or, where noise hides who did, somebody may have."""
        return bool(self.senders(name))

    def staleness_weights(self, name: str) -> list[float]:
        """Return the staleness weight of each of `senders`; 1 in a synchronous round."""
        return list(self._staleness_weights.get(name, [1.0] * len(self.senders(name))))

    def mean(self, name: str) -> Tensor | None:
        """Σ w·v / Σ w of the single-tensor items of that name, element by element; None if nobody sent it."""
        self._folded(name)
        self.combined.add((name, self._spec(name).kind))
        if self._noise is not None and self._noise.expects(name):
            return self._noise.mean(
                name, self._tensors[name].total if name in self._tensors else None
            )
        return self._tensors[name].mean if name in self._tensors else None

    def total(self, name: str) -> tuple[Tensor, Tensor]:
        """(Σ values·weight, Σ weight) of the single-tensor items of that name. Raises KeyError if nobody sent it."""
        self._folded(name)
        if self._spec(name).kind == "counts":
            self.combined.add((name, "counts"))
        if self._noise is not None and self._noise.expects(name):
            return self._noise.total(
                name, self._tensors[name].total if name in self._tensors else None
            )
        return self._tensors[name].total

    def mean_by_group(self, name: str) -> dict[str, Tensors]:
        """For each architecture group the mean over the owners of each tensor that its members sent under that name; all
        under "" where the item was declared with `across`."""
        self._folded(name)
        self.combined.add((name, "models"))
        means = self._models[name].by_group() if name in self._models else {}
        if self._noise is None:
            return means
        weights = self._models[name].weights_by_group() if name in self._models else {}
        return self._noise.by_group(name, means, weights, self._senders.get(name, []))

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """The sum of weights behind each tensor of `mean_by_group`."""
        self._folded(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].weights_by_group() if name in self._models else {}

    def counts_by_group(self, name: str) -> Mapping[str, Mapping[str, float]]:
        """Return how many uploads are behind each tensor of `mean_by_group`; under noise, how many are expected."""
        self._folded(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].counts_by_group() if name in self._models else {}

    def consensus(self, name: str, predictions: Mapping[str, Item]) -> Tensor | None:
        """What is made of one prediction `[N, C]` a client, by id, that the server has from single uploads (of their models,
        of codes): as `mean` of items of kind "rows". `name`: what a rule remembers it by. None if nobody says anything."""
        self.combined.add((name, "rows"))
        ids = natural_order(predictions)
        if self._rules is None or not self._rules.applies_to(ItemSpec("rows")):
            return mean_of_items([predictions[id] for id in ids]) if ids else None
        client_infos = {upload.client: upload.client_info for upload in self._kept}
        ruled = RobustItemMeans(name, self._rules, [client_infos[id] for id in ids])
        for id in ids:
            ruled.add(predictions[id])
        return ruled.mean if ids else None

    def with_uploads(self, uploads: Iterable[Upload], specs: Mapping[str, ItemSpec]) -> Uploads:
        """Others in place of these, under the same rules: what the server made of single uploads."""
        made = Uploads(uploads, specs, rules=self._rules)
        self.combined |= {(name, "models") for name in specs}
        return made

    def prepare(self, server: Participant) -> Plan[None]:
        """What a rule has to compute before it is asked; on a copy of the server, which is not to be used afterwards."""
        for models in self._models.values():
            if isinstance(models, RobustModelMeans) and models.rules.of_parameters.uses_root:
                models.roots = yield from root_models(server, models.sent)

    @property
    def each(self) -> Sequence[Upload]:
        """The single uploads, with the items that were declared with `use="each"`.

        Raises UserError if there are none: what is only summed is not kept.
        """
        if self._count and all(spec.use != "each" for spec in self._specs.values()):
            raise UserError("uploads.each: no item of this method is declared with use='each'")
        return tuple(self._kept)

    def having(self, name: str) -> list[Upload]:
        """The single uploads with that item, which has to be declared with `use="each"`."""
        self._declared(name)
        if name in self._specs and self._specs[name].use != "each":
            raise UserError(f"uploads.having: item '{name}' is not declared with use='each'")
        return [u for u in self._kept if name in u.payload]
