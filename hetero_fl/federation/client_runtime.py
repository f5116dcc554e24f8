"""The client side of a run: run plans for training, deployment and evaluation.

The same code runs in simulation and on nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import Items, inference_model, kept_state, runs_user_code
from hetero_fl.algorithms.local_training import add_log_prior
from hetero_fl.communication.protocol import (
    Content,
    Message,
    Reply,
    RoundProtocol,
    TrainingRequest,
    encoded,
)
from hetero_fl.core.metrics import Scores, calibration, confusion, score
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload, report_with_loss
from hetero_fl.core.plan import Plan, Rows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Examples
from hetero_fl.engine.driver import (
    Backend,
    PlanOutcome,
    reported_loss,
    run_plan,
    run_plans,
)
from hetero_fl.federation.broadcasts import HELD, hold, read_broadcast
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.privacy.client_side import ClientPrivacy
from hetero_fl.robustness.attacks import TRIGGERED

MAX_BROADCASTS = 8  # that are kept: in most federations there are no more architectures


class ReceivedBroadcast(NamedTuple):
    """A message of a round, and what clients decode from it."""

    round_idx: int
    content: Content
    payload: Payload


class BroadcastCache:
    """What clients received in a round; each message is decoded and checked once.

    Clients that received the same message share its tensors, within a process also with the server.
    No method of this package changes them in place.

    Args:
        decode: Decodes the message to a client in a round.
        max_entries: Number of messages to keep; 0 for methods that may change tensors in place.
    """

    def __init__(
        self, decode: Callable[[str, int, Content], Payload], max_entries: int = MAX_BROADCASTS
    ) -> None:
        self._decode = decode
        self._entries: deque[ReceivedBroadcast] = deque(maxlen=max_entries)

    def get(self, client_id: str, round_idx: int, content: Content) -> Payload:
        """Return what a client received, in dictionaries of its own.

        Args:
            client_id: The client.
            round_idx: The round; what was received in another round is forgotten.
            content: The message. Messages are the same if they are one object.

        Raises:
            PayloadError: If the message is malformed.
        """
        if self._entries and self._entries[0].round_idx != round_idx:
            self.clear()
        for entry in self._entries:
            if entry.content is content:
                return copy_dictionaries(entry.payload)
        payload = self._decode(client_id, round_idx, content)
        self._entries.append(ReceivedBroadcast(round_idx, content, payload))
        return copy_dictionaries(payload)

    def clear(self) -> None:
        """Free the memory."""
        self._entries.clear()


def copy_dictionaries(payload: Payload) -> Payload:
    """Return a payload with the same tensors."""
    items = {
        name: replace(i, values=dict(i.values) if isinstance(i.values, dict) else i.values)
        for name, i in payload.items_.items()
    }
    return Payload(items, payload.report)


# What a report shows besides scores: what simple rules reach on the same rows, and a stretch of
# truth and forecast.

STRETCH = 168  # rows of a forecast that are kept for a picture: a week of hours


def baseline_scores(task: Task, rows: Examples, y: Tensor) -> dict[str, Scores]:
    """The scores of the baselines of these rows, by name."""
    return {name: score(task, said, y, rows.unit) for name, said in rows.baselines.items()}


def forecast(task: Task, rows: Examples, y: Tensor, predicted: Tensor) -> dict[str, Any]:
    """Truth, prediction and baselines of the last rows in time, for each output, in the target's unit; empty if not dated."""
    if rows.time is None or task.kind != "regression":
        return {}
    order = rows.time.argsort(stable=True)[-STRETCH:]
    by = 1.0 if rows.unit is None else rows.unit[order, None].double()

    def to_plain(values: Tensor) -> list[list[float]]:
        return [
            [round(v, 6) for v in column]
            for column in (values.detach().cpu()[order].double() * by).T.tolist()
        ]

    said = {name: to_plain(outputs) for name, outputs in rows.baselines.items()}
    return {
        "time": rows.time[order].tolist(),
        "truth": to_plain(y),
        "predicted": to_plain(predicted),
        "baselines": said,
    }


# The client's side of a run: where plans of clients are made and carried out, in the simulator and
# on real machines alike.

# what is read on which rows, and whether the client's own label frequencies hold there
EVALUATION_SETS = {
    "personal": ("test", True),
    "global": ("common_test", False),
    "validation_personal": ("validation", True),
    "validation_global": ("common_validation", False),
}


# classes: of more nobody reads a matrix, and every client would have one
MAX_CONFUSION_CLASSES = 100
# Logits and labels that are remembered, in case other clients share them.
MAX_SHARED = 64


@dataclass
class ClientEvaluation:
    """What an evaluation tells of one client. Only scores leave a real site; the rest is for a simulation's report."""

    scores: dict[str, Scores] = field(default_factory=dict)
    confusion: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Scores]] = field(default_factory=dict)  # by reading and baseline
    forecast: dict[str, Any] = field(default_factory=dict)  # at home, where rows are dated
    # share of the common test rows with a backdoor's trigger that it takes for the target
    triggered: float | None = None
    model: bytes = b""  # the deployed model, as `SavedModel.encode` gives it


class ClientRuntime:
    """Runs clients' plans with their own data and private state, several clients together.

    Args:
        algorithm: The method.
        federation: Clients and data.
        store: The clients' private state.
        backend: What computes.
        protocol: How uploads reach the server.
        local: Whether the server is in this process. Uploads are then handed over as they are,
            where nothing on their way needs bytes; a user's method may change tensors that it has
            handed over, so that its uploads are encoded.

    Attributes:
        listener: Called with a line for each step that begins.
        review_upload: Called with each upload before it is encoded; may refuse it by raising.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        federation: FederationSpec,
        store: StateStore,
        backend: Backend,
        protocol: RoundProtocol,
        local: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.federation = federation.with_memory(backend.templates.memory)
        self.store = store
        self.backend = backend
        self.protocol = protocol
        self.links = FederationLinks(algorithm, federation)
        shares_nothing = runs_user_code(algorithm, federation.client_infos)
        self.broadcast_cache = BroadcastCache(
            self._decode_broadcast, 0 if shares_nothing else MAX_BROADCASTS
        )
        self.hands_over = (
            local and protocol.takes_payload and self.links.up is None and not shares_nothing
        )
        self.privacy = ClientPrivacy.from_federation(algorithm, federation)
        self.listener: Callable[[str], None] | None = None
        self.review_upload: Callable[[str, Payload], None] | None = None
        # Copies on the CPU and scores, of logits and labels that several clients share.
        self._host_copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._common: dict[int, tuple[Tensor, Scores]] = {}

    def run(self, requests: Mapping[str, Message]) -> dict[str, Reply]:
        """Answer one request per client.

        Returns:
            The reply of each client; a `DivergedError` where training diverged.
        """
        replies: dict[str, Reply] = {}
        training: dict[str, TrainingRequest] = {}
        for client_id, request in requests.items():
            answer = self.protocol.answer(client_id, request, request.round_idx, self.store.notes)
            if isinstance(answer, Message):
                replies[client_id] = answer
            else:
                training[client_id] = answer
        clients: dict[str, Participant] = {}
        for client_id in training:
            request = requests[client_id]
            clients[client_id] = self.federation.client(
                client_id, self.store.get(client_id), request.round_idx, request.attempt
            )
            clients[client_id].step_share = request.step_share
        received = {
            c: self.broadcast_cache.get(c, requests[c].round_idx, training[c].broadcast)
            for c in sorted(training, key=lambda c: requests[c].round_idx)
        }
        held = {c: self._hold(c, training[c].broadcast, received[c]) for c in clients}
        outcomes = self._train(clients, received)
        for client_id, outcome in zip(clients, outcomes, strict=True):
            if outcome.failure is not None:
                replies[client_id] = outcome.failure
                continue
            upload = self._finish_upload(clients[client_id], outcome, received[client_id])
            if held[client_id] is not None:
                clients[client_id].state[HELD] = held[client_id]
            replies[client_id] = self._send(
                clients[client_id],
                upload,
                received[client_id],
                requests[client_id],
                training[client_id],
            )
        return replies

    def _train(
        self, clients: Mapping[str, Participant], received: Mapping[str, Payload]
    ) -> list[PlanOutcome[Items]]:
        backend = self.backend
        if self.privacy is not None:
            backend = self.privacy.make_backend(clients.values(), backend)
        # A user's hook may read rows when it is called, not only when its plan runs.
        plans = [(c, self.algorithm.train(c, received[id])) for id, c in clients.items()]
        watch = self._report_progress if self.listener is not None else None
        return run_plans(plans, backend, watch)

    def _decode_broadcast(self, client_id: str, round_idx: int, content: Content) -> Payload:
        device = self.federation.memory.storage_device
        if isinstance(content, Payload):
            return Payload.from_untrusted(content.tree()).to(device)
        held = self.store.get(client_id).state.get(HELD)
        return read_broadcast(self.links, round_idx, content, held).to(device)

    def _hold(self, client_id: str, content: Content, received: Payload) -> dict[str, Any] | None:
        """Return the estimate that a client holds from now on, where broadcasts need one."""
        if not self.links.sends_changes:
            return None
        return hold(encoded(content), received, self.store.get(client_id).state.get(HELD))

    def _finish_upload(
        self, client: Participant, outcome: PlanOutcome[Items], received: Payload
    ) -> Payload:
        upload = Payload(outcome.result())
        if self.privacy is None:
            upload.report = report_with_loss(reported_loss(outcome.reports), client.logged)
        else:  # a training loss would be a release of its own
            upload = self.privacy.release_upload(client, upload, received)
            upload.report = {}
        if self.review_upload is not None:
            self.review_upload(client.participant_id, upload)
        return upload

    def _send(
        self,
        client: Participant,
        upload: Payload,
        received: Payload,
        request: Message,
        training: TrainingRequest,
    ) -> Message:
        """Return the reply with an upload, and stage the private state that the client keeps."""
        client_id = client.participant_id
        content: Content = upload
        if not self.hands_over:
            content = self.links.encode_upload(
                self.federation.client_infos[client_id],
                request.round_idx,
                upload,
                received,
                client.state,
                request.attempt,
            )
        reply = training.reply(content)
        state = PrivateState(kept_state(self.algorithm, client), client.state)
        num_bytes = self.store.cached_bytes + state.num_bytes
        if not self.federation.memory.has_room_for_state(num_bytes):
            state = state.on_cpu()
        self.store.stage(client_id, state)
        return reply

    def deploy_clients(
        self, received: Mapping[str, Payload], round_idx: int
    ) -> dict[str, Participant]:
        """Copies of the clients with the models that they would use now, personalized. Raises DivergedError if one does."""
        clients = {c: self.federation.client(c, self.store.get(c), round_idx) for c in received}
        for hook in (self.algorithm.deploy, self.algorithm.personalize):
            self._run({c: hook(p, received[c]) for c, p in clients.items()}, clients)
        return clients

    def evaluate(
        self, broadcasts: Mapping[str, Content], round_idx: int, details: bool = False
    ) -> dict[str, ClientEvaluation]:
        """Score clients' models at home and in common, on test and validation rows; `details`: all that a report shows.

        Raises DivergedError if a deployment does.
        """
        for client in broadcasts:
            self._report_progress(client, "evaluation")
        received = {
            c: self.broadcast_cache.get(c, round_idx, content) for c, content in broadcasts.items()
        }
        return self._evaluate_clients(self.deploy_clients(received, round_idx), details)

    def _evaluate_clients(
        self, clients: Mapping[str, Participant], details: bool
    ) -> dict[str, ClientEvaluation]:
        readings = {c: ClientEvaluation() for c in clients}
        task = self.federation.task
        private = self.federation.privacy is not None
        if details:
            for c, participant in clients.items():
                slot, view = inference_model(self.algorithm, participant)
                view = view or self.federation.client_infos[c].preprocess
                at_home = add_log_prior(
                    participant,
                    torch.zeros(task.outputs, device=self.federation.memory.storage_device),
                )
                # Exact label frequencies of a private client stay out of its model's file.
                tells_prior = bool(at_home.any()) and (
                    not private or self.federation.has_noisy_counts
                )
                prior = tuple(at_home.tolist()) if tells_prior else None
                tensors = participant.models[slot]
                arch = participant.arch[slot]
                layout = self.federation.data.layout
                saved = SavedModel(
                    tensors, arch, asdict(view), task, prior, layout.columns, layout.categories
                )
                readings[c].model = saved.encode()
        for name, (rows, home) in EVALUATION_SETS.items():
            labels = {c: self._on_host(p.data(rows, None)["y"]) for c, p in clients.items()}
            some = {c: p for c, p in clients.items() if len(labels[c])}
            plans = {c: self.algorithm.predict(p, Rows(rows), home) for c, p in some.items()}
            for c, predicted in self._run(plans, some).items():
                logits = self._on_host(predicted)
                beside = self.federation.data.extra_columns(c, rows)
                readings[c].scores[name] = self._score(logits, labels[c], beside.unit)
                if details and name in ("personal", "global"):
                    readings[c].baselines[name] = baseline_scores(task, beside, labels[c])
                if details and name == "personal" and not private:
                    readings[c].forecast = forecast(task, beside, labels[c], logits)
                if details and name in ("personal", "global") and task.kind != "regression":
                    # The rows of a local confusion matrix add up to the client's label counts.
                    if task.outputs <= MAX_CONFUSION_CLASSES and not (
                        private and name == "personal"
                    ):
                        readings[c].confusion[name] = confusion(task, logits, labels[c]).tolist()
                    readings[c].calibration[name] = calibration(task, logits, labels[c])
        if self.federation.malicious is not None and self.federation.malicious.has_trigger:
            target = self.federation.malicious.config.target
            plans = {
                c: self.algorithm.predict(p, Rows(TRIGGERED), False) for c, p in clients.items()
            }
            for c, logits in self._run(plans, clients).items():
                readings[c].triggered = float((logits.argmax(-1) == target).double().mean())
        return readings

    def _on_host(self, tensor: Tensor) -> Tensor:
        """Return logits or labels on the CPU; those that several clients share are copied once."""
        if tensor.is_cpu:
            return tensor
        known = self._host_copies.get(id(tensor))
        if known is None or known[0] is not tensor:
            if len(self._host_copies) >= MAX_SHARED:
                self._host_copies.clear()
            known = self._host_copies[id(tensor)] = (tensor, tensor.cpu())
        return known[1]

    def clear_caches(self) -> None:
        """Forget broadcasts, and what clients share of an evaluation."""
        self.broadcast_cache.clear()
        self._host_copies.clear()
        self._common.clear()

    def _score(self, logits: Tensor, y: Tensor, unit: Tensor | None) -> Scores:
        """Scores of the logits; those that several clients share are scored once."""
        known = self._common.get(id(logits))
        if known is None or known[0] is not logits:
            if len(self._common) >= MAX_SHARED:
                self._common.clear()
            known = self._common[id(logits)] = (
                logits,
                score(self.federation.task, logits, y, unit),
            )
        return known[1]

    def predict(self, participant: Participant, rows: Rows, personal: bool) -> Tensor:
        """Logits of a deployed client's model, on the CPU."""
        plan = self.algorithm.predict(participant, rows, personal)
        return run_plan(plan, participant, self.backend)[0].cpu()

    def _run(
        self, plans: Mapping[str, Plan[Any]], clients: Mapping[str, Participant]
    ) -> dict[str, Any]:
        outcomes = run_plans([(clients[c], plan) for c, plan in plans.items()], self.backend)
        return {c: outcome.result() for c, outcome in zip(plans, outcomes, strict=True)}

    def _report_progress(self, client: str, label: str) -> None:
        if self.listener is not None:
            self.listener(f"{client}: {label}")
