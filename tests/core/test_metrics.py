"""Metrics compared with scikit-learn, and undefined metrics."""

from __future__ import annotations

import itertools
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import one_hot

from hetero_fl.core.metrics import (
    CLASSIFICATION,
    calibration,
    confusion,
    score,
    selection_metric,
    summarize_clients,
)
from hetero_fl.core.payload import loss_from_report
from hetero_fl.core.task import Task
from tests.support.cases import each_case

BINARY, TEN, LABELS = Task("multiclass", 2), Task("multiclass", 10), Task("multilabel", 4)
VALUES = Task("regression", 3)


@pytest.fixture(scope="module")
def sk() -> ModuleType:
    """Return the reference, which is not imported before a test needs it."""
    from sklearn import metrics

    return metrics


def draw(task: Task, n: int, seed: int, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return informative scores and targets that contain every class."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, task.outputs, generator=g)
    if ties:
        logits = logits.round()
    if task.kind == "multiclass":
        y = torch.cat(
            [
                torch.arange(task.outputs),
                torch.randint(task.outputs, (n - task.outputs,), generator=g),
            ]
        )
        return logits + one_hot(y, task.outputs), y
    if task.kind == "multilabel":
        return logits, (logits + torch.randn(n, task.outputs, generator=g) > 0.5).float()
    return logits, logits * 0.7 + torch.randn(n, task.outputs, generator=g)


@each_case(("ties", "seed", "task"), itertools.product((False, True), range(5), (BINARY, TEN)))
def test_multiclass_agrees_with_scikit_learn(
    ties: Any, seed: Any, task: Any, sk: ModuleType
) -> None:
    logits, y = draw(task, 200, seed, ties)
    p, guess = logits.double().softmax(1).numpy(), logits.argmax(1).numpy()
    area = (
        sk.roc_auc_score(y, p[:, 1])
        if task.outputs == 2
        else sk.roc_auc_score(y, p, multi_class="ovr")
    )
    expected = {
        "accuracy": sk.accuracy_score(y, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
        "macro_f1": sk.f1_score(y, guess, average="macro"),
        "auroc": area,
        "average_precision": sk.average_precision_score(
            one_hot(y, task.outputs), p, average="macro"
        ),
        "loss": sk.log_loss(y, p),
    }
    assert score(task, logits, y) == pytest.approx(expected, abs=1e-9)


@each_case("ties", (False, True))
def test_multilabel_agrees_with_scikit_learn(ties: bool, sk: ModuleType) -> None:
    logits, y = draw(LABELS, 300, 1, ties)
    p = logits.double().sigmoid().numpy()
    guess = p > 0.5
    expected = {
        "accuracy": (guess == y.numpy()).mean(),
        "balanced_accuracy": np.mean(
            [sk.balanced_accuracy_score(y[:, i], guess[:, i]) for i in range(4)]
        ),
        "macro_f1": sk.f1_score(y, guess, average="macro"),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "average_precision": sk.average_precision_score(y, p, average="macro"),
        "loss": sk.log_loss(y.flatten(), p.flatten()),
    }
    assert score(LABELS, logits, y) == pytest.approx(expected, abs=1e-9)


def test_regression_agrees_with_scikit_learn(sk: ModuleType) -> None:
    outputs, y = draw(VALUES, 150, 2)
    expected = {
        "mae": sk.mean_absolute_error(y, outputs),
        "rmse": sk.root_mean_squared_error(y.double(), outputs.double()),
        "r2": sk.r2_score(y.double(), outputs.double()),
    }
    assert score(VALUES, outputs, y) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_with_ties(rows: list[tuple[int, bool]]) -> None:
    margin, y = torch.tensor([float(r[0]) for r in rows]), torch.tensor([int(r[1]) for r in rows])
    found = score(BINARY, torch.stack([torch.zeros(len(rows)), margin], 1), y)["auroc"]
    if len(set(y.tolist())) < 2:
        assert found is None
        return
    beaten = (margin[y == 1][:, None] - margin[y == 0]).sign().add(1).div(2).mean()
    assert found == pytest.approx(float(beaten), abs=1e-6)


def test_missing_class_makes_only_auroc_undefined(sk: ModuleType) -> None:
    logits, y = draw(TEN, 200, 3)
    kept = y != 4
    found = score(TEN, logits[kept], y[kept])
    assert found["auroc"] is None
    assert all(found[name] is not None for name in CLASSIFICATION if name != "auroc")
    guess = logits[kept].argmax(1)
    assert (guess == 4).any(), "the case is about a class that is predicted and absent"
    assert found["macro_f1"] == pytest.approx(sk.f1_score(y[kept], guess, average="macro"))
    recalls = [float((guess[y[kept] == c] == c).double().mean()) for c in range(10) if c != 4]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_metrics_of_one_class() -> None:
    found = score(BINARY, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert found["auroc"] is None and found["average_precision"] is None
    assert found["accuracy"] == found["balanced_accuracy"] == 0.5


def test_constant_labels_are_left_out(sk: ModuleType) -> None:
    logits, y = draw(LABELS, 60, 4)
    y[:, 2] = 0
    found, rest = score(LABELS, logits, y), [0, 1, 3]
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(y[:, rest], logits[:, rest]))
    assert found["average_precision"] == pytest.approx(
        sk.average_precision_score(y[:, rest], logits[:, rest])
    )
    assert score(LABELS, logits, torch.zeros_like(y))["auroc"] is None


@each_case("task", (BINARY, TEN, LABELS, VALUES))
def test_metrics_are_never_nan(task: Any) -> None:
    logits, y = draw(task, 20, 5)
    assert set(score(task, logits[:0], y[:0]).values()) == {None}
    for bad in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[3, 1] = bad
        text = json.dumps(score(task, broken, y), allow_nan=False)
        assert "null" in text
    for n in (1, 2):
        json.dumps(score(task, logits[:n], y[:n]), allow_nan=False)
    constant = score(VALUES, *(torch.ones(5, 3),) * 2)
    assert constant["r2"] is None and constant["mae"] == 0


def test_confusion_rows_are_true_classes(sk: ModuleType) -> None:
    logits, y = draw(TEN, 200, 7)
    assert np.array_equal(confusion(TEN, logits, y), sk.confusion_matrix(y, logits.argmax(1)))
    logits, y = draw(LABELS, 50, 7)
    assert np.array_equal(
        confusion(LABELS, logits, y), sk.multilabel_confusion_matrix(y, logits > 0)
    )


def test_outputs_of_minus_infinity_have_scores() -> None:
    logits, y = draw(TEN, 50, 6)
    logits[:, 9] = -torch.inf
    found = score(TEN, logits, y)
    assert found["loss"] is None and found["accuracy"] is not None and found["auroc"] is not None
    assert confusion(TEN, logits, y).sum() == 50


def test_confusion_is_empty_without_predictions() -> None:
    for task in (TEN, LABELS):
        logits, y = draw(task, 20, 7)
        logits[3, 1] = torch.nan
        assert not confusion(task, logits, y).any()
        assert score(task, logits, y)["accuracy"] is None


def test_calibration_matches_computation_by_hand() -> None:
    # confidences .65 .65 .85 .85; correct, wrong, correct, correct; gaps .15 and .15
    p = torch.tensor([0.65, 0.65, 0.15, 0.15])
    logits = torch.stack([1 - p, p], 1).log()
    found = calibration(BINARY, logits, torch.tensor([1, 0, 0, 0]), bins=10)
    assert found["ece"] == pytest.approx(0.15)
    assert found["count"] == [0, 0, 0, 0, 0, 0, 2, 0, 2, 0]
    assert (
        found["accuracy"][6] == 0.5 and found["accuracy"][8] == 1 and found["accuracy"][0] is None
    )
    assert found["confidence"][8] == pytest.approx(0.85)
    json.dumps(found, allow_nan=False)


def test_calibration_agrees_with_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, y = draw(TEN, 500, 8)
    expected = multiclass_calibration_error(logits.double(), y, num_classes=10, n_bins=15)
    found = calibration(TEN, logits, y)
    assert found["ece"] == pytest.approx(float(expected), abs=1e-6) and sum(found["count"]) == 500
    labels = calibration(LABELS, *draw(LABELS, 50, 8))
    assert sum(labels["count"]) == 200 and 0 <= labels["ece"] <= 1
    assert calibration(TEN, logits[:0], y[:0])["ece"] is None
    assert calibration(TEN, logits * torch.nan, y)["ece"] is None


def test_spread_takes_the_worst_by_direction_and_counts_the_undefined() -> None:
    clients = {
        "a": {"auroc": 0.9, "loss": 0.2},
        "b": {"auroc": None, "loss": 0.6},
        "c": {"auroc": 0.7, "loss": 0.4},
    }
    found = summarize_clients(clients)
    assert found == pytest.approx(
        {"auroc": 0.8, "auroc_std": 0.1, "auroc_worst": 0.7, "auroc_undefined": 1}
        | {"loss": 0.4, "loss_std": np.std([0.2, 0.6, 0.4]), "loss_worst": 0.6}
    )
    none = dict.fromkeys(("auroc", "auroc_std", "auroc_worst"))
    assert summarize_clients({"a": {"auroc": None}}) == none | {"auroc_undefined": 1}
    assert summarize_clients({}) == {}


def test_spread_does_not_depend_on_the_order_of_clients() -> None:
    g = torch.Generator().manual_seed(9)
    clients = {
        f"c{i}": {"accuracy": float(v)}
        for i, v in enumerate(torch.rand(50, generator=g, dtype=torch.float64))
    }
    assert summarize_clients(clients) == summarize_clients(dict(reversed(clients.items())))


def test_selection_metric_of_each_task() -> None:
    chosen = [selection_metric(task) for task in (BINARY, LABELS, VALUES)]
    assert chosen == [("balanced_accuracy", 1), ("auroc", 1), ("mae", -1)]


def test_scores_beyond_the_float_range_are_undefined() -> None:
    large = torch.full((4, VALUES.outputs), 1e20, dtype=torch.float64)

    found = score(VALUES, large, torch.zeros(4, VALUES.outputs))
    spread = summarize_clients({"a": {"loss": 1.7e308}, "b": {"loss": 1.0}, "c": {"loss": 2**1000}})

    assert found["mae"] is None and found["rmse"] is None
    assert spread == {"loss": 1.0, "loss_std": 0.0, "loss_worst": 1.0, "loss_undefined": 2}


def test_loss_of_overflowing_report_is_none() -> None:
    for loss in ("1.7e308", 1.7e308, -1e300, 2**63, "nan"):
        assert loss_from_report({"loss": loss}) is None
    assert loss_from_report({"loss": "2.5"}) == 2.5
