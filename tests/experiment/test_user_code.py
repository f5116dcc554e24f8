"""Losses, optimizers, metrics and transforms of the user, as objects and by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2
from typing_extensions import override

import hetero_fl as hfl
from hetero_fl.utils.errors import RunFailedError
from tests.support.python_federations import QUIET, images, same_models


def federation(**client: Any) -> hfl.Federation:
    clients = [hfl.Client(f"site_{i}", "mlp", images(40, i), **client) for i in (1, 2)]
    return hfl.Federation(clients, test=images(30, 9))


def train(own: hfl.Federation, method: Any = None, **settings: Any) -> hfl.Run:
    overrides = settings.pop("overrides", QUIET)
    return own.train(method or hfl.Local(), rounds=2, overrides=overrides, **settings)


def smoothed_loss(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, label_smoothing=0.1, reduction="none")


def make_rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=0.02)


def invert(x: Tensor) -> Tensor:
    return 1 - x


def error_rate(predictions: Tensor, y: Tensor) -> Tensor:
    return (predictions.argmax(1) != y).float().mean()


@dataclass(frozen=True)
class SquaredError(hfl.Objective):
    """The squared error of probabilities."""

    kind: str = "multiclass"

    @override
    def loss(self, nets: Any, batch: Any, context: Any) -> Tensor:
        p = nets.model(batch.x).softmax(1)
        return (p - functional.one_hot(batch.y, p.shape[1])).square().sum(1)


OBJECTS: dict[str, dict[str, Any]] = {
    "loss function": {
        "objective": lambda z, y: functional.cross_entropy(z, y, reduction="none") ** 2
    },
    "loss module": {"objective": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "objective class": {"objective": SquaredError},
    "optimizer class": {"optimizer": torch.optim.RMSprop},
    "optimizer function": {"optimizer": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)},
    "preprocessing": {"preprocess": hfl.Preprocess(transform=lambda x: x.square())},
    "augmentation": {"augment": hfl.Augment(transform=v2.RandomErasing(p=1.0))},
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_object_changes_the_result_and_is_reproducible(kind: str) -> None:
    own = federation(**OBJECTS[kind])

    first, second, plain = train(own), train(own), train(federation())

    assert same_models(first, second)
    assert not same_models(first, plain)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["batched", "processes"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_object_gives_equal_scores_on_all_executors(kind: str, executor: str) -> None:
    own = federation(**OBJECTS[kind])

    serial = train(own, hfl.FedAvg())
    other = train(own, hfl.FedAvg(), overrides=[*QUIET, f"runtime.executor={executor}"])

    expected = serial.models["site_1"].tensors
    for name, tensor in other.models["site_1"].tensors.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5)


@pytest.mark.slow
def test_registered_model_is_trained_in_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hfl.register_model, "_known", dict(hfl.register_model._known))
    hfl.register_model("flat")(lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    clients = [hfl.Client(f"site_{i}", "flat") for i in (1, 2)]
    own = hfl.Federation(clients, data={"name": "digits", "train_limit": 150})

    runs = [
        train(own, hfl.FedAvg(), overrides=[*QUIET, f"runtime.executor={executor}"])
        for executor in ("serial", "processes")
    ]

    assert same_models(*runs)


@pytest.mark.parametrize(
    ("client", "in_file"),
    [
        ({"objective": smoothed_loss}, {"objective": "smoothed_loss"}),
        ({"optimizer": make_rmsprop}, {"optimizer": {"name": "make_rmsprop", "lr": 0.02}}),
        (
            {"preprocess": hfl.Preprocess(transform=invert)},
            {"preprocess": {"transform": "invert"}},
        ),
    ],
    ids=["objective", "optimizer", "transform"],
)
def test_named_function_equals_the_object(
    client: dict[str, Any], in_file: dict[str, Any], tmp_path: Path
) -> None:
    def refer(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: refer(value) for key, value in tree.items()}
        return f"python:{__name__}:{tree}" if isinstance(tree, str) else tree

    data = {"name": "digits", "train_limit": 150}
    clients = [hfl.Client(f"site_{i}", "mlp", **client) for i in (1, 2)]
    objects = hfl.Federation(clients, data=data)
    first = train(objects, hfl.FedAvg())
    groups = [{"name": f"site_{i}", "model": "mlp", **refer(in_file)} for i in (1, 2)]
    file = {
        "name": "federation",
        "data": data,
        "clients": {"groups": groups},
        "rounds": 2,
        "algorithm": {"name": "fedavg"},
    }
    second = hfl.run(file, out=tmp_path / "run", overrides=QUIET)

    assert same_models(first, second)


def test_loss_function_equals_the_supervised_loss() -> None:
    plain = train(federation(logit_adjustment=True, class_weights="balanced"), hfl.FedAvg())
    own = federation(
        logit_adjustment=True, class_weights="balanced", objective=nn.CrossEntropyLoss()
    )

    assert same_models(train(own, hfl.FedAvg()), plain)


def test_optimizer_function_with_a_schedule_equals_the_built_in_optimizer() -> None:
    schedule = ["clients.defaults.optimizer.schedule=cosine"]
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    sgd = federation(optimizer=hfl.SGD(**settings))
    own = federation(optimizer=lambda p: torch.optim.SGD(p, **settings, fused=True))

    first, second = (train(each, overrides=[*QUIET, *schedule]) for each in (sgd, own))

    assert same_models(first, second)
    assert not same_models(first, train(sgd))


def test_metrics_of_the_user_are_evaluated() -> None:
    evaluation = hfl.Evaluation(metrics={"error_rate": error_rate})

    overrides = [*QUIET, "output.report=true"]
    run = train(federation(), hfl.FedAvg(), evaluation=evaluation, overrides=overrides)

    last = run.summary["global"]["last"]
    assert last["error_rate"] == pytest.approx(1 - last["accuracy"], abs=1e-6)
    assert "error_rate_worst" in run.summary["personal"]["last"]
    assert set(run.history.query("metric == 'error_rate'")["client"]) > {"site_1", "mean"}
    assert "Error rate" in (run.path / "report.html").read_text(encoding="utf-8")
    assert "error rate" in run._repr_html_()


def test_metric_in_a_comparison() -> None:
    evaluation = hfl.Evaluation(
        metrics={"error_rate": lambda p, y: (p.argmax(1) != y).double().mean()}
    )
    comparison = federation().compare(["local", "fedavg"], rounds=1, evaluation=evaluation)
    frame = comparison.frame
    assert np.allclose(frame["global_last_error_rate"], 1 - frame["global_last_accuracy"])


def test_preprocessing_is_part_of_predictions() -> None:
    own = federation(preprocess=hfl.Preprocess(transform=lambda x: x.clamp(max=0.5)))
    run = train(own)
    x = images(5, 7)[0]

    predicted = torch.tensor(run.predict("site_1", x, personal=False).to_numpy())

    inputs = (torch.from_numpy(x)[:, None].float() / 255).clamp(max=0.5)
    assert torch.allclose(predicted, run.model("site_1")(inputs).softmax(1), atol=1e-6)


def fail_on_many(predictions: Tensor, y: Tensor) -> float:
    if len(y) > 10:
        raise KeyError("column")
    return 0.0


def test_metric_that_fails_after_training_is_named_with_its_place() -> None:
    evaluation = hfl.Evaluation(metrics={"own": fail_on_many})

    with pytest.raises(RunFailedError, match=r"test_user_code\.py:.* in fail_on_many: KeyError"):
        train(federation(), evaluation=evaluation)
