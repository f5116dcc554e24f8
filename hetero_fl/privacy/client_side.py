"""Differential privacy on the client: guarded training, and bounds on uploads.

With `privacy.unit` "record" training is DP-SGD (`hetero_fl.privacy.dp_sgd`); with "local" each upload
is noised here; with "client" it is only bounded here, and the server noises the sum
(`hetero_fl.privacy.server_side`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import permitted_part
from hetero_fl.config.privacy import PrivacyConfig
from hetero_fl.core.participant import ClientDirectory, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.task import Task
from hetero_fl.data import FederatedData
from hetero_fl.engine.driver import Backend
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.dp_sgd import PrivacyBackend, PrivacyLedger
from hetero_fl.privacy.mechanisms import (
    NoiseSource,
    add_noise,
    clip_upload,
    label_counts_charge,
    predictions_to_votes,
)

WITHIN = "within_clip"  # of each item, whether it was within its bound
FACTOR = "clip "  # before an item's name: the factor on its bound, in a broadcast's report


def received_factors(received: Payload) -> dict[str, float]:
    """The factors on bounds that came with a broadcast."""
    told = {
        n.removeprefix(FACTOR): str(v) for n, v in received.report.items() if n.startswith(FACTOR)
    }
    return {name: float(factor) for name, factor in told.items()}


class PrivateFederation(Protocol):
    """What privacy reads of a federation."""

    task: Task
    data: FederatedData
    client_infos: ClientDirectory
    privacy: PrivacyConfig | None
    noise: NoiseSource
    common: tuple[str, ...]


def uploadable_items(algorithm: Algorithm, federation: PrivateFederation) -> dict[str, ItemSpec]:
    """Return the declared items that some client of the federation may upload."""
    settings = [profile.settings for profile in federation.client_infos.profiles]
    allowed = {share for s in settings for share in s.shares}
    allowed |= {"parameters" for s in settings if permitted_part(s.shares)}
    num_proxy = federation.data.n_proxy
    return {
        name: spec
        for name, spec in algorithm.uploads.items()
        if spec.needed_share in allowed
        and (num_proxy or spec.kind != "rows" or spec.rows_of != "proxy")
    }


def upload_specs(algorithm: Algorithm, federation: PrivateFederation) -> dict[str, ItemSpec]:
    """Return the declarations of all that an upload may hold, adaptive clipping included."""
    specs = dict(algorithm.uploads)
    if federation.privacy is not None and federation.privacy.adaptive_clip is not None:
        specs[WITHIN] = ItemSpec("counts", private=True)
    return specs


@dataclass(frozen=True)
class ClientPrivacy:
    """The client's side of a `privacy` section.

    Args:
        config: The section.
        noise: Source of noise.
        specs: Declarations of all that an upload may hold.
        items: Names of the items that clients of this federation send, sorted.
        task_kind: Kind of the task.
    """

    config: PrivacyConfig
    noise: NoiseSource
    specs: Mapping[str, ItemSpec]
    items: tuple[str, ...]
    task_kind: str

    @classmethod
    def from_federation(
        cls, algorithm: Algorithm, federation: PrivateFederation
    ) -> ClientPrivacy | None:
        """Return the client's side of the federation's `privacy` section; None without one."""
        if federation.privacy is None:
            return None
        return cls(
            federation.privacy,
            federation.noise,
            upload_specs(algorithm, federation),
            tuple(sorted(uploadable_items(algorithm, federation))),
            federation.task.kind,
        )

    def make_backend(self, clients: Iterable[Participant], backend: Backend) -> Backend:
        """Return the backend for these clients' training."""
        if self.config.unit != "record":
            return backend
        return PrivacyBackend(backend, self.config, self.noise, list(clients))

    def make_ledger(self, backend: Backend) -> PrivacyLedger | None:
        """Return a backend that notes what each step costs; None if steps cost nothing."""
        return PrivacyLedger(backend, self.config) if self.config.unit == "record" else None

    def charges(
        self, steps: Sequence[PrivacyCharge], counts_read: bool, sent: bool
    ) -> tuple[PrivacyCharge, ...]:
        """Return what a round costs a client.

        Args:
            steps: What its training steps cost.
            counts_read: Whether its label counts were read.
            sent: Whether it uploads anything.
        """
        if self.config.unit != "record":
            return (PrivacyCharge(1.0),) if sent else ()
        counts = label_counts_charge(self.task_kind, self.config) if counts_read else ()
        return (*steps, *counts)

    def release_upload(self, client: Participant, upload: Payload, received: Payload) -> Payload:
        """Return the upload as it may leave the client: with votes, bounds and noise as configured."""
        privacy = self.config
        if privacy.unit == "record":
            return upload
        factors = received_factors(received)

        def bound(name: str) -> float:
            return privacy.clip_norm(name) * factors.get(name, 1.0)

        if privacy.votes:
            for name in [n for n in upload if self.specs[n].says]:
                upload.items_[name] = predictions_to_votes(upload.item(name), bound(name))
        if privacy.unit == "client":
            released_, within = clip_upload(upload, received, bound)
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

        return clip_upload(upload, received, bound, add)[0]

    def deviation(self, name: str, factor: float = 1.0, z: float | None = None) -> float:
        """Standard deviation of the noise on one item: z·√m·C; local: twice that, for any upload may take another's place."""
        twice = 2 if self.config.unit == "local" else 1
        return (
            twice
            * (z or self.config.known_noise_multiplier)
            * len(self.items) ** 0.5
            * self.config.clip_norm(name)
            * factor
        )

    @staticmethod
    def factors_item(factors: Mapping[str, float]) -> dict[str, str]:
        """Bounds' factors as they go with a broadcast: to the bit, in a fixed width."""
        return {FACTOR + name: f"{factor:.16e}" for name, factor in sorted(factors.items())}
