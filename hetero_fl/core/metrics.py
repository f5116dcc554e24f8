"""Metrics of a model, and the mean, standard deviation and worst value of metrics over clients.

Metrics are computed in float64, except for user-defined metrics, which receive predictions in the
data type of the outputs. Scores are fractions, not percentages, and errors of a regression have the
unit of the target. An undefined metric is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hetero_fl.core.task import Task
from model_zoo.generators import keyed_generators

Scores = dict[str, float | None]
MetricFunction = Callable[[Tensor, Tensor], Any]
"""A user's metric: a function of predictions and targets that returns a number."""

CLASSIFICATION = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "average_precision", "loss")
REGRESSION = ("mae", "rmse", "r2")
RARE = ("auroc", "average_precision", "balanced_accuracy", "macro_f1", "accuracy", "loss")
MANY = (
    "accuracy",
    "top3_accuracy",
    "perplexity",
    "balanced_accuracy",
    "macro_f1",
    "auroc",
    "average_precision",
    "loss",
)
TOP = 10
"""Number of items that are recommended in the metrics of a ranking."""
RANKING = ("ndcg_10", "hit_rate_10")
# Metrics of larger magnitude are undefined. All other metrics can be squared and summed in float32.
MAX_METRIC_VALUE = 1e18
SMALLER_IS_BETTER = frozenset({"loss", "perplexity", "mae", "rmse"})


def metric_names(task: Task) -> tuple[str, ...]:
    """Return the names of the metrics that `score` computes for a task, in the order of tables.

    Example:
        >>> from hetero_fl.core.metrics import metric_names
        >>> from hetero_fl.core.task import Task
        >>> metric_names(Task("regression", 1))
        ('mae', 'rmse', 'r2')
    """
    if task.kind == "regression":
        return REGRESSION
    names = MANY if task.has_many_classes else CLASSIFICATION if task.rare is None else RARE
    return (*RANKING, *names) if task.is_ranking else names


def selection_metric(task: Task) -> tuple[str, int]:
    """Return the metric that selects the best round, and 1 if larger is better, otherwise -1."""
    if task.kind == "regression":
        return "mae", -1
    if task.is_ranking:
        return RANKING[0], 1
    if task.has_many_classes:
        return "accuracy", 1
    return ("balanced_accuracy" if task.kind == "multiclass" and task.rare is None else "auroc"), 1


def score(
    task: Task,
    logits: Tensor,
    y: Tensor,
    unit: Tensor | None = None,
    *,
    excluded: Tensor | None = None,
) -> Scores:
    """Compute all metrics of a task for the outputs of one model.

    Multiclass:

    - `accuracy`: fraction of correct predictions.
    - `balanced_accuracy`: mean recall over the classes in `y`.
    - `macro_f1`: mean F1 score over the classes that occur in `y` or are predicted, as in
      scikit-learn's `f1_score` with `average="macro"`.
    - `auroc`: area under the ROC curve of class 1 for two classes, otherwise the one-vs-rest mean.
      None unless all classes occur in `y`.
    - `average_precision`: one-vs-rest mean over the classes in `y` or, for a task with a `rare`
      class, the average precision of this class. None if `y` contains only one class.
    - `loss`: mean cross-entropy.
    - `top3_accuracy` and `perplexity` (exponential of the loss): only for tasks with 20 or more
      classes.
    - `hit_rate_10` and `ndcg_10`: only for tasks with `is_ranking` (see `ranking_metrics`). They
      rank the true class among all classes that are not in `excluded`.

    Multilabel: the same metrics, computed for each label and averaged over the labels for which
    they are defined. `macro_f1` and `average_precision` of a label refer to the positive class.
    `auroc` and `average_precision` are defined for labels with positive and negative examples.
    Labels are predicted with a threshold of 0.5 on probabilities. `accuracy` and `loss` (binary
    cross-entropy) are means over all pairs of an example and a label.

    Regression: `mae`, `rmse` and `r2`, averaged over the outputs. `r2` uses only the outputs whose
    targets vary, and is None if there are none.

    All metrics are None if there are no examples or the outputs contain NaN or infinity, with two
    exceptions:

    - In a multiclass task, an output of -inf is treated as probability 0, unless all outputs of an
      example are -inf. `top3_accuracy` is then None, and so are `loss` and `perplexity` if the
      output of a true class is -inf. All other metrics are computed.
    - In a regression, NaN and infinity in an output whose targets do not vary do not affect `r2`.

    A metric whose magnitude exceeds `MAX_METRIC_VALUE` is None.

    Args:
        task: The task.
        logits: Outputs, shape `[N, C]`.
        y: Targets, shape `[N]` (classes) or `[N, C]`.
        unit: Factor by which outputs and targets of each example are multiplied in a regression,
            shape `[N]`. If None, nothing is multiplied. Ignored for other tasks.
        excluded: Classes that are left out of a ranking, as bits in uint8 `[N, ceil(C / 8)]`, such
            as `numpy.packbits(mask, axis=1)`. Ignored for other tasks.

    Returns:
        The metrics, keyed by name, in the order of `metric_names`.

    Raises:
        ValueError: If the shapes do not match the task.

    Example:
        >>> import torch
        >>> from hetero_fl.core.metrics import score
        >>> from hetero_fl.core.task import Task
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> scores = score(Task("multiclass", 2), logits, torch.tensor([0, 1, 1]))
        >>> round(scores["accuracy"], 3), scores["auroc"]
        (0.667, 1.0)
    """
    _check_shapes(task, logits, y)
    outputs = logits.detach().double()
    if unit is not None and task.kind == "regression":
        factors = unit.to(outputs.device).double()[:, None]
        y = y.to(outputs.device) * factors
        outputs = outputs * factors
    names = metric_names(task)
    if not len(outputs):
        return dict.fromkeys(names)
    compute: dict[str, Callable[[Tensor, Tensor], list[Tensor | None]]] = {
        "multiclass": _multiclass,
        "multilabel": _multilabel,
        "regression": _regression,
    }
    y = y.to(outputs.device)
    found = dict(
        zip(
            REGRESSION if task.kind == "regression" else CLASSIFICATION,
            compute[task.kind](outputs, y),
            strict=True,
        )
    )
    if task.has_many_classes:
        loss = found["loss"]
        in_top3 = (outputs.topk(3).indices == y[:, None]).any(1)
        defined = loss is not None and bool(outputs.isfinite().all())
        found["top3_accuracy"] = in_top3.double().mean() if defined else None
        found["perplexity"] = loss.exp() if loss is not None else None
    if task.is_ranking:
        found |= _rankings(outputs, y, excluded)
    if task.rare is not None and found["average_precision"] is not None:
        found["average_precision"] = _ranking(
            outputs.softmax(1).T[[task.rare]], (y == task.rare)[None]
        )[1][0]
    return dict(zip(names, _finite([found[name] for name in names]), strict=True))


def apply_metric(function: MetricFunction, task: Task, logits: Tensor, y: Tensor) -> float | None:
    """Compute a user's metric on the outputs of a model.

    Args:
        function: Function of predictions `[N, C]` and targets (`[N]` or `[N, C]`) that returns a
            number. Predictions are probabilities, or the model outputs in a regression. They are
            not checked for NaN or infinity.
        task: The task.
        logits: Outputs, shape `[N, C]`.
        y: Targets, shape `[N]` (classes) or `[N, C]`.

    Returns:
        The value of the metric. None if there are no examples, or the value is NaN or its magnitude
        exceeds `MAX_METRIC_VALUE`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.metrics import apply_metric
        >>> from hetero_fl.core.task import Task
        >>> def top_probability(predictions, y):
        ...     return predictions.max(1).values.mean()
        >>> apply_metric(top_probability, Task("multiclass", 2), torch.zeros(3, 2), torch.zeros(3))
        0.5
    """
    if not len(y):
        return None
    predictions = logits.detach()
    if task.kind == "multiclass":
        predictions = predictions.softmax(1)
    elif task.kind == "multilabel":
        predictions = predictions.sigmoid()
    with keyed_generators(0, predictions.device):
        value = float(function(predictions, y.to(predictions.device)))
    return value if abs(value) <= MAX_METRIC_VALUE else None


def _has_predictions(kind: str, logits: Tensor) -> bool:
    """Return whether the outputs of a classification define a prediction of each example."""
    values = logits.softmax(1) if kind == "multiclass" else logits
    return bool(values.isfinite().all())


def _multiclass(logits: Tensor, y: Tensor) -> list[Tensor | None]:
    if not _has_predictions("multiclass", logits):
        return [None] * len(CLASSIFICATION)
    p = logits.softmax(1)
    classes = p.shape[1]
    truth = functional.one_hot(y, classes).T.bool()
    prediction = functional.one_hot(p.argmax(1), classes).T.bool()
    hits = (truth & prediction).sum(1).double()
    num_true = truth.sum(1).double()
    num_predicted = prediction.sum(1).double()
    present = num_true > 0
    area, precision = _ranking(p.T[present], truth[present])
    area = area[-1] if classes == 2 else area.mean()
    return [
        hits.sum() / len(y),
        _mean(hits / num_true, num_true > 0),
        _mean(2 * hits / (num_true + num_predicted), num_true + num_predicted > 0),
        area if present.all() else None,
        precision.mean() if (num_true < len(y)).all() else None,
        functional.cross_entropy(logits, y),
    ]


def unpack_classes(bits: Tensor, num_classes: int) -> Tensor:
    """Return a mask of classes, bool `[N, C]`, from bits in uint8 `[N, ceil(C / 8)]`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.metrics import unpack_classes
        >>> unpack_classes(torch.tensor([[0b01100000]], dtype=torch.uint8), 3)
        tensor([[False,  True,  True]])
    """
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=1, count=num_classes)).bool()


def ranking_metrics(scores: Tensor, y: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Compute the NDCG and the hit rate of the first ten recommended items.

    The rank r of the true item is 1 plus the number of other items with at least the same score, so
    that ties count against a model. Excluded items have no rank. An example has the hit rate 1 if
    r <= 10, otherwise 0. As one item is relevant, the normalized discounted cumulative gain is
    `1 / log2(r + 1)` if r <= 10, otherwise 0 (He et al., "Neural Collaborative Filtering", WWW
    2017, section 4.1).

    Args:
        scores: Scores of all items, shape `[N, C]`.
        y: True items, int64 `[N]`.
        excluded: Mask of the items that are not recommended, for example because the user has seen
            them, bool `[N, C]`. It does not contain the true item.

    Returns:
        Means of the NDCG and of the hit rate over the examples, float64 `[2]`.

    Example:
        >>> import torch
        >>> from hetero_fl.core.metrics import ranking_metrics
        >>> scores = torch.arange(20.0).flip(0).expand(2, 20)
        >>> ranking_metrics(scores, torch.tensor([2, 15]))
        tensor([0.2500, 0.5000], dtype=torch.float64)
        >>> ranking_metrics(scores, torch.tensor([2, 15]), excluded=scores > 17)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    is_ahead = scores >= scores.gather(1, y[:, None])
    if excluded is not None:
        is_ahead &= ~excluded
    # The true item itself has at least its own score.
    rank = is_ahead.sum(1).double()
    is_hit = (rank <= TOP).double()
    return torch.stack([(is_hit / torch.log2(rank + 1)).mean(), is_hit.mean()])


def _rankings(logits: Tensor, y: Tensor, excluded: Tensor | None) -> dict[str, Tensor | None]:
    """Return the metrics in `RANKING`, which are None for outputs with NaN or infinity."""
    if not bool(logits.isfinite().all()):
        return dict.fromkeys(RANKING)
    mask = None
    if excluded is not None:
        mask = unpack_classes(excluded, logits.shape[1]).to(logits.device)
    return dict(zip(RANKING, ranking_metrics(logits, y, mask), strict=True))


def _multilabel(logits: Tensor, y: Tensor) -> list[Tensor | None]:
    if not _has_predictions("multilabel", logits):
        return [None] * len(CLASSIFICATION)
    p = logits.sigmoid()
    target = y.double()
    truth = target.T > 0.5
    prediction = (p > 0.5).T
    hits = (truth & prediction).sum(1).double()
    num_true = truth.sum(1).double()
    num_predicted = prediction.sum(1).double()
    num_false = len(y) - num_true
    varies = (num_true > 0) & (num_false > 0)
    # Recall of positive and of negative examples; a constant label has only one of them.
    recalls = torch.stack([hits / num_true, (num_false - (num_predicted - hits)) / num_false])
    num_recalls = torch.stack([num_true > 0, num_false > 0]).sum(0)
    balanced = recalls.nan_to_num(0.0).sum(0) / num_recalls
    area, precision = _ranking(p.T.contiguous(), truth)
    return [
        (truth == prediction).double().mean(),
        balanced.mean(),
        _mean(2 * hits / (num_true + num_predicted), num_true + num_predicted > 0),
        _mean(area, varies),
        _mean(precision, varies),
        functional.binary_cross_entropy_with_logits(logits, target),
    ]


def _regression(outputs: Tensor, y: Tensor) -> list[Tensor | None]:
    target = y.double()
    error = outputs - target
    residual = error.square().sum(0)
    total = (target - target.mean(0)).square().sum(0)
    return [
        error.abs().mean(),
        error.square().mean(0).sqrt().mean(),
        _mean(1 - residual / total, total > 0),
    ]


def _ranking(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the area under the ROC curve and the average precision of each row.

    Equal scores share one threshold. The area counts ties as one half (the Mann-Whitney U statistic
    with midranks). The precision of a positive example is computed at the end of the run of ties to
    which the example belongs.

    Args:
        scores: Scores, shape `[R, N]`.
        truth: Whether each example is positive, shape `[R, N]`.

    Returns:
        Area and average precision, shape `[R]` each. Undefined values are NaN.
    """
    n = scores.shape[1]
    ordered, order = scores.sort(dim=1, descending=True)
    hit = truth.gather(1, order).double()
    position = torch.arange(n, device=scores.device).expand_as(order)
    # First and last position of the run of ties to which each example belongs.
    differs = ordered[:, 1:] != ordered[:, :-1]
    boundary = torch.ones_like(differs[:, :1]) if n > 1 else torch.ones_like(truth)
    first = torch.where(torch.cat([boundary, differs], 1), position, 0).cummax(1).values
    is_last = torch.cat([differs, boundary], 1)
    last = torch.where(is_last, position, n - 1).flip(1).cummin(1).values.flip(1)
    positives = hit.sum(1)
    negatives = n - positives
    # Number of other examples with a lower score; ties count half.
    below = n - 1 - (first + last) / 2
    area = ((below * hit).sum(1) - positives * (positives - 1) / 2) / (positives * negatives)
    precision = hit.cumsum(1).gather(1, last) / (last + 1)
    return area, (precision * hit).sum(1) / positives


def confusion(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """Compute the confusion matrix, whose rows are true classes and columns predicted classes.

    Labels of a multilabel task are predicted with a threshold of 0.5 on probabilities.

    Args:
        task: The task.
        logits: Outputs, shape `[N, C]`.
        y: Targets, shape `[N]` (classes) or `[N, C]`.

    Returns:
        Counts (int64) of shape `[C, C]`, or `[C, 2, 2]` for multilabel as in scikit-learn's
        `multilabel_confusion_matrix`. All counts are 0 if `accuracy` is undefined, because an
        output is NaN or infinite (see `score`).

    Raises:
        ValueError: If the task is a regression or the shapes do not match the task.
    """
    if task.kind == "regression":
        raise ValueError("confusion: not defined for regression")
    _check_shapes(task, logits, y)
    if not _has_predictions(task.kind, logits):
        # Without predictions, as in `calibration`.
        logits = logits[:0]
        y = y[:0]
    if task.kind == "multilabel":
        labels = torch.arange(task.outputs, device=logits.device)
        cells = (4 * labels + 2 * (y.to(logits.device) > 0.5) + (logits > 0)).flatten()
        return torch.bincount(cells, minlength=4 * task.outputs).reshape(task.outputs, 2, 2).cpu()
    pairs = y.to(logits.device) * task.outputs + logits.argmax(1)
    return (
        torch.bincount(pairs, minlength=task.outputs**2).reshape(task.outputs, task.outputs).cpu()
    )


def calibration(task: Task, logits: Tensor, y: Tensor, bins: int = 15) -> dict[str, Any]:
    """Compute the expected calibration error with bins of equal width (Guo et al., ICML 2017).

    The confidence is the probability of the predicted class. In multilabel tasks, each label counts
    as a separate prediction.

    Args:
        task: The task.
        logits: Outputs, shape `[N, C]`.
        y: Targets, shape `[N]` (classes) or `[N, C]`.
        bins: Number of bins (i / bins, (i + 1) / bins].

    Returns:
        A dictionary with the calibration error `ece` and three lists with one value per bin: the
        mean `confidence`, the `accuracy` and the `count` of predictions. The error is None and all
        bins are empty if there are no examples or a probability is not finite. Confidence and
        accuracy of an empty bin are None.

    Raises:
        ValueError: If the task is a regression or the shapes do not match the task.
    """
    if task.kind == "regression":
        raise ValueError("calibration: not defined for regression")
    _check_shapes(task, logits, y)
    outputs = logits.detach().double()
    if task.kind == "multiclass":
        confidence, prediction = outputs.softmax(1).max(1)
        correct = prediction == y.to(prediction.device)
    else:
        p = outputs.sigmoid().flatten()
        confidence = torch.maximum(p, 1 - p)
        correct = (p > 0.5) == (y.to(p.device).flatten() > 0.5)
    is_defined = bool(confidence.isfinite().all()) and len(confidence) > 0
    if not is_defined:
        confidence = confidence[:0]
        correct = correct[:0]
    bin_idx = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count, confidence_sum, hits = (
        torch.bincount(bin_idx, weights=w, minlength=bins).double()
        for w in (None, confidence, correct.double())
    )
    return {
        "ece": float((confidence_sum - hits).abs().sum() / count.sum()) if is_defined else None,
        "confidence": _finite((confidence_sum / count).unbind()),
        "accuracy": _finite((hits / count).unbind()),
        "count": [int(c) for c in count],
    }


def _check_shapes(task: Task, logits: Tensor, y: Tensor) -> None:
    expected = logits.shape[:1] if task.kind == "multiclass" else logits.shape
    if logits.ndim != 2 or logits.shape[1] != task.outputs or y.shape != expected:
        raise ValueError(
            f"{task.kind} task with {task.outputs} outputs: got outputs of shape "
            f"{tuple(logits.shape)} and targets of shape {tuple(y.shape)}"
        )


def _mean(values: Tensor, mask: Tensor) -> Tensor | None:
    return values[mask].mean() if mask.any() else None


def _finite(values: list[Tensor | None] | tuple[Tensor, ...]) -> list[float | None]:
    numbers = [None if v is None else float(v) for v in values]
    return [v if v is not None and abs(v) <= MAX_METRIC_VALUE else None for v in numbers]


def summarize_clients(
    values: Mapping[str, Mapping[str, float | None]],
) -> dict[str, float | int | None]:
    """Compute the mean, population standard deviation and worst value of metrics over clients.

    All clients have the same weight. The values do not depend on the order of the clients.

    Args:
        values: Metrics of each client, keyed by client id and metric name.

    Returns:
        For each metric m, the mean as `m`, the standard deviation as `m_std` and the worst value as
        `m_worst`. The worst value is the maximum for metrics in `SMALLER_IS_BETTER`, otherwise the
        minimum. Clients are excluded if the metric is missing, None or NaN, or if its magnitude
        exceeds `MAX_METRIC_VALUE`. All three values are None if all clients are excluded. The entry
        `m_undefined` is the number of excluded clients, if any.

    Example:
        >>> from hetero_fl.core.metrics import summarize_clients
        >>> summarize_clients({"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}})
        {'accuracy': 0.75, 'accuracy_std': 0.25, 'accuracy_worst': 0.5}
    """
    summary: dict[str, float | int | None] = {}
    for name in dict.fromkeys(name for scores in values.values() for name in scores):
        given = [scores.get(name) for scores in values.values()]
        known = [float(v) for v in given if v is not None and abs(v) <= MAX_METRIC_VALUE]
        if known:
            mean = math.fsum(known) / len(known)
            variance = math.fsum((v - mean) ** 2 for v in known) / len(known)
            summary[name] = mean
            summary[f"{name}_std"] = math.sqrt(variance)
            summary[f"{name}_worst"] = max(known) if name in SMALLER_IS_BETTER else min(known)
        else:
            summary |= dict.fromkeys((name, f"{name}_std", f"{name}_worst"))
        if len(known) < len(given):
            summary[f"{name}_undefined"] = len(given) - len(known)
    return summary
