"""Differential privacy at the client: private training and clipped or noisy uploads.

With `privacy.unit: record`, clients train with DP-SGD (`hetero_fl.privacy.dp_sgd`). With `local`,
clients clip their uploads and add noise. With `client`, clients clip their uploads, and the server
adds noise to the sum (`hetero_fl.privacy.server_side`).
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

# Name of the item with one bit per uploaded item, which is set if the norm of the update was within
# the clipping bound.
WITHIN_CLIP = "within_clip"
# Prefix of the names of report values that are factors on clipping bounds. The name of the item
# follows the prefix.
FACTOR = "clip "


def received_factors(received: Payload) -> dict[str, float]:
    """Return the factors on the clipping bounds in a broadcast, by item name."""
    return {
        name.removeprefix(FACTOR): float(str(value))
        for name, value in received.report.items()
        if name.startswith(FACTOR)
    }


class PrivateFederation(Protocol):
    """Attributes of a federation that differential privacy requires."""

    task: Task
    data: FederatedData
    client_infos: ClientDirectory
    privacy: PrivacyConfig | None
    noise: NoiseSource
    common: tuple[str, ...]


def uploadable_items(algorithm: Algorithm, federation: PrivateFederation) -> dict[str, ItemSpec]:
    """Return the declarations of the items that at least one client may upload, by name."""
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
    """Return the declarations of all items of an upload, by name.

    With adaptive clipping, the item `within_clip` is included.
    """
    specs = dict(algorithm.uploads)
    if federation.privacy is not None and federation.privacy.adaptive_clip is not None:
        specs[WITHIN_CLIP] = ItemSpec("counts", private=True)
    return specs


@dataclass(frozen=True)
class ClientPrivacy:
    """Differential privacy at the client.

    Args:
        config: The `privacy` section of the configuration.
        noise: Source of noise.
        specs: Declarations of all items of an upload, by name.
        items: Sorted names of the items that clients of this federation may upload.
        task_kind: Kind of the task, such as "multiclass".
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
        """Return an instance for a federation, or None if there is no `privacy` section."""
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
        """Return the backend that trains these clients; with `unit: record`, it adds noise."""
        if self.config.unit != "record":
            return backend
        return PrivacyBackend(backend, self.config, self.noise, list(clients))

    def make_ledger(self, backend: Backend) -> PrivacyLedger | None:
        """Return a backend that records the charges of steps, or None without `unit: record`."""
        return PrivacyLedger(backend, self.config) if self.config.unit == "record" else None

    def charges(
        self, steps: Sequence[PrivacyCharge], counts_read: bool, sent: bool
    ) -> tuple[PrivacyCharge, ...]:
        """Return the privacy charges of one client in a round.

        Args:
            steps: Charges of the client's training steps.
            counts_read: Whether the client's label counts were read.
            sent: Whether the client sent an upload.
        """
        if self.config.unit != "record":
            return (PrivacyCharge(1.0),) if sent else ()
        counts = label_counts_charge(self.task_kind, self.config) if counts_read else ()
        return (*steps, *counts)

    def release_upload(self, client: Participant, upload: Payload, received: Payload) -> Payload:
        """Return the upload to send: with votes, clipping and noise, as configured.

        Args:
            client: The client.
            upload: Upload returned by the method.
            received: Payload that the client received. Updates are the differences from its items.
        """
        privacy = self.config
        if privacy.unit == "record":
            return upload
        factors = received_factors(received)

        def bound(name: str) -> float:
            return privacy.clip_norm(name) * factors.get(name, 1.0)

        if privacy.votes:
            for name in [n for n in upload if self.specs[n].prediction_type]:
                upload.items_by_name[name] = predictions_to_votes(upload.item(name), bound(name))
        if privacy.unit == "client":
            clipped, within = clip_upload(upload, received, bound)
            if privacy.adaptive_clip is not None and upload:
                # Subtracting 1/2 reduces the sensitivity to 1/2 (Andrew et al. 2021, section 3).
                bits = torch.tensor([float(within.get(name, True)) - 0.5 for name in self.items])
                clipped.items_by_name[WITHIN_CLIP] = Item(bits, 1.0, "counts")
            return clipped
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
        """Return the standard deviation z·√m·C of the noise on one of m items.

        With `unit: local`, the standard deviation is twice as large, because the guarantee covers
        the replacement of an upload by any other upload.

        Args:
            name: Name of the item.
            factor: Factor on the clipping bound C.
            z: Noise multiplier. If None, the multiplier of the run is used.
        """
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
        """Format factors on clipping bounds as report values, without rounding errors.

        All values have the same width, so that the size of a report does not vary.
        """
        return {FACTOR + name: f"{factor:.16e}" for name, factor in sorted(factors.items())}
