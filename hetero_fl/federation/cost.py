"""Expected communication and computation of a run, which dry runs of its plans determine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import EncodeCache, total_bytes
from hetero_fl.core.payload import Item, Payload
from hetero_fl.engine.driver import run_plan, translate_user_errors
from hetero_fl.federation.expected import ExpectedUploads, payload_structure
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.privacy.accounting import PrivacyCharge

# Key of a phase (see `DryRun.phase`).
Phase = tuple[int, ...]


@dataclass
class ExpectedCost:
    """Expected communication and computation of a run.

    Attributes:
        up: Bytes of uploads, keyed by client id.
        down: Bytes of broadcasts for training, keyed by client id.
        evaluation: Bytes of broadcasts for evaluation, keyed by client id.
        is_upper_bound: Whether the numbers of bytes are upper bounds. This is the case if the size
            of messages depends on learned values.
        client_operations: Floating-point operations of training, keyed by client id (see
            `hetero_fl.federation.expected.step_flops`). Evaluation is not counted.
        server_operations: Floating-point operations at the server.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    evaluation: Counter[str] = field(default_factory=Counter)
    is_upper_bound: bool = False
    client_operations: Counter[str] = field(default_factory=Counter)
    server_operations: int = 0

    def add(self, client_id: str, cost: ClientCost, count: int = 1) -> None:
        """Add the cost of a client's participation in `count` rounds."""
        self.up[client_id] += count * cost.up
        self.down[client_id] += count * cost.down
        self.client_operations[client_id] += count * cost.operations


class ClientCost(NamedTuple):
    """Cost of a client's participation in a round.

    Attributes:
        down: Number of bytes sent to the client.
        up: Number of bytes uploaded by the client.
        charges: Privacy charges of the upload.
        operations: Floating-point operations of the client's training.
    """

    down: int
    up: int
    charges: tuple[PrivacyCharge, ...] = ()
    operations: int = 0


@translate_user_errors()
def expected_cost(
    algorithm: Algorithm,
    federation: FederationSpec,
    rounds: int,
    per_round: int | None = None,
    every: int = 1,
) -> ExpectedCost:
    """Estimate the bytes that a run sends and the operations that it computes, without training.

    The cost of a client is determined once for each phase (see `DryRun.phase`), and multiplied by
    the number of rounds of the phase in which the client is sampled. Every sampled client is
    assumed to upload once. Failures, repeated rounds, early stopping by `evaluation.patience` and,
    in asynchronous runs, the different speeds of clients are ignored.

    Args:
        algorithm: The method.
        federation: The federation.
        rounds: Number of rounds. In an asynchronous run, a round has as many uploads as a cohort.
        per_round: Number of clients sampled for a round. If None, all clients participate.
        every: Number of rounds between evaluations. The last round is always evaluated.

    Returns:
        The expected cost. The numbers of bytes are 0 for methods whose communication is not counted
        (`Needs.counts_traffic`).

    Raises:
        UserError: If the method does not support this federation.
        RunFailedError: If a hook of a user-defined method raises an exception.
    """
    largest = algorithm.model_copy(update=algorithm.needs.largest_uploads)
    run = DryRun(largest, federation)
    cost = ExpectedCost(is_upper_bound=largest != algorithm or run.expected.links.is_upper_bound)
    phases: dict[Phase, list[int]] = {}
    for round_idx in range(rounds):
        phases.setdefault(run.phase(round_idx), []).append(round_idx)
    for members in phases.values():
        # The cohorts of all rounds are known in advance, because they depend only on the seed.
        cohorts = {index: federation.sample_cohort(per_round, index) for index in members}
        _add_training(cost, run, cohorts)
        num_evaluations = sum((index + 1) % every == 0 or index + 1 == rounds for index in members)
        if num_evaluations:
            for client_id in federation.evaluated_clients:
                size = run.evaluation_bytes(client_id, members[0] + 1)
                cost.evaluation[client_id] += num_evaluations * size
    if not algorithm.needs.counts_traffic:
        for counter in (cost.up, cost.down, cost.evaluation):
            counter.clear()
    return cost


def _add_training(cost: ExpectedCost, run: DryRun, cohorts: Mapping[int, list[str]]) -> None:
    """Add the cost of training and aggregation in the rounds of a phase.

    Args:
        cost: The cost, which is modified in place.
        run: The dry run.
        cohorts: Ids of the clients in each round, keyed by the index of the round.
    """
    for client_id, count in Counter(chain.from_iterable(cohorts.values())).items():
        cost.add(client_id, run.client_cost(client_id, min(cohorts)), count)
    for round_idx, cohort in cohorts.items():
        if cohort:
            cost.server_operations += run.aggregate(cohort, round_idx)


class DryRun:
    """Run without training, which determines the cost of each phase.

    Args:
        algorithm: The method.
        federation: The federation.
    """

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.expected = ExpectedUploads(algorithm, federation)
        self.protocol = make_protocol(algorithm, federation)
        self._client_costs: dict[Any, ClientCost] = {}
        self._aggregations: dict[Phase, int] = {}
        # Clients usually receive the same tensors, and the size of a broadcast is not random.
        self._encoded_size = EncodeCache(self._measure_broadcast)

    def phase(self, round_idx: int) -> Phase:
        """Return the phase of a round. In all rounds of a phase, a client has the same cost.

        Each round until all clients have uploaded is a phase, because these uploads change what the
        server sends. Later rounds belong to the same phase if the same clients upload.

        Args:
            round_idx: Index of the round, from 0.
        """
        return (min(round_idx, self.expected.intervals[-1]), *self.expected.round_phase(round_idx))

    def client_cost(self, client_id: str, round_idx: int) -> ClientCost:
        """Return the cost of a client's participation in a round."""
        phase = self.phase(round_idx)
        client_info = self.federation.client_infos[client_id]
        broadcast = self.expected.broadcast(client_info, round_idx)
        profile = self.federation.client_infos.profile(client_id)
        # Items are weighted by the number of rows, whose digits are part of the upload.
        key = phase, profile.first, client_info.num_rows, payload_structure(broadcast)
        if key not in self._client_costs:
            operations = self.expected.backend.operations
            upload, charges = self.expected.dry_run_upload(client_info, broadcast, round_idx)
            sizes = self.protocol.sizes(
                self.federation.cohort,
                round_idx,
                self._broadcast_size(round_idx, broadcast),
                self.expected.encoded_size(client_info, upload, broadcast, round_idx),
            )
            operations = self.expected.backend.operations - operations
            self._client_costs[key] = ClientCost(*total_bytes(sizes.values()), charges, operations)
        return self._client_costs[key]

    def aggregate(self, cohort: list[str], round_idx: int) -> int:
        """Run the aggregation of a round, unless a round of the same phase has been aggregated.

        The number of floating-point operations is returned.

        Args:
            cohort: Ids of the clients in the round, at least one.
            round_idx: Index of the round, from 0.
        """
        phase = self.phase(round_idx)
        if phase not in self._aggregations:
            uploads = Uploads(specs=self.expected.specs, common=self.federation.common)
            for client_id in cohort:
                client_info = self.federation.client_infos[client_id]
                received = self.expected.broadcast(client_info, round_idx)
                items = self.expected.expected_items(client_info, received, round_idx)
                uploads.add(Upload(client_info, Payload(dict(items))))
            backend = self.expected.backend
            server = self.expected.server
            operations = backend.operations
            run_plan(server, self.algorithm.aggregate(server, uploads), backend)
            self._aggregations[phase] = backend.operations - operations
        return self._aggregations[phase]

    def evaluation_bytes(self, client_id: str, round_idx: int) -> int:
        """Return the number of bytes sent to a client for the evaluation before a round."""
        client_info = replace(self.federation.client_infos[client_id], purpose="evaluate")
        return self._broadcast_size(round_idx, self.expected.broadcast(client_info, round_idx))

    def _broadcast_size(self, round_idx: int, broadcast: Payload) -> int:
        """Return the number of bytes of the message with a broadcast."""
        return self.protocol.broadcast_size(round_idx, self._encoded_size(broadcast))

    def _measure_broadcast(self, broadcast: Payload) -> int:
        if self.expected.links.down is None:
            return broadcast.encoded_size
        server = self.expected.server
        round_idx = server.round_context.round_idx
        links = self.expected.links
        return len(links.encode_broadcast(round_idx, broadcast, server.arch.values()))


@dataclass(frozen=True)
class UploadedPart:
    """A tensor of an upload, or several tensors of a layer or of a larger part of a model.

    Attributes:
        item: Name of the item that contains the tensors.
        name: Name of the tensor, or the prefix of the names of several tensors, which ends in a
            dot. Empty if the item is a single tensor, or if the prefix is empty.
        shapes: Shapes of the tensors.
        num_values: Number of values of all tensors.
        num_bytes: Size of the values in bytes, before compression and encryption.
    """

    item: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    num_values: int
    num_bytes: int


@dataclass(frozen=True)
class UploadContent:
    """The content of the uploads of clients that upload tensors of the same names and shapes.

    Attributes:
        clients: Ids of the first clients of each profile with this content.
        num_clients: Number of clients with this content.
        parts: Parts of the upload. Empty if these clients upload nothing in the first round.
    """

    clients: tuple[str, ...]
    num_clients: int
    parts: tuple[UploadedPart, ...]


@translate_user_errors()
def upload_contents(
    algorithm: Algorithm, federation: FederationSpec, max_parts: int = 10
) -> list[UploadContent]:
    """Return what clients upload in the first round, without training.

    Args:
        algorithm: The method.
        federation: The federation.
        max_parts: Maximum number of parts of all uploads together, if each upload has a part for
            each item. Tensors are grouped by layers, or by larger parts of the model.

    Example:
        >>> from hetero_fl.experiment import prepare
        >>> from hetero_fl.federation.cost import upload_contents
        >>> linear = {"defaults": {"model": "linear"}}
        >>> run = prepare({"data": {"name": "digits"}, "clients": linear})
        >>> for part in upload_contents(run.method, run.federation)[0].parts:
        ...     print(part.name, part.shapes, part.num_bytes)
        head.weight ((10, 64),) 2560
        head.bias ((10,),) 40
    """
    expected = ExpectedUploads(algorithm, federation)
    clients: dict[object, list[str]] = {}
    num_clients: Counter[object] = Counter()
    items: dict[object, Mapping[str, Item]] = {}
    for profile in federation.client_infos.profiles:
        client_info = federation.client_infos[profile.first]
        found = expected.expected_items(client_info, expected.broadcast(client_info, 0), 0)
        key = tuple(
            (name, tuple((n, tuple(t.shape), t.dtype) for n, t in item.tensors.items()))
            for name, item in found.items()
        )
        clients.setdefault(key, []).append(profile.first)
        num_clients[key] += profile.count
        items[key] = found
    share = max(1, max_parts // len(clients))
    return [
        UploadContent(tuple(names), num_clients[key], _group_tensors(items[key], share))
        for key, names in clients.items()
    ]


def _group_tensors(items: Mapping[str, Item], max_parts: int) -> tuple[UploadedPart, ...]:
    """Return the parts of an upload, with as many levels of names as `max_parts` permits."""
    names = [name for item in items.values() for name in item.tensors]
    deepest = max((name.count(".") for name in names), default=0) + 1
    for depth in range(deepest, -1, -1):
        parts = [part for name, item in items.items() for part in _parts(name, item, depth)]
        if len(parts) <= max_parts:
            break
    return tuple(parts)


def _parts(item_name: str, item: Item, depth: int) -> list[UploadedPart]:
    """Group the tensors of an item by the first `depth` levels of their names."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in item.tensors.items():
        levels = name.split(".")
        prefix = name if len(levels) <= depth else "".join(f"{n}." for n in levels[:depth])
        grouped.setdefault(prefix, {})[name] = tensor
    return [
        UploadedPart(
            item_name,
            _part_name(prefix, tensors) if isinstance(item.values, Mapping) else "",
            tuple(tuple(tensor.shape) for tensor in tensors.values()),
            sum(tensor.numel() for tensor in tensors.values()),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        )
        for prefix, tensors in grouped.items()
    ]


def _part_name(prefix: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the only tensor of a part, or the common prefix of several."""
    return prefix if len(tensors) > 1 else next(iter(tensors))
