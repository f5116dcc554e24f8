"""Estimate of the communication and computation of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.protocol import total_bytes
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Payload
from hetero_fl.engine.driver import run_plan, translate_user_errors
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.dry_run import ExpectedUploads, payload_structure
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.federation.summed_uploads.hidden_server import state_message_size, state_size
from hetero_fl.privacy.accounting import PrivacyCharge


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
            `hetero_fl.engine.operations.step_flops`). Evaluation is not counted.
        server_operations: Floating-point operations at the server.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    evaluation: Counter[str] = field(default_factory=Counter)
    is_upper_bound: bool = False
    client_operations: Counter[str] = field(default_factory=Counter)
    server_operations: int = 0


@translate_user_errors()
def expected_cost(
    algorithm: Algorithm,
    federation: FederationSpec,
    rounds: int,
    per_round: int | None = None,
    every: int = 1,
) -> ExpectedCost:
    """Estimate the bytes that a run sends and the operations that it computes, without training.

    Every sampled client is assumed to upload once. Failures, repeated rounds, early stopping by
    `evaluation.patience` and, in asynchronous runs, the different speeds of clients are ignored.

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
    cost = ExpectedCost(is_upper_bound=largest != algorithm or run.links.is_upper_bound)
    counts_traffic = algorithm.needs.counts_traffic
    for round_idx in range(rounds):
        cohort = federation.sample_cohort(per_round, round_idx)
        for client_id in cohort:
            exchange = run.exchange_cost(client_id, round_idx)
            cost.client_operations[client_id] += exchange.operations
            if counts_traffic:
                cost.down[client_id] += exchange.down
                cost.up[client_id] += exchange.up
        before = run.state_message_size()
        cost.server_operations += run.aggregate(cohort, round_idx)
        if counts_traffic and (aggregation := run.aggregation_cost(cohort, round_idx, before)):
            client_id, (down, up) = aggregation
            cost.down[client_id] += down
            cost.up[client_id] += up
        if counts_traffic and ((round_idx + 1) % every == 0 or round_idx + 1 == rounds):
            for client_id in federation.evaluated_clients:
                cost.evaluation[client_id] += run.evaluation_bytes(client_id, round_idx + 1)
    return cost


class ExchangeCost(NamedTuple):
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


class DryRun:
    """Run without training, which determines the sizes of messages.

    Rounds in which clients with the same settings send and receive items of the same names and
    shapes form a phase. For each phase, only one round is run. The first round is a separate phase,
    because no aggregation has changed the server's state yet.

    Args:
        algorithm: The method.
        federation: The federation.
    """

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.server = federation.server()
        self.expectations = ExpectedUploads(algorithm, federation)
        self.links = FederationLinks(algorithm, federation, bound=True)
        self.protocol = make_protocol(algorithm, federation)
        algorithm.setup(self.server)
        self._uploads: dict[Any, tuple[int, tuple[PrivacyCharge, ...], int]] = {}
        self._exchanges: dict[Any, ExchangeCost] = {}
        # Sizes of encoded broadcasts in bytes.
        self._lengths: dict[Any, int] = {}
        # Operations of the aggregation, keyed by phase.
        self._aggregated: dict[tuple[int, ...], int] = {}

    def exchange_cost(self, client_id: str, round_idx: int) -> ExchangeCost:
        """Return the bytes and the privacy charges of a client's participation in a round."""
        phase = self._begin_round(round_idx)
        client_info = self.federation.client_infos[client_id]
        received = call_broadcast(self.algorithm, self.server, client_info)
        down = self._broadcast_bytes(received, round_idx)
        # Items are weighted by the client's number of rows, whose digits are part of the upload.
        key = (phase, self._form(client_info, received), client_info.num_rows)
        if key not in self._uploads:
            before = self.expectations.backend.operations
            upload, charges = self.expectations.dry_run_upload(client_info, received, round_idx)
            operations = self.expectations.backend.operations - before
            up = 0
            if not self.protocol.setup:
                body = self.links.encode_upload(client_info, round_idx, upload, received, {})
                up = len(body)
            self._uploads[key] = up, charges, operations
        up, charges, operations = self._uploads[key]
        if (key, down) not in self._exchanges:
            sizes = self.protocol.sizes(self.federation.cohort, round_idx, down, up)
            self._exchanges[key, down] = ExchangeCost(
                *total_bytes(sizes.values()), charges, operations
            )
        return self._exchanges[key, down]

    def state_message_size(self) -> int:
        """Return the size of a message with the server's state, if the server cannot read it.

        The result is 0 if the server can read its state.
        """
        if not self.protocol.hides_server:
            return 0
        return state_message_size(self.server, is_sealed=bool(self._aggregated))

    def aggregation_cost(
        self, cohort: list[str], round_idx: int, before: int
    ) -> tuple[str, tuple[int, int]] | None:
        """Return the client that decrypts the sum of a round, and the bytes sent to and by it.

        Args:
            cohort: Ids of the clients in the round.
            round_idx: Index of the round, from 0.
            before: Size of the message with the server's state before the aggregation.

        Returns:
            The client and the bytes, or None if no client decrypts a sum.
        """
        if not self.protocol.hides_server or not cohort:
            return None
        after = state_size(self.server)
        return self.protocol.aggregation_sizes(cohort, round_idx, before, after)

    def evaluation_bytes(self, client_id: str, round_idx: int) -> int:
        """Return the number of bytes sent to a client for the evaluation before a round."""
        self._begin_round(round_idx)
        client_info = replace(self.federation.client_infos[client_id], purpose="evaluate")
        received = call_broadcast(self.algorithm, self.server, client_info)
        return self._broadcast_bytes(received, round_idx)

    def aggregate(self, cohort: list[str], round_idx: int) -> int:
        """Run the aggregation of a round, unless a round of the same phase has been aggregated.

        Args:
            cohort: Ids of the clients in the round. If empty, there is no aggregation.
            round_idx: Index of the round, from 0.

        Returns:
            Floating-point operations at the server in a round of this phase.
        """
        phase = self._begin_round(round_idx)
        if not cohort:
            return 0
        if phase in self._aggregated:
            return self._aggregated[phase]
        uploads = Uploads(specs=self.expectations.specs, common=self.server.common)
        for client_id in cohort:
            client_info = self.federation.client_infos[client_id]
            received = call_broadcast(self.algorithm, self.server, client_info)
            items = self.expectations.expected_items(client_info, received, round_idx)
            uploads.add(Upload(client_info, Payload(dict(items))))
        plan = self.algorithm.aggregate(self.server, uploads)
        before = self.expectations.backend.operations
        run_plan(self.server, plan, self.expectations.backend)
        self._aggregated[phase] = self.expectations.backend.operations - before
        return self._aggregated[phase]

    def _begin_round(self, round_idx: int) -> tuple[int, ...]:
        """Set the round context of the server, and return the phase of the round."""
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return (min(round_idx, 1), *self.expectations.round_phase(round_idx))

    def _form(self, client_info: ClientInfo, received: Payload) -> tuple[Any, ...]:
        profile = self.federation.client_infos.profile(client_info.client_id)
        return profile.first, payload_structure(received)

    def _broadcast_bytes(self, payload: Payload, round_idx: int) -> int:
        """Return the size of a broadcast in bytes."""
        if self.protocol.hides_server:
            return self.state_message_size()
        key = tensor_structure(payload), min(round_idx, 1)
        if key not in self._lengths:
            archs = self.server.arch.values()
            self._lengths[key] = len(self.links.encode_broadcast(round_idx, payload, archs))
        return self._lengths[key]


def tensor_structure(payload: Payload) -> Any:
    """Return the names, kinds and shapes of the tensors of a payload."""
    return tuple(
        (name, item.kind, tuple((n, tuple(t.shape)) for n, t in item.tensors.items()))
        for name, item in payload.items_by_name.items()
    )
