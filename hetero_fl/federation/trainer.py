"""Trainer of synchronous rounds, which also evaluates the models and saves the state of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import is_user_method, runs_user_code
from hetero_fl.algorithms.prediction import proxy_sample, recalibrates
from hetero_fl.communication.protocol import Content, Traffic, content_size
from hetero_fl.config.simulation import CohortConfig
from hetero_fl.core.metrics import Scores, summarize_clients
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant, copy_containers, copy_tree
from hetero_fl.core.payload import PayloadError
from hetero_fl.core.plan import Predict, Recalibrate, Rows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.engine.driver import Backend, DivergedError, translate_user_errors
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.combination import make_uploads
from hetero_fl.federation.executors.base import Arrival, ClientAbsentError, Executor, Until
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.round import (
    Record,
    RoundEvents,
    RoundUploads,
    ServerLink,
    UploadCollector,
)
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.summed_uploads import make_link, make_protocol
from hetero_fl.utils.errors import RoundAbandonedError, RunFailedError
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import sample_numbers

# Number of successive rounds in which training at the server may diverge.
MAX_DIVERGED_ROUNDS = 3
# Function that is called with a client id or "server" and an encoded model (`SavedModel.encode`).
SaveFunction = Callable[[str, bytes], None]


@dataclass
class EvaluationResult:
    """Result of an evaluation of all clients and the server.

    Attributes:
        clients: Evaluation of each client, keyed by client id.
        server: Scores of the server's model on the global test and validation sets, keyed by
            "global" and "validation_global". None if the server has no model.
        absent_clients: Reasons why clients could not be evaluated, keyed by client id. These
            clients are excluded from all means.
        down_bytes: Bytes of the broadcasts that the clients received.
    """

    clients: dict[str, ClientEvaluation]
    server: dict[str, Scores] | None
    absent_clients: dict[str, str] = field(default_factory=dict)
    down_bytes: int = 0


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


def evaluate_clients(
    executor: Executor,
    link: ServerLink,
    round_idx: int,
    details: bool = False,
    save: SaveFunction | None = None,
) -> EvaluationResult:
    """Evaluate the models of the clients in `federation.evaluated_clients`.

    The clients receive the next broadcast.

    Args:
        executor: Executor that runs the clients.
        link: The server's link to the clients.
        round_idx: Index of the next round, from 0.
        details: Whether to compute all results that a report shows, including the models.
        save: Function that is called with each model. If None, the encoded models are part of the
            result.

    Returns:
        The evaluations, without the scores of the server.

    Raises:
        DivergedError: If training for deployment diverges.
        PayloadError: If a broadcast is malformed.
    """
    sizes: dict[str, int] = {}

    def broadcast(client_id: str) -> Content:
        client_info = replace(link.federation.client_infos[client_id], purpose="evaluate")
        content = link.content(link.broadcast(client_info))
        sizes[client_id] = content_size(content)
        return content

    result = EvaluationResult({}, None)
    client_ids = natural_order(link.federation.evaluated_clients)
    for client_id, evaluation in executor.evaluate(client_ids, broadcast, round_idx, details):
        if isinstance(evaluation, ClientAbsentError):
            result.absent_clients[client_id] = str(evaluation)
            continue
        if save is not None:
            save(client_id, evaluation.model)
            evaluation.model = b""
        result.clients[client_id] = evaluation
    result.down_bytes = sum(sizes.values())
    return result


def evaluate_server(
    slot: str,
    server: Participant,
    federation: FederationSpec,
    backend: Backend,
    save: SaveFunction | None = None,
) -> dict[str, Scores]:
    """Return the scores of one of the server's models on the global test and validation sets.

    With `recalibrate: [global_test]`, the model's BatchNorm statistics are computed on the proxy
    set.

    Args:
        slot: Name of the model in `server.models`.
        server: The server.
        federation: The federation.
        backend: Backend that computes the predictions.
        save: Function that is called with "server" and the encoded model. If None, the model is not
            saved.
    """
    view = federation.preprocessing_of(slot)
    tensors = server.models[slot]
    if server.has_proxy and recalibrates(server.peers.main_profile.settings, "global_test"):
        (statistics,) = backend.run([(server, Recalibrate(slot, proxy_sample(server, view)))])
        tensors = {**tensors, **statistics}
    server = replace(server, models={slot: tensors})
    scores = {}
    for name, rows in (("global", "common_test"), ("validation_global", "common_validation")):
        y = server.data(rows, view)["y"].cpu()
        if len(y):
            (logits,) = backend.run([(server, Predict(slot, Rows(rows, preprocess=view)))])
            columns = federation.data.extra_columns(server.participant_id, rows)
            scores[name] = federation.score(logits.cpu(), y, columns)
    if save is not None:
        layout = federation.data.layout
        model = SavedModel(
            tensors,
            server.arch[slot],
            asdict(view),
            federation.task,
            None,
            layout.columns,
            layout.categories,
        )
        save("server", model.encode())
    return scores


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def min_clients(policy: CohortConfig, federation: FederationSpec) -> int:
    """Return the minimum number of clients that a round needs."""
    secure_sum = federation.channel.secure_sum
    survivors = 1 if secure_sum is None else secure_sum.min_survivors(federation.cohort)
    return max(policy.least, survivors)


class FederatedTrainer:
    """Trainer that runs synchronous rounds (McMahan et al. 2017, Algorithm 1).

    In each round, the server samples a cohort, sends the broadcast, waits for the uploads of the
    cohort and aggregates the uploads. How long tasks take and which of them fail is up to the
    executor. The state of a run consists of the server, the clients' private state and the traffic.
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
        link: The server's link to the clients. Broadcasts of user-defined methods are always
            encoded, because such methods may modify received tensors in place.
        make_uploads: Function that creates the uploads of a round from the index of the round.
        num_sampled: Number of clients that are sampled for a round.
        traffic: Bytes sent so far.
        completed: Number of completed rounds.
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
        self.traffic = Traffic()
        self.completed = 0
        # Number of successive rounds discarded because training at the server diverged.
        self.num_diverged = 0
        self.server = self.federation.server()
        with translate_user_errors():
            algorithm.setup(self.server)
        self.server.models = self.federation.memory.to_storage(self.server.models)
        self.server.state = self.federation.memory.to_storage(self.server.state)
        self.protocol = make_protocol(algorithm, federation)
        skips_encoding = (
            executor.accepts_unencoded
            and self.protocol.accepts_unencoded
            and not self.keeps_requests
            and not runs_user_code(algorithm, federation.client_infos)
        )
        expectations = ExpectedUploads(algorithm, federation)
        self.link = make_link(
            self.protocol,
            algorithm,
            self.federation,
            self.server,
            expectations,
            per_round=per_round,
            skips_encoding=skips_encoding,
        )
        self.make_uploads = make_uploads(self.protocol, self.link)
        self.num_sampled = self.policy.num_sampled(per_round, len(federation.client_infos))

    @property
    def store(self) -> StateStore:
        """Store of the clients' private states."""
        return self.executor.store

    @property
    def backend(self) -> Backend:
        """Backend that computes the server's plans."""
        return self.executor.backend

    @property
    def round_idx(self) -> int:
        """Index of the next round, from 0, which seeds the random draws of the server."""
        return self.completed

    def run_round(self) -> Record:
        """Run the next round, and commit the new state of the server and the clients.

        Returns:
            The round's line in `metrics.jsonl`.

        Raises:
            RunFailedError: If there are too few usable uploads and the policy requires a failure,
                or if a user-defined method fails. The private states of the clients are restored.
        """
        events = RoundEvents(start=self.executor.now)
        with self.rollback_on_error():
            self.set_round(self.round_idx)
            events.cohort = self.sample_cohort(self.round_idx)
            uploads = self.make_uploads(self.round_idx)
            collector = UploadCollector(events, self.protocol, self.link, uploads, self.store)
            try:
                # After the last exchange, the collector completes the uploads.
                for exchange in collector.exchanges():
                    request = partial(collector.request, exchange)
                    until = Until(self.policy.deadline, self.per_round)
                    for arrival in self.executor.run(exchange.clients, request, until):
                        self.check_divergence(arrival)
                        collector.add(exchange, arrival)
                        # Free the upload before the next client trains.
                        del arrival
            except RoundAbandonedError as error:
                collector.abandon(error)
                if not self._skips_rounds:
                    raise
            collector.close(self.executor.now)
            skipped: dict[str, Any] = {}
            if collector.is_sufficient(self.policy.least):
                if diverged := self.update_server(uploads):
                    skipped = {"skipped": True, "diverged": diverged}
            elif self._skips_rounds:
                skipped = {"skipped": True}
            else:
                raise collector.shortage(self.policy.least)
            if skipped:
                self.store.discard()
            else:
                self.store.commit()
        return self.complete_round(events) | uploads.record() | skipped

    def complete_round(self, events: RoundEvents) -> Record:
        """Count a round and its traffic, and return the round's line in `metrics.jsonl`.

        Args:
            events: What happened in the round.
        """
        self.completed += 1
        if not self.algorithm.needs.counts_traffic:
            events.up_bytes = 0
            events.down_bytes = 0
        self.traffic.up += events.up_bytes
        self.traffic.down += events.down_bytes
        return events.record(self.completed, self.executor.clock) | self.executor.record()

    def sample_cohort(self, round_idx: int) -> list[str]:
        """Sample the clients of a round.

        Returns:
            Client ids in natural order. If `per_round` is None, the ids of all available clients.
        """
        count = self.num_sampled
        if self.policy.sampling != "available":
            return self.federation.sample_cohort(count, round_idx)
        least = min_clients(self.policy, self.federation)
        available = self.executor.wait_for_clients(round_idx, count, least)
        if available is None:
            available = self.federation.client_infos.clients.ids
        if len(available) > count:
            key = (self.federation.seed, round_idx, "available")
            available = [available[i] for i in sample_numbers(len(available), count, *key)]
        return natural_order(available)

    @property
    def _skips_rounds(self) -> bool:
        """Whether rounds with too few uploads are skipped."""
        default = "fail" if self.executor.clock is None else "skip"
        return (self.policy.too_few or default) == "skip"

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Restore private states and the time if an exception is raised in the context.

        Exceptions of user-defined code are converted to `RunFailedError`.
        """
        now = self.executor.now
        try:
            with translate_user_errors():
                yield
        except BaseException:
            self.store.discard()
            self.executor.now = now
            raise

    def set_round(self, round_idx: int) -> None:
        """Set the round of the server, and restart its random streams.

        Broadcasts of other rounds are dropped.
        """
        is_next = round_idx != self.server.round_context.round_idx
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        if is_next:
            self.link.clear()

    def check_divergence(self, arrival: Arrival) -> None:
        """Check whether a client's training diverged.

        Raises:
            RunFailedError: If training diverged and the run is configured to stop.
        """
        if self.stop_on_divergence and isinstance(arrival.reply, DivergedError):
            raise RunFailedError(
                f"round {self.completed + 1}: {arrival.client} diverged: {arrival.reply}"
            )

    def update_server(self, uploads: RoundUploads) -> str:
        """Update the server with the uploads of a round.

        If training at the server diverges, the state before the update is restored.

        Returns:
            Reason why training at the server diverged. Empty if training did not diverge.

        Raises:
            RunFailedError: If training at the server diverges and `runtime.divergence` is "stop",
                or if training has diverged in `MAX_DIVERGED_ROUNDS` successive rounds. In a run
                with fewer rounds, the limit is the number of rounds.
        """
        # Free memory for the aggregation.
        self.link.clear()
        # Methods of this package replace tensors; user-defined ones may modify them in place.
        copy = copy_tree if is_user_method(self.algorithm) else copy_containers
        models = copy(self.server.models)
        state = copy(self.server.state)
        arch = dict(self.server.arch)
        link = self.link.state_dict()
        try:
            uploads.update_server(self.backend)
        except DivergedError as error:
            self.server.models = models
            self.server.state = state
            self.server.arch = arch
            self.link.load_state_dict(link)
            self.num_diverged += 1
            return self._describe_divergence(error, uploads)
        self.num_diverged = 0
        return ""

    def _describe_divergence(self, error: DivergedError, uploads: RoundUploads) -> str:
        reason = f"training at the server diverged: {error}{uploads.describe_largest()}"
        limit = min(MAX_DIVERGED_ROUNDS, self.federation.num_rounds)
        if self.num_diverged >= limit or self.stop_on_divergence:
            times = f", {self.num_diverged} times in a row" if self.num_diverged > 1 else ""
            raise RunFailedError(f"round {self.completed + 1}: {reason}{times}") from None
        return reason

    @translate_user_errors()
    def evaluate(
        self,
        details: bool = False,
        save: SaveFunction | None = None,
        counts_traffic: bool = True,
    ) -> EvaluationResult:
        """Evaluate the present models of the clients and the server's model.

        All clients in `federation.evaluated_clients` are evaluated, including clients outside the
        cohort of the round. The clients receive the next broadcast.

        Args:
            details: Whether to compute all results that a report shows, including the models.
            save: Function that is called with each model. If None, the encoded models of the
                clients are part of the result.
            counts_traffic: Whether the broadcasts count as traffic of the run.

        Raises:
            RunFailedError: If a model cannot be evaluated.
        """
        self.set_round(self.round_idx)
        try:
            result = evaluate_clients(self.executor, self.link, self.round_idx, details, save)
        except (DivergedError, PayloadError) as error:
            raise RunFailedError(
                f"round {self.completed}: a model cannot be evaluated: {error}"
            ) from None
        self.link.clear()
        if counts_traffic and self.algorithm.needs.counts_traffic:
            self.traffic.down += result.down_bytes
        if (slot := self.link.server_slot) is not None:
            result.server = evaluate_server(slot, self.server, self.federation, self.backend, save)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the private states of the clients."""
        state: dict[str, Any] = {
            "completed": self.completed,
            "server": {"models": self.server.models, "state": self.server.state},
            "traffic": {"up": self.traffic.up, "down": self.traffic.down},
            "link": self.link.state_dict(),
        }
        if self.executor.clock is not None:
            state["now"] = self.executor.now
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
        self.executor.resume(state.get("now", 0.0))
        self.link.load_state_dict(state["link"])
        self.link.clear()
