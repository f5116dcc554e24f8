"""Differential privacy at the client: private training and clipped or noisy uploads.

With `privacy.unit: record`, clients train with DP-SGD (`hetero_fl.privacy.dp_sgd`). With `local`,
clients clip their uploads and add noise. With `client`, clients clip their uploads, and the server
adds noise to the sum (`hetero_fl.privacy.server_side`). An upload consists of named items (`Item`),
such as parameters or predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.round_parts import permitted_part
from hetero_fl.config.protection import PrivacyConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientDirectory, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Step
from hetero_fl.core.task import Task
from hetero_fl.data import FederatedData
from hetero_fl.engine.driver import Backend, ReviewedBackend
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.dp_sgd import PrivacyBackend, is_private, step_charge
from hetero_fl.privacy.noise import COUNTS, NoiseSource
from hetero_fl.utils.seeding import Key

# Name of the item that contains one bit for each uploaded item. The bit is set if the norm of the
# update was within the clipping bound.
WITHIN_CLIP = "within_clip"
# The factor on the clipping bound of an item is a value in the report of a broadcast. The name of
# the value is this prefix followed by the name of the item.
FACTOR = "clip "


def received_factors(received: Payload) -> dict[str, float]:
    """Return the factors on the clipping bounds in a broadcast, keyed by item name.

    The mapping is empty if the server does not adapt the clipping bounds.
    """
    return {
        name.removeprefix(FACTOR): float(str(value))
        for name, value in received.report.items()
        if name.startswith(FACTOR)
    }


# Each item i of an upload with up to m items is clipped to a norm C_i and receives noise with a
# standard deviation of z·√m·C_i. Scaled by 1/C_i and concatenated, the items are one vector of norm
# at most √m with noise z·√m. This is one Gaussian mechanism with multiplier z (McMahan et al. 2018,
# section 3, "per-layer clipping").

VALUES = "values"
WEIGHT = "weight"


def clip_item(item: Item, received: Item | None, bound: float) -> tuple[Item, bool]:
    """Clip the update in an item to a maximum L2 norm and set the weight of the item to 1.

    The update in an item of kind "params" is the difference from the received parameters. The
    update in any other item is the values. The weights of "class_sums", which are counts of rows,
    are part of the clipped vector.

    Args:
        item: Item to clip.
        received: Received item of the same name. If None, the update is the sent values.
        bound: Maximum L2 norm.

    Returns:
        The clipped item, and whether the norm of the update was within the bound.
    """
    vector = _flatten_item(item)
    reference = reference_tensors(item, received)
    update = {n: t - reference[n] for n, t in vector.items()}
    squares = [t.double().square().sum() for t in update.values()]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    # The norm of invalid numbers is not within any bound.
    is_within = norm <= bound
    if not is_within:
        vector = {n: reference[n] + t * (bound / norm) for n, t in update.items()}
    return _unflatten_item(item, vector), is_within


def _flatten_item(item: Item) -> Tensors:
    """Return all numbers of an item that the receiver uses, as named tensors."""
    if isinstance(item.values, Mapping):
        return dict(item.values)
    if item.kind == "class_sums":
        return {VALUES: item.values, WEIGHT: torch.as_tensor(item.weight, dtype=item.values.dtype)}
    return {VALUES: item.values}


def _unflatten_item(like: Item, vector: Tensors) -> Item:
    if isinstance(like.values, Mapping):
        return Item(vector, 1.0, like.kind)
    weight = vector[WEIGHT].clamp(min=0) if like.kind == "class_sums" else 1.0
    values = vector[VALUES].clamp(min=0) if like.kind == "counts" else vector[VALUES]
    return Item(values, weight, like.kind)


def reference_tensors(item: Item, received: Item | None) -> Tensors:
    """Return the tensors that are subtracted from an item to compute the update.

    For an item of kind "params", these are the received tensors of the same name and shape. For all
    other tensors, zeros are returned.

    Args:
        item: The sent item.
        received: Received item of the same name. If None, all returned tensors are zeros.
    """
    known = received.tensors if received is not None and item.kind == "params" else {}
    vector = _flatten_item(item)
    return {
        n: known[n] if n in known and known[n].shape == t.shape else torch.zeros_like(t)
        for n, t in vector.items()
    }


def predictions_to_votes(item: Item, norm: float) -> Item:
    """Replace predictions `[D, C]` by one-hot votes, scaled to an L2 norm.

    The class with the most votes after noise is added is the result of GNMax (Papernot et al.
    2018). This class does not depend on the scale of the votes and the noise.

    Args:
        item: Item with the predictions.
        norm: L2 norm of the votes of all rows.
    """
    assert isinstance(item.values, Tensor)
    votes = F.one_hot(item.values.argmax(-1), item.values.shape[-1]).to(item.values.dtype)
    return Item(votes * (norm / max(1, len(votes)) ** 0.5), 1.0, item.kind)


class PrivateFederation(Protocol):
    """Protocol for the attributes of a federation that differential privacy uses.

    Attributes:
        task: Task of the federation.
        data: Data sets of the clients.
        client_infos: Descriptions of the clients.
        privacy: The `privacy` section of the configuration, or None without differential privacy.
        noise: Source of noise.
        common: Prefixes of the names of tensors that are averaged across architectures.
    """

    task: Task
    data: FederatedData
    client_infos: ClientDirectory
    privacy: PrivacyConfig | None
    noise: NoiseSource
    common: tuple[str, ...]


def uploadable_items(algorithm: Algorithm, federation: PrivateFederation) -> dict[str, ItemSpec]:
    """Return the specifications of the items that at least one client may upload.

    Items with a row for each proxy example are left out if there are no proxy examples.

    Args:
        algorithm: Method of the run.
        federation: Federation of the run.

    Returns:
        Item specifications, keyed by item name.
    """
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
    """Return the specifications of all items of an upload, keyed by item name.

    With adaptive clipping, the item `within_clip` is included.
    """
    specs = dict(algorithm.uploads)
    if federation.privacy is not None:
        # These weights are counts of rows with noise.
        noisy = [name for name, spec in specs.items() if spec.kind == "class_sums"]
        specs |= {name: replace(specs[name], max_weight=math.inf) for name in noisy}
    if federation.privacy is not None and federation.privacy.adaptive_clip is not None:
        specs[WITHIN_CLIP] = ItemSpec("counts", private=True)
    return specs


@dataclass(frozen=True)
class ClientPrivacy:
    """Clipping, noise and privacy charges at the client.

    Args:
        config: The `privacy` section of the configuration.
        noise: Source of noise.
        specs: Specifications of all items of an upload, keyed by item name.
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
        """Return an instance for a federation, or None without a `privacy` section."""
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
        """Return the backend that trains the given clients.

        With `unit: record`, this is a `PrivacyBackend`, which trains with DP-SGD. Otherwise,
        `backend` is returned.
        """
        if self.config.unit != "record":
            return backend
        return PrivacyBackend(backend, self.config, self.noise, list(clients))

    def charge_steps(self, backend: Backend, charges: list[PrivacyCharge]) -> Backend:
        """Return a backend that adds the privacy charges of the steps on private rows to a list.

        Without `unit: record`, `backend` is returned, because steps are not charged.

        Args:
            backend: Backend that runs the steps. With a backend for dry runs, the charges are
                computed without training.
            charges: List to which the charges are added.
        """

        def charge(client: Participant, step: Step) -> None:
            if is_private(step):
                charges.append(step_charge(client, step, self.config))

        return ReviewedBackend(backend, charge) if self.config.unit == "record" else backend

    def charges(
        self, steps: Sequence[PrivacyCharge], counts_read: bool, sent: bool
    ) -> tuple[PrivacyCharge, ...]:
        """Return the privacy charges of one client in a round.

        With `unit: record`, the training and the release of the label counts are charged.
        Otherwise, only the upload is charged.

        Args:
            steps: Charges of the client's steps on private rows (see `charge_steps`).
            counts_read: Whether the client's label counts were read.
            sent: Whether the client sent an upload.
        """
        if self.config.unit != "record":
            return (PrivacyCharge(1.0),) if sent else ()
        if not counts_read or self.task_kind == "regression":
            # The number of rows of a regression task is not private.
            return tuple(steps)
        scale = self.config.statistics_noise
        return (*steps, PrivacyCharge(1.0, scale=scale, once=COUNTS))

    def release_upload(self, client: Participant, upload: Payload, received: Payload) -> Payload:
        """Clip an upload and add noise, as configured.

        With `unit: record`, the upload is returned unchanged. With `unit: client`, the upload is
        clipped. With `unit: local`, noise is added as well. If the setting `votes` is True,
        predictions are first replaced by votes. With adaptive clipping, the item `within_clip` is
        added to the upload.

        Args:
            client: Client that sends the upload.
            upload: Upload returned by the method.
            received: Payload that the client received. For parameters, the difference from the
                received parameters is clipped.

        Returns:
            The upload to send.
        """
        unit = self.config.unit
        if unit == "record":
            return upload
        factors = received_factors(received)
        stream = client.stream("release") if unit == "local" else ()
        items = {}
        within = {}
        for name in upload:
            item = upload.item(name)
            bound = self.config.clip_norm(name) * factors.get(name, 1.0)
            if self.config.votes and self.specs[name].prediction_type:
                item = predictions_to_votes(item, bound)
            before = received.items_by_name.get(name)
            items[name], within[name] = clip_item(item, before, bound)
            if unit == "local":
                items[name] = self._add_noise(name, items[name], stream)
        if self.config.adaptive_clip is not None and upload:
            # Subtracting 1/2 reduces the sensitivity to 1/2 (Andrew et al. 2021, section 3).
            bits = torch.tensor([float(within.get(name, True)) - 0.5 for name in self.items])
            items[WITHIN_CLIP] = Item(bits, 1.0, "counts")
        return Payload(items, upload.report)

    def _add_noise(self, name: str, item: Item, stream: Sequence[Key]) -> Item:
        """Add noise to all numbers in an item. Noisy counts are clamped to at least 0."""
        deviation = self.deviation(name)
        noisy = {
            part: tensor + self.noise.normal(tensor, deviation, *stream, name, part)
            for part, tensor in _flatten_item(item).items()
        }
        return _unflatten_item(item, noisy)

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
        multiplier = self.config.known_noise_multiplier if z is None else z
        return twice * multiplier * len(self.items) ** 0.5 * self.config.clip_norm(name) * factor
