"""Prediction with a client's models: class priors, scores and recalibration.

The running statistics of a client's model describe the client's own rows. Proxy rows have another
class distribution. If the client's labels are skewed, these statistics therefore bias predictions
on proxy rows, and consensus distillation amplifies the bias from round to round. Recalibration
recomputes the BatchNorm statistics on public rows before a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetero_fl.config.clients import ClientSettings, Recalibration
from hetero_fl.core.images import reshape_rows
from hetero_fl.core.mapped_tensors import join_rows
from hetero_fl.core.metrics import score, selection_metric
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import log_prior
from hetero_fl.core.participant import (
    Participant,
)
from hetero_fl.core.plan import Plan, Predict, Recalibrate, Rows, TensorRows
from hetero_fl.utils.seeding import keyed_generator

if TYPE_CHECKING:
    from hetero_fl.algorithms.base import Algorithm


def add_log_prior(client: Participant, logits: Tensor) -> Tensor:
    """Add the client's log class prior to logits, if the client's settings require it.

    The class prior consists of the relative label frequencies in the training rows, smoothed by
    adding 1 to each count. The logits are returned unchanged if the task is not multiclass.

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms import add_log_prior
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.participant import Participant
        >>> from hetero_fl.core.task import Task
        >>> settings = ClientSettings(logit_adjustment=True)
        >>> counts = lambda: torch.tensor([2.0, 0.0])  # counts are smoothed by one
        >>> client = Participant("a", Task("multiclass", 2), {}, {}, None, settings, counts)
        >>> add_log_prior(client, torch.zeros(1, 2)).exp()
        tensor([[0.7500, 0.2500]])
    """
    settings = client.settings
    is_used = settings.logit_adjustment if settings.local_prior is None else settings.local_prior
    prior = _log_prior_if(client, bool(is_used))
    return logits if prior is None else logits + prior


def subtract_log_prior(client: Participant, logits: Tensor) -> Tensor:
    """Subtract the client's log class prior from logits if `prior_correction` is set.

    The result approximates the logits of a model that was trained on balanced classes (Menon et al.
    2021, section 4.1). The correction suits models that the client has trained on its own rows. The
    logits are returned unchanged if the task is not multiclass.

    Args:
        client: The client.
        logits: Logits for rows of another label distribution, shape `[N, C]`.
    """
    prior = _log_prior_if(client, bool(client.settings.prior_correction))
    return logits if prior is None else logits - prior


def _log_prior_if(client: Participant, is_used: bool) -> Tensor | None:
    """Return the log class prior if it is used and the task is multiclass, otherwise None."""
    # Read the label counts only if they are used, because reading them may spend privacy budget.
    if not is_used or client.task.kind != "multiclass":
        return None
    return log_prior(client.task, client.counts)


def adjust_to_labels(
    method: Algorithm, client: Participant, logits: Tensor, personal: bool
) -> Tensor:
    """Adjust logits to the label distribution of the predicted rows.

    Args:
        method: The method.
        client: The client. Its settings `local_prior` and `prior_correction` apply.
        logits: Logits, shape `[N, C]`.
        personal: Whether the rows follow the client's own label distribution.

    Returns:
        Logits, shape `[N, C]`. With the client's class prior π, the result for the client's own
        rows is `logits + log π` if `local_prior` applies. The result for other rows is
        `logits - log π` if `prior_correction` is set, unless the model has also been trained by
        other clients or the server. Otherwise, the logits are returned unchanged.

    Example:
        >>> import torch
        >>> from hetero_fl.algorithms import FedAvg, adjust_to_labels
        >>> from hetero_fl.config.clients import ClientSettings
        >>> from hetero_fl.core.participant import Participant
        >>> client = Participant("a", None, {}, {}, None, ClientSettings(), None)
        >>> adjust_to_labels(FedAvg(), client, torch.zeros(1, 2), personal=True)
        tensor([[0., 0.]])
    """
    if personal:
        return add_log_prior(client, logits)
    return logits if method.needs.shared_model else subtract_log_prior(client, logits)


def predicting_models(
    method: Algorithm, client: Participant, personal: bool
) -> list[tuple[Predict, Any]]:
    """Return the model outputs that the first step of `predict` requests.

    Args:
        method: The method.
        client: The client.
        personal: Whether the client predicts its own rows.

    Returns:
        The `Predict` step of each model, and the preprocessing of the model's inputs (None for the
        client's own preprocessing). The list is empty if the first step requests anything else.
    """
    # Use a copy, because a plan that draws random numbers would advance the client's streams.
    plan = method.predict(replace(client, stream_uses={}), Rows("train"), personal)
    if not isinstance(plan, GeneratorType):
        return []
    step = next(plan, None)
    plan.close()
    return [
        (prediction, getattr(prediction.data, "preprocess", None))
        for prediction in (step if isinstance(step, list) else [step])
        if isinstance(prediction, Predict) and prediction.slot in client.models
    ]


def inference_model(method: Algorithm, client: Participant) -> tuple[str, Any]:
    """Return the model with which a deployed client predicts its own rows.

    This is the model whose logits the first step of `predict` requests. If this step requests
    anything else, for example the outputs of several models, the slot of the client's own model is
    returned.

    Returns:
        The slot of the model, and the preprocessing of the model's inputs (None for the client's
        own preprocessing).
    """
    models = predicting_models(method, client, personal=True)
    if len(models) == 1 and models[0][0].readout == "logits":
        return models[0][0].slot, models[0][1]
    return "model", None


def model_rows(client: Participant, slot: str, rows: Rows) -> Rows | TensorRows:
    """Return rows as inputs of one of a client's models.

    Images are converted if the model's input shape differs from that of the client's own model.

    Args:
        client: The client.
        slot: Slot of the model.
        rows: The rows.
    """
    shape = client.arch[slot].input_shape
    if shape == client.arch["model"].input_shape:
        return rows
    return TensorRows({"x": reshape_rows(rows.columns(client)["x"], shape)})


def log_scores(client: Participant, slots: Iterable[str], data: str = "validation") -> Plan[None]:
    """Predict a data set of a client with several models and log the score of each.

    The score is the metric that selects the best round, for example `balanced_accuracy`. Its name
    in `logged` of `metrics.jsonl` is the slot followed by the metric. The models must have the
    inputs of the client's own model.

    Args:
        client: The client.
        slots: Slots of the models.
        data: Name of the data set.

    Example:
        >>> from hetero_fl.algorithms import FedAvg, local_fit, log_scores, upload_model
        >>> class Scored(FedAvg):
        ...     def train(self, client, received):
        ...         yield from self.deploy(client, received)
        ...         yield local_fit(client)
        ...         yield from log_scores(client, ["model"])
        ...         return upload_model(self, client)
    """
    metric, _ = selection_metric(client.task)
    y = client.data(data, None)["y"]
    for slot in slots:
        logits = yield Predict(slot, Rows(data))
        value = score(client.task, logits.cpu(), y.cpu())[metric]
        if value is not None:
            client.log(f"{slot} {metric}", value)


def recalibrates(settings: ClientSettings, prediction: Recalibration) -> bool:
    """Return whether a client recomputes BatchNorm statistics for a kind of prediction."""
    return prediction in (settings.recalibrate or ())


def recalibrated_tensors(
    participant: Participant, slot: str, data: Rows | TensorRows
) -> Plan[Tensors]:
    """Return the tensors of a model, with BatchNorm statistics recomputed on rows.

    Args:
        participant: The participant. The participant's own model is not changed.
        slot: Slot of the model.
        data: Rows from which the statistics are computed.
    """
    statistics: Tensors = yield Recalibrate(slot, data)
    return {**participant.models[slot], **statistics}


def recalibrates_evaluation(client: Participant, personal: bool) -> bool:
    """Return whether a client recomputes BatchNorm statistics before a test set is predicted.

    Args:
        client: The client.
        personal: Whether the test set is the client's own.
    """
    prediction: Recalibration = "local_test" if personal else "global_test"
    return client.has_proxy and recalibrates(client.settings, prediction)


def recalibrated_models(
    method: Algorithm, client: Participant, personal: bool
) -> Plan[dict[str, Tensors]]:
    """Return the models of a client, keyed by slot, after recalibrating the models that predict.

    Each model is recalibrated with the preprocessing and the input shape that are used for
    predictions. The client itself is not changed.

    Args:
        method: The method.
        client: The client, which must have the proxy set.
        personal: Whether the models predict the client's own rows. If True, the statistics are
            computed on `local_sample`, otherwise on the proxy set.
    """
    # The saved model may differ from the models that predict this test set.
    used = dict([inference_model(method, client)])
    used |= {step.slot: view for step, view in predicting_models(method, client, personal)}
    sample = local_sample if personal else proxy_sample
    models = dict(client.models)
    for slot, preprocess in used.items():
        x = sample(client, preprocess).columns(client)["x"]
        data = TensorRows({"x": reshape_rows(x, client.arch[slot].input_shape)})
        models[slot] = yield from recalibrated_tensors(client, slot, data)
    return models


def proxy_sample(participant: Participant, preprocess: object = None) -> Rows:
    """Return all proxy rows in a random order, which is the same for all participants.

    Args:
        participant: The participant.
        preprocess: Preprocessing of the rows. If None, the participant's own preprocessing is used.
    """
    num_rows = len(participant.data("proxy", preprocess)["x"])
    return Rows(
        "proxy", _permutation(participant, num_rows, "recalibration"), preprocess=preprocess
    )


def local_sample(client: Participant, preprocess: object = None) -> TensorRows:
    """Return equal numbers of the client's training rows and proxy rows, shuffled.

    Both numbers equal the size of the smaller set.

    Args:
        client: The client.
        preprocess: Preprocessing of the rows. If None, the client's own preprocessing is used.
    """
    own = client.data("train", preprocess)["x"]
    proxy = client.data("proxy", preprocess)["x"]
    size = min(len(own), len(proxy))
    rows = [
        x[_permutation(client, len(x), name)[:size]]
        for x, name in ((own, client.participant_id), (proxy, "recalibration"))
    ]
    order = _permutation(client, 2 * size, "local recalibration")
    return TensorRows({"x": join_rows(rows)[order]})


def _permutation(participant: Participant, num_rows: int, name: str) -> Tensor:
    generator = keyed_generator(participant.round_context.seed, "recalibration", name)
    return torch.randperm(num_rows, generator=generator)
