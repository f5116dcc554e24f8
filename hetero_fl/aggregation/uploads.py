"""The uploads of a round, and the one rule by which they are combined: the weighted mean over the owners of each element.

That rule is FedAvg within an architecture, partial sharing, and the mean of predictions at once. Uploads are added in
client-id order, so that the order of arrival changes no bit, and are folded into means as they come; what a method declares
with `use="each"` is kept whole besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hetero_fl.aggregation.averaging import OwnerMeans
from hetero_fl.aggregation.noised import SumNoise
from hetero_fl.aggregation.sums import ItemSum
from hetero_fl.architecture import Tensors
from hetero_fl.errors import UserError, nearest
from hetero_fl.payload import ItemSpec, NoSuchItem, Payload
from hetero_fl.state import Card, in_order


@dataclass(frozen=True)
class Upload:
    """What one client sent."""

    card: Card
    payload: Payload

    @property
    def client(self) -> str:
        """The sender's id."""
        return self.card.id

    @property
    def group(self) -> str:
        """The architecture group of the sender's model."""
        return self.card.arch.id


class Uploads:
    """What arrived in a round.

    Args:
        uploads: in hand; more can be added, in client-id order.
        specs: what the method declares of its items; those used one by one are kept.
        common: prefixes of tensors that are averaged across architectures.
        noise: what is added to every sum, and what takes the place of its weight.
    """

    def __init__(
        self,
        uploads: Iterable[Upload] = (),
        specs: Mapping[str, ItemSpec] | None = None,
        common: Sequence[str] = (),
        noise: SumNoise | None = None,
    ) -> None:
        self._specs, self._common, self._noise = specs or {}, common, noise
        self._kept: list[Upload] = []
        self._senders: dict[str, list[Card]] = {}
        self._tensors: dict[str, ItemSum] = {}
        self._models: dict[str, OwnerMeans] = {}
        self._count = 0
        by_client = {u.client: u for u in uploads}
        for client in in_order(by_client):
            self.add(by_client[client])

    def __len__(self) -> int:
        return self._count

    def add(self, upload: Upload) -> None:
        """Fold one more upload in, or keep it. Clients come in the order of their ids."""
        self._count += 1
        whole = {}
        for name in upload.payload:
            self._senders.setdefault(name, []).append(upload.card)
            if self._spec(name).use == "each":
                whole[name] = upload.payload.item(name)
            else:
                self._fold(name, upload)
        if any(spec.use == "each" for spec in self._specs.values()):
            self._kept.append(Upload(upload.card, Payload(whole)))

    def _spec(self, name: str) -> ItemSpec:
        return self._specs.get(name, ItemSpec("params"))

    def _fold(self, name: str, upload: Upload) -> None:
        item = upload.payload.item(name)
        if isinstance(item.values, Tensor):
            self._tensors.setdefault(name, ItemSum()).add(item)
        else:
            group = "" if self._spec(name).across else upload.group
            self._models.setdefault(name, OwnerMeans(self._common)).add(group, item.values, float(item.weight))

    def _folded(self, name: str) -> None:
        """Fold what was kept one by one, where its mean is asked for after all."""
        self._declared(name)
        if self._spec(name).use == "each" and name not in self._tensors and name not in self._models:
            for upload in self.having(name):
                self._fold(name, upload)

    def _declared(self, name: str) -> None:
        if self._specs and name not in self._specs:
            raise NoSuchItem(f"item {name!r} is not declared in `uploads`{nearest(name, self._specs)}")

    def senders(self, name: str) -> list[Card]:
        """Who sent the item. As below, raises NoSuchItem (a KeyError) for one that the method does not declare."""
        self._declared(name)
        return list(self._senders.get(name, []))

    def mean(self, name: str) -> Tensor | None:
        """Σ w·v / Σ w of the single-tensor items of that name, element by element; None if nobody sent it."""
        self._folded(name)
        if self._noise is not None and self._noise.sends(name):
            return self._noise.mean(name, self._tensors[name].total if name in self._tensors else None)
        return self._tensors[name].mean if name in self._tensors else None

    def total(self, name: str) -> tuple[Tensor, Tensor]:
        """(Σ values·weight, Σ weight) of the single-tensor items of that name. Raises KeyError if nobody sent it."""
        self._folded(name)
        if self._noise is not None and self._noise.sends(name):
            return self._noise.total(name, self._tensors[name].total if name in self._tensors else None)
        return self._tensors[name].total

    def mean_by_group(self, name: str) -> dict[str, Tensors]:
        """For each architecture group the mean over the owners of each tensor that its members sent under that name; all
        under "" where the item was declared with `across`."""
        self._folded(name)
        means = self._models[name].by_group() if name in self._models else {}
        if self._noise is None:
            return means
        return self._noise.by_group(name, means, self._models[name].weights_by_group() if name in self._models else {})

    def weights_by_group(self, name: str) -> dict[str, dict[str, float]]:
        """The sum of weights behind each tensor of `mean_by_group`."""
        self._folded(name)
        if self._noise is not None:
            return self._noise.weights_by_group(name)
        return self._models[name].weights_by_group() if name in self._models else {}

    @property
    def each(self) -> Iterator[Upload]:
        """The single uploads, with the items that were declared with `use="each"`.

        Raises UserError if there are none: what is only summed is not kept.
        """
        if self._count and all(spec.use != "each" for spec in self._specs.values()):
            raise UserError("uploads.each: no item of this method is declared with use='each'")
        return iter(self._kept)

    def having(self, name: str) -> list[Upload]:
        """The single uploads with that item, which has to be declared with `use="each"`."""
        self._declared(name)
        if name in self._specs and self._specs[name].use != "each":
            raise UserError(f"uploads.having: item '{name}' is not declared with use='each'")
        return [u for u in self._kept if name in u.payload]
