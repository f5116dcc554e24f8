"""Collection of the uploads of a round, which are validated and added to the aggregation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.communication.protocol import (
    AggregatedUploads,
    Content,
    Exchange,
    Message,
    Reply,
    SealedAggregate,
    Traffic,
)
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregation
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo
from hetero_fl.core.payload import Payload, PayloadError, logged_from_report, loss_from_report
from hetero_fl.engine.driver import DivergedError
from hetero_fl.federation.executors.base import ClientLateError
from hetero_fl.federation.summed_uploads.derived_setup import uploads_from_sum
from hetero_fl.robustness.robust_means import AggregationRules
from hetero_fl.utils.errors import NoUploadError, RoundAbandonedError, RunFailedError
from hetero_fl.utils.text import pluralize

if TYPE_CHECKING:
    from hetero_fl.federation.trainer import FederatedTrainer

DAMAGED = "upload refused: checksum mismatch"


class UploadCollector:
    """Collector of the replies of one cohort.

    Each upload is added to the aggregation on arrival, so that only one upload is in memory at a
    time. When the upload of a simulated malicious client has arrived, this upload and all later
    uploads are stored until the end of the round, because an attack may depend on the uploads of
    all malicious clients.

    Args:
        trainer: The trainer that runs the round.
        cohort: Ids of the clients in the round, in order.

    Attributes:
        uploads: The uploads that the method aggregates.
        losses: Training loss, keyed by client id. If uploads are summed, the only entry is
            "mean".
        logged: Values that clients logged, keyed by client id and name.
        failed: Reasons why clients sent no usable upload, keyed by client id.
        late: Ids of clients that had not replied when the round ended.
        magnitudes: Largest norm of a tensor in each upload, keyed by client id.
        malicious: Ids of simulated malicious clients whose uploads arrived.
        abandoned: Error with which the protocol abandoned the round, or None.
        diverged: Reason why training at the server diverged. Empty if training did not diverge.
        sealed: State of the server that a client computed, if the server cannot read uploads.
        up_bytes: Bytes uploaded in the round.
    """

    def __init__(self, trainer: FederatedTrainer, cohort: Sequence[str]) -> None:
        self.trainer = trainer
        self.cohort = cohort
        self.round_idx = trainer.round_idx
        self.rules = self._make_rules()
        self._noise = (
            None
            if trainer.privacy is None
            else trainer.privacy.sum_noise(self._received_by, self.round_idx)
        )
        self.uploads = Uploads(
            specs=trainer.expectations.specs,
            common=trainer.federation.common,
            rules=self.rules,
            noise=self._noise,
        )
        self.losses: dict[str, float] = {}
        self.logged: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}
        self.late: list[str] = []
        self.magnitudes: dict[str, float] = {}
        self.malicious: list[str] = []
        self.abandoned: RoundAbandonedError | None = None
        self.diverged = ""
        self.sealed: SealedAggregate | None = None
        self.up_bytes = 0
        # Bytes sent to clients, keyed by kind of the exchange and client id.
        self._sent_bytes: dict[tuple[str, str], int] = {}
        # Broadcasts to clients that have not replied, keyed by client id.
        self._sent: dict[str, Payload] = {}
        # Result of the exchanges, if the protocol reveals only a sum.
        self._total: AggregatedUploads | SealedAggregate | None = None
        # Uploads that are stored until the uploads of all malicious clients have arrived, keyed by
        # client id.
        self._waiting: dict[str, Payload] = {}

    @property
    def down_bytes(self) -> int:
        """Bytes sent to clients in the round."""
        return sum(self._sent_bytes.values())

    @property
    def is_sufficient(self) -> bool:
        """Whether enough uploads arrived for an aggregation.

        The result is always True for an empty cohort, which can be sampled with
        `privacy.poisson_cohorts`. In this case, the aggregated sum consists of noise only.
        """
        return not self.cohort or len(self.uploads) >= self.trainer.policy.least

    def shortage(self) -> RunFailedError:
        """Return an error that describes why there are too few uploads.

        If the protocol abandoned the round, the error of the protocol is returned.
        """
        if self.abandoned is not None:
            return self.abandoned
        least = self.trainer.policy.least
        found = f"{len(self.uploads)} of at least {least} usable uploads"
        line = f"round {self.round_idx + 1}: {found if least > 1 else 'no usable upload'}"
        line += f" from {pluralize(len(self.cohort), 'client')}"
        if self.failed:
            client_id, reason = next(iter(self.failed.items()))
            line += f"; {client_id}: {reason}"
        elif self.late:
            line += f"; {len(self.late)} of them late"
        return RunFailedError(line)

    def exchanges(self, clients: Sequence[str] | None = None) -> Iterator[Exchange]:
        """Yield the exchanges of the round.

        The replies to an exchange must be added before the next exchange is requested. `finish`
        must be called after the last exchange.

        Args:
            clients: Ids of the clients of the cohort that participate. If None, all clients
                participate.
        """
        clients = self.cohort if clients is None else clients
        try:
            self._total = yield from self.trainer.protocol.exchanges(clients, self.round_idx)
        except RoundAbandonedError as error:
            self.abandoned = error

    def finish(self) -> None:
        """Complete the uploads after the last exchange.

        Simulated attacks replace the uploads of malicious clients. With secure aggregation,
        `uploads` is set to the aggregated sum. If the protocol abandoned the round, all clients
        that did not fail before are recorded as failed.
        """
        if self.abandoned is not None:
            self._fail_remaining()
        elif isinstance(self._total, AggregatedUploads):
            self._read_sum(self._total)
        elif self._total is not None:
            self._keep_sealed(self._total)
        elif self._waiting:
            self._poison()
        # Free the memory of the sum.
        self._total = None

    def request(self, exchange: Exchange, client_id: str) -> Message:
        """Return the request to a client, and count the traffic.

        If a request is repeated, only the last request counts.
        """
        message = exchange.request(client_id, self._broadcast_to)
        self._sent_bytes[exchange.kind, client_id] = message.size
        return replace(message, round_idx=self.round_idx)

    def add(self, exchange: Exchange, client_id: str, reply: Reply) -> None:
        """Add the reply of a client. Replies must be added in the order of the cohort.

        Args:
            exchange: The exchange that requested the reply.
            client_id: The client.
            reply: The reply.

        Raises:
            RunFailedError: If the client diverged and `runtime.divergence` is "stop".
        """
        if isinstance(reply, DivergedError):
            self.trainer.check_divergence(client_id, reply)
            self.fail(client_id, str(reply))
        elif isinstance(reply, ClientLateError):
            self.late.append(client_id)
        elif isinstance(reply, NoUploadError):
            self.fail(client_id, str(reply))
        else:
            self.up_bytes += reply.size
            if not reply.is_intact:
                self.refuse(client_id, DAMAGED)
                return
            try:
                if (content := exchange.accept(client_id, reply)) is not None:
                    self._add_upload(client_id, content)
            except PayloadError as error:
                self.refuse(client_id, f"upload refused: {error}")

    def fail(self, client_id: str, reason: str) -> None:
        """Record that a client sent no usable upload, and the reason."""
        self.failed[client_id] = reason
        self._sent.pop(client_id, None)

    def refuse(self, client_id: str, reason: str) -> None:
        """Record that a client's upload cannot be used, and discard the new private state."""
        self.fail(client_id, reason)
        self.trainer.store.discard_client(client_id)

    def _add_upload(self, client_id: str, content: Content) -> None:
        client_info = self.trainer.federation.client_infos[client_id]
        received = self.trainer.broadcasts.received(self._sent.pop(client_id))
        payload = self.trainer.decode_upload(client_info, content, received, self.round_idx)
        self.magnitudes[client_id] = payload.magnitude
        loss = loss_from_report(payload.report)
        if loss is not None:
            self.losses[client_id] = loss
        if logged := logged_from_report(payload.report):
            self.logged[client_id] = logged
        attacks = self.trainer.federation.malicious
        if attacks is not None and attacks.is_malicious(client_id, self.round_idx):
            self.malicious.append(client_id)
        if self.malicious:
            self._waiting[client_id] = payload
        else:
            self.uploads.add(Upload(client_info, payload))

    def _poison(self) -> None:
        """Replace the uploads of malicious clients by the attack, and add all stored uploads."""
        attacks = self.trainer.federation.malicious
        assert attacks is not None
        client_infos = self.trainer.federation.client_infos
        true_uploads = {c: (client_infos[c], self._waiting[c]) for c in self.malicious}
        self._waiting |= attacks.poison(
            true_uploads,
            self.round_idx,
            len(self.uploads) + len(self._waiting),
            self._reference,
            self.trainer.expectations.trained_names,
        )
        for client_id, payload in self._waiting.items():
            self.magnitudes[client_id] = payload.norm()
            self.uploads.add(Upload(client_infos[client_id], payload))

    def _read_sum(self, aggregated: AggregatedUploads) -> None:
        """Set `uploads` to the result of secure aggregation."""
        protocol = self.trainer.protocol
        assert isinstance(protocol, SecureAggregation)
        client_infos = [self.trainer.federation.client_infos[c] for c in aggregated.clients]
        forms = [
            (
                info,
                self.trainer.expectations.expected_items(
                    info, self._received_by(info), self.round_idx
                ),
            )
            for info in client_infos
        ]
        layout = protocol.agreed.layout(self.round_idx)
        vector = protocol.fixed.decode(aggregated.total)
        self.uploads, loss = uploads_from_sum(vector, aggregated.unit, layout, forms, self._noise)
        if loss is not None:
            self.losses = {"mean": loss}
        self._record_dropouts(aggregated)

    def _keep_sealed(self, aggregate: SealedAggregate) -> None:
        """Keep the result of an aggregation at a client."""
        self.sealed = aggregate
        client_infos = self.trainer.federation.client_infos
        self.uploads = Uploads(Upload(client_infos[c], Payload()) for c in aggregate.clients)
        self._record_dropouts(aggregate)

    def _record_dropouts(self, aggregated: AggregatedUploads | SealedAggregate) -> None:
        """Record the clients whose uploads are not in a sum."""
        # Clients that dropped out after their upload are part of the sum.
        for client_id in aggregated.clients:
            self.failed.pop(client_id, None)
        self.late = [c for c in self.late if c not in aggregated.clients]
        for client_id, reason in aggregated.dropouts.items():
            if client_id in self.failed or client_id in self.late:
                self.trainer.store.discard_client(client_id)
            else:
                self.refuse(client_id, f"upload refused: {reason}")

    def _fail_remaining(self) -> None:
        """Record the clients that did not fail before the protocol abandoned the round."""
        for client_id in self.cohort:
            if client_id not in self.failed and client_id not in self.late:
                self.fail(client_id, f"the round was abandoned: {self.abandoned}")

    def _make_rules(self) -> AggregationRules | None:
        """Return the aggregation rules of the round, or None for the plain mean."""
        if self.trainer.rules_config is None:
            return None
        return AggregationRules(
            self.trainer.rules_config,
            self.trainer.federation.task,
            self._reference,
            self.trainer.expectations.trained_names,
        )

    def _broadcast_to(self, client_id: str) -> Content:
        client_info = self.trainer.federation.client_infos[client_id]
        payload = self.trainer.broadcast(client_info)
        self._sent[client_id] = payload
        return self.trainer.broadcasts.content(payload)

    def _received_by(self, client_info: ClientInfo) -> Payload:
        return self.trainer.broadcasts.received(self.trainer.broadcast(client_info))

    def _reference(self, client_info: ClientInfo, name: str) -> Tensors:
        """Return the tensors of a model that a client received, keyed by name.

        The result is empty if the client received no model as the item `name`.
        """
        item = self._received_by(client_info).items_by_name.get(name)
        if item is None or item.kind != "params" or not isinstance(item.values, dict):
            return {}
        return item.values

    def record(self, traffic: Traffic, seconds: float) -> dict[str, Any]:
        """Return the record of the round for `metrics.jsonl`, without evaluation results.

        The evaluation time in `seconds` is 0 and is replaced if the round is evaluated.

        Args:
            traffic: Bytes sent in the round.
            seconds: Wall-clock time of the round in seconds.
        """
        record = {
            "round": self.round_idx + 1,
            "cohort": list(self.cohort),
            "failed": self.failed,
            "train_loss": self.losses,
            **({"logged": self.logged} if self.logged else {}),
            "up_bytes": traffic.up,
            "down_bytes": traffic.down,
        }
        if self.rules is not None and self.rules.too_few:
            record["too_few"] = self.rules.too_few
        if self.trainer.federation.malicious is not None:
            record["attacks"] = {"malicious": self.malicious}
        record["seconds"] = {"training": seconds, "evaluation": 0.0}
        if self.diverged or not self.is_sufficient:
            record["skipped"] = True
        if self.diverged:
            record["diverged"] = self.diverged
        return record
