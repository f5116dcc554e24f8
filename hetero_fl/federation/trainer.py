"""Base class of trainers, which run the rounds of a federation and evaluate its models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast, is_user_method, runs_user_code
from hetero_fl.algorithms.prediction import proxy_sample, recalibrates
from hetero_fl.communication.protocol import (
    Content,
    Message,
    SealedAggregate,
    Traffic,
    content_size,
)
from hetero_fl.config.simulation import CohortConfig
from hetero_fl.core.metrics import Scores, summarize_clients
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import ClientInfo, copy_containers, copy_tree
from hetero_fl.core.payload import Payload, PayloadError, check_size, check_upload
from hetero_fl.core.plan import Predict, Recalibrate, Rows
from hetero_fl.core.stored_rows import targets
from hetero_fl.engine.driver import DivergedError, translate_user_errors
from hetero_fl.federation.broadcasts import Broadcasts, PlainBroadcasts
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.base import ClientAbsentError, Executor
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec, as_sender
from hetero_fl.federation.state_store import PrivateState
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.federation.summed_uploads.hidden_server import SealedBroadcasts
from hetero_fl.privacy.server_side import ServerPrivacy
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.ordering import natural_order

# A line of metrics.jsonl.
Record = dict[str, Any]

# Number of successive rounds in which training at the server may diverge.
MAX_DIVERGED_ROUNDS = 3


@dataclass
class EvaluationResult:
    """Result of an evaluation of all clients and the server.

    Attributes:
        clients: Evaluation of each client, keyed by client id.
        server: Scores of the server's model on the global test and validation sets, keyed by
            "global" and "validation_global". None if the server has no model.
        absent_clients: Reasons why clients could not be evaluated, keyed by client id. These
            clients are excluded from all means.
    """

    clients: dict[str, ClientEvaluation]
    server: dict[str, Scores] | None
    absent_clients: dict[str, str] = field(default_factory=dict)


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def add_evaluation(record: Record, evaluation: EvaluationResult) -> None:
    """Add the scores of an evaluation to the record of a round, in place."""
    by_name = {
        name: summarize_clients(
            {c: r.scores[name] for c, r in evaluation.clients.items() if name in r.scores}
        )
        for name in ("personal", "global", "validation_personal", "validation_global")
        if any(name in r.scores for r in evaluation.clients.values())
    }
    server = evaluation.server or {}
    record["personal"] = by_name.get("personal")
    record["global"] = by_name.get("global")
    record["server"] = server.get("global")
    record["validation"] = {
        "personal": by_name.get("validation_personal"),
        "global": by_name.get("validation_global"),
        "server": server.get("validation_global"),
    }
    triggered = [r.triggered for r in evaluation.clients.values() if r.triggered is not None]
    if triggered:
        record["attacks"]["success"] = sum(triggered) / len(triggered)
    record["clients"] = {
        c: {name: r.scores[name] for name in ("personal", "global") if name in r.scores}
        for c, r in evaluation.clients.items()
    }
    if evaluation.absent_clients:
        record["absent"] = evaluation.absent_clients


class FederatedTrainer(ABC):
    """Base class of trainers, which run the rounds of a federation and evaluate its models.

    The state of a run consists of the server, the clients' private state and the traffic.
    Everything else follows from the configuration.

    Args:
        algorithm: The method.
        federation: The clients, their models and data.
        executor: Executor that runs the clients' tasks.
        per_round: Number of clients in a round. If None, all clients participate.
        stop_on_divergence: Whether the run ends if training of a client or the server diverges.
        policy: Policy for the sampling of cohorts and for rounds with too few uploads. If None, the
            default `CohortConfig` is used.

    Attributes:
        keeps_requests: Whether requests are stored in checkpoints, because clients may still train
            on a request after the server has changed.
        skips_encoding: Whether broadcasts are passed to clients in this process without encoding.
            Broadcasts of user-defined methods are always encoded, because such methods may modify
            received tensors in place.
        traffic: Bytes sent so far.
        completed: Number of completed rounds.
        now: Simulated or measured time since the start of the run in seconds. Always 0.0 in
            trainers without a clock.
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
        self.skips_encoding = (
            executor.accepts_unencoded
            and self.protocol.accepts_unencoded
            and not self.keeps_requests
            and not runs_user_code(algorithm, federation.client_infos)
        )
        self.expectations = ExpectedUploads(algorithm, federation)
        self.privacy = ServerPrivacy.from_federation(
            self.expectations.privacy, federation, self.expectations.expected_items, per_round
        )
        self.traffic = Traffic()
        # None if uploads are aggregated by the plain mean.
        self.rules_config = None if federation.aggregation.is_plain_mean else federation.aggregation
        # State of the aggregation rules that is stored between rounds.
        self.now = 0.0
        self.completed = 0
        # Number of successive rounds discarded because training at the server diverged.
        self.num_diverged = 0
        self.server = self.federation.server()
        with translate_user_errors():
            algorithm.setup(self.server)
        self.server.models = self.federation.memory.to_storage(self.server.models)
        self.server.state = self.federation.memory.to_storage(self.server.state)
        self.broadcasts: Broadcasts = (
            SealedBroadcasts(self.server)
            if self.protocol.hides_server
            else PlainBroadcasts(self.links, self.skips_encoding)
        )
        self.broadcasts.begin(0, self.server.arch.values())

    @property
    def round_idx(self) -> int:
        """Index of the next round, from 0, which seeds the random draws of the server."""
        return self.completed

    @abstractmethod
    def run_round(self) -> Record:
        """Run the next round, and commit the new state of the server and the clients.

        Returns:
            The round's line in `metrics.jsonl`.

        Raises:
            RunFailedError: If there are too few usable uploads and the policy requires a failure,
                or if a user-defined method fails. The private states of the clients are restored.
        """

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Restore private states, `traffic` and `now` if an exception is raised in the context.

        Exceptions of user-defined code are converted to `RunFailedError`.
        """
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

    def save(
        self, checkpoints: Checkpoints, about: Mapping[str, Any], kept_rounds: Collection[int] = ()
    ) -> None:
        """Write a checkpoint of the run.

        Args:
            checkpoints: The checkpoints of the run.
            about: Further entries of the checkpoint, which describe the run.
            kept_rounds: Rounds whose checkpoints are kept, in addition to the two newest.
        """
        checkpoints.save(self.completed, {"run": self.state_dict(), **about}, kept_rounds)
        self.on_checkpoint()

    def on_checkpoint(self) -> None:
        """Handle a checkpoint that has been written or loaded.

        The base class does nothing. Subclasses may override this method.
        """
        return

    @property
    def server_slot(self) -> str | None:
        """Name of the server's model that is evaluated and saved.

        None if the server has no model, or cannot read its model.
        """
        if self.protocol.hides_server:
            return None
        return self.algorithm.server_model(self.server)

    def adopt_state(self, aggregate: SealedAggregate) -> None:
        """Set the server's state to the result of an aggregation at a client.

        Raises:
            DivergedError: If training in the aggregation diverged.
        """
        if aggregate.diverged:
            raise DivergedError(aggregate.diverged)
        assert isinstance(self.broadcasts, SealedBroadcasts)
        self.broadcasts.replace(aggregate.state)

    def load_client_states(self, states: Mapping[str, PrivateState]) -> None:
        """Set the initial private states of clients.

        Args:
            states: Private states, keyed by client id.
        """
        for client_id, state in states.items():
            self.store.stage(client_id, state)
        self.store.commit()

    def broadcast(self, client_info: ClientInfo) -> Payload:
        """Return the payload of the server's broadcast to a client.

        The method may be called several times and in any order of clients, because random draws are
        seeded with the client id.
        """
        server = as_sender(self.server, client_info.client_id)
        payload = call_broadcast(self.algorithm, server, client_info)
        return payload if self.privacy is None else self.privacy.add_bounds(payload)

    def _clear_broadcasts(self) -> None:
        """Drop messages that are outdated because the server has changed."""
        self.broadcasts.begin(self.server.round_context.round_idx, self.server.arch.values())

    def _set_round_context(self, round_idx: int) -> None:
        is_next = round_idx != self.server.round_context.round_idx
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        if is_next:
            self._clear_broadcasts()

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
        expected = self.expectations.expected_items(client_info, received, round_idx)
        specs = self.expectations.specs
        if isinstance(content, Payload):
            payload = Payload.from_untrusted(content.tree())
        else:
            check_size(len(content), specs, expected)
            payload = self.links.decode_upload(
                client_info, round_idx, content, expected, received, attempt=attempt
            )
        payload = payload.to(self.federation.memory.storage_device)
        check_upload(payload, specs, expected, client_info.num_rows)
        return payload

    def count_traffic(self, up: int = 0, down: int = 0) -> None:
        """Count bytes as traffic, unless the communication of the method is not counted.

        Args:
            up: Bytes uploaded by clients.
            down: Bytes sent to clients.
        """
        if self.algorithm.needs.counts_traffic:
            self.traffic.up += up
            self.traffic.down += down

    def check_divergence(self, client_id: str, error: DivergedError | str) -> None:
        """Handle the divergence of a client.

        Raises:
            RunFailedError: If the run is configured to stop when a client diverges.
        """
        if self.stop_on_divergence:
            raise RunFailedError(f"round {self.completed + 1}: {client_id} diverged: {error}")

    def update_server(self, aggregate: Callable[[], None], magnitudes: Mapping[str, float]) -> str:
        """Update the server.

        If training at the server diverges, the state before the update is restored.

        Args:
            aggregate: Function that updates the server, the state of the aggregation rules and the
                privacy bounds.
            magnitudes: Largest norm of a tensor in each upload, keyed by client id, which is used
                in the description of a divergence.

        Returns:
            Reason why training at the server diverged. Empty if training did not diverge.

        Raises:
            RunFailedError: If training at the server diverges and `runtime.divergence` is "stop",
                or if training has diverged in `MAX_DIVERGED_ROUNDS` successive rounds. In a run
                with fewer rounds, the limit is the number of rounds.
        """
        # Free memory for the aggregation.
        self._clear_broadcasts()
        # Methods of this package replace tensors; user-defined ones may modify them in place.
        copy = copy_tree if is_user_method(self.algorithm) else copy_containers
        models = copy(self.server.models)
        state = copy(self.server.state)
        arch = dict(self.server.arch)
        bounds = self.privacy.state_dict() if self.privacy is not None else {}
        try:
            aggregate()
        except DivergedError as error:
            self.server.models = models
            self.server.state = state
            self.server.arch = arch
            if self.privacy is not None:
                self.privacy.load_state_dict(bounds)
            self.num_diverged += 1
            return self._describe_divergence(error, magnitudes)
        self.num_diverged = 0
        return ""

    def _describe_divergence(self, error: DivergedError, magnitudes: Mapping[str, float]) -> str:
        reason = f"training at the server diverged: {error}"
        if magnitudes and self.privacy is None:
            client = max(magnitudes, key=lambda c: magnitudes[c])
            largest = f"{magnitudes[client]:.3g}"
            reason += f"; the upload of {client} has the largest magnitude, {largest}"
        limit = min(MAX_DIVERGED_ROUNDS, self.federation.num_rounds)
        if self.num_diverged >= limit or self.stop_on_divergence:
            times = f", {self.num_diverged} times in a row" if self.num_diverged > 1 else ""
            raise RunFailedError(f"round {self.completed + 1}: {reason}{times}") from None
        return reason

    @translate_user_errors()
    def request_upload(self, client_id: str, round_idx: int) -> tuple[Payload, Payload]:
        """Train one client in a round, and return the upload.

        The new private state of the client is discarded.

        Args:
            client_id: The client.
            round_idx: Index of the round, from 0.

        Returns:
            The broadcast that the client received, and the upload as the server decodes it.

        Raises:
            RunFailedError: If the client sends no upload.
            PayloadError: If the upload does not have the expected structure.
        """
        self._set_round_context(round_idx)
        client_info = self.federation.client_infos[client_id]
        payload = self.broadcast(client_info)
        request = Message("train", self.broadcasts.content(payload), round_idx)
        try:
            ((_, reply),) = self.executor.run([client_id], lambda _: request)
        finally:
            self.store.discard()
        if not isinstance(reply, Message):
            raise RunFailedError(f"round {round_idx + 1}: {client_id} sent no upload: {reply}")
        received = self.broadcasts.received(payload)
        upload = self.decode_upload(client_info, reply.content, received, round_idx)
        return received, upload

    @translate_user_errors()
    def evaluate(
        self,
        details: bool = False,
        save: Callable[[str, bytes], None] | None = None,
        counts_traffic: bool = True,
    ) -> EvaluationResult:
        """Evaluate the present models of the clients and the server's model.

        All clients in `federation.evaluated_clients` are evaluated, including clients outside the
        cohort of the round. The clients receive the next broadcast.

        Args:
            details: Whether to compute all results that a report shows, including the models.
            save: Function that is called with the id and the encoded model of each client (see
                `SavedModel.encode`). If None, the encoded models are part of the result.
            counts_traffic: Whether the broadcasts count as traffic of the run.

        Raises:
            RunFailedError: If a model cannot be evaluated.
        """
        self._set_round_context(self.round_idx)
        client_ids = natural_order(self.federation.evaluated_clients)
        sizes: dict[str, int] = {}

        def broadcast(client_id: str) -> Content:
            client_info = replace(self.federation.client_infos[client_id], purpose="evaluate")
            content = self.broadcasts.content(self.broadcast(client_info))
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
        if counts_traffic:
            self.count_traffic(down=sum(sizes.values()))
        return EvaluationResult(clients, self._evaluate_server(), absent)

    def server_tensors(self, slot: str) -> Tensors:
        """Return the tensors of one of the server's models for deployment.

        With `recalibrate: [global_test]`, the model's BatchNorm statistics are computed on the
        proxy set.

        Args:
            slot: Name of the model in `server.models`.

        Returns:
            The tensors, keyed by name.
        """
        tensors = self.server.models[slot]
        settings = self.server.peers.main_profile.settings
        if not self.server.has_proxy or not recalibrates(settings, "global_test"):
            return tensors
        rows = proxy_sample(self.server, self.federation.preprocessing_of(slot))
        (statistics,) = self.backend.run([(self.server, Recalibrate(slot, rows))])
        return {**tensors, **statistics}

    def _evaluate_server(self) -> dict[str, Scores] | None:
        slot = self.server_slot
        if slot is None:
            return None
        view = self.federation.preprocessing_of(slot)
        server = replace(self.server, models={slot: self.server_tensors(slot)})
        scores = {}
        for name, rows in (("global", "common_test"), ("validation_global", "common_validation")):
            y = targets(self.server.data(rows, view)).cpu()
            if len(y):
                (logits,) = self.backend.run([(server, Predict(slot, Rows(rows, preprocess=view)))])
                columns = self.federation.data.extra_columns(self.server.participant_id, rows)
                scores[name] = self.federation.score(logits.cpu(), y, columns)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the private states of the clients."""
        state: dict[str, Any] = {
            "completed": self.completed,
            "server": {"models": self.server.models, "state": self.server.state},
            "traffic": {"up": self.traffic.up, "down": self.traffic.down},
            "bounds": self.privacy.state_dict() if self.privacy is not None else {},
        }
        if broadcasts := self.broadcasts.state_dict():
            state["broadcasts"] = broadcasts
        if self.num_diverged:
            state["diverged"] = self.num_diverged
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from the return value of `state_dict`."""
        self.completed = state["completed"]
        self.num_diverged = state.get("diverged", 0)
        to_storage = self.federation.memory.to_storage
        models = state["server"]["models"]
        for slot, initial in self.server.models.items():
            if _shapes(models[slot]) != _shapes(initial):
                raise ValueError(f"server model {slot!r}: other tensors than in this run")
        self.server.models = to_storage(models)
        self.server.state = to_storage(state["server"]["state"])
        self.traffic = Traffic(**{name: int(count) for name, count in state["traffic"].items()})
        if self.privacy is not None:
            self.privacy.load_state_dict(state["bounds"])
        self.broadcasts.load_state_dict(state.get("broadcasts", {}))
        self._clear_broadcasts()
