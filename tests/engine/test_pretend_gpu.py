"""Rounds on a pretended GPU: no operation mixes devices, and the result is the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.serialization import encode
from tests.federation.test_synchronous import METHODS
from tests.helpers.pretend_gpu import PretendGPU
from tests.helpers.small_federations import MIXED, config, rounds_of

QUICK = ("fedavg", "scaffold", "fedmd", "fedproto", "hybrid", "kt_pfl")
CASES = [
    method if method in QUICK else pytest.param(method, marks=pytest.mark.slow)
    for method in METHODS
]


def results(trainer: FederatedTrainer) -> list[Any]:
    """Return records, evaluation and state of a round."""
    record = trainer.run_round()
    del record["seconds"]
    evaluation = trainer.evaluate()
    clients = {c: e.scores for c, e in evaluation.clients.items()}
    return [record, clients, evaluation.server, encode(trainer.state_dict(), "x")]


@pytest.mark.parametrize("method", CASES)
def test_every_method_computes_on_the_device_what_it_does_on_the_cpu(method: str) -> None:
    source = config(method, MIXED, clients=6, server={"model": "linear"})
    wanted = results(rounds_of(source, held=0))
    with PretendGPU() as gpu:
        source["runtime"] |= {"device": "cuda", "executor": "serial"}
        assert results(rounds_of(source, held=0)) == wanted
    assert any(t.kind == "to device" for t in gpu.transfers)


@pytest.mark.parametrize("method", CASES)
def test_every_method_computes_together_on_the_device_what_it_does_alone(method: str) -> None:
    source = config(method, MIXED, clients=6, server={"model": "linear"})
    alone = rounds_of(source, held=0)
    with PretendGPU():
        source["runtime"] |= {"device": "cuda", "executor": "batched"}
        together = rounds_of(source, held=0)
        # Adam at the server makes more of the last bits.
        for tolerance in (1e-4, 0.05):
            wanted = alone.run_round()["train_loss"]
            assert together.run_round()["train_loss"] == pytest.approx(wanted, rel=tolerance)
        together.evaluate()


def test_the_pretended_gpu_refuses_what_a_real_one_does() -> None:
    with PretendGPU() as gpu:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == torch.device("cuda:0") and (there + 1).is_cuda
        assert (there * torch.tensor(2.0)).is_cuda and there[:2].is_cuda and here.is_cpu
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        layer = torch.nn.Linear(3, 2).to("cuda")
        layer(there).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_cuda
        before = len(gpu.transfers)
        assert float(there.sum()) == 3.0
        there.cpu()
        there.copy_(here)
        kinds = [(t.kind, t.nbytes) for t in gpu.transfers[before:]]
        assert kinds == [("wait", 4), ("to host", 12), ("to device", 12)]
