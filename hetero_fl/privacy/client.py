"""What differential privacy does at a client: a guard around its steps, a bound (and noise) on its upload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload, report_with_loss
from hetero_fl.engine.driver import Backend
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.dp_sgd import PrivacyBackend, PrivacyLedger
from hetero_fl.privacy.mechanisms import (
    NoiseSource,
    add_noise,
    label_counts_charge,
    predictions_to_votes,
    release_upload,
)

if TYPE_CHECKING:
    from hetero_fl.federation.federation import FederationSpec

WITHIN = "within_clip"  # of each item, whether it was within its bound
FACTOR = "clip "  # before an item's name: the factor on its bound, in a broadcast's report


def received_factors(received: Payload) -> dict[str, float]:
    """The factors on bounds that came with a broadcast."""
    told = {
        n.removeprefix(FACTOR): str(v) for n, v in received.report.items() if n.startswith(FACTOR)
    }
    return {name: float(factor) for name, factor in told.items()}


def uploadable_items(algorithm: Algorithm, federation: FederationSpec) -> dict[str, ItemSpec]:
    """The items that some client may upload, as the method declares them."""
    given = {share for k in federation.client_infos.profiles for share in k.settings.shares}
    given |= {"parameters" for k in federation.client_infos.profiles if k.settings.shared_prefixes}
    proxy = federation.data.n_proxy
    return {
        n: spec
        for n, spec in algorithm.uploads.items()
        if spec.share in given and (proxy or spec.kind != "rows" or spec.rows_of != "proxy")
    }


@dataclass(frozen=True)
class ClientPrivacy:
    """The client's side of one `privacy` section; without one everything passes as it is."""

    privacy: PrivacyConfig | None
    noise: NoiseSource
    specs: Mapping[str, ItemSpec]  # of all that an upload may have
    items: tuple[str, ...]  # those of them that the method sends here, sorted
    kind: str  # of the task

    @classmethod
    def from_federation(cls, algorithm: Algorithm, federation: FederationSpec) -> ClientPrivacy:
        """As the federation has it."""
        privacy = federation.privacy
        specs = dict(algorithm.uploads)
        if privacy is not None and privacy.adaptive_clip is not None:
            specs[WITHIN] = ItemSpec("counts", private=True)
        items = tuple(sorted(uploadable_items(algorithm, federation)))
        return cls(privacy, federation.noise, specs, items, federation.task.kind)

    @property
    def unit(self) -> str:
        """record, client, local; or nothing."""
        return "" if self.privacy is None else str(self.privacy.unit)

    def make_backend(self, clients: Iterable[Participant], backend: Backend) -> Backend:
        """Who performs these clients' training."""
        if self.privacy is None or self.unit != "record":
            return backend
        return PrivacyBackend(backend, self.privacy, self.noise, list(clients))

    def make_ledger(self, backend: Backend) -> PrivacyLedger | None:
        """Who notes what a dry run of a plan costs, where steps cost anything."""
        if self.privacy is None or self.unit != "record":
            return None
        return PrivacyLedger(backend, self.privacy)

    def charges(
        self, steps: Sequence[PrivacyCharge], counts_read: bool, sent: bool
    ) -> tuple[PrivacyCharge, ...]:
        """What a round costs a client. `steps`: as a tally noted them; `counts_read`: whether its label counts were read; `sent`:
        whether it uploads anything."""
        if self.privacy is None:
            return ()
        if self.unit == "record":
            return (*steps, *(label_counts_charge(self.kind, self.privacy) if counts_read else ()))
        return (PrivacyCharge(1.0),) if sent else ()

    def release_upload(self, client: Participant, upload: Payload, received: Payload) -> Payload:
        """The upload as it may leave."""
        privacy = self.privacy
        if privacy is None or privacy.unit == "record":
            return upload
        factors = received_factors(received)

        def bound(name: str) -> float:
            return privacy.clip_norm(name) * factors.get(name, 1.0)

        if privacy.votes:
            for name in [n for n in upload if self.specs[n].says]:
                upload.items_[name] = predictions_to_votes(upload.item(name), bound(name))
        if privacy.unit == "client":
            released_, within = release_upload(upload, received, bound)
            if privacy.adaptive_clip is not None and upload:
                # A bit less one half moves a sum by one half (Andrew et al. 2021, section 3).
                bits = torch.tensor([float(within.get(name, True)) - 0.5 for name in self.items])
                released_.items_[WITHIN] = Item(bits, 1.0, "counts")
            return released_
        stream = client.stream("release")

        def add(name: str, item: Item) -> Item:
            deviation = self.deviation(name)
            return add_noise(
                item,
                deviation,
                lambda like, sd, part: self.noise.normal(like, sd, *stream, name, part),
            )

        return release_upload(upload, received, bound, add)[0]

    def deviation(self, name: str, factor: float = 1.0, z: float | None = None) -> float:
        """Standard deviation of the noise on one item: z·√m·C; local: twice that, for any upload may take another's place."""
        assert self.privacy is not None
        twice = 2 if self.privacy.unit == "local" else 1
        return (
            twice
            * (z or self.privacy.known_noise_multiplier)
            * len(self.items) ** 0.5
            * self.privacy.clip_norm(name)
            * factor
        )

    @staticmethod
    def factors_item(factors: Mapping[str, float]) -> dict[str, str]:
        """Bounds' factors as they go with a broadcast: to the bit, in a fixed width."""
        return {FACTOR + name: f"{factor:.16e}" for name, factor in sorted(factors.items())}

    def report(
        self, loss: float | None, logged: Mapping[str, float] | None = None
    ) -> dict[str, str]:
        """Return the report of an upload; empty where anything is private."""
        return report_with_loss(loss, logged) if self.privacy is None else {}
