"""Metrics of one model, and their mean, spread and worst value over many clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hetero_fl.core.task import Task

# How good scores are, per model: `score`, `confusion`, `calibration`; over many clients see
# `hetero_fl.core.metrics`.
#
# All figures are fractions (or in the unit of the target, for errors), computed in float64. A
# figure that is not defined is None, never NaN.

Scores = dict[str, float | None]

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
LARGEST_FIGURE = 1e18
"""A metric of larger magnitude is undefined: figures can be squared and summed over clients without overflow, in float32 too."""
SMALLER_IS_BETTER = frozenset({"loss", "perplexity", "mae", "rmse"})


def metric_names(task: Task) -> tuple[str, ...]:
    """The metrics that `score` returns for a task, in the order of tables: those that lead come first."""
    if task.kind == "regression":
        return REGRESSION
    return MANY if task.has_many_classes else CLASSIFICATION if task.rare is None else RARE


def selection_metric(task: Task) -> tuple[str, int]:
    """The metric by which validation selects a round, and its sign: +1 if larger is better, −1 if smaller is."""
    if task.kind == "regression":
        return "mae", -1
    if task.has_many_classes:
        return "accuracy", 1
    return ("balanced_accuracy" if task.kind == "multiclass" and task.rare is None else "auroc"), 1


def score(task: Task, logits: Tensor, y: Tensor, unit: Tensor | None = None) -> Scores:
    """Every metric of a task for the outputs `[N, C]` of one model and the targets of the same N examples.

    Multiclass (y `[N]`, classes): `accuracy`; `balanced_accuracy`, the mean recall over the classes in y; `macro_f1`
    over the classes in y or predicted (scikit-learn's default labels); `auroc`, of P(class 1) for two classes, else the
    mean of one-vs-rest over all classes, None unless every class is in y; `average_precision`, the mean of one-vs-rest
    over the classes in y, None if y holds one class only (it would be 1 whatever the scores); `loss`, the mean
    cross-entropy. A task with a `rare` class: `average_precision` is that class's. Many classes: `top3_accuracy` besides,
    how often the truth is among the three likeliest, and `perplexity`, the exponential of the loss.

    Multilabel (y `[N, C]` of 0 and 1, decisions at probability 0.5): the same keys, each computed label by label and
    averaged over the labels for which it is defined; `accuracy` and `loss` over all N·C decisions.

    Regression (y `[N, C]`): `mae`, `rmse`, `r2`, averaged over outputs (r2: those whose target varies), of outputs and targets
    times `unit` `[N]` where that is given.

    All are None without examples, and where the outputs give no probabilities (NaN, +inf). A figure beyond
    `LARGEST_FIGURE` is None.
    Raises ValueError if the shapes do not fit the task.
    """
    _check_shapes(task, logits, y)
    outputs = logits.detach().double()
    if unit is not None and task.kind == "regression":
        by = unit.to(outputs.device).double()[:, None]
        y = y.to(outputs.device) * by
        outputs = outputs * by
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
        among = (outputs.topk(3).indices == y[:, None]).any(1)
        known = loss is not None and bool(outputs.isfinite().all())
        found["top3_accuracy"] = among.double().mean() if known else None
        found["perplexity"] = loss.exp() if loss is not None else None
    if task.rare is not None and found["average_precision"] is not None:
        found["average_precision"] = _ranking(
            outputs.softmax(1).T[[task.rare]], (y == task.rare)[None]
        )[1][0]
    return dict(zip(names, _finite([found[name] for name in names]), strict=True))


def _multiclass(logits: Tensor, y: Tensor) -> list[Tensor | None]:
    p = logits.softmax(1)
    if not p.isfinite().all():
        return [None] * len(CLASSIFICATION)
    classes = p.shape[1]
    truth = functional.one_hot(y, classes).T.bool()
    guess = functional.one_hot(p.argmax(1), classes).T.bool()
    hits = (truth & guess).sum(1).double()
    true = truth.sum(1).double()
    said = guess.sum(1).double()
    there = true > 0
    area, precision = _ranking(p.T[there], truth[there])  # of others there is nothing to rank
    area = area[-1] if classes == 2 else area.mean()
    return [
        hits.sum() / len(y),
        _mean(hits / true, true > 0),
        _mean(2 * hits / (true + said), true + said > 0),
        area if there.all() else None,
        precision.mean() if (true < len(y)).all() else None,
        functional.cross_entropy(logits, y),
    ]


def _multilabel(logits: Tensor, y: Tensor) -> list[Tensor | None]:
    if not logits.isfinite().all():
        return [None] * len(CLASSIFICATION)
    p = logits.sigmoid()
    target = y.double()
    truth = target.T > 0.5
    guess = (p > 0.5).T
    hits = (truth & guess).sum(1).double()
    true = truth.sum(1).double()
    said = guess.sum(1).double()
    false = len(y) - true
    both = (true > 0) & (false > 0)
    # Recall of the label's presence and of its absence; a label that is always or never there has one of the two.
    recalls = torch.stack([hits / true, (false - (said - hits)) / false])
    balanced = recalls.nan_to_num(0.0).sum(0) / torch.stack([true > 0, false > 0]).sum(0)
    area, precision = _ranking(p.T.contiguous(), truth)
    return [
        (truth == guess).double().mean(),
        balanced.mean(),
        _mean(2 * hits / (true + said), true + said > 0),
        _mean(area, both),
        _mean(precision, both),
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
    """Area under the ROC curve and average precision of each row; scores and truth `[R, N]`. NaN where undefined.

    One descending sort serves both. Equal scores share one threshold: the area counts them half (Mann and Whitney's U
    with mid-ranks), and every positive gets the precision at the end of its run of equals.
    """
    n = scores.shape[1]
    ordered, order = scores.sort(dim=1, descending=True)
    hit = truth.gather(1, order).double()
    place = torch.arange(n, device=scores.device).expand_as(order)
    edge = ordered[:, 1:] != ordered[:, :-1]
    wall = torch.ones_like(edge[:, :1]) if n > 1 else torch.ones_like(truth)
    first = torch.where(torch.cat([wall, edge], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([edge, wall], 1), place, n - 1).flip(1).cummin(1).values.flip(1)
    positives = hit.sum(1)
    negatives = n - positives
    # how many examples a positive beats, equals counted half, itself not
    below = n - 1 - (first + last) / 2
    area = ((below * hit).sum(1) - positives * (positives - 1) / 2) / (positives * negatives)
    precision = hit.cumsum(1).gather(1, last) / (last + 1)
    return area, (precision * hit).sum(1) / positives


def confusion(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """How often each class was taken for each, int64: rows are true, columns predicted.

    Multiclass: `[C, C]`. Multilabel: `[C, 2, 2]`, for each label absent and present (scikit-learn's
    `multilabel_confusion_matrix`). Raises ValueError for regression.
    """
    if task.kind == "regression":
        raise ValueError("a regression task has no confusion matrix")
    _check_shapes(task, logits, y)
    if task.kind == "multilabel":
        labels = torch.arange(task.outputs, device=logits.device)
        cells = (4 * labels + 2 * (y.to(logits.device) > 0.5) + (logits > 0)).flatten()
        return torch.bincount(cells, minlength=4 * task.outputs).reshape(task.outputs, 2, 2).cpu()
    pairs = y.to(logits.device) * task.outputs + logits.argmax(1)
    return (
        torch.bincount(pairs, minlength=task.outputs**2).reshape(task.outputs, task.outputs).cpu()
    )


def calibration(task: Task, logits: Tensor, y: Tensor, bins: int = 15) -> dict[str, Any]:
    """How far confidence is from accuracy: expected calibration error, bins of equal width (Guo et al., ICML 2017).

    Returns `ece` (None without examples or probabilities), and for each bin of (i/bins, (i+1)/bins] the mean
    `confidence`, the `accuracy` (both None in an empty bin) and the `count`. Multiclass: the probability of the
    predicted class; multilabel: that of each decision, N·C of them. Raises ValueError for regression.
    """
    if task.kind == "regression":
        raise ValueError("a regression task has no calibration of confidence")
    _check_shapes(task, logits, y)
    outputs = logits.detach().double()
    if task.kind == "multiclass":
        confidence, guess = outputs.softmax(1).max(1)
        right = guess == y.to(guess.device)
    else:
        p = outputs.sigmoid().flatten()
        confidence = torch.maximum(p, 1 - p)
        right = (p > 0.5) == (y.to(p.device).flatten() > 0.5)
    known = bool(confidence.isfinite().all()) and len(confidence) > 0
    if not known:
        confidence = confidence[:0]
        right = right[:0]
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count, sure, hits = (
        torch.bincount(which, weights=w, minlength=bins).double()
        for w in (None, confidence, right.double())
    )
    return {
        "ece": float((sure - hits).abs().sum() / count.sum()) if known else None,
        "confidence": _finite((sure / count).unbind()),
        "accuracy": _finite((hits / count).unbind()),
        "count": [int(c) for c in count],
    }


def _check_shapes(task: Task, logits: Tensor, y: Tensor) -> None:
    expected = logits.shape[:1] if task.kind == "multiclass" else logits.shape
    if logits.ndim != 2 or logits.shape[1] != task.outputs or y.shape != expected:
        raise ValueError(
            f"{task.kind} with {task.outputs} outputs: found outputs of shape {tuple(logits.shape)} "
            f"and targets of shape {tuple(y.shape)}"
        )


def _mean(values: Tensor, which: Tensor) -> Tensor | None:
    return values[which].mean() if which.any() else None


def _finite(values: list[Tensor | None] | tuple[Tensor, ...]) -> list[float | None]:
    numbers = [None if v is None else float(v) for v in values]
    return [v if v is not None and abs(v) <= LARGEST_FIGURE else None for v in numbers]


# A metric over many clients: the mean, how far they are apart, the worst.


def summarize_clients(
    values: Mapping[str, Mapping[str, float | None]],
) -> dict[str, float | int | None]:
    """Over clients: for each metric m the mean as `m`, the population standard deviation `m_std`, and `m_worst`.

    The worst is the minimum, for errors and losses the maximum. Undefined values, and those beyond `LARGEST_FIGURE`, are left
    out and counted as `m_undefined` where there are any; a metric that is defined for no client has None in all three. The
    order of clients changes no bit.
    """
    found: dict[str, float | int | None] = {}
    for name in dict.fromkeys(name for scores in values.values() for name in scores):
        given = [scores.get(name) for scores in values.values()]
        known = [float(v) for v in given if v is not None and abs(v) <= LARGEST_FIGURE]
        if known:
            mean = math.fsum(known) / len(known)
            found[name] = mean
            found[f"{name}_std"] = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
            found[f"{name}_worst"] = max(known) if name in SMALLER_IS_BETTER else min(known)
        else:
            found |= dict.fromkeys((name, f"{name}_std", f"{name}_worst"))
        if len(known) < len(given):
            found[f"{name}_undefined"] = len(given) - len(known)
    return found
