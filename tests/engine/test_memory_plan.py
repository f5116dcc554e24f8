"""Estimates of the memory that local training needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.device_memory import MemoryPlan, activation_bytes
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.choose import choose_executor
from tests.support.cases import each_case
from tests.support.federations import config
from tests.support.pretend_gpu import PretendGPU

MLP = ModelSpec.from_config("mlp", 10, (1, 8, 8), options={"hidden": [24]})


@each_case(
    ("optimizer", "states"), [({"name": "sgd"}, 0), ({"name": "sgd", "momentum": 0.9}, 1), ({}, 2)]
)
def test_memory_plan_counts_weights_gradients_optimizer_and_activations(
    optimizer: dict[str, Any], states: int
) -> None:
    plan = MemoryPlan.estimate({"model": MLP}, OptimizerConfig(**optimizer), 16)
    parameters = 64 * 24 + 24 + 24 * 10 + 10
    # A linear layer saves its input and relu its output, which is the next layer's input.
    activations = 16 * (64 + 24)
    assert plan == MemoryPlan(
        4 * parameters, 4 * parameters, states * 4 * parameters, 4 * activations
    )
    assert plan.total == 4 * ((2 + states) * parameters + activations)


@each_case("name", ["cnn_bn_small", "lenet", "resnet18"])
def test_activation_bytes_match_saved_tensors(name: str) -> None:
    arch = ModelSpec.from_config(name, 10, (3, 32, 32))
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    module = arch.build().train()
    of_model = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        module(torch.zeros(8, 3, 32, 32))
    num_bytes = sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in of_model)
    assert 8 * activation_bytes(arch) == pytest.approx(num_bytes, rel=0.02)


def test_activation_bytes_follow_the_default_dtype() -> None:
    single = activation_bytes(MLP)

    torch.set_default_dtype(torch.float64)
    try:
        double = activation_bytes(MLP)
    finally:
        torch.set_default_dtype(torch.float32)

    assert double == 2 * single
    assert activation_bytes(MLP) == single


def test_chunk_is_the_number_of_clients_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    source = config("fedavg", "mlp", clients=6)
    source["runtime"] = {"device": "cuda"}
    with PretendGPU():
        prepared = prepare(source)
        choice = choose_executor(prepared.config, prepared.federation)
        assert choice.executor == "batched" and choice.chunk == 128
        client = prepared.federation.client_infos["site_1"]
        plan = MemoryPlan.estimate(
            client.models, client.settings.optimizer, client.settings.batch_size
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * plan.total, 2**34))
        choice = choose_executor(prepared.config, prepared.federation)
        assert choice.chunk == 3
        assert any(line.startswith("3 clients at a time: a client") for line in choice.reasons)
        source["runtime"]["chunk"] = 5
        prepared = prepare(source)
        assert choose_executor(prepared.config, prepared.federation).chunk == 5
