"""A run in progress: the server, the clients' state, traffic and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast, is_user_method, runs_user_code
from hetero_fl.communication.protocol import Content, Message, Traffic, content_size
from hetero_fl.config.simulation import CohortConfig
from hetero_fl.core.metrics import Scores, score, summarize_clients
from hetero_fl.core.participant import ClientInfo, copy_containers, copy_tree
from hetero_fl.core.payload import Payload, PayloadError, check_size, check_upload
from hetero_fl.core.plan import Predict, Rows
from hetero_fl.engine.driver import DivergedError, translate_user_errors
from hetero_fl.federation.broadcasts import make_broadcasts
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.executors.base import ClientAbsentError, Executor
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.secure_aggregation import make_protocol
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.privacy.server_side import ServerPrivacy
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_order

# An evaluation's figures, and how they stand in a round's record.

Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass
class EvaluationResult:
    """An evaluation: each client's reading, the server's scores on the common sets if it has a model, and why clients on machines
    of their own could not be read, whose scores are in no mean."""

    clients: dict[str, ClientEvaluation]
    server: dict[str, Scores] | None
    absent_clients: dict[str, str] = field(default_factory=dict)


def add_evaluation(record: Record, evaluation: EvaluationResult) -> None:
    """Set an evaluation's figures into a round's record."""
    by_name = {
        name: summarize_clients(
            {c: r.scores[name] for c, r in evaluation.clients.items() if name in r.scores}
        )
        for name in ("personal", "global", "validation_personal", "validation_global")
        if any(name in r.scores for r in evaluation.clients.values())
    }
    server = evaluation.server or {}
    record["personal"], record["global"] = by_name.get("personal"), by_name.get("global")
    record["server"] = server.get("global")
    record["validation"] = {
        "personal": by_name.get("validation_personal"),
        "global": by_name.get("validation_global"),
        "server": server.get("validation_global"),
    }
    stamped = [r.triggered for r in evaluation.clients.values() if r.triggered is not None]
    if stamped:
        record["attacks"]["success"] = sum(stamped) / len(stamped)
    record["clients"] = {
        c: {name: r.scores[name] for name in ("personal", "global") if name in r.scores}
        for c, r in evaluation.clients.items()
    }
    if evaluation.absent_clients:
        record["unread"] = evaluation.absent_clients


MOST_DIVERGED = 3  # rounds in succession in which training at the server may diverge


class FederatedTrainer(ABC):
    """A run in progress: the server, the clients' state, traffic and evaluation.

    Its state is the server, the store and the traffic; everything else follows from the
    configuration.

    Args:
        algorithm: The method.
        federation: Who takes part, and on which data.
        executor: Computes the clients' tasks.
        per_round: Clients in a round; None: all.
        stop_on_divergence: End the run if a client's or the server's training diverges.
        policy: How cohorts are drawn, and what happens with too few uploads.

    Attributes:
        keeps_requests: Whether requests outlive the server's version, and are part of checkpoints.
        hands_over: Whether clients in this process are handed broadcasts as they are. A user's
            method may change what it receives in place, so that its broadcasts are encoded.
    """

    keeps_requests = False

    def __init__(
        self,
        algorithm: Algorithm,
        federation: FederationSpec,
        executor: Executor,
        per_round: int | None = None,
        stop_on_divergence: bool = False,
        *,
        policy: CohortConfig | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.federation = federation.with_memory(executor.backend.templates.memory)
        self.executor = executor
        self.per_round = per_round
        self.stop_on_divergence = stop_on_divergence
        self.policy = policy or CohortConfig()
        self.store = executor.store
        self.backend = executor.backend
        self.protocol = make_protocol(algorithm, federation)
        self.links = FederationLinks(algorithm, federation)
        self.hands_over = (
            executor.takes_payload
            and self.protocol.takes_payload
            and not self.keeps_requests
            and not runs_user_code(algorithm, federation.client_infos)
        )
        self.broadcasts = make_broadcasts(self.links, self.store.stamp, self.hands_over)
        self.expectations = ExpectedUploads(algorithm, federation)
        self.privacy = ServerPrivacy.from_federation(
            self.expectations.privacy, federation, self.expectations.expected_items, per_round
        )
        self.traffic = Traffic()
        # Rules replace the mean, where the configuration asks for one.
        self.rules_config = None if federation.aggregation.is_plain_mean else federation.aggregation
        self.rule_memory: dict[str, Any] = {}  # what aggregation rules remember between rounds
        self.now = 0.0  # seconds since the run began, where a subclass simulates or measures them
        self.completed = 0
        self.num_diverged = 0  # rounds in succession given up because the server diverged
        self.server = self.federation.server()
        with translate_user_errors():
            algorithm.setup(self.server)
        self.server.models = self.federation.memory.to_storage(self.server.models)
        self.server.state = self.federation.memory.to_storage(self.server.state)
        self._clear_broadcasts()

    @property
    def round_idx(self) -> int:
        """Index of the next round, from 0. Keys what the server sends and draws."""
        return self.completed

    @abstractmethod
    def run_round(self) -> Record:
        """Run the next round and commit it.

        Returns:
            The round's line in `metrics.jsonl`.

        Raises:
            RunFailedError: If no upload can be used, or a user's method fails. Nothing that
                clients did in the round is kept then.
        """

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Undo what a round did to the store, the traffic and the clock if it fails."""
        traffic = replace(self.traffic)
        now = self.now
        try:
            with translate_user_errors():
                yield
        except BaseException:
            self.store.discard()
            self.traffic.up = traffic.up
            self.traffic.down = traffic.down
            self.now = now
            raise

    def save(self, checkpoints: Checkpoints, about: Mapping[str, Any]) -> None:
        """Write a checkpoint of the run with what it must be resumed with."""
        checkpoints.save(self.completed, {"run": self.state_dict(), **about})
        self.on_checkpoint()

    def on_checkpoint(self) -> None:
        """Called when a checkpoint has been written or read."""
        return

    @property
    def fingerprint(self) -> str:
        """A hash of what the run was given besides data and configuration; empty if nothing."""
        return ""

    def load_client_states(self, states: Mapping[str, PrivateState]) -> None:
        """Let clients begin with these private states."""
        for client_id, state in states.items():
            self.store.stage(client_id, state)
        self.store.commit()

    # What clients receive ----------------------------------------------------------------------
    def broadcast(self, client_info: ClientInfo) -> Payload:
        """Return what the server sends to a client.

        May be called several times, in any order: random draws are keyed by the client.
        """
        speaker = replace(
            self.server,
            participant_id=f"{self.server.participant_id} to {client_info.client_id}",
            stream_uses={},
        )
        payload = call_broadcast(self.algorithm, speaker, client_info)
        return payload if self.privacy is None else self.privacy.add_bounds(payload)

    def broadcast_content(self, client_info: ClientInfo, payload: Payload) -> Content:
        """Return the message to a client; clients that receive the same are given one object."""
        return self.broadcasts.content(client_info, payload)

    def as_received(self, client_info: ClientInfo, payload: Payload) -> Payload:
        """Return the payload that a client decodes from a broadcast."""
        return self.broadcasts.received(client_info, payload)

    def _clear_broadcasts(self) -> None:
        """Forget messages: the server has changed, or goes on to another round."""
        self.broadcasts.begin(
            self.server.round_context.round_idx,
            self.round_idx,
            self.server.arch.values(),
            self.clients_in_training(),
        )

    def clients_in_training(self) -> Collection[str]:
        """Return the clients that still train on an earlier version of the server."""
        return ()

    def _set_round_context(self, round_idx: int) -> None:
        is_next = round_idx != self.server.round_context.round_idx
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        if is_next:
            self._clear_broadcasts()

    # What the server receives ------------------------------------------------------------------
    def decode_upload(
        self,
        client_info: ClientInfo,
        content: Content,
        received: Payload,
        round_idx: int,
        attempt: int = 0,
    ) -> Payload:
        """Decode an upload and check it against what this client was to send.

        Args:
            client_info: The sender.
            content: The upload, encoded or as it is.
            received: What the client received.
            round_idx: The round.
            attempt: How often the client was asked in that round before.

        Raises:
            PayloadError: If the upload is malformed or has another form.
        """
        expected = self.expectations.expected_items(client_info, received, round_idx)
        specs = self.expectations.specs
        if isinstance(content, Payload):
            payload = Payload.from_untrusted(content.tree())
        else:
            check_size(len(content), specs, expected)
            payload = self.links.decode_upload(
                client_info, round_idx, content, expected, received, attempt
            )
        payload = payload.to(self.federation.memory.storage_device)
        check_upload(payload, specs, expected)
        return payload

    def count_traffic(self, up: int = 0, down: int = 0) -> None:
        """Count bytes, unless the method is a bound that sends nothing."""
        if self.algorithm.needs.counts_traffic:
            self.traffic.up += up
            self.traffic.down += down

    def check_divergence(self, client_id: str, error: DivergedError | str) -> None:
        """Raise RunFailedError if a diverged client ends the run."""
        if self.stop_on_divergence:
            raise RunFailedError(f"round {self.completed + 1}: {client_id} diverged: {error}")

    def update_server(self, aggregate: Callable[[], None], magnitudes: Mapping[str, float]) -> str:
        """Change the server; restore it if its training diverges.

        Args:
            aggregate: Changes the server, the memory of rules and the privacy bounds.
            magnitudes: Norm of each upload, by client.

        Returns:
            Why the server diverged; empty if it did not.

        Raises:
            RunFailedError: If this has happened `MOST_DIVERGED` times in succession, or in every
                round of a shorter run, or if `runtime.divergence` is "stop".
        """
        self._clear_broadcasts()  # frees memory for the aggregation
        # Methods of this package replace tensors; others may change them in place.
        keep = copy_tree if is_user_method(self.algorithm) else copy_containers
        models = keep(self.server.models)
        state = keep(self.server.state)
        arch = dict(self.server.arch)
        memory = copy_containers(self.rule_memory)
        bounds = self.privacy.state_dict() if self.privacy is not None else {}
        try:
            aggregate()
        except DivergedError as error:
            self.server.models = models
            self.server.state = state
            self.server.arch = arch
            self.rule_memory = memory
            if self.privacy is not None:
                self.privacy.load_state_dict(bounds)
            self.num_diverged += 1
            return self._server_divergence(error, magnitudes)
        self.num_diverged = 0
        return ""

    def _server_divergence(self, error: DivergedError, magnitudes: Mapping[str, float]) -> str:
        why = f"training at the server diverged: {error}"
        if magnitudes and self.privacy is None:
            client = max(magnitudes, key=lambda c: magnitudes[c])
            largest = f"{magnitudes[client]:.3g}"
            why += f"; the upload of {client} has the largest magnitude, {largest}"
        most = min(MOST_DIVERGED, self.federation.num_rounds)
        if self.num_diverged >= most or self.stop_on_divergence:
            times = f", {self.num_diverged} times in succession" if self.num_diverged > 1 else ""
            raise RunFailedError(f"round {self.completed + 1}: {why}{times}") from None
        return why

    @translate_user_errors()
    def request_upload(self, client_id: str, round_idx: int) -> tuple[Payload, Payload]:
        """Have one client train in a round of its own; nothing is kept.

        Returns:
            What the client received, and its upload as the server sees it.

        Raises:
            RunFailedError: If the client sends no upload.
            PayloadError: If the upload does not have the expected form.
        """
        self._set_round_context(round_idx)
        client_info = self.federation.client_infos[client_id]
        payload = self.broadcast(client_info)
        request = Message("train", self.broadcast_content(client_info, payload), round_idx)
        try:
            ((_, reply),) = self.executor.run([client_id], lambda client_id: request)
        finally:
            self.store.discard()
        if not isinstance(reply, Message):
            raise RunFailedError(f"round {round_idx + 1}: {client_id} sent no upload: {reply}")
        received = self.as_received(client_info, payload)
        upload = self.decode_upload(client_info, reply.content, received, round_idx)
        return received, upload

    # Evaluation --------------------------------------------------------------------------------------------------
    @translate_user_errors()
    def evaluate(
        self, details: bool = False, save: Callable[[str, bytes], None] | None = None
    ) -> EvaluationResult:
        """Evaluate the clients' models as they would be used now, in this cohort or not; and the server's.

        What they receive for it is what they would receive next, and is counted like any other transfer. `details`: all
        that a report shows; each model (see `SavedModel.encode`) is then handed to `save` as it comes, and not kept.
        """
        self._set_round_context(self.round_idx)
        client_ids = natural_order(self.federation.evaluated_clients)
        sizes: dict[str, int] = {}

        def broadcast(client_id: str) -> Content:
            client_info = replace(self.federation.client_infos[client_id], purpose="evaluate")
            content = self.broadcast_content(client_info, self.broadcast(client_info))
            sizes[client_id] = content_size(content)
            return content

        clients: dict[str, ClientEvaluation] = {}
        absent: dict[str, str] = {}
        try:
            for client_id, evaluation in self.executor.evaluate(
                client_ids, broadcast, self.round_idx, details
            ):
                if isinstance(evaluation, ClientAbsentError):
                    absent[client_id] = str(evaluation)
                    continue
                if save is not None:
                    save(client_id, evaluation.model)
                    evaluation.model = b""
                clients[client_id] = evaluation
        except (DivergedError, PayloadError) as error:
            raise RunFailedError(
                f"round {self.completed}: a model cannot be evaluated: {error}"
            ) from None
        self._clear_broadcasts()
        if self.algorithm.needs.counts_traffic:
            self.traffic.down += sum(sizes.values())
        return EvaluationResult(clients, self._evaluate_server(), absent)

    def _evaluate_server(self) -> dict[str, Scores] | None:
        slot = self.algorithm.server_model(self.server)
        if slot is None:
            return None
        view = self.federation.preprocessing_of(slot)
        scores = {}
        for name, rows in (("global", "common_test"), ("validation_global", "common_validation")):
            y = self.server.data(rows, view)["y"].cpu()
            if len(y):
                (logits,) = self.backend.run(
                    [(self.server, Predict(slot, Rows(rows, preprocess=view)))]
                )
                unit = self.federation.data.extra_columns(self.server.participant_id, rows).unit
                scores[name] = score(self.federation.task, logits.cpu(), y, unit)
        return scores

    # Crash safety ------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return, besides the store, everything that another process needs to go on."""
        state: dict[str, Any] = {
            "completed": self.completed,
            "server": {"models": self.server.models, "state": self.server.state},
            "traffic": {"up": self.traffic.up, "down": self.traffic.down},
            "aggregation": self.rule_memory,
            "bounds": self.privacy.state_dict() if self.privacy is not None else {},
        }
        if broadcasts := self.broadcasts.state_dict():
            state["broadcasts"] = broadcasts
        if self.num_diverged:
            state["diverged"] = self.num_diverged
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.completed = state["completed"]
        self.num_diverged = state.get("diverged", 0)
        to_storage = self.federation.memory.to_storage
        self.server.models = to_storage(state["server"]["models"])
        self.server.state = to_storage(state["server"]["state"])
        self.traffic = Traffic(**state["traffic"])
        self.rule_memory = state["aggregation"]
        if self.privacy is not None:
            self.privacy.load_state_dict(state["bounds"])
        self.broadcasts.load_state_dict(state.get("broadcasts", {}))
        self._clear_broadcasts()
