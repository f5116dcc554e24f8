"""DENSE: generator objective, single upload, and which model is evaluated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.core.generative_objectives import (
    BatchStatistics,
    Generator,
    preprocess_generated,
)
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Rows
from hetero_fl.experiment import prepare
from model_zoo import create_model
from tests.references.local_training import clients, module
from tests.support.calls import record_results
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
        x = Generator(size, 5, shape)(torch.randn(4, 5))

        assert x.shape == (4, size)
        assert len(shape) != 3 or bool(((x >= 0) & (x <= 1)).all()), shape


def test_models_are_uploaded_once_and_training_is_local_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = {**federation(), "rounds": 3}
    source["clients"]["overrides"] = [{"match": "site_3", "shares": ["backbone"]}]
    rounds = rounds_of(source, num_rounds=0)
    received = record_results(monkeypatch, rounds.link, "decode_upload")
    for _ in range(3):
        rounds.run_round()

    # A partial model cannot be a teacher.
    assert [list(payload) for payload in received] == [[]] * 6 + [["model"], ["model"], []]
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
        expected = module(home.arch["model"], student).eval()(home.data("common_test", None)["x"])
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
