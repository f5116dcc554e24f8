"""Layout of the vectors that clients send for a sum, and conversion of sums to uploads.

The vectors contain the values and weights of all uploaded tensors (see
`hetero_fl.communication.vector_layout`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np
import torch
from typing_extensions import override

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.means import Mean
from hetero_fl.aggregation.uploads import SINGLE, CombineNoise, MeanCombiner, Means
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.vector_layout import TensorKey, VectorLayout
from hetero_fl.core.model_spec import Owner
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
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
        self.algorithm = algorithm
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
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return self.expectations.expected_items(
            client_info, call_broadcast(self.algorithm, self.server, client_info), round_idx
        )

    @cached_property
    def server(self) -> Participant:
        """The server in its initial state."""
        server = self.federation.server()
        self.algorithm.setup(server)
        return server

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

    def combiner(self, name: str, spec: ItemSpec, common: Sequence[str]) -> SumCombiner:
        """Create the combiner of an item."""
        return SumCombiner(name, spec, common, self)


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
    total = VectorSum(vector, unit, layout)
    expected = [Upload(client_info, Payload(form)) for client_info, form in forms]
    uploads = Uploads(expected, layout.specs, layout.common, rules=total, noise=noise)
    return uploads, layout.mean_loss(vector)
