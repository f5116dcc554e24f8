"""Runs on a GPU match those on the CPU.

The GPU is simulated, unless the environment variable HETERO_FL_TEST_GPU is 1 and there is a GPU:

    HETERO_FL_TEST_GPU=1 pytest -m gpu
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl import run
from hetero_fl.engine.serial import class_sums
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.workers import Worker, WorkerSetup
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import Interrupted
from tests.support.cases import each_case
from tests.support.federations import METHODS, MIXED, TOP, config, rounds_of, stop_after
from tests.support.pretend_gpu import PretendGPU
from tests.support.workers import LocalWorkerPool, rounds_on, setup_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float64")]
has_gpu = pytest.mark.usefixtures("gpu")
IS_REAL = torch.cuda.is_available()
QUICK = {"fedavg", "scaffold", "fedmd", "hybrid", "kt_pfl", "private records", "dropout"}
EXECUTORS = ("serial", "batched")
PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-4}
FEATURES: dict[str, dict[str, Any]] = {
    "secure aggregation": {"channel": {"secure_sum": {"threshold": 3}}},
    "compression": {"channel": {**TOP, "compress_down": [{"quantize": 8}]}},
    "preset": {"channel": {"preset": "small"}},
    "private clients": {"models": "cnn_gn_small", "privacy": {"unit": "client", **PRIVACY}},
    "private records": {"models": "cnn_gn_small", "privacy": {"unit": "record", **PRIVACY}},
    "a robust rule": {"aggregation": {"rule": "median"}},
    "dropout": {"models": {"name": "mlp", "hidden": [24], "dropout": 0.3}},
    "augmentation": {"clients__defaults__augment": {"flip": True}},
    "state of optimizers": {"clients__defaults__optimizer": {"name": "adam", "lr": 0.01}},
}


def cases(names: Iterable[str]) -> list[Any]:
    """Return parametrizations, with slow ones marked."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@contextmanager
def make_gpu() -> Iterator[None]:
    """Simulate a GPU, which slows down everything in the context, or use the GPU that exists."""
    with nullcontext() if IS_REAL else PretendGPU():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu() -> Iterator[None]:
    with make_gpu():
        yield


def on(device: str, executor: str, source: dict[str, Any]) -> FederatedTrainer:
    """Return the run of a configuration on a device, before its first round."""
    # Other algorithms of a GPU add numbers in an order that changes between runs.
    runtime = {"threads": 1, "device": device, "executor": executor, "deterministic": True}
    source["runtime"] = runtime
    return rounds_of(source, num_rounds=0)


@dataclass(frozen=True)
class Round:
    """What a round gave: losses of the clients, and models of the server on the CPU."""

    losses: dict[tuple[str, str], float]
    server: dict[str, dict[str, Tensor]]


def rounds(trainer: FederatedTrainer, number: int = 2) -> list[Round]:
    """Run rounds and return the results of each."""
    results = []
    for _ in range(number):
        assert not trainer.run_round()["failed"]
        losses = {
            (client, name): values["loss"]
            for client, evaluation in trainer.evaluate(details=True).clients.items()
            for name, values in evaluation.scores.items()
        }
        models = {
            slot: {
                name: tensor.cpu().clone()
                for name, tensor in tensors.items()
                if tensor.is_floating_point()
            }
            for slot, tensors in trainer.server.models.items()
        }
        results.append(Round(losses, models))
    return results


def check_equal(
    expected: list[Round], found: list[Round], tolerances: tuple[float, ...] = (1e-6, 1e-4)
) -> None:
    """Compare the rounds of two runs, each with a tolerance of its own."""
    for one, other, tolerance in zip(expected, found, tolerances, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=tolerance)
        torch.testing.assert_close(other.server, one.server, rtol=tolerance, atol=tolerance)


@cache
def rounds_on_cpu(name: str, executor: str = "serial") -> list[Round]:
    return rounds(on("cpu", executor, source_of(name)))


def rounds_on_gpu(name: str, executor: str) -> list[Round]:
    with make_gpu():
        return rounds(on("cuda", executor, source_of(name)))


def source_of(name: str) -> dict[str, Any]:
    """Return the configuration of a method or feature."""
    if name in FEATURES:
        return config(**{"method": "fedavg", "clients": 4, **FEATURES[name]})
    return config(name, MIXED, clients=6, server={"model": "linear"})


@pytest.mark.parametrize("method", cases(METHODS))
def test_every_method_matches_the_cpu(method: str) -> None:
    executor = EXECUTORS[METHODS.index(method) % 2]
    check_equal(rounds_on_cpu(method), rounds_on_gpu(method, executor))


@pytest.mark.parametrize("feature", cases(FEATURES))
def test_every_feature_matches_the_cpu(feature: str) -> None:
    executor = EXECUTORS[list(FEATURES).index(feature) % 2]
    # Dropout masks are drawn on the device, and CUDA draws others than the CPU.
    draws_differ = feature == "dropout" and IS_REAL
    expected = (rounds_on_gpu if draws_differ else rounds_on_cpu)(feature, executor)
    # Rounding to eight bits turns differences of 1e-16 into a step of up to 1e-5.
    tolerances = (1e-5, 1e-4) if feature == "preset" else (1e-6, 1e-4)
    check_equal(expected, rounds_on_gpu(feature, executor), tolerances)


RESUMED: dict[str, dict[str, Any]] = {
    "scaffold": {},
    "fedper": {},
    "ds_fl": {"algorithm": {"name": "ds_fl", "proxy_rows": 40}},
    "fedavg": {"runtime": {"mode": "async", "buffer": 2}},
}


def defined(scores: dict[str, float | None]) -> dict[str, float]:
    """Return the scores that a test set of this size has."""
    return {metric: score for metric, score in scores.items() if score is not None}


@pytest.mark.parametrize("method", RESUMED)
def test_resumed_run_matches_the_cpu(method: str, tmp_path: Path) -> None:
    source = config(method, clients=3, rounds=3, **RESUMED[method])
    source["runtime"] |= {"threads": 1, "device": "cpu", "executor": "serial"}
    uninterrupted = run(source, out=tmp_path / "whole")
    source["runtime"] |= {"device": "cuda", "deterministic": True}

    with make_gpu():
        with pytest.raises(Interrupted):
            run(source, out=tmp_path / "resumed", callbacks=[stop_after(2)])
        resumed = run(source, out=tmp_path / "resumed", resume=True)
    for test, scores in uninterrupted.summary["personal"].items():
        assert defined(resumed.summary["personal"][test]) == pytest.approx(defined(scores), 1e-4)


@has_gpu
def test_class_sums_match_the_cpu() -> None:
    values, y = torch.randn(20, 3), torch.arange(20) % 4
    expected = class_sums(values, y, 5)
    found = class_sums(values.to("cuda"), y.to("cuda"), 5)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.cpu(), one)


@has_gpu
@each_case("method", ["fedavg", "scaffold", "fedadam"])
def test_run_from_saved_models_matches_the_cpu(method: str, tmp_path: Path) -> None:
    source = config("fedavg", clients=2, rounds=1)
    source["runtime"] = {"threads": 1, "device": "cuda", "executor": "serial"}
    first = run(source, out=tmp_path / "first")
    source["algorithm"]["name"] = method
    run({**source, "init_from": str(first.path)}, out=tmp_path / "second")


@has_gpu
@each_case("executor", ["serial", "processes"])
def test_deterministic_algorithms_are_used_on_request(
    executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    source = config(clients=2)
    for device, enabled, wanted in (
        ("cpu", True, []),
        ("cuda", True, [True]),
        ("cuda", False, [True, False]),
    ):
        source["runtime"] = {"device": device, "deterministic": enabled, "executor": "serial"}
        prepared = prepare(source)
        if executor == "serial":
            prepared.make_trainer()
        else:
            setup = WorkerSetup(
                prepared.method, prepared.federation, 1, (device,), deterministic=enabled
            )
            # The property creates the runtime.
            _ = Worker(setup, 0).runtime
        assert calls == wanted


def test_two_workers_in_this_process_share_a_device() -> None:
    expected = rounds_on_cpu("hybrid")
    with make_gpu():
        setup = setup_of(source_of("hybrid"))
        setup = replace(setup, devices=("cuda:0", "cuda:0"), dtype=torch.float64)
        together = rounds_on(setup, LocalWorkerPool(setup, 2), 2, cohort=6)
        check_equal(expected, rounds(together))


@has_gpu
@pytest.mark.skipif(not IS_REAL, reason="a pretended GPU is in one process")
def test_two_workers_share_a_device() -> None:
    source = source_of("hybrid")
    single = rounds(on("cuda", "serial", source))
    together = on("cuda", "processes", source)
    try:
        check_equal(single, rounds(together))
    finally:
        together.executor.close()


@pytest.mark.skipif(IS_REAL, reason="transfers of a pretended GPU are noted")
@each_case(
    ("executor", "method"),
    itertools.product(["serial", "batched"], ["fedavg", "scaffold", "fedproto", "fedmd"]),
)
def test_models_and_predictions_stay_on_the_device(method: str, executor: str) -> None:
    with PretendGPU() as gpu:
        trainer = on("cuda", executor, config(method, MIXED, clients=6, rounds=4))
        # In the second round clients receive results of the first.
        for _ in range(2):
            trainer.run_round()
        trainer.evaluate()
        gpu.transfers.clear()

        trainer.run_round()

        assert not getattr(trainer.backend, "_refused", None)
        moved = [t for t in gpu.transfers if t.kind != "wait"]
        assert {t.kind for t in moved} == {"to device"}
        # Row numbers of the batches.
        serial = {t.where for t in moved if not t.where.startswith("engine/vectorized")}
        assert {where.split()[1] for where in serial} <= {"device_indices"}
        assert sum(t.nbytes for t in moved) < 10_000
        gpu.transfers.clear()
        trainer.evaluate()
        predicted = {t.where.split()[1] for t in gpu.transfers if t.kind == "to host"}
        # Predictions that clients share are scored and copied once.
        assert predicted and predicted <= {"_score", "evaluate_server"}


@has_gpu
def test_fit_is_repeated_after_running_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = config(clients=4)
    expected = rounds(on("cpu", "serial", source))
    trainer = on("cuda", "batched", source)
    clone = torch.Tensor.clone
    calls = 0

    def fail_once(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        nonlocal calls
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "finish":
            frame = frame.f_back  # type: ignore[assignment]
        calls += frame is not None
        # After some of the models were copied.
        if frame is not None and calls == 30:
            raise torch.OutOfMemoryError
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", fail_once)
    check_equal(expected, rounds(trainer))
    assert calls > 30


@has_gpu
@each_case("owns_device", [False, True])
def test_worker_with_a_separate_device_keeps_copies(owns_device: bool) -> None:
    setup = setup_of(config(clients=2))
    setup = replace(setup, devices=("cuda:0",), dtype=torch.float64, owns_device=owns_device)
    worker = Worker(setup, 0)
    tensor = torch.ones(3)
    memory = worker.runtime.backend.templates.memory
    assert (memory.keep(tensor) is tensor) is not owns_device
    assert memory.storage_device.type == "cpu"


@has_gpu
@pytest.mark.skipif(IS_REAL, reason="of a pretended GPU")
def test_pretend_gpu_refuses_mixed_devices() -> None:
    on_cpu, on_gpu = torch.ones(3), torch.ones(3, device="cuda")
    assert on_gpu.device == torch.device("cuda:0") and (on_gpu + 1).is_cuda
    assert (on_gpu * torch.tensor(2.0)).is_cuda and on_gpu[:2].is_cuda and on_cpu.is_cpu
    with pytest.raises(RuntimeError, match="same device"):
        on_cpu + on_gpu
    with pytest.raises(TypeError, match="numpy"):
        on_gpu.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([on_cpu.sum(), on_gpu.sum()])
    with pytest.raises(RuntimeError, match="indices should be"):
        on_cpu[torch.tensor([0], device="cuda")]
    with pytest.raises(RuntimeError, match="same device"):
        on_gpu[torch.tensor([0, 1])] = on_cpu[:2]
    with pytest.raises(RuntimeError, match="generator"):
        on_gpu.normal_(generator=torch.Generator())
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(on_gpu).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.is_cuda


@pytest.mark.skipif(IS_REAL, reason="of a pretended GPU")
def test_pretend_gpu_records_transfers() -> None:
    with PretendGPU() as gpu:
        on_cpu, on_gpu = torch.ones(3), torch.ones(3, device="cuda")
        assert float(on_gpu.sum()) == 3.0
        on_gpu.cpu()
        on_gpu.copy_(on_cpu)
        kinds = [(t.kind, t.nbytes) for t in gpu.transfers]
        assert kinds == [("wait", 8), ("to host", 24), ("to device", 24)]
