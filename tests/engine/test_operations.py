"""Floating-point operations of single steps, and of runs against PyTorch's counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    Predict,
    Recalibrate,
    Rows,
    SampledBatches,
    TensorRows,
)
from hetero_fl.experiment import prepare
from hetero_fl.federation.cost import expected_cost
from hetero_fl.federation.expected import step_flops
from tests.support.federations import config, deployed, rounds_of

ROWS = 70
WEIGHTS = 64 * 10
"""Weights of the linear model, which has two operations for each weight and example."""


@pytest.fixture(scope="module")
def client() -> Participant:
    found = deployed(rounds_of(config("fedavg", "linear", clients=2)), "site_1")
    found.models["other"] = found.models["model"]
    found.arch["other"] = found.arch["model"]
    x = torch.zeros(ROWS, 1, 8, 8)
    y = torch.zeros(ROWS, dtype=torch.int64)
    found.data = lambda _name, _preprocess: {"x": x, "y": y}
    return found


def forward(client: Participant) -> int:
    return step_flops(client, Predict("model", Rows("train"))) // ROWS


def test_a_prediction_is_one_forward_pass_for_each_row(client: Participant) -> None:
    assert 2 * WEIGHTS <= forward(client) <= 2.1 * WEIGHTS
    assert step_flops(client, ClassSums("model", Rows("train"))) == ROWS * forward(client)
    few = TensorRows({"x": torch.zeros(3, 1, 8, 8)})
    assert step_flops(client, Predict("model", few)) == 3 * forward(client)


def test_training_is_three_forward_passes_for_each_example(client: Participant) -> None:
    fit = Fit({"model": None}, Supervised(), Rows("train"), epochs=2, batch_size=32)
    one = forward(client)
    assert step_flops(client, fit) == 3 * one * 2 * ROWS
    assert step_flops(client, replace(fit, steps=5)) == 3 * one * 5 * 32
    assert step_flops(client, replace(fit, steps=5, batch_size=500)) == 3 * one * 5 * ROWS
    sampled = SampledBatches(lambda _generator, _size: {}, size=16)
    assert step_flops(client, replace(fit, data=sampled, steps=5)) == 3 * one * 5 * 16


def test_frozen_models_and_extra_batches_are_counted(client: Participant) -> None:
    fit = Fit({"model": None}, Supervised(), Rows("train"), batch_size=32)
    one = forward(client)
    assert step_flops(client, replace(fit, frozen=("other",))) == (3 + 1) * one * ROWS
    both = replace(fit, train={"model": None, "other": None})
    assert step_flops(client, both) == (3 + 3) * one * ROWS
    extra = {"proxy": SampledBatches(lambda _generator, _size: {}, size=8)}
    # 70 rows are three batches of 32, 32 and 6.
    assert step_flops(client, replace(fit, extra_batches=extra)) == 3 * one * (ROWS + 3 * 8)


def test_recalibration_without_batch_norm_computes_nothing(client: Participant) -> None:
    assert step_flops(client, Recalibrate("model", Rows("train"))) == 0
    other = deployed(rounds_of(config("fedavg", "cnn_bn_small", clients=2)), "site_1")
    rows = len(Rows("train").columns(other)["x"])
    found = step_flops(other, Recalibrate("model", Rows("train")))
    assert found == step_flops(other, Predict("model", Rows("train"))) > 0
    assert found % rows == 0


@pytest.mark.parametrize(
    "method",
    ["fedavg", "ditto", "fedmd", "feddf", "ds_fl", "hybrid", "fedproto", "fml", "centralized"],
)
def test_expected_operations_are_those_that_torch_counts(method: str) -> None:
    models: list[Any] = ["cnn_bn_small", "mlp"]
    source = config(method, models, clients=4, rounds=2)
    prepared = prepare(source)
    cost = expected_cost(prepared.method, prepared.federation, 2)
    rounds = rounds_of(source, 0)
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            rounds.run_round()
    expected = cost.client_operations.total() + cost.server_operations
    # The counter leaves out element-wise operations and the input gradient of the first layer.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert (cost.server_operations > 0) == (method in ("feddf", "hybrid", "centralized"))
