"""A run in progress: the server, the clients' state, traffic and evaluation."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import EncodeCache, Message, Traffic
from hetero_fl.core.metrics import Scores, score, summarize_clients
from hetero_fl.core.participant import ClientInfo, copy_containers, copy_tree
from hetero_fl.core.payload import Item, Payload, PayloadError, report_with_loss
from hetero_fl.core.plan import Predict, Rows
from hetero_fl.engine.driver import DivergedError
from hetero_fl.federation.channel import FederationLinks, make_protocol
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.dry_run import ExpectedUploads
from hetero_fl.federation.executors.base import (
    ClientAbsentError,
    Executor,
    RemoteExecutor,
    order_arrivals,
)
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.schedule import SimulationEnvironment
from hetero_fl.federation.upload_collector import UploadCollector
from hetero_fl.federation.user_methods import call_broadcast, is_user_method, translate_user_errors
from hetero_fl.privacy.server import ServerPrivacy
from hetero_fl.utils.caching import LazyMapping
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


# A run in progress, whatever decides who is asked and when: its server, its clients' state, its
# traffic, its readings.

MOST_DIVERGED = 3  # rounds in succession in which training at the server may diverge


class FederatedTrainer(ABC):
    """A run in progress. Its state is the server, the store and the traffic; everything else follows from the configuration."""

    def __init__(
        self,
        algorithm: Algorithm,
        federation: FederationSpec,
        executor: Executor,
        per_round: int | None = None,
        stop_on_divergence: bool = False,
        environment: SimulationEnvironment | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.executor = executor
        self.per_round = per_round
        self.stop_on_divergence = stop_on_divergence
        self.environment = environment or SimulationEnvironment.ideal(federation, per_round)
        self.now = (
            # seconds since the run began: simulated ones, or real ones where clients are on
            # machines of their own
            0.0
        )
        self.resumed: int | None = None  # the round after which this process took the run over
        self.store = executor.store
        self.backend = executor.backend
        self.protocol = make_protocol(algorithm, federation)
        self.traffic = Traffic()
        self.expectations = ExpectedUploads(algorithm, federation)
        self.links = FederationLinks(algorithm, federation)
        self.bounds = FederationLinks(algorithm, federation, bound=True)
        self.server_privacy = ServerPrivacy(self.expectations, per_round)
        self.collector = UploadCollector(
            self.expectations, self.links, self.protocol, self.server_privacy
        )
        self.server = federation.server()
        self.completed = 0
        # rounds in succession that were given up because training at the server diverged
        self.diverged = 0
        # of uploads, by the example that they follow
        self._lengths: dict[int, tuple[Mapping[str, Item], int]] = {}
        self._before = time.monotonic()  # the moment from which real seconds are counted
        with translate_user_errors():
            algorithm.setup(self.server)

    @property
    def remote_executor(self) -> RemoteExecutor | None:
        """The executor, if clients are on machines of their own."""
        return (
            cast(RemoteExecutor, self.executor)
            if self.environment.connected_clients is not None
            else None
        )

    def elapsed_seconds(self) -> float:
        """Seconds since the run began, those between a crash and a resume left out."""
        return time.monotonic() - self._before

    def on_checkpoint(self) -> None:
        """A checkpoint has been written, or read."""
        if self.remote_executor is not None:
            self.remote_executor.on_checkpoint()

    @translate_user_errors()
    def run_round(self) -> Record:
        """Hold the next round and commit it. Raises RunFailedError if clients trained and no upload could be used, or if a
        method of the user's own fails; nothing that clients did in it is kept then."""
        before = replace(self.traffic)
        now = self.now
        try:
            return self._run_round()
        except BaseException:
            self.store.discard()
            self.traffic.up = before.up
            self.traffic.down = before.down
            self.now = now
            raise

    def _simulate_server_crash(self) -> None:
        """As `faults.server` has it, before the round is committed; the process that takes the run over there goes on."""
        if (
            self.completed + 1 in self.environment.faults.config.server
            and self.resumed != self.completed
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def round_idx(self) -> int:
        """The round that comes next, from 0: what the server sends and draws is keyed by it."""
        return self.completed

    @abstractmethod
    def _run_round(self) -> Record:
        """The next round: whom to ask, what to make of the answers, and its line of `metrics.jsonl`."""

    # What the server makes of uploads --------------------------------------------------------------------------------------
    def _change_server(self, aggregate: Callable[[], None], magnitudes: Mapping[str, float]) -> str:
        """Change the server by `aggregate`; if its training diverges, set it back to what it was and return why.

        Args:
            aggregate: Changes the server, the memory of rules and the bounds of private sums.
            magnitudes: Of each upload, by client.

        Raises:
            RunFailedError: If this has happened `MOST_DIVERGED` times in succession, or in every round of a shorter run, or if
                `runtime.divergence` is `stop`.
        """
        # only methods of this package replace all tensors
        keep = copy_tree if is_user_method(self.algorithm) else copy_containers
        models = keep(self.server.models)
        state = keep(self.server.state)
        arch = dict(self.server.arch)
        memory = copy_containers(self.collector.memory)
        sums = self.server_privacy.state_dict()
        try:
            aggregate()
        except DivergedError as error:
            self.server.models = models
            self.server.state = state
            self.server.arch = arch
            self.collector.memory = memory
            self.server_privacy.load_state_dict(sums)
            self.diverged += 1
            why = f"training at the server diverged: {error}"
            if magnitudes and self.server_privacy.privacy is None:
                client = max(magnitudes, key=lambda c: magnitudes[c])
                why += (
                    f"; the upload of {client} has the largest magnitude, {magnitudes[client]:.3g}"
                )
            most = min(MOST_DIVERGED, self.federation.num_rounds)
            if self.diverged >= most or self.stop_on_divergence:
                times = f", {self.diverged} times in succession" if self.diverged > 1 else ""
                raise RunFailedError(f"round {self.completed + 1}: {why}{times}") from None
            return why
        self.diverged = 0
        return ""

    # What clients receive -----------------------------------------------------------------------------------------------
    def broadcasts(
        self, clients: Collection[str], for_evaluation: bool = False
    ) -> Mapping[str, bytes]:
        """What the server sends to each, encoded when it is asked for; `for_evaluation`: to be read, not to be trained on."""
        encoded = EncodeCache(
            lambda payload: self.links.encode_broadcast(
                self.server.round_context.round_idx, payload, self.server.arch.values()
            )
        )

        def make(client: str) -> bytes:
            card = self.federation.client_infos[client]
            return encoded(
                self._broadcast(replace(card, purpose="evaluate") if for_evaluation else card)
            )

        return LazyMapping(clients, make)

    def decoded_broadcasts(self, round_idx: int) -> Callable[[ClientInfo], Payload]:
        """What each client makes of what it was sent in that round."""
        heard = EncodeCache(
            lambda payload: self.links.simulate_broadcast(
                round_idx, payload, self.server.arch.values()
            )
        )
        return lambda card: heard(self._broadcast(card))

    def _broadcast(self, client_info: ClientInfo) -> Payload:
        """May be made several times, in any order: what it draws is keyed by the client, not by the turn."""
        speaker = replace(
            self.server,
            participant_id=f"{self.server.participant_id} to {client_info.client_id}",
            stream_uses={},
        )
        return self.server_privacy.add_bounds(call_broadcast(self.algorithm, speaker, client_info))

    def upload_bytes(self, client_info: ClientInfo, broadcast: Payload, round_idx: int) -> int:
        """Bytes of the upload that a client will make of this broadcast, its report included (but for the digits of a weight)."""
        like = self.expectations.expected_items(client_info, broadcast, round_idx)
        known = self._lengths.get(id(like))
        if known is None or known[0] is not like:
            length = len(
                self.bounds.encode_upload(
                    client_info,
                    round_idx,
                    Payload(dict(like), report_with_loss(0.0)),
                    broadcast,
                    {},
                )
            )
            known = self._lengths[id(like)] = (like, length)
        return known[1]

    def _set_round_context(self, round_idx: int) -> None:
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}

    @translate_user_errors()
    def request_upload(self, client: str, round_idx: int) -> tuple[Payload, Payload]:
        """What one client receives in a round, and what arrives of its answer if the server sees it by itself; nothing is kept.

        Raises RunFailedError if the client diverges, PayloadError if the answer is not what was asked for.
        """
        self._set_round_context(round_idx)
        bodies = dict(self.broadcasts([client]))
        try:
            ((_, reply),) = self.executor.run({client: Message("train", bodies[client], round_idx)})
        finally:
            self.store.discard()
        if isinstance(reply, DivergedError):
            raise RunFailedError(f"round {round_idx + 1}: {client} diverged: {reply}")
        got = self.links.decode_broadcast(round_idx, bodies[client])
        return got, self.collector.decode_upload(
            client, reply.body, self.decoded_broadcasts(round_idx), round_idx
        )

    # Evaluation --------------------------------------------------------------------------------------------------
    @translate_user_errors()
    def evaluate(
        self, details: bool = False, save: Callable[[str, bytes], None] | None = None
    ) -> EvaluationResult:
        """Read the models of the federation's readers, in this cohort or not, as they would be used now; and the server's.

        What they receive for it is what they would receive next, and is counted like any other transfer. `details`: all
        that a report shows; each model (see `SavedModel.encode`) is then handed to `save` as it comes, and not kept.
        """
        self._set_round_context(self.round_idx)
        ids = natural_order(self.federation.evaluated_clients)
        bodies = self.broadcasts(ids, for_evaluation=True)

        def counted(client: str) -> bytes:
            body = bodies[client]
            sizes[client] = len(body)
            return body

        sizes: dict[str, int] = {}
        clients: dict[str, ClientEvaluation] = {}
        absent: dict[str, str] = {}
        try:
            for id, reading in order_arrivals(
                ids, self.executor.evaluate(LazyMapping(ids, counted), self.round_idx, details)
            ):
                if isinstance(reading, ClientAbsentError):
                    absent[id] = str(reading)
                    continue
                if save is not None:
                    save(id, reading.model)
                    reading.model = b""
                clients[id] = reading
        except (DivergedError, PayloadError) as error:
            raise RunFailedError(
                f"round {self.completed}: a model cannot be evaluated: {error}"
            ) from None
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
            y = self.server.data(rows, view)["y"]
            if len(y):
                (logits,) = self.backend.run(
                    [(self.server, Predict(slot, Rows(rows, preprocess=view)))]
                )
                unit = self.federation.data.extra_columns(self.server.participant_id, rows).unit
                scores[name] = score(self.federation.task, logits, y, unit)
        return scores

    # Crash safety ------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """With the store, everything that a later process needs to go on as if nothing had happened."""
        return {
            "completed": self.completed,
            "server": {"models": self.server.models, "state": self.server.state},
            "traffic": {"up": self.traffic.up, "down": self.traffic.down},
            "aggregation": self.collector.memory,
            "bounds": self.server_privacy.state_dict(),
            **({"diverged": self.diverged} if self.diverged else {}),
            **(
                {"now": self.now}
                if self.environment.simulated or self.remote_executor is not None
                else {}
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        self.completed = self.resumed = state["completed"]
        self.now = state.get("now", 0.0)
        self.diverged = state.get("diverged", 0)
        self._before = time.monotonic() - self.now
        self.server.models = state["server"]["models"]
        self.server.state = state["server"]["state"]
        self.traffic = Traffic(**state["traffic"])
        self.collector.memory = state["aggregation"]
        self.server_privacy.load_state_dict(state["bounds"])
