"""Runs on a GPU are those on the CPU: on a real one if there is one, on a pretended one otherwise.

`pytest -m gpu` runs them all, and besides what only a real GPU can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl import run
from hetero_fl.engine.serial import class_sums
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.workers import Worker, WorkerSetup
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import Interrupted
from tests.federation.test_synchronous import METHODS
from tests.helpers.pretend_gpu import PretendGPU
from tests.helpers.small_federations import MIXED, TOP, config, rounds_of
from tests.helpers.workers import Here, rounds_on, setup_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float64", "gpu")]
IS_REAL = torch.cuda.is_available()
QUICK = {"fedavg", "scaffold", "fedmd", "hybrid", "kt_pfl", "private records", "dropout"}
PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-4}
FEATURES: dict[str, dict[str, Any]] = {
    "secure aggregation": {"channel": {"secure_sum": {"threshold": 3}}},
    "compression": {"channel": {**TOP, "compress_down": [{"quantize": 8}]}},
    "changes downwards": {"channel": {"preset": "small"}},
    "private clients": {"models": "cnn_gn_small", "privacy": {"unit": "client", **PRIVACY}},
    "private records": {"models": "cnn_gn_small", "privacy": {"unit": "record", **PRIVACY}},
    "a robust rule": {"aggregation": {"rule": "median"}},
    "dropout": {"models": {"name": "mlp", "hidden": [24], "dropout": 0.3}},
    "augmentation": {"clients__defaults__augment": {"flip": True}},
    "state of optimizers": {"clients__defaults__optimizer": {"name": "adam", "lr": 0.01}},
}


def cases(names: Iterable[str]) -> list[Any]:
    """Return the names, those that are not quick marked as slow."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture
def gpu() -> Iterator[None]:
    if IS_REAL:
        yield
        return
    with PretendGPU():
        yield


def on(device: str, executor: str, source: dict[str, Any]) -> FederatedTrainer:
    """Return the run of a configuration on a device, before its first round."""
    source["runtime"] = {"threads": 1, "device": device, "executor": executor}
    return rounds_of(source, held=0)


def check_equal(
    one: FederatedTrainer, other: FederatedTrainer, tolerances: tuple[float, ...] = (1e-6, 1e-4)
) -> None:
    """Hold a round for each tolerance, and compare losses, scores and the server."""
    for tolerance in tolerances:
        for trainer in (one, other):
            assert not trainer.run_round()["failed"]
        scores = [
            {
                (client, name): values["loss"]
                for client, evaluation in trainer.evaluate(details=True).clients.items()
                for name, values in evaluation.scores.items()
            }
            for trainer in (one, other)
        ]
        assert scores[0] == pytest.approx(scores[1], rel=tolerance)
        for slot, tensors in one.server.models.items():
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(
                        other.server.models[slot][name].cpu(),
                        tensor.cpu(),
                        rtol=tolerance,
                        atol=tolerance,
                    )


@pytest.mark.parametrize("executor", ["serial", "batched"])
@pytest.mark.parametrize("method", cases(METHODS))
def test_every_method(method: str, executor: str) -> None:
    source = config(method, MIXED, clients=6, server={"model": "linear"})
    check_equal(on("cpu", "serial", source), on("cuda", executor, source))


@pytest.mark.parametrize("executor", ["serial", "batched"])
@pytest.mark.parametrize("feature", cases(FEATURES))
def test_every_feature(feature: str, executor: str) -> None:
    source = config(**{"method": "fedavg", "clients": 4, **FEATURES[feature]})
    check_equal(on("cpu", "serial", source), on("cuda", executor, source))


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    source = config("scaffold", clients=3, rounds=3)
    source["runtime"] = {"threads": 1, "device": "cuda", "executor": "serial"}
    whole = run(source, out=tmp_path / "whole")

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(source, out=tmp_path / "resumed", callbacks=[stop])
    resumed = run(source, out=tmp_path / "resumed", resume=True)
    assert resumed.summary["personal"] == whole.summary["personal"]


def test_class_sums() -> None:
    values, y = torch.randn(20, 3), torch.arange(20) % 4
    expected = class_sums(values, y, 5)
    found = class_sums(values.to("cuda"), y.to("cuda"), 5)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.cpu(), one)


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_deterministic_algorithms_are_used_on_request(
    executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    source = config(clients=2)
    for device, wanted in (("cpu", []), ("cuda", [True])):
        source["runtime"] = {"device": device, "deterministic": True, "executor": "serial"}
        prepared = prepare(source)
        if executor == "serial":
            prepared.make_trainer()
        else:
            setup = WorkerSetup(
                prepared.method, prepared.federation, 1, (device,), deterministic=True
            )
            Worker(setup, 0).runtime  # noqa: B018  # made when it is first asked for
        assert asked == wanted
    assert torch.backends.cudnn.benchmark is False


def test_two_workers_in_this_process_share_a_device() -> None:
    source = config("hybrid", MIXED, clients=6, server={"model": "linear"})
    setup = replace(setup_of(source), devices=("cuda:0", "cuda:0"), dtype=torch.float64)
    check_equal(on("cpu", "serial", source), rounds_on(setup, Here(setup, 2), 2, cohort=6))


@pytest.mark.skipif(not IS_REAL, reason="a pretended GPU is in one process")
def test_two_workers_share_a_device() -> None:
    source = config("hybrid", MIXED, clients=6, server={"model": "linear"})
    alone = on("cuda", "serial", source)
    together = on("cuda", "processes", source)
    try:
        check_equal(alone, together)
    finally:
        together.executor.close()


@pytest.mark.skipif(IS_REAL, reason="transfers of a pretended GPU are noted")
@pytest.mark.parametrize("executor", ["serial", "batched"])
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedproto", "fedmd"])
def test_models_and_predictions_stay_on_the_device(method: str, executor: str) -> None:
    with PretendGPU() as gpu:
        trainer = on("cuda", executor, config(method, MIXED, clients=6, rounds=4))
        for _ in range(2):  # in the second, clients receive what the first has made
            trainer.run_round()
        trainer.evaluate()
        gpu.transfers.clear()

        trainer.run_round()

        moved = [t for t in gpu.transfers if t.kind != "wait"]
        assert {t.kind for t in moved} == {"to device"}
        # row numbers of the batches
        assert all(t.where.startswith(("engine/batches", "engine/vectorized")) for t in moved)
        assert sum(t.nbytes for t in moved) < 10_000
        gpu.transfers.clear()
        trainer.evaluate()
        predicted = {t.where.split()[1] for t in gpu.transfers if t.kind == "to host"}
        assert predicted <= {"_on_host", "_evaluate_server"}


@pytest.mark.skipif(IS_REAL, reason="of a pretended GPU")
def test_the_pretended_gpu_refuses_what_a_real_one_does() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == torch.device("cuda:0") and (there + 1).is_cuda
    assert (there * torch.tensor(2.0)).is_cuda and there[:2].is_cuda and here.is_cpu
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([here.sum(), there.sum()])
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(there).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.is_cuda


@pytest.mark.skipif(IS_REAL, reason="of a pretended GPU")
def test_the_pretended_gpu_notes_transfers() -> None:
    with PretendGPU() as gpu:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert float(there.sum()) == 3.0
        there.cpu()
        there.copy_(here)
        kinds = [(t.kind, t.nbytes) for t in gpu.transfers]
        assert kinds == [("wait", 8), ("to host", 24), ("to device", 24)]
