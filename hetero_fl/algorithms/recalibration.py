"""Recalibration: recomputing BatchNorm statistics on public rows before a prediction.

The running statistics of a client's model describe the client's own rows. Proxy rows have another
class distribution. If the client's labels are skewed, these statistics therefore bias predictions
on proxy rows, and consensus distillation amplifies the bias from round to round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_fl.algorithms.base import Algorithm, inference_model, predicting_models
from hetero_fl.config.clients import ClientSettings, Recalibration
from hetero_fl.core.images import reshape_rows
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Plan, Recalibrate, Rows, TensorRows
from hetero_fl.core.stored_rows import join_rows
from hetero_fl.utils.seeding import keyed_generator


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
    predicting = predicting_models(method, client, personal)
    # The saved model may differ from the models that predict this test set.
    used = dict([inference_model(method, client)])
    used |= {prediction.slot: preprocess for prediction, preprocess in predicting}
    models = dict(client.models)
    for slot, preprocess in used.items():
        sample = local_sample if personal else proxy_sample
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
