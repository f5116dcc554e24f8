"""Client side of a run: execution of plans for training, deployment and evaluation.

A plan is a generator of compute steps (see `hetero_fl.core.plan`). The same code runs in
simulations and on the nodes of a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.algorithms.prediction import (
    adjust_to_labels,
    inference_model,
    recalibrated_models,
    recalibrates_evaluation,
)
from hetero_fl.algorithms.round_parts import Items, kept_state
from hetero_fl.communication.protocol import (
    Content,
    Message,
    Reply,
    RoundProtocol,
    TrainingRequest,
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
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.store import PrivateState, StateStore
from hetero_fl.privacy.client_side import ClientPrivacy
from hetero_fl.robustness.attacks import TRIGGERED
from hetero_fl.utils.caching import IdentityCache

# Number of cached broadcasts. Most federations do not have more architectures.
MAX_BROADCASTS = 8
# Number of rows in the plot of a forecast: one week of hourly values.
FORECAST_ROWS = 168
# Data set of each evaluation, and whether the rows follow the label distribution of the client.
EVALUATION_SETS = {
    "personal": ("test", True),
    "global": ("common_test", False),
    "validation_personal": ("validation", True),
    "validation_global": ("common_validation", False),
}
# Maximum number of classes for which the confusion matrix of each client is stored.
MAX_CONFUSION_CLASSES = 100
# Maximum number of cached tensors (logits and labels) that several clients share.
MAX_SHARED = 64


# Function that is called with a message when a fit or an evaluation begins.
Listener = Callable[[str], None]


def _fits_local_tests(client: Participant) -> bool:
    """Return whether a client's model is personalized only before local tests."""
    return client.settings.fine_tune_before == "local_tests"


def report_progress(listener: Listener, client_id: str, label: str) -> None:
    """Call a listener with a message that a client's fit or evaluation begins."""
    listener(f"{client_id}: {label}")


def copy_dictionaries(payload: Payload) -> Payload:
    """Return a copy of a payload with new dictionaries, which contain the original tensors."""
    items = {
        name: replace(i, values=dict(i.values) if isinstance(i.values, dict) else i.values)
        for name, i in payload.items_by_name.items()
    }
    return Payload(items, payload.report)


def baseline_scores(task: Task, rows: Examples, y: Tensor) -> dict[str, Scores]:
    """Return the scores of each baseline, keyed by the name of the baseline.

    Args:
        task: The learning task.
        rows: Examples with the outputs of the baselines.
        y: Targets of the examples.
    """
    return {
        name: score(task, outputs, y, rows.unit, excluded=rows.excluded)
        for name, outputs in rows.baselines.items()
    }


def forecast(task: Task, rows: Examples, y: Tensor, predicted: Tensor) -> dict[str, Any]:
    """Return the data for a plot of predictions for the latest `FORECAST_ROWS` rows.

    Args:
        task: The learning task.
        rows: Examples with times and the outputs of the baselines.
        y: Targets of the rows, shape `[N, outputs]`.
        predicted: Predictions for the rows, shape `[N, outputs]`.

    Returns:
        A dictionary with the entries `time`, `truth`, `predicted` and `baselines`. All entries
        except `time` contain a list per output with values in the unit of the target. The
        dictionary is empty if the rows have no time or the task is not a regression.
    """
    if rows.time is None or task.kind != "regression":
        return {}
    order = rows.time.argsort(stable=True)[-FORECAST_ROWS:]
    unit = 1.0 if rows.unit is None else rows.unit[order, None].double()

    def to_lists(values: Tensor) -> list[list[float]]:
        return [
            [round(v, 6) for v in column]
            for column in (values.detach().cpu()[order].double() * unit).T.tolist()
        ]

    return {
        "time": rows.time[order].tolist(),
        "truth": to_lists(y),
        "predicted": to_lists(predicted),
        "baselines": {name: to_lists(outputs) for name, outputs in rows.baselines.items()},
    }


@dataclass
class ClientEvaluation:
    """Results of the evaluation of one client.

    In a deployment, only the scores are sent to the server. All other attributes are used in
    reports of simulations.

    Attributes:
        scores: Scores, keyed by name of the evaluation (see `EVALUATION_SETS`).
        confusion: Confusion matrices, keyed by name of the evaluation.
        calibration: Calibration, keyed by name of the evaluation.
        baselines: Scores of the baselines, keyed by name of the evaluation and of the baseline.
        forecast: Forecast for the latest rows of the local test set (see the function `forecast`).
        triggered: Success rate of a backdoor, which is the fraction of global test rows with the
            trigger that are classified as the target class. None if there is no backdoor, or no
            row of another class.
        model: The deployed model, encoded by `SavedModel.encode`.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    confusion: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Scores]] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    triggered: float | None = None
    model: bytes = b""


class ClientRuntime:
    """Runtime that executes the plans of clients for training and evaluation.

    The plans of several clients can be executed together.

    Args:
        algorithm: The method.
        federation: The federation.
        store: Store of the clients' private states.
        backend: Backend that computes the steps of plans.
        protocol: Protocol by which uploads reach the server.
        local: Whether the server is in this process. If True, uploads are passed to the server
            without encoding where possible. Uploads of user-defined methods are always encoded,
            because such methods may modify tensors after the upload.

    Attributes:
        skips_encoding: Whether uploads are passed to the server without encoding.
        review_upload: Function that is called with the client id and the upload before the upload
            is encoded. The function may raise an exception to prevent the upload. If None, no
            function is called.
        guard: Function that wraps the backend of the given clients, for example to refuse steps. If
            None, backends are not wrapped.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        federation: FederationSpec,
        store: StateStore,
        backend: Backend,
        protocol: RoundProtocol,
        *,
        local: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.federation = federation.with_memory(backend.templates.memory)
        self.store = store
        self.backend = backend
        self.protocol = protocol
        self.links = FederationLinks(algorithm, federation)
        self.has_user_code = runs_user_code(algorithm, federation.client_infos)
        self.skips_encoding = (
            local
            and protocol.accepts_unencoded
            and self.links.up is None
            and not self.has_user_code
        )
        self.privacy = ClientPrivacy.from_federation(algorithm, federation)
        self.review_upload: Callable[[str, Payload], None] | None = None
        self.guard: Callable[[Backend, Iterable[Participant]], Backend] | None = None
        # Decoded broadcasts of a round, and scores of predictions that several clients share.
        self._broadcasts: IdentityCache[Payload] = IdentityCache(MAX_BROADCASTS)
        self._round_idx = 0
        self._shared_scores: IdentityCache[Scores] = IdentityCache(MAX_SHARED)

    def run(
        self, requests: Mapping[str, Message], listener: Listener | None = None
    ) -> dict[str, Reply]:
        """Execute one request for each client, and stage the clients' new private states.

        Args:
            requests: The request to each client, keyed by client id.
            listener: Function that is called with a message when a fit begins.

        Returns:
            The reply of each client, keyed by client id. If training diverged, the reply is a
            `DivergedError`, and no private state is staged.

        Raises:
            PayloadError: If a broadcast is malformed.
        """
        replies: dict[str, Reply] = {}
        training: dict[str, TrainingRequest] = {}
        clients: dict[str, Participant] = {}
        received: dict[str, Payload] = {}
        for client_id, request in requests.items():
            answer = self.protocol.answer(client_id, request, request.round_idx, self.store.notes)
            if isinstance(answer, Message):
                replies[client_id] = answer
            else:
                training[client_id] = answer
                received[client_id] = self.receive(request.round_idx, answer.broadcast)
                clients[client_id] = self.federation.client(
                    client_id, self.store.get(client_id), request.round_idx, request.attempt
                )
        backend = self.backend
        if self.privacy is not None:
            backend = self.privacy.make_backend(clients.values(), backend)
        if self.guard is not None:
            backend = self.guard(backend, clients.values())
        # A user-defined hook may read rows when it is called, not only when its plan runs.
        plans = [
            (client, self.algorithm.train(client, received[c])) for c, client in clients.items()
        ]
        watch = None if listener is None else partial(report_progress, listener)
        outcomes = run_plans(plans, backend, watch)
        for client_id, outcome in zip(clients, outcomes, strict=True):
            replies[client_id] = outcome.failure or self._send(
                clients[client_id],
                outcome,
                received[client_id],
                requests[client_id],
                training[client_id],
            )
        return replies

    def receive(self, round_idx: int, content: Content) -> Payload:
        """Return a decoded broadcast, whose dictionaries may be modified in place.

        Clients that receive the same message in a round share the decoded tensors, also with a
        server in this process. The methods of this package do not modify these tensors in place.

        Args:
            round_idx: Index of the round.
            content: The message. Messages are compared by identity.

        Raises:
            PayloadError: If the message is malformed.
        """
        decode = partial(self._decode_broadcast, round_idx, content)
        if self.has_user_code:
            return decode()
        # With compression, the same bytes mean different tensors in another round.
        if round_idx != self._round_idx:
            self._broadcasts.clear()
            self._round_idx = round_idx
        return copy_dictionaries(self._broadcasts.get(content, decode))

    def _decode_broadcast(self, round_idx: int, content: Content) -> Payload:
        device = self.federation.memory.storage_device
        if isinstance(content, Payload):
            return Payload.from_untrusted(content.tree()).to(device)
        return self.links.decode_broadcast(round_idx, content).to(device)

    def _send(
        self,
        client: Participant,
        outcome: PlanOutcome[Items],
        received: Payload,
        request: Message,
        training: TrainingRequest,
    ) -> Message:
        """Return the reply with the upload of a client, and stage the client's private state."""
        client_id = client.participant_id
        upload = Payload(outcome.result())
        if self.privacy is None:
            upload.report = report_with_loss(reported_loss(outcome.reports), client.logged)
        else:
            # A training loss would release further private information.
            upload = self.privacy.release_upload(client, upload, received)
            upload.report = {}
        if self.review_upload is not None:
            self.review_upload(client_id, upload)
        content: Content = upload
        if not self.skips_encoding:
            content = self.links.encode_upload(
                self.federation.client_infos[client_id],
                request.round_idx,
                upload,
                received,
                client.state,
                attempt=request.attempt,
            )
        reply = training.reply(content)
        kept = self.federation.changed_tensors(client_id, kept_state(self.algorithm, client))
        state = PrivateState(kept, client.state)
        num_bytes = self.store.cached_bytes + state.num_bytes
        if not self.federation.memory.has_room_for_state(num_bytes):
            state = state.on_cpu()
        self.store.stage(client_id, state)
        return reply

    def deploy_clients(
        self, received: Mapping[str, Payload], round_idx: int
    ) -> dict[str, Participant]:
        """Return copies of clients with the models for deployment.

        The models are personalized, except for clients whose models are personalized only before
        local tests. The private states in the store do not change.

        Args:
            received: The decoded broadcast of each client, keyed by client id.
            round_idx: Index of the round, from 0.

        Returns:
            The copies, keyed by client id.

        Raises:
            DivergedError: If training for deployment diverges.
        """
        clients = {c: self.federation.client(c, self.store.get(c), round_idx) for c in received}
        self._run({c: self.algorithm.deploy(p, received[c]) for c, p in clients.items()}, clients)
        self._personalize({c: p for c, p in clients.items() if not _fits_local_tests(p)}, received)
        return clients

    def _personalize(
        self, clients: Mapping[str, Participant], received: Mapping[str, Payload]
    ) -> None:
        """Adapt the models of clients to their own rows."""
        plans = {c: self.algorithm.personalize(p, received[c]) for c, p in clients.items()}
        self._run(plans, clients)

    def _local_clients(
        self, clients: Mapping[str, Participant], received: Mapping[str, Payload]
    ) -> dict[str, Participant]:
        """Return the clients with the models that predict their own rows."""
        adapted = {
            c: replace(p, models={slot: dict(tensors) for slot, tensors in p.models.items()})
            for c, p in clients.items()
            if _fits_local_tests(p)
        }
        self._personalize(adapted, received)
        return {**clients, **adapted}

    def evaluate(
        self,
        broadcasts: Mapping[str, Content],
        round_idx: int,
        details: bool = False,
        listener: Listener | None = None,
    ) -> dict[str, ClientEvaluation]:
        """Evaluate clients' models on local and global test and validation sets.

        Args:
            broadcasts: The message to each client, keyed by client id.
            round_idx: Index of the round, from 0.
            details: Whether to compute all results that a report shows. If False, only scores and
                the success rate of a backdoor are computed.
            listener: Function that is called with a message for each client.

        Returns:
            The evaluation of each client, keyed by client id.

        Raises:
            DivergedError: If training for deployment diverges.
            PayloadError: If a broadcast is malformed.
        """
        received: dict[str, Payload] = {}
        for client_id, content in broadcasts.items():
            if listener is not None:
                report_progress(listener, client_id, "evaluation")
            request = Message("read", content, round_idx)
            received[client_id] = self.receive(
                round_idx, self.protocol.broadcast_in(client_id, request)
            )
        clients = self.deploy_clients(received, round_idx)
        return self._evaluate_clients(clients, self._local_clients(clients, received), details)

    def _evaluate_clients(
        self,
        clients: Mapping[str, Participant],
        local_clients: Mapping[str, Participant],
        details: bool,
    ) -> dict[str, ClientEvaluation]:
        """Evaluate clients.

        Args:
            clients: The clients with the models for the global test.
            local_clients: The clients with the models for their own rows.
            details: See `evaluate`.
        """
        evaluations = {c: ClientEvaluation() for c in clients}
        views = {
            False: self._recalibrate(clients, personal=False),
            True: self._recalibrate(local_clients, personal=True),
        }
        if details:
            for c in clients:
                evaluations[c].model = self._save_model(views[False][c], views[True][c]).encode()
        for name, (rows, is_personal) in EVALUATION_SETS.items():
            labels = {c: p.data(rows, None)["y"] for c, p in clients.items()}
            with_rows = {c: p for c, p in views[is_personal].items() if len(labels[c])}
            plans = {
                c: self.algorithm.predict(p, Rows(rows), is_personal) for c, p in with_rows.items()
            }
            for c, logits in self._run(plans, with_rows).items():
                examples = self.federation.data.extra_columns(c, rows)
                score_rows = partial(self._score, logits, labels[c], examples)
                evaluations[c].scores[name] = self._shared_scores.get(logits, score_rows)
                if details and name in ("personal", "global"):
                    self._add_details(evaluations[c], name, examples, labels[c].cpu(), logits.cpu())
        self._evaluate_backdoor(views[False], evaluations)
        return evaluations

    def _recalibrate(
        self, clients: Mapping[str, Participant], personal: bool
    ) -> dict[str, Participant]:
        """Return the clients with the BatchNorm statistics for local or global evaluations."""
        changed = {c: p for c, p in clients.items() if recalibrates_evaluation(p, personal)}
        plans = {c: recalibrated_models(self.algorithm, p, personal) for c, p in changed.items()}
        models = self._run(plans, changed)
        return {c: replace(p, models=models[c]) if c in models else p for c, p in clients.items()}

    def _save_model(self, participant: Participant, local: Participant) -> SavedModel:
        """Return the model that a client deploys.

        Args:
            participant: The client.
            local: The client with the tensors for predictions on local rows.
        """
        task = self.federation.task
        slot, view = inference_model(self.algorithm, participant)
        view = view or self.federation.client_infos[participant.participant_id].preprocess
        zeros = torch.zeros(task.outputs, device=self.federation.memory.storage_device)
        prior = adjust_to_labels(self.algorithm, participant, zeros, personal=True)
        correction = -adjust_to_labels(self.algorithm, participant, zeros, personal=False)
        # The model's file must not reveal the label frequencies of a private client, nor tensors
        # that depend on its rows.
        is_private = self.federation.privacy is not None
        may_save_prior = not is_private or self.federation.has_noisy_counts
        tensors = participant.models[slot]
        local_tensors = {
            name: tensor
            for name, tensor in local.models[slot].items()
            if tensor is not tensors[name] and not is_private
        }
        layout = self.federation.data.layout
        return SavedModel(
            tensors,
            participant.arch[slot],
            asdict(view),
            task,
            tuple(prior.tolist()) if bool(prior.any()) and may_save_prior else None,
            layout.columns,
            layout.categories,
            tuple(correction.tolist()) if bool(correction.any()) and may_save_prior else None,
            local_tensors,
        )

    def _add_details(
        self,
        evaluation: ClientEvaluation,
        name: str,
        examples: Examples,
        labels: Tensor,
        logits: Tensor,
    ) -> None:
        """Add the baselines, forecast, confusion matrix and calibration of one evaluation set.

        The forecast is added for the local test set only. The confusion matrix and the calibration
        are added for classification tasks only, and the confusion matrix only up to
        `MAX_CONFUSION_CLASSES` outputs. With differential privacy, the forecast and the confusion
        matrix of the local test set are omitted.
        """
        task = self.federation.task
        reveals_rows = self.federation.privacy is not None and name == "personal"
        evaluation.baselines[name] = baseline_scores(task, examples, labels)
        if name == "personal" and not reveals_rows:
            evaluation.forecast = forecast(task, examples, labels, logits)
        if task.kind != "regression":
            # The rows of a local confusion matrix sum to the client's label counts.
            if task.outputs <= MAX_CONFUSION_CLASSES and not reveals_rows:
                evaluation.confusion[name] = confusion(task, logits, labels).tolist()
            evaluation.calibration[name] = calibration(task, logits, labels)

    def _evaluate_backdoor(
        self, clients: Mapping[str, Participant], evaluations: Mapping[str, ClientEvaluation]
    ) -> None:
        malicious = self.federation.malicious
        if malicious is None or not malicious.has_trigger:
            return
        target = malicious.config.target
        with_rows = {c: p for c, p in clients.items() if len(p.data(TRIGGERED, None)["y"])}
        plans = {c: self.algorithm.predict(p, Rows(TRIGGERED), False) for c, p in with_rows.items()}
        for c, logits in self._run(plans, with_rows).items():
            evaluations[c].triggered = float((logits.argmax(-1) == target).double().mean())

    def _score(self, logits: Tensor, labels: Tensor, examples: Examples) -> Scores:
        return self.federation.score(logits.cpu(), labels.cpu(), examples)

    def clear_caches(self) -> None:
        """Drop cached broadcasts and results of evaluations."""
        self._broadcasts.clear()
        self._shared_scores.clear()

    def predict(self, participant: Participant, rows: Rows, personal: bool) -> Tensor:
        """Return the logits of a deployed client on the CPU, shape `[N, outputs]`.

        Args:
            participant: The client, as returned by `deploy_clients`.
            rows: The rows to predict.
            personal: Whether the rows follow the label distribution of the client.
        """
        plan = self.algorithm.predict(participant, rows, personal)
        return run_plan(participant, plan, self.backend)[0].cpu()

    def _run(
        self, plans: Mapping[str, Plan[Any]], clients: Mapping[str, Participant]
    ) -> dict[str, Any]:
        backend = self.backend
        if self.guard is not None:
            backend = self.guard(backend, clients.values())
        outcomes = run_plans([(clients[c], plan) for c, plan in plans.items()], backend)
        return {c: outcome.result() for c, outcome in zip(plans, outcomes, strict=True)}
