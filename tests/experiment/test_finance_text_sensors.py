"""Configurations of banks, phones, sensors, speech, movies, vehicles: short runs, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.core.metrics import score
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.data import load_source
from hetero_fl.experiment import evaluate, prepare, run
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["rounds=2", "clients.defaults.steps=2", "runtime.threads=1", "algorithm.distill_epochs=1"]


def run_two_rounds(name: str, *overrides: str) -> FederatedTrainer:
    torch.set_num_threads(1)
    rounds = prepare(CONFIGS / f"{name}.yaml", overrides).make_trainer()
    for _ in range(2):
        rounds.run_round()
    return rounds


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "finance_hetero",
        "text_hetero",
        "sensors_hetero",
        "speech_hetero",
        "recommendation_hetero",
        "driving_hetero",
    ],
)
def test_configurations_run_two_rounds(name: str, tmp_path: Path) -> None:
    # FedAvg does not distill.
    short = [each for each in SHORT if name != "driving_hetero" or "distill" not in each]
    finished = run(
        CONFIGS / f"{name}.yaml", overrides=[*short, "evaluation.every=2"], out=tmp_path / "run"
    )
    summary = finished.summary
    assert summary["data"]["simulated"] and summary["rounds_completed"] == 2
    assert all(
        value is not None
        for key, value in summary["global"]["last"].items()
        if "auroc" not in key and "prec" not in key
    )
    details = json.loads((tmp_path / "run" / "details.json").read_text())
    leading = {
        "finance_hetero": "auroc",
        "recommendation_hetero": "ndcg_10",
        "driving_hetero": "mae",
    }
    assert next(iter(summary["global"]["last"])) == leading.get(name, "accuracy")
    report = (tmp_path / "run" / "report.html").read_text()
    if name == "finance_hetero":
        assert details["rare"] == 1 and "AUROC" in report and "of the rare class, fraud" in report
    if name == "text_hetero":
        assert (
            "Top-3 accuracy" in report
            and "Perplexity" in report
            and not any(details["confusion"].values())
        )
        check_saved_token_models(finished, tmp_path / "run")


def check_saved_token_models(finished: Any, path: Path) -> None:
    """Check predictions and scores of saved models on other texts."""
    config = finished.directory.config()["data"]
    from hetero_fl.config.data import SourceConfig, TextConfig

    dataset = load_source(
        SourceConfig(name="phrases", text=TextConfig(**config["text"])), Path(".")
    )
    assert (
        dataset.vocabulary is not None and dataset.test is not None and dataset.test.y is not None
    )
    x = dataset.vocabulary.encode(["can you print the", "where"], 8)
    p = finished.predict("old_01" if "old_01" in finished.models else "old_1", x)
    assert p.shape == (2, dataset.task.outputs) and np.allclose(p.sum(axis=1), 1)
    client = next(iter(finished.models))
    for bad, words in (
        (x[:, :5], r"expected \(N, 8\), got shape \(2, 5\)"),
        (x.float(), "expected integers, got floats"),
        (x + 900, "row 0: expected tokens from 0 to 200, got"),
    ):
        with pytest.raises(UserError, match=words):
            finished.predict(client, bad)
    with pytest.warns(UserWarning, match="are also in the run's training rows"):
        found = evaluate(path, "phrases", client)[client]
    model = finished.models[client]
    assert found == score(model.task, model.logits(dataset.test.x), dataset.test.y)
    assert (
        SavedModel.load(path / "models" / f"{client}.safetensors").arch.vocabulary
        == dataset.vocabulary.size
    )
    with pytest.raises(UserError, match=r"data: digits: expected class names as in the models"):
        evaluate(path, "digits", client)


METHODS = [
    "local",
    "fedavg",
    "fedmd",
    "fedproto",
    "fml",
    "fedkd",
    "fedgkt",
    "heterofl",
    "scaffold",
    "ditto",
    "fedgen",
    "kt_pfl",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_on_tokens(method: str) -> None:
    small = ["clients.defaults.steps=1", "data.proxy.size=40", f"algorithm.name={method}"]
    own = json.dumps([{"name": "phone", "count": 12, "model": ["text_cnn", "text_transformer"]}])
    rounds = run_two_rounds("text_hetero", *small, f"clients.groups={own}")
    assert rounds.completed == 2


@pytest.mark.slow
def test_token_models_are_equal_in_both_backends(float64: None) -> None:
    own = json.dumps([{"name": "phone", "count": 12, "model": ["text_cnn", "text_transformer"]}])
    small = ["clients.defaults.steps=3", "data.proxy.size=40", f"clients.groups={own}"]

    serial, batched = (
        run_two_rounds("text_hetero", *small, f"runtime.executor={executor}").server.models
        for executor in ("serial", "batched")
    )

    torch.testing.assert_close(serial, batched, rtol=1e-6, atol=1e-8)


def test_metrics_of_many_classes() -> None:
    task = Task("multiclass", 25)
    logits = torch.zeros(3, 25)
    logits[0, :3], logits[1, 4], logits[2, 7] = torch.tensor([3.0, 2.0, 1.0]), 5.0, 5.0
    found = score(task, logits, torch.tensor([2, 4, 9]))
    assert next(iter(found)) == "accuracy" and found["accuracy"] == pytest.approx(1 / 3)
    assert found["top3_accuracy"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(float(torch.tensor(found["loss"]).exp()))
    assert "top3_accuracy" not in score(
        Task("multiclass", 10), torch.zeros(2, 10), torch.tensor([0, 1])
    )
    nan_scores = score(task, torch.full((3, 25), torch.nan), torch.tensor([2, 4, 9]))
    assert set(nan_scores.values()) == {None}


def test_average_precision_of_the_rare_class() -> None:
    logits = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    y = torch.tensor([0, 1, 0, 0])
    found = score(Task("multiclass", 2, rare=1), logits, y)
    assert tuple(found)[:2] == ("auroc", "average_precision") and found[
        "average_precision"
    ] == pytest.approx(0.5)
    # without a rare class, the mean of both classes
    assert score(Task("multiclass", 2), logits, y)["average_precision"] != pytest.approx(0.5)
    single = score(Task("multiclass", 2, rare=1), logits, torch.zeros(4, dtype=torch.int64))
    assert single["average_precision"] is None and single["auroc"] is None


def test_perplexity_is_not_formatted_as_a_percentage() -> None:
    from hetero_fl.reporting.formatting import format_score

    assert format_score(6.87, "perplexity") == "6.87" and format_score(
        0.687, "top3_accuracy"
    ).startswith("68.7")
