"""Estimate what a run will send before it starts."""

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
from hetero_fl.federation.broadcasts import (
    KEPT_CHANGES,
    estimate_group,
    message_bytes,
    split_models,
)
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.dry_run import ExpectedUploads, payload_structure
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.secure_aggregation import make_protocol
from hetero_fl.privacy.accounting import (
    PrivacyCharge,
)

# What a run will send.


@dataclass
class CommunicationCost:
    """Expected bytes of a run by client.

    Attributes:
        up: Uploads.
        down: Broadcasts to train on.
        evaluation: Broadcasts that serve an evaluation only.
        is_upper_bound: Whether sizes follow from what is learned; they are counted at their largest.
    """

    up: Counter[str] = field(default_factory=Counter)
    down: Counter[str] = field(default_factory=Counter)
    evaluation: Counter[str] = field(default_factory=Counter)
    is_upper_bound: bool = False


@translate_user_errors()
def communication_cost(
    algorithm: Algorithm,
    federation: FederationSpec,
    rounds: int,
    per_round: int | None = None,
    every: int = 1,
) -> CommunicationCost:
    """Estimate what a run sends: its rounds times the bytes of a dry round of their phase.

    Every sampled client counts as uploading once. Failures, repeated rounds, a stop by
    `evaluation.patience` and, in asynchronous runs, the different speeds of clients are not
    simulated.

    Args:
        algorithm: The method.
        federation: The federation.
        rounds: Number of rounds; of an asynchronous run, each is a cohort's worth of uploads.
        per_round: Clients sampled for a round; None: all.
        every: Rounds between evaluations; the last round is always evaluated.

    Raises:
        UserError: If the method raises it for this federation.
        RunFailedError: If a hook of a user's method raises an exception.
    """
    largest = algorithm.model_copy(update=algorithm.needs.largest_uploads)
    run = DryRun(largest, federation)
    cost = CommunicationCost(is_upper_bound=largest != algorithm or run.links.at_most)
    if not algorithm.needs.counts_traffic:
        return cost
    for round_idx in range(rounds):
        cohort = federation.sample_cohort(per_round, round_idx)
        for client_id in cohort:
            exchange = run.exchange_cost(client_id, round_idx)
            cost.down[client_id] += exchange.down
            cost.up[client_id] += exchange.up
        run.aggregate(cohort, round_idx)
        if (round_idx + 1) % every == 0 or round_idx + 1 == rounds:
            for client_id in federation.evaluated_clients:
                cost.evaluation[client_id] += run.evaluation_bytes(client_id, round_idx + 1)
    return cost


class ExchangeCost(NamedTuple):
    """Bytes down to a client and up from it, and what it spends of its privacy."""

    down: int
    up: int
    charges: tuple[PrivacyCharge, ...] = ()


class DryRun:
    """A run in which nothing is computed: one round of each phase.

    Rounds are of one phase if clients with the same settings send and receive the same names and
    shapes in them. The first round is a phase of its own, because nothing was aggregated before.
    """

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.server = federation.server()
        self.expectations = ExpectedUploads(algorithm, federation)
        self.links = FederationLinks(algorithm, federation, bound=True)
        self.protocol = make_protocol(algorithm, federation)
        algorithm.setup(self.server)
        self._estimates: dict[tuple[str, str], ExpectedEstimate] = {}  # by item and group
        # By client and item: the last change that the client received.
        self._held: dict[tuple[str, str], int] = {}
        self._uploads: dict[Any, tuple[int, tuple[PrivacyCharge, ...]]] = {}
        self._exchanges: dict[Any, ExchangeCost] = {}
        self._lengths: dict[Any, int] = {}  # bytes of encoded broadcasts and of parts of them
        self._aggregated: set[tuple[int, ...]] = set()  # phases

    def exchange_cost(self, client_id: str, round_idx: int) -> ExchangeCost:
        """Return what a client's part in a round comes to."""
        phase = self._begin_round(round_idx)
        client_info = self.federation.client_infos[client_id]
        received = call_broadcast(self.algorithm, self.server, client_info)
        down = self._broadcast_bytes(client_info, received, round_idx)
        # a weight in an upload has the digits of the client's number of rows
        key = (phase, self._form(client_info, received), client_info.num_rows)
        if key not in self._uploads:
            upload, charges = self.expectations.dry_run_upload(client_info, received, round_idx)
            up = 0
            if not self.protocol.setup:
                body = self.links.encode_upload(client_info, round_idx, upload, received, {})
                up = len(body)
            self._uploads[key] = up, charges
        up, charges = self._uploads[key]
        if (key, down) not in self._exchanges:
            sizes = self.protocol.sizes(self.federation.cohort, round_idx, down, up)
            self._exchanges[key, down] = ExchangeCost(*total_bytes(sizes.values()), charges)
        return self._exchanges[key, down]

    def evaluation_bytes(self, client_id: str, round_idx: int) -> int:
        """Return the bytes down to a client that is evaluated before a round."""
        self._begin_round(round_idx)
        client_info = replace(self.federation.client_infos[client_id], purpose="evaluate")
        received = call_broadcast(self.algorithm, self.server, client_info)
        return self._broadcast_bytes(client_info, received, round_idx)

    def aggregate(self, cohort: list[str], round_idx: int) -> None:
        """Carry out the server's part of a round, once in each phase."""
        phase = self._begin_round(round_idx)
        if phase in self._aggregated or not cohort:
            return
        self._aggregated.add(phase)
        uploads = Uploads(specs=self.expectations.specs, common=self.server.common)
        for client_id in cohort:
            client_info = self.federation.client_infos[client_id]
            received = call_broadcast(self.algorithm, self.server, client_info)
            items = self.expectations.expected_items(client_info, received, round_idx)
            uploads.add(Upload(client_info, Payload(dict(items))))
        plan = self.algorithm.aggregate(self.server, uploads)
        run_plan(plan, self.server, self.expectations.backend)

    def _begin_round(self, round_idx: int) -> tuple[int, ...]:
        """Put the server into a round, and return the phase of that."""
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return (min(round_idx, 1), *self.expectations.round_phase(round_idx))

    def _form(self, client_info: ClientInfo, received: Payload) -> tuple[Any, ...]:
        profile = self.federation.client_infos.profile(client_info.client_id)
        return profile.first, payload_structure(received)

    def _broadcast_bytes(self, client_info: ClientInfo, payload: Payload, round_idx: int) -> int:
        """Return the bytes of a broadcast, and note what a client that trains then holds."""
        if not self.links.sends_changes:
            return self._length(payload, round_idx)
        models, others = split_models(payload)
        group = estimate_group(self.algorithm, client_info)
        is_training = client_info.purpose == "train"
        sizes = {}
        for name, item in models.items_.items():
            only = Payload({name: item})
            estimate = self._estimates.setdefault((name, group), ExpectedEstimate())
            number = estimate.number + (estimate.version != round_idx)
            key = client_info.client_id, name
            held = self._held.get(key, 0)
            whole = self._length(only, round_idx, "whole")
            changes = [
                self._length(only, round_idx, "change" if n else "first")
                for n in range(held, number)
            ]
            is_kept = estimate.number - held <= KEPT_CHANGES
            is_short = message_bytes({name: changes}, 0) <= message_bytes({name: [whole]}, 0)
            sizes[name] = changes if is_kept and is_short else [whole]
            if is_training:
                estimate.number = number
                estimate.version = round_idx
                self._held[key] = number
        return message_bytes(sizes, self._length(others, round_idx))

    def _length(self, payload: Payload, round_idx: int, form: str = "first") -> int:
        """Return the bytes of a payload: a "first" message, a "change" from one alike, or "whole"."""
        key = tensor_structure(payload), min(round_idx, 1), form
        if key not in self._lengths:
            reference = payload if form == "change" else None
            archs = self.server.arch.values()
            self._lengths[key] = (
                payload.encoded_size
                if form == "whole"
                else len(self.links.encode_broadcast(round_idx, payload, archs, reference))
            )
        return self._lengths[key]


@dataclass
class ExpectedEstimate:
    """An estimate that clients hold of a model.

    Attributes:
        number: Number of changes so far.
        version: The server's version when it changed last.
    """

    number: int = 0
    version: int = -1


def tensor_structure(payload: Payload) -> Any:
    """Return the names, kinds and shapes of the tensors of a payload."""
    return tuple(
        (name, item.kind, tuple((n, tuple(t.shape)) for n, t in item.tensors.items()))
        for name, item in payload.items_.items()
    )
