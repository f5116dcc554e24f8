"""A round at the server: its link to the clients, the uploads, and the record of what happened."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.robust_means import AggregationRules
from hetero_fl.aggregation.uploads import MeanCombiner, discount_upload
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast
from hetero_fl.communication.protocol import (
    AggregatedUploads,
    Content,
    EncodeCache,
    Exchange,
    Message,
    RoundProtocol,
    encoded,
)
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import (
    Item,
    Payload,
    PayloadError,
    check_size,
    check_upload,
    logged_from_report,
    loss_from_report,
)
from hetero_fl.engine.driver import Backend, run_plans
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.executors.base import Arrival, ClientLateError
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec, as_sender
from hetero_fl.federation.store import StateStore
from hetero_fl.privacy.server_side import ServerPrivacy, SumNoise
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.text import pluralize

# A line of metrics.jsonl.
Record = dict[str, Any]


@dataclass
class RoundEvents:
    """Events of a round, for the line of the round in `metrics.jsonl`.

    Attributes:
        cohort: Ids of the clients in the round.
        start: Time at which the round began, in seconds on the clock of the run.
        end: Time at which the server stopped waiting for uploads.
        failed: Reasons why clients sent no usable upload, keyed by client id.
        losses: Training loss, keyed by client id. If the clients reveal only their sum, the only
            entry is "mean".
        logged: Values that clients logged, keyed by client id and name.
        up_bytes: Bytes sent by clients.
        down_bytes: Bytes sent to clients.
        tasks: A list `[client, start, end, outcome]` for each task, with times in seconds.
        began: Value of `time.perf_counter` at the start of the round.
    """

    cohort: list[str] = field(default_factory=list)
    start: float = 0.0
    end: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    logged: dict[str, dict[str, float]] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0
    tasks: list[list[Any]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def add_report(self, client_id: str, payload: Payload) -> None:
        """Record the training loss and the logged values in the report of an upload."""
        if (loss := loss_from_report(payload.report)) is not None:
            self.losses[client_id] = loss
        if logged := logged_from_report(payload.report):
            self.logged[client_id] = logged

    def record(self, number: int, clock: str | None) -> Record:
        """Return the entries of the round's record that do not depend on the method.

        Args:
            number: Number of the round, from 1.
            clock: Kind of the clock. None if tasks take no time.
        """
        record: Record = {
            "round": number,
            "cohort": self.cohort,
            "failed": self.failed,
            "train_loss": self.losses,
        }
        if self.logged:
            record["logged"] = self.logged
        record["up_bytes"] = self.up_bytes
        record["down_bytes"] = self.down_bytes
        record["seconds"] = {"training": time.perf_counter() - self.began, "evaluation": 0.0}
        if clock is not None:
            outcomes = Counter(outcome for *_, outcome in self.tasks)
            counts = {outcome: outcomes[outcome] for outcome in ("arrived", "failed", "late")}
            record[clock] = {"start": self.start, "end": self.end}
            record["counts"] = {"invited": len(self.tasks), **counts}
            record["tasks"] = self.tasks
        return record


class ServerLink:
    """The server's end of the link to the clients.

    Args:
        algorithm: The method.
        federation: The federation.
        server: The server, in its present state and round.
        expectations: Names, shapes and dtypes of the items of uploads.
        per_round: Number of clients in a round. If None, all clients participate.
        skips_encoding: Whether payloads are passed to clients in this process without encoding.
            Ignored if broadcasts are compressed.

    Attributes:
        channel: Encoder and decoder of messages.
        specs: Declarations of the items that arrive, keyed by name.
        robust: Settings of robust rules, or None if items are averaged.
        privacy: Noise on sums and clipping bounds at the server, or None if there is no noise.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        federation: FederationSpec,
        server: Participant,
        expectations: ExpectedUploads,
        *,
        per_round: int | None = None,
        skips_encoding: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.server = server
        self.expectations = expectations
        self.specs = expectations.specs
        aggregation = federation.aggregation
        self.robust = None if aggregation.is_plain_mean else aggregation
        self.channel = FederationLinks(algorithm, federation)
        self.skips_encoding = skips_encoding
        self.privacy = ServerPrivacy.from_federation(
            expectations.privacy, federation, expectations.expected_items, per_round
        )
        self._contents: EncodeCache[Content] = EncodeCache(self._encode)
        self._decoded = EncodeCache(self._decode)
        self.clear()

    def clear(self) -> None:
        """Drop messages that are outdated because the server has changed."""
        self._contents.clear()
        self._decoded.clear()

    @property
    def server_slot(self) -> str | None:
        """Name of the server's model that is evaluated and saved.

        None if the server has no model, or cannot read its model.
        """
        return self.algorithm.server_model(self.server)

    def broadcast(self, client_info: ClientInfo) -> Payload:
        """Return the payload of the server's broadcast to a client.

        The method may be called several times and in any order of clients, because random draws are
        seeded with the client id.
        """
        sender = as_sender(self.server, client_info.client_id)
        payload = call_broadcast(self.algorithm, sender, client_info)
        return payload if self.privacy is None else self.privacy.add_bounds(payload)

    def content(self, payload: Payload) -> Content:
        """Return the message with a broadcast.

        Equal broadcasts have the same message object.
        """
        return self._contents(payload)

    def received(self, payload: Payload) -> Payload:
        """Return the payload that a client decodes from the message with a broadcast."""
        return payload if self.channel.down is None else self._decoded(payload)

    def _encode(self, payload: Payload) -> Content:
        if self.skips_encoding and self.channel.down is None:
            return payload
        round_idx = self.server.round_context.round_idx
        return self.channel.encode_broadcast(round_idx, payload, self.server.arch.values())

    def _decode(self, payload: Payload) -> Payload:
        round_idx = self.server.round_context.round_idx
        return self.channel.decode_broadcast(round_idx, encoded(self.content(payload)))

    def received_by(self, client_info: ClientInfo) -> Payload:
        """Return the payload that a client decodes from its broadcast."""
        return self.received(self.broadcast(client_info))

    def received_model(self, client_info: ClientInfo, name: str) -> Tensors:
        """Return the tensors of a model that a client received as the item `name`, keyed by name.

        The result is empty if the client received no model as this item.
        """
        item = self.received_by(client_info).items_by_name.get(name)
        if item is None or item.kind != "params" or not isinstance(item.values, dict):
            return {}
        return item.values

    def expected_items(
        self, client_info: ClientInfo, received: Payload, round_idx: int
    ) -> Mapping[str, Item]:
        """Return the items that arrive in a client's upload, with placeholder values.

        Args:
            client_info: The sender.
            received: The broadcast on which the client trained.
            round_idx: Index of the round, from 0.
        """
        return self.expectations.expected_items(client_info, received, round_idx)

    def decode_upload(
        self,
        client_info: ClientInfo,
        content: Content,
        received: Payload,
        round_idx: int,
        attempt: int = 0,
    ) -> Payload:
        """Decode an upload, and validate the structure.

        Args:
            client_info: The sender.
            content: The upload, encoded or as a payload.
            received: The broadcast on which the client trained.
            round_idx: Index of the round, from 0.
            attempt: Number of times that the client has already trained in this round.

        Raises:
            PayloadError: If the upload is malformed or does not have the expected structure.
        """
        expected = self.expected_items(client_info, received, round_idx)
        if isinstance(content, Payload):
            payload = Payload.from_untrusted(content.tree())
        else:
            check_size(len(content), self.specs, expected)
            payload = self.channel.decode_upload(
                client_info, round_idx, content, expected, received, attempt=attempt
            )
        payload = payload.to(self.federation.memory.storage_device)
        check_upload(payload, self.specs, expected, client_info.num_rows)
        return payload

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {} if self.privacy is None else {"bounds": dict(self.privacy.factors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the return value of `state_dict`."""
        if self.privacy is not None:
            self.privacy.factors = dict(state["bounds"])


class RoundUploads:
    """Uploads of a round, which are added to the aggregation on arrival.

    Only one upload is in memory at a time, unless a robust rule or the method needs all of them.

    Args:
        link: The server's link to the clients.
        round_idx: Index of the round, from 0.

    Attributes:
        rules: Robust aggregation rules. If None, items are averaged.
        magnitudes: Largest norm of a tensor in each upload, keyed by client id.
        malicious: Ids of simulated malicious clients whose uploads arrived.
        mean_loss: Mean training loss, if the clients reveal only their sum. Otherwise None.
    """

    def __init__(self, link: ServerLink, round_idx: int) -> None:
        self.link = link
        self.round_idx = round_idx
        self.rules: AggregationRules | None = None
        if link.robust is not None:
            self.rules = AggregationRules(
                link.robust,
                link.federation.task,
                link.received_model,
                link.expectations.trained_names,
            )
        self.noise: SumNoise | None = None
        if link.privacy is not None:
            self.noise = link.privacy.sum_noise(link.received_by, round_idx)
        self.uploads = Uploads(
            specs=link.expectations.specs,
            common=link.federation.common,
            new_combiner=MeanCombiner if self.rules is None else self.rules.combiner,
            noise=self.noise,
        )
        self.magnitudes: dict[str, float] = {}
        self.malicious: list[str] = []
        self.mean_loss: float | None = None

    def __len__(self) -> int:
        return len(self.uploads)

    def add(self, client_info: ClientInfo, payload: Payload, staleness_weight: float = 1.0) -> None:
        """Add an upload. Uploads must be added in the order of client ids.

        Args:
            client_info: The sender.
            payload: The upload.
            staleness_weight: Factor on the weights of the upload.
        """
        self.magnitudes[client_info.client_id] = payload.magnitude
        # The weights in the payload are discounted here; methods may also read the factor.
        discounted = discount_upload(payload, staleness_weight)
        self.uploads.add(Upload(client_info, discounted, staleness_weight))

    def finish(self, result: AggregatedUploads | None) -> None:
        """Complete the uploads after the last exchange of the round."""
        return

    def update_server(self, backend: Backend) -> None:
        """Update the server and the bounds of its privacy with the uploads.

        Raises:
            DivergedError: If training at the server diverges.
        """
        server = self.link.server
        plan = self.link.algorithm.aggregate(server, self.uploads)
        (outcome,) = run_plans([(server, plan)], backend)
        outcome.result()
        if self.link.privacy is not None:
            self.link.privacy.adapt_bounds(self.uploads)

    def describe_largest(self) -> str:
        """Return the continuation of a message with the largest upload, or "" if it is private."""
        if not self.magnitudes or self.link.privacy is not None:
            return ""
        client = max(self.magnitudes, key=lambda c: self.magnitudes[c])
        largest = f"{self.magnitudes[client]:.3g}"
        return f"; the upload of {client} has the largest magnitude, {largest}"

    def record(self) -> dict[str, Any]:
        """Return entries of the round's record."""
        entries: dict[str, Any] = {}
        if self.rules is not None and self.rules.too_few:
            entries["too_few"] = self.rules.too_few
        if self.link.federation.malicious is not None:
            entries["attacks"] = {"malicious": self.malicious}
        return entries


def check_intact(reply: Message) -> None:
    """Raise PayloadError if the content of a reply does not match its checksum."""
    if not reply.is_intact:
        raise PayloadError("checksum mismatch")


class UploadCollector:
    """Collector of the replies of one cohort.

    Args:
        events: What happens in the round. The ids in the cohort are in order.
        protocol: Protocol by which uploads reach the server.
        link: The server's link to the clients.
        uploads: The uploads, to which none has been added.
        store: Store of the clients' private states.

    Attributes:
        late: Ids of clients that had not replied when the round ended.
    """

    def __init__(
        self,
        events: RoundEvents,
        protocol: RoundProtocol,
        link: ServerLink,
        uploads: RoundUploads,
        store: StateStore,
    ) -> None:
        self.events = events
        self.cohort = events.cohort
        self.protocol = protocol
        self.link = link
        self.uploads = uploads
        self.store = store
        self.round_idx = uploads.round_idx
        self.late: list[str] = []
        # Bytes sent to clients, keyed by kind of the exchange and client id.
        self._sent_bytes: dict[tuple[str, str], int] = {}
        # Broadcasts to clients that have not replied, keyed by client id.
        self._sent: dict[str, Payload] = {}
        # Start and end of each client's tasks in seconds, keyed by client id.
        self._times: dict[str, tuple[float, float]] = {}

    def exchanges(self) -> Iterator[Exchange]:
        """Yield the exchanges of the round, and complete the uploads after the last one.

        The replies to an exchange must be added before the next exchange is requested. There is no
        exchange if the cohort is empty.

        Raises:
            RoundAbandonedError: If too few clients are left for the protocol.
        """
        if not self.cohort:
            return
        result = yield from self.protocol.exchanges(self.cohort, self.round_idx)
        self.uploads.finish(result)
        if result is not None:
            self._record_dropouts(result.clients, result.dropouts)
        if self.uploads.mean_loss is not None:
            self.events.losses = {"mean": self.uploads.mean_loss}

    def request(self, exchange: Exchange, client_id: str) -> Message:
        """Return the request to a client, and count the traffic.

        If a request is repeated, only the last request counts.
        """
        message = exchange.request(client_id, self._broadcast_to)
        key = (exchange.kind, client_id)
        self.events.down_bytes += message.size - self._sent_bytes.get(key, 0)
        self._sent_bytes[key] = message.size
        return replace(message, round_idx=self.round_idx)

    def add(self, exchange: Exchange, arrival: Arrival) -> None:
        """Add the reply of a client. Replies must be added in the order of the cohort.

        Args:
            exchange: The exchange that requested the reply.
            arrival: The reply.
        """
        client_id = arrival.client
        reply = arrival.reply
        start, _ = self._times.get(client_id, (arrival.start, arrival.end))
        self._times[client_id] = (start, arrival.end)
        self.events.up_bytes += arrival.unused_bytes
        if isinstance(reply, Message):
            self.events.up_bytes += reply.size
            self._add_message(exchange, client_id, reply)
        elif isinstance(reply, ClientLateError):
            self.late.append(client_id)
            self._sent.pop(client_id, None)
        else:
            self.fail(client_id, str(reply))

    def _add_message(self, exchange: Exchange, client_id: str, reply: Message) -> None:
        try:
            check_intact(reply)
            if (content := exchange.accept(client_id, reply)) is not None:
                self._add_upload(client_id, content)
        except PayloadError as error:
            self.refuse(client_id, f"upload refused: {error}")

    def _add_upload(self, client_id: str, content: Content) -> None:
        client_info = self.link.federation.client_infos[client_id]
        received = self.link.received(self._sent.pop(client_id))
        payload = self.link.decode_upload(client_info, content, received, self.round_idx)
        self.events.add_report(client_id, payload)
        self.uploads.add(client_info, payload)

    def fail(self, client_id: str, reason: str) -> None:
        """Record that a client sent no usable upload, and the reason."""
        self.events.failed[client_id] = reason
        self._sent.pop(client_id, None)

    def refuse(self, client_id: str, reason: str) -> None:
        """Record that a client's upload cannot be used, and discard the new private state."""
        self.fail(client_id, reason)
        self.store.discard_client(client_id)

    def _record_dropouts(self, summed: Sequence[str], dropouts: dict[str, str]) -> None:
        """Record the clients whose uploads are not in a sum.

        Args:
            summed: Ids of the clients whose uploads are in the sum. They may have dropped out
                afterwards.
            dropouts: Reasons why other uploads are not in the sum, keyed by client id.
        """
        for client_id in summed:
            self.events.failed.pop(client_id, None)
        self.late = [client_id for client_id in self.late if client_id not in summed]
        for client_id, reason in dropouts.items():
            if client_id in self.events.failed or client_id in self.late:
                self.store.discard_client(client_id)
            else:
                self.refuse(client_id, f"upload refused: {reason}")

    def abandon(self, reason: object) -> None:
        """Record that the protocol abandoned the round for all clients that did not fail before."""
        for client_id in self.cohort:
            if client_id not in self.events.failed and client_id not in self.late:
                self.fail(client_id, f"the round was abandoned: {reason}")

    def is_sufficient(self, least: int) -> bool:
        """Return whether at least `least` uploads arrived.

        The result is always True for an empty cohort, which can be sampled with
        `privacy.poisson_cohorts`. In this case, the aggregated sum consists of noise only.
        """
        return not self.cohort or len(self.uploads) >= least

    def shortage(self, least: int) -> RunFailedError:
        """Return an error that describes why fewer than `least` uploads arrived."""
        found = f"{len(self.uploads)} of at least {least} usable uploads"
        line = f"round {self.round_idx + 1}: {found if least > 1 else 'no usable upload'}"
        line += f" from {pluralize(len(self.cohort), 'client')}"
        if self.events.failed:
            client_id, reason = next(iter(self.events.failed.items()))
            line += f"; {client_id}: {reason}"
        elif self.late:
            line += f"; {len(self.late)} of them late"
        return RunFailedError(line)

    def _broadcast_to(self, client_id: str) -> Content:
        payload = self.link.broadcast(self.link.federation.client_infos[client_id])
        self._sent[client_id] = payload
        return self.link.content(payload)

    def close(self, end: float) -> None:
        """Record the tasks of the clients.

        Args:
            end: Time at which the server stopped waiting, in seconds.
        """
        self.events.end = end
        for client_id in self.cohort:
            outcome = "arrived"
            if client_id in self.events.failed:
                outcome = "failed"
            elif client_id in self.late:
                outcome = "late"
            start, finished = self._times.get(client_id, (end, end))
            self.events.tasks.append([client_id, start, min(finished, end), outcome])
