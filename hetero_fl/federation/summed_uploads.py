"""Sums of uploads that the server cannot take apart or cannot read: setup, protocol and link.

With secure aggregation and homomorphic encryption, clients send vectors of the values and weights
of all uploaded tensors (see `hetero_fl.communication.vector_layout`).

With homomorphic encryption, the server reads neither uploads nor sums nor models, so that its own
models never change. A client decrypts the last sum, aggregates it as the server would, and reads
its broadcast from the result. This suffices for methods whose broadcasts are the means of the last
uploads (see `hetero_fl.algorithms.base.broadcasts_means`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.uploads import SINGLE, CombineNoise, Mean, MeanCombiner, Means, Owner
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.homomorphic import KEY_NAME, SharedKey, ciphertext_shape
from hetero_fl.communication.protocol import (
    UPLOAD,
    Content,
    DirectProtocol,
    Message,
    RoundProtocol,
    TrainingRequest,
    encoded,
    refusal,
)
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.communication.vector_layout import FixedPoint, TensorKey, VectorLayout, weight_unit
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload, PayloadError, check_upload
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.expected import ExpectedUploads, initial_server
from hetero_fl.federation.federation import FederationSpec, as_sender
from hetero_fl.federation.round import ServerLink
from hetero_fl.utils.caching import BoundedCache

# Number of cached layouts.
MAX_LAYOUTS = 8


class DerivedSetup:
    """Setup of summed uploads that the server and each client derive independently.

    The layout of the vectors in a round is determined by a dry run of one client per
    `ClientProfile`.

    Args:
        algorithm: The method.
        federation: The federation.

    Attributes:
        expectations: Names, shapes and dtypes of the uploaded items.
    """

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.federation = federation
        self.client_ids: Sequence[str] = federation.client_infos.clients.ids
        self.expectations = ExpectedUploads(algorithm, federation)
        self._layouts: BoundedCache[VectorLayout] = BoundedCache(MAX_LAYOUTS)

    def layout(self, round_idx: int) -> VectorLayout:
        """Return the layout of the vectors in a round.

        Rounds in which uploads have the same structure share a layout.
        """
        phase = self.expectations.round_phase(round_idx)
        if phase not in self._layouts:
            forms = [(info.arch.spec_id, form) for info, form in self.upload_forms(round_idx)]
            self._layouts[phase] = VectorLayout.from_forms(
                forms, self.expectations.specs, self.federation.common
            )
        return self._layouts[phase]

    def upload_forms(self, round_idx: int) -> list[tuple[ClientInfo, Mapping[str, Item]]]:
        """Return the first client of each profile, paired with the expected items of its upload."""
        clients = [profile.first for profile in self.federation.client_infos.profiles]
        infos = self.federation.client_infos
        return [(infos[client], self.upload_form(client, round_idx)) for client in clients]

    def upload_form(self, client: str, round_idx: int) -> Mapping[str, Item]:
        """Return the expected items of a client's upload in a round, with placeholder values.

        The items are determined with the server in its initial state, because the layout must not
        depend on uploads.
        """
        client_info = self.federation.client_infos[client]
        received = self.expectations.broadcast(client_info, round_idx)
        return self.expectations.expected_items(client_info, received, round_idx)

    def aggregation_group(self, client: str) -> str:
        """Return the id of the architecture within which a client's tensors are averaged."""
        return self.federation.client_infos[client].arch.spec_id

    def noise(
        self, client: str, round_idx: int, layout: VectorLayout, unit: float, shares: int
    ) -> np.ndarray | None:
        """Return a client's share of the privacy noise on sums (`privacy.distributed`).

        The noise is drawn from N(0, deviation**2 / shares) for every element of the vector to which
        the server would otherwise add noise, whether or not the client uploads the element.

        Args:
            client: The client.
            round_idx: Index of the round, from 0.
            layout: Layout of the vector.
            unit: Factor by which the client divides values and weights.
            shares: Number of shares that make up the required noise.

        Returns:
            The noise, divided by `unit`, shape `[layout.size]`. None if clients do not add noise.
        """
        privacy = self.expectations.privacy
        if privacy is None or not privacy.config.distributed:
            return None
        vector = np.zeros(layout.size)
        for key, tensor_slice in layout.slices.items():
            values, weights = tensor_slice.parts(key)
            # The weights of class sums are counts of private rows.
            has_private_weights = layout.specs[key.item].kind == "class_sums"
            parts = slice(values.start, weights.stop) if has_private_weights else values
            draws = self.federation.noise.stream(
                "share", round_idx, client, *map(str, astuple(key))
            )
            noise = draws.normal(torch.empty(parts.stop - parts.start, dtype=torch.float64), 1.0)
            vector[parts] = noise.numpy() * (privacy.deviation(key.item) / math.sqrt(shares) / unit)
        return vector

    def num_rows(self, client: str) -> int:
        """Return the number of training rows of a client."""
        return self.federation.client_infos[client].num_rows


@dataclass(frozen=True)
class VectorSum:
    """Sum of the clients' vectors, from which the means of items are read.

    Args:
        vector: The sum, dtype float64.
        unit: Factor by which the clients divided values and weights.
        layout: Layout of the vectors.
    """

    vector: np.ndarray
    unit: float
    layout: VectorLayout


class SumCombiner(MeanCombiner):
    """Means of an item that are read from the sum of the clients' vectors.

    Only the names and shapes of the tensors of added uploads are used. Named tensors with a total
    weight of zero have no mean, because no client sent these tensors.

    Args:
        name: Name of the item.
        spec: Declaration of the item.
        common: Prefixes of the names of tensors that are averaged across architectures.
        total: Sum of the clients' vectors.
    """

    def __init__(self, name: str, spec: ItemSpec, common: Sequence[str], total: VectorSum) -> None:
        super().__init__(name, spec, common)
        self.total = total
        # Number of clients that may have sent each tensor.
        self._counts: Counter[TensorKey] = Counter()

    @override
    def add(self, upload: Upload) -> None:
        item = upload.payload.item(self.name)
        self.register(upload)
        self._counts.update(self.total.layout.tensor_keys(upload.group, {self.name: item}))

    @override
    def means(self) -> Means:
        means: dict[Owner, Mean] = {}
        layout = self.total.layout
        for key, count in self._counts.items():
            total, weight = layout.read(key, self.total.vector, self.total.unit)
            dtype = layout.slices[key].dtype
            if not key.tensor:
                means[SINGLE] = Mean.from_total(total.to(dtype), weight.to(dtype), count)
            elif weight > 0:
                owner = (key.tensor, key.shape, key.group)
                means[owner] = Mean((total / weight).to(dtype), float(weight), count)
        return self.by_group(means)


def uploads_from_sum(
    vector: np.ndarray,
    unit: float,
    layout: VectorLayout,
    forms: Sequence[tuple[ClientInfo, Mapping[str, Item]]],
    noise: CombineNoise | None = None,
) -> tuple[Uploads, float | None]:
    """Convert a sum of the clients' vectors to the uploads of a round.

    Args:
        vector: The sum, dtype float64.
        unit: Factor by which the clients divided values and weights.
        layout: Layout of the summed vectors.
        forms: Pairs of a client in the sum and the expected items of the client's upload.
        noise: Privacy noise that is added to the sums. If None, no noise is added.

    Returns:
        The uploads, and the mean training loss. The loss is None if no client reports a loss.
    """
    new_combiner = partial(SumCombiner, total=VectorSum(vector, unit, layout))
    expected = [Upload(client_info, Payload(form)) for client_info, form in forms]
    uploads = Uploads(expected, layout.specs, layout.common, new_combiner=new_combiner, noise=noise)
    return uploads, layout.mean_loss(vector)


# Name of the item with ciphertexts, uint8, one in each row.
CIPHERTEXTS = "ciphertexts"
SPECS = {CIPHERTEXTS: ItemSpec("rows")}


class HomomorphicEncryption(DirectProtocol):
    """Protocol of uploads that are encrypted with CKKS (Cheon et al. 2017) under the clients' key.

    Clients train and send the encrypted vector of their upload. Broadcasts contain the encrypted
    sum of the last uploads, and before the first sum the initial model.

    The server is assumed to follow the protocol. Clients cannot tell whether the ciphertexts that
    they receive are the sum of those that other clients sent.

    Args:
        algorithm: The method.
        federation: The federation. Its key is None at the server.
    """

    accepts_unencoded = False

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        config = federation.channel.homomorphic
        assert config is not None
        self.algorithm = algorithm
        self.federation = federation
        self.shared_setup = DerivedSetup(algorithm, federation)
        self.fixed = FixedPoint.from_config(config, federation.cohort, "channel.homomorphic")
        self.noise_bits = config.num_noise_bits(federation.cohort)
        # The last message with a sum, and the server after the aggregation of this sum.
        self._last: tuple[Content, Participant] | None = None

    @property
    def key(self) -> SharedKey:
        """Key of the clients.

        Raises:
            PayloadError: If this participant has no key.
        """
        if self.federation.shared_key is None:
            raise PayloadError("channel.homomorphic: this participant does not have the shared key")
        return self.federation.shared_key

    @cached_property
    def unit(self) -> float:
        """Factor by which clients divide values and weights."""
        return 2.0 ** weight_unit(map(self.shared_setup.num_rows, self.shared_setup.client_ids))

    @override
    def answer(
        self, client_id: str, message: Message, round_idx: int, notes: MutableMapping[str, bytes]
    ) -> Message | TrainingRequest:
        def encrypt(upload: Content) -> Message:
            try:
                payload = Payload.decode(encoded(upload))
                return Message(UPLOAD, self._encrypt(client_id, payload, round_idx).encode())
            except PayloadError as error:
                return refusal(error)

        try:
            return TrainingRequest(self.broadcast_in(client_id, message), encrypt)
        except PayloadError as error:
            return refusal(error)

    def _encrypt(self, client_id: str, payload: Payload, round_idx: int) -> Payload:
        group = self.shared_setup.aggregation_group(client_id)
        vector = self.shared_setup.layout(round_idx).pack(group, payload, self.unit)
        rows = self.key.encrypt(self.fixed.encode(vector), self.noise_bits)
        return Payload({CIPHERTEXTS: torch.from_numpy(rows)}, {"key": self.key.name})

    @override
    def broadcast_in(self, client_id: str, message: Message) -> Content:
        if self._last is None or self._last[0] is not message.content:
            payload = Payload.decode(message.body)
            if CIPHERTEXTS not in payload:
                return message.content
            self._last = message.content, self._aggregate(payload)
        client_info = self.federation.client_infos[client_id]
        if message.kind != "train":
            client_info = replace(client_info, purpose="evaluate")
        round_context = self.federation.round_context(message.round_idx)
        server = replace(self._last[1], round_context=round_context)
        return call_broadcast(self.algorithm, as_sender(server, client_id), client_info)

    def _aggregate(self, payload: Payload) -> Participant:
        """Return a server that contains only what follows from an encrypted sum."""
        round_idx = payload.report.get("round")
        if not isinstance(round_idx, int) or not 0 <= round_idx < self.federation.num_rounds:
            raise PayloadError(f"round of the sum: unknown round {round_idx!r}")
        check_upload(payload, SPECS, self.form(round_idx).items_by_name)
        layout = self.shared_setup.layout(round_idx)
        words = self.key.decrypt(payload[CIPHERTEXTS].numpy(), layout.size, self.noise_bits)
        forms = self.shared_setup.upload_forms(round_idx)
        uploads, _ = uploads_from_sum(self.fixed.decode(words), self.unit, layout, forms)
        server = initial_server(self.algorithm, self.federation, round_idx)
        # Tensors that no client of the sum uploads stay as they are at the recipient.
        server.models = {slot: {} for slot in server.models}
        # A mean needs no step of computation.
        run_plan(
            server,
            self.algorithm.aggregate(server, uploads),
            self.shared_setup.expectations.backend,
        )
        return server

    def form(self, round_idx: int, **report: Any) -> Payload:
        """Return a payload with the shape of encrypted uploads and their sum in a round."""
        shape = ciphertext_shape(self.shared_setup.layout(round_idx).size)
        return Payload({CIPHERTEXTS: torch.zeros((), dtype=torch.uint8).expand(shape)}, report)

    @override
    def sizes(
        self, cohort: int, round_idx: int, broadcast: int, upload: int
    ) -> dict[str, tuple[int, int]]:
        encrypted = self.form(round_idx, key="0" * KEY_NAME)
        return {"train": (broadcast, encrypted.encoded_size)}

    @override
    def broadcast_size(self, round_idx: int, broadcast: int) -> int:
        # Groups of clients that upload in other rounds than others may receive an earlier sum.
        last = max(
            (i for i in range(round_idx) if self.shared_setup.layout(i).slices), default=None
        )
        return broadcast if last is None else self.form(last, round=last).encoded_size


class EncryptedLink(ServerLink):
    """Link of a server that forwards the encrypted sum of the last uploads.

    Args:
        protocol: The protocol.
        *args: Arguments of `ServerLink`.
        **options: Arguments of `ServerLink`.

    Attributes:
        sums: Last encrypted sum of each architecture group, or of all clients under "" if the
            method does not average within groups.
        key_name: Name of the key of the first upload of the run.
    """

    def __init__(self, protocol: HomomorphicEncryption, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.protocol = protocol
        self.specs = SPECS
        self.sums: dict[str, Payload] = {}
        self.key_name: Any = None

    @property
    @override
    def server_slot(self) -> str | None:
        return None

    def group_of(self, client_info: ClientInfo) -> str:
        """Return the group whose sum a client receives."""
        return client_info.arch.spec_id if self.algorithm.needs.one_architecture else ""

    @override
    def broadcast(self, client_info: ClientInfo) -> Payload:
        group = self.group_of(client_info)
        return self.sums[group] if group in self.sums else super().broadcast(client_info)

    @override
    def expected_items(
        self, client_info: ClientInfo, received: Payload, round_idx: int
    ) -> Mapping[str, Item]:
        return self.protocol.form(round_idx).items_by_name

    @override
    def state_dict(self) -> dict[str, Any]:
        sums = {group: payload.tree() for group, payload in self.sums.items()}
        return {"sums": sums, "key": self.key_name}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {group: Payload.from_untrusted(tree) for group, tree in state["sums"].items()}
        self.key_name = state["key"]


def make_protocol(algorithm: Algorithm, federation: FederationSpec) -> RoundProtocol:
    """Create the protocol by which uploads reach the server.

    Secure aggregation or homomorphic encryption is used if `channel.secure_sum` or
    `channel.homomorphic` is configured and the method uploads items.
    """
    channel = federation.channel
    if not algorithm.uploads:
        return DirectProtocol()
    if channel.secure_sum is not None:
        setup = DerivedSetup(algorithm, federation)
        return SecureAggregation(channel.secure_sum, federation.cohort, setup, federation.site_keys)
    if channel.homomorphic is not None:
        return HomomorphicEncryption(algorithm, federation)
    return DirectProtocol()


def make_link(protocol: RoundProtocol, *args: Any, **options: Any) -> ServerLink:
    """Create the server's link to the clients, which depends on whether the server can read it.

    Args:
        protocol: The protocol by which uploads reach the server.
        *args: Arguments of `ServerLink`.
        **options: Arguments of `ServerLink`.
    """
    if isinstance(protocol, HomomorphicEncryption):
        return EncryptedLink(protocol, *args, **options)
    return ServerLink(*args, **options)
