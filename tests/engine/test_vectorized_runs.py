"""Batched and serial runs of every method agree, with ragged clients, BatchNorm and dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.communication.protocol import DirectProtocol
from hetero_fl.engine import vectorized
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import Backend
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.engine.vectorized import VectorizedBackend
from hetero_fl.experiment import prepare
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import InProcessExecutor
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.cases import each_case
from tests.support.federations import METHODS, config
from tests.support.pretend_gpu import PretendGPU

CPU = torch.device("cpu")
QUICK = {
    "fedavg",
    "scaffold",
    "fedprox",
    "ditto",
    "heterofl",
    "fedmd",
    "feddf",
    "fd",
    "fml",
    "fedproto",
    "hybrid",
}
MODELS = ["cnn_bn_small", {"name": "mlp", "hidden": [24], "dropout": 0.3}]


def run_rounds(source: dict[str, Any], backend: Backend) -> FederatedTrainer:
    """Return a run of three rounds that stacks all clients of an architecture."""
    prepared = prepare(source)
    site = ClientRuntime(
        prepared.method, prepared.federation, StateStore(), backend, DirectProtocol()
    )
    rounds = FederatedTrainer(
        prepared.method, prepared.federation, InProcessExecutor(site, chunk=100)
    )
    for _ in range(3):
        rounds.run_round()
    return rounds


def tensors(rounds: FederatedTrainer) -> dict[tuple[str, str, str], Tensor]:
    """Return every tensor that a run has computed."""
    found = {("server", s, n): t for s, m in rounds.server.models.items() for n, t in m.items()}
    for client_id in rounds.federation.client_infos:
        found |= {
            (client_id, s, n): t
            for s, m in rounds.store.get(client_id).models.items()
            for n, t in m.items()
        }
    return found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_batched_run_matches_serial_run(method: str) -> None:
    source = config(
        method,
        MODELS,
        clients=6,
        server={"model": "linear"},
        data__train_limit=420,
        data__partition__min_size=18,
    )
    agree(source)


@pytest.mark.usefixtures("float64")
@each_case("method", ["fedavg", "fedproto"])
def test_batched_run_with_dropout_matches_serial_run(method: str) -> None:
    agree(config(method, "fedproto_cnn", clients=3, clients__defaults__preprocess={"resize": 16}))


def agree(source: dict[str, Any]) -> None:
    """Compare the records of a batched and a serial run."""
    notes: list[str] = []
    one, many = (
        run_rounds(source, SerialBackend(DeviceMemory(CPU))),
        run_rounds(source, VectorizedBackend(DeviceMemory(CPU), notes.append)),
    )
    assert notes == []
    actual, expected = tensors(many), tensors(one)
    assert actual.keys() == expected.keys() and actual
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-8, atol=1e-8, msg=str(name)
        )
    a, b = one.evaluate(), many.evaluate()
    assert {c: r.scores for c, r in a.clients.items()} == {
        c: {n: pytest.approx(s, abs=1e-8) for n, s in r.scores.items()}
        for c, r in b.clients.items()
    }


@each_case("fit_together", [1, 2, 3])
def test_chunk_is_halved_when_memory_is_exhausted(
    fit_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    fit_stacked, rows = vectorized.fit_stacked, torch.zeros(3)

    def limited(work: Any, templates: Any) -> Any:
        tried.append(len(work))
        if len(tried) == 1:
            templates.memory.keep(rows)
        if len(work) > fit_together:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fit_stacked(work, templates)

    source = config("fedavg", "mlp", clients=6)
    wanted = tensors(run_rounds(source, SerialBackend(DeviceMemory(CPU))))
    monkeypatch.setattr(vectorized, "fit_stacked", limited)
    lines: list[str] = []
    with PretendGPU():
        found = tensors(
            run_rounds(source, VectorizedBackend(DeviceMemory(torch.device("cuda")), lines.append))
        )
    # Groups of one are trained by the serial backend.
    assert tried == {1: [6, 3, 2], 2: [6, 3, *[2] * 8], 3: [6, *[3] * 6]}[fit_together]
    assert lines[0].startswith("mlp: the memory of cuda")
    assert "is too small for 6 participants at once" in lines[0]
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
