"""DENSE: generator objective, single upload, and which model is evaluated."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.core.generative_objectives import (
    BatchStatistics,
    Generator,
    Synthesis,
    preprocess_generated,
)
from hetero_fl.core.objectives import Batch, ModelView, ModelViews
from hetero_fl.core.participant import ClientInfo, floating_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Rows
from hetero_fl.experiment import prepare
from hetero_fl.federation.synchronous import SynchronousTrainer
from model_zoo import create_model, is_batch_norm
from tests.references.local_training import clients, module
from tests.support.federations import MIXED, config, deployed, rounds_of, same_bits

FEW = {
    "synthesis_epochs": 2,
    "generator_steps": 3,
    "student_steps": 4,
    "synthetic_batch": 12,
    "noise": 5,
}
# The student's optimizer keeps its momentum from batch to batch.
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


def federation(models: Any = MIXED, clients: int = 3, **settings: Any) -> dict[str, Any]:
    own = {"name": "dense", **FEW, **settings}
    return config("dense", models, clients, algorithm=own, server={"optimizer": SGD})


def statistics(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits in evaluation mode and the summed BatchNorm distances, measured with hooks."""
    found = [torch.zeros(())]

    def note(layer: Any, inputs: tuple[Tensor]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        found.append(((x.mean(1) - layer.running_mean) ** 2).sum().sqrt())
        found.append(((x.var(1, correction=0) - layer.running_var) ** 2).sum().sqrt())

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if is_batch_norm(m)]
    z = model(x).logits
    for hook in hooks:
        hook.remove()
    return z, sum(found)  # type: ignore[return-value]


def by_hand(
    teachers: list[nn.Module], student: nn.Module, x: Tensor, y: Tensor, bn: float, adv: float
) -> Tensor:
    outputs = [statistics(t, x) for t in teachers]
    mean, s = sum(z for z, _ in outputs) / len(outputs), student(x).logits
    p, q = mean.softmax(1), s.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1)
    kl = torch.where(mean.argmax(1) == s.argmax(1), torch.zeros_like(kl), kl)
    return (
        F.cross_entropy(mean, y) + bn * sum(b for _, b in outputs) / len(outputs) - adv * kl.mean()
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("bn", "adv"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.8)])
def test_generator_objective_matches_reference_and_stacks(bn: float, adv: float) -> None:
    torch.manual_seed(1)
    teachers = [
        create_model("cnn_bn_small", 10, 1, 8).eval(),
        create_model("cnn_gn_small", 10, 1, 8).eval(),
    ]
    student, imager = create_model("mlp", 10, 1, 8).eval(), Generator(64, 5, (1, 8, 8))
    nets = ModelViews(
        {
            "a": ModelView.from_module(teachers[0]),
            "b": ModelView.from_module(teachers[1]),
            "s": ModelView.from_module(student),
        }
    )
    nets["generator"] = ModelView.from_module(imager)
    view = ((1, 8, 8), None, None)
    objective = Synthesis((1, 8, 8), (("a", view), ("b", view)), ("s", view), bn, adv)
    z, y = torch.randn(9, 5), torch.arange(9)
    total = objective.total_loss(nets, Batch(x=z, y=y), {})
    expected = by_hand(teachers, student, imager(z).logits.view(9, 1, 8, 8), y, bn, adv)
    assert torch.allclose(total, expected, rtol=0, atol=1e-12)
    single = by_hand(teachers, student, imager(z).logits.view(9, 1, 8, 8), y, 0, 0)
    assert bool((expected - single).abs() > 1e-4) == bool(bn + adv)
    stacked = torch.vmap(lambda a: objective.total_loss(nets, Batch(x=a, y=y), {}))(
        torch.stack([-z, z])
    )
    assert torch.allclose(stacked[1], total, rtol=0, atol=1e-10)
    # A student equal to its only teacher gives no boundary loss.
    nets["s"] = nets["a"]
    agreed = Synthesis((1, 8, 8), (("a", view),), ("s", view), 0.0, 5.0).total_loss(
        nets, Batch(x=z, y=y), {}
    )
    assert torch.allclose(
        agreed, F.cross_entropy(teachers[0](imager(z).logits.view(9, 1, 8, 8)).logits, y)
    )


@pytest.mark.usefixtures("float64")
def test_boundary_loss_counts_only_disagreements() -> None:
    torch.manual_seed(2)
    teacher, imager = create_model("mlp", 10, 1, 8).eval(), Generator(64, 5, (1, 8, 8))
    x, y, view = torch.randn(40, 5), torch.arange(40) % 10, ((1, 8, 8), None, None)
    images, student = imager(x).logits.view(40, 1, 8, 8), copy.deepcopy(teacher)
    with torch.no_grad():
        z = teacher(images).logits
        second, first = z.mean(0).argsort()[-2:]
        # The student disagrees on half of them.
        student.head.bias[second] += (z[:, first] - z[:, second]).median()
    agree = teacher(images).logits.argmax(1) == student(images).logits.argmax(1)
    assert agree.any() and not agree.all()
    nets = ModelViews(
        t=ModelView.from_module(teacher),
        s=ModelView.from_module(student),
        generator=ModelView.from_module(imager),
    )
    total = Synthesis((1, 8, 8), (("t", view),), ("s", view), 0.0, 0.8).total_loss(
        nets, Batch(x=x, y=y), {}
    )
    assert torch.allclose(total, by_hand([teacher], student, images, y, 0, 0.8), rtol=0, atol=1e-12)


def test_generator_handles_models_without_batch_norm_and_client_views() -> None:
    with BatchStatistics() as found:
        create_model("cnn_gn_small", 10, 1, 8)(torch.rand(4, 1, 8, 8))
    assert found.distance == 0.0
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(preprocess_generated(x, ((1, 8, 8), None, None)), x)
    grown = preprocess_generated(x, ((3, 12, 12), 0.5, 0.25))
    expected = (
        F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False).expand(-1, 3, 12, 12)
        - 0.5
    ) / 0.25
    assert torch.allclose(grown, expected)


def test_generator_supports_every_input_shape() -> None:
    for shape in ((1, 8, 8), (3, 9, 14), (6,), (2, 15)):
        size = math.prod(shape)
        x = Generator(size, 5, shape)(torch.randn(4, 5)).logits

        assert x.shape == (4, size)
        assert len(shape) != 3 or bool(((x >= 0) & (x <= 1)).all()), shape


def uploads(rounds: SynchronousTrainer) -> list[dict[str, list[str]]]:
    """Return the items that each client sends, by round."""
    seen_: list[dict[str, list[str]]] = []
    receive = rounds.decode_upload

    def note(client_info: ClientInfo, data: bytes, requests: Any, index: int) -> Payload:
        payload = receive(client_info, data, requests, index)
        seen_[-1][client_info.client_id] = list(payload)
        return payload

    rounds.decode_upload = note  # type: ignore[method-assign]
    while rounds.completed < rounds.federation.num_rounds:
        seen_.append({})
        rounds.run_round()
    return seen_


def test_models_are_uploaded_once_and_training_is_local_before() -> None:
    source = {**federation(), "rounds": 3}
    source["clients"]["overrides"] = [{"match": "site_3", "shares": ["backbone"]}]
    rounds = rounds_of(source, num_rounds=0)
    assert uploads(rounds) == [
        {"site_1": [], "site_2": [], "site_3": []},
        {"site_1": [], "site_2": [], "site_3": []},
        # A partial model cannot be a teacher.
        {"site_1": ["model"], "site_2": ["model"], "site_3": []},
    ]
    local = rounds_of({**config("local", MIXED, 3), "rounds": 3})
    for client_id in local.federation.client_infos:
        assert same_bits(
            rounds.store.get(client_id).models["model"], local.store.get(client_id).models["model"]
        )


def test_server_needs_no_data() -> None:
    rounds = rounds_of(
        {**federation(), "data": {**federation()["data"], "proxy": {"size": 0}}}, num_rounds=1
    )

    rounds.server.data = Mock(side_effect=AssertionError("data were read"))
    rounds.run_round()
    assert "student" in rounds.server.state


def test_clients_use_the_student_once_distilled() -> None:
    source = federation(student="site_2")
    source["clients"]["overrides"] = [
        {"match": "site_1", "preprocess": {"resize": 12, "channels": 3}}
    ]
    rounds = rounds_of(source, num_rounds=1)
    site = rounds.executor.runtime  # type: ignore[attr-defined]
    before = deployed(rounds, "site_1")
    assert before.arch.keys() == {"model"} and rounds.evaluate().server is None
    rounds.run_round()
    client, home = deployed(rounds, "site_1"), clients(rounds)["site_2"]
    student = rounds.server.models[home.arch["model"].spec_id]
    with torch.no_grad():
        expected = (
            module(home.arch["model"], student).eval()(home.data("common_test", None)["x"]).logits
        )
    assert torch.allclose(site.predict(client, Rows("common_test"), False), expected, atol=1e-5)
    readings = rounds.evaluate()
    assert readings.server is not None
    assert readings.server["global"]["accuracy"] == pytest.approx(
        readings.clients["site_1"].scores["global"]["accuracy"]
    )
    assert "student" not in rounds.store.get("site_1").models
    assert set(floating_tensors(student)) == set(
        rounds.algorithm.broadcast(
            rounds.server, replace(rounds.federation.client_infos["site_1"], purpose="evaluate")
        )["student"]
    )


def test_student_defaults_to_most_frequent_model() -> None:
    models = ["cnn_bn_small", "mlp", "mlp", "cnn_gn_small"]
    prepared = prepare(federation(models, 4))
    assert prepared.config.algorithm["student"] == "site_2" and "mlp" in prepared.notes[-1]


@pytest.mark.slow
def test_student_learns_without_data() -> None:
    longer = {
        "synthesis_epochs": 8,
        "generator_steps": 12,
        "student_steps": 25,
        "synthetic_batch": 64,
        "noise": 32,
    }
    source = federation("cnn_bn_small", 2, **longer)
    source["data"]["partition"] = {"kind": "iid"}
    source["clients"]["defaults"]["epochs"] = 6
    source["server"] = {"optimizer": {"name": "adam", "lr": 0.005}}
    scores = rounds_of(source).evaluate().server
    assert scores is not None and scores["global"]["accuracy"] > 0.3
