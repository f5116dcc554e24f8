"""Evaluation of the clients' models and the server's model between rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hetero_fl.algorithms.prediction import proxy_sample, recalibrates
from hetero_fl.communication.protocol import Content, content_size
from hetero_fl.core.metrics import Scores, summarize_clients
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Predict, Recalibrate, Rows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.engine.driver import Backend
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.federation.executors.base import ClientAbsentError, Executor
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.server_link import ServerLink
from hetero_fl.utils.ordering import natural_order

# A line of metrics.jsonl.
Record = dict[str, Any]
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
