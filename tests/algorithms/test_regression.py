"""Regression with every method that supports it: squared error instead of KL, and no softmax."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.baselines import MEMBER
from hetero_fl.algorithms.requirements import needs_of
from hetero_fl.core.objectives import TeacherDistillation, distillation_loss
from hetero_fl.core.plan import Rows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data import Dataset, from_arrays
from hetero_fl.experiment import prepare
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.cases import each_case
from tests.support.federations import QUICK, deployed

METHODS = [
    name
    for name in sorted(register_algorithm)
    if "regression" in needs_of(register_algorithm[name]).tasks
    and register_algorithm[name].__module__[:9] == "hetero_fl"
]
KINDS = ("softmax", "log_softmax", "logsumexp", "sigmoid")


def slopes(groups: list[str] | None = None) -> Dataset:
    """Return two targets that are linear in four columns and have a scale far from one."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(240, 4, generator=draws)
    y = x @ torch.randn(4, 2, generator=draws) / 2 + 1
    return from_arrays(x, y, group=groups, unit=torch.linspace(50, 90, 240), name="slopes")


def settings(method: str, same: bool, **own: Any) -> dict[str, Any]:
    models = [{"name": "mlp", "hidden": [width]} for width in (12, 12 if same else 9, 12)]
    return {
        "rounds": 3,
        "data": {"proxy": {"size": 40}},
        "clients": {
            "defaults": {
                "optimizer": {"name": "adam", "lr": 0.02},
                "batch_size": 16,
                "preprocess": {"normalize": "own"},
            },
            "groups": [{"name": "site", "count": 3, "model": models}],
        },
        "algorithm": {"name": method, **QUICK.get(method, {}), **own},
        "runtime": {"threads": 1, "executor": "serial"},
    }  # fmt: skip


def run_rounds(method: str, rounds: int = 3, same: bool = True, **own: Any) -> FederatedTrainer:
    run = prepare(settings(method, same, **own), dataset=slopes()).make_trainer()
    for _ in range(rounds):
        run.run_round()
    return run


@pytest.mark.slow
def test_regression_learns_without_softmax(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    def refused(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a prediction of a regression is made a probability")

    for name in KINDS:
        monkeypatch.setattr(Tensor, name, refused)
        monkeypatch.setattr(torch, name, refused, raising=False)
        monkeypatch.setattr(F, name, refused, raising=False)
    for name in ("cross_entropy", "kl_div", "binary_cross_entropy_with_logits", "logsigmoid"):
        monkeypatch.setattr(F, name, refused)
    for method in METHODS:
        with subtests.test(method=method):
            for reading in run_rounds(method).evaluate().clients.values():
                error = reading.scores["global"]["mae"]
                # In the target's unit, about 70 times that of outputs.
                assert error is not None and 0.5 < error < 60


@each_case("method", ("fedmd", "feddf", "hybrid"))
def test_temperature_does_not_change_regression(method: str) -> None:
    one, other = run_rounds(method, temperature=1.0), run_rounds(method, temperature=4.0)
    for client_id in one.federation.client_infos.clients.ids:
        a, b = (
            deployed(one, client_id).models["model"],
            deployed(other, client_id).models["model"],
        )
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_regression_distillation_uses_squared_error() -> None:
    student, teacher = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    found = distillation_loss("regression", student, teacher, 7.0)
    assert torch.allclose(found, (student - teacher).square().mean(1)) and not found.requires_grad
    assert TeacherDistillation("regression").kind == "regression"


def test_regression_teacher_is_weighted_mean_of_predictions() -> None:
    cases = {"mean": False, "entropy": False, "samples": True, "contrast": True}
    for kind, by_rows in cases.items():
        run = run_rounds("fedmd", 1, same=False, teacher=kind)
        top, bottom = torch.zeros(()), 0.0
        for client_id, info in run.federation.client_infos.items():
            predict = run.executor.runtime.predict  # type: ignore[attr-defined]
            weight = float(info.num_rows) if by_rows else 1.0
            top = top + weight * predict(deployed(run, client_id), Rows("proxy"), False)
            bottom += weight

        assert torch.allclose(run.server.state["teacher"], top / bottom, atol=1e-6), kind


def test_regression_ensemble_averages_predictions() -> None:
    run = run_rounds("ensemble", 1, same=False)
    client = deployed(run, "site_1")
    members = []
    for client_id, info in run.federation.client_infos.items():
        tensors = client.models[MEMBER + client_id]
        preprocess = asdict(info.preprocess)
        member = SavedModel(tensors, info.arch, preprocess, run.federation.task)
        rows = run.federation.data.columns(client_id, "common_test", info.preprocess)
        members.append(member.logits(rows["x"]))

    full = run.executor.runtime.predict(client, Rows("common_test"), False)  # type: ignore[attr-defined]

    assert torch.allclose(full, torch.stack(members).mean(0), atol=1e-6)
