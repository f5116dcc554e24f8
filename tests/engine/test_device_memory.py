"""Copies of tensors on a simulated GPU, and estimates of the memory that training needs."""

from __future__ import annotations

import gc

import pytest
import torch

from hetero_fl.algorithms import FedAvg
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, FitReport, Plan, Predict, Rows
from hetero_fl.engine import device_memory, serial
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.templates import Templates
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.choose import stays_on_device
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of
from tests.support.pretend_gpu import PretendGPU


def test_tensor_is_copied_once_until_it_changes() -> None:
    with PretendGPU() as gpu:
        memory = DeviceMemory(torch.device("cuda"))
        rows = torch.arange(3.0)
        copy = memory.keep(rows)
        assert copy.is_cuda and memory.keep(rows) is copy and memory.keep(copy) is copy
        rows.add_(1)
        assert memory.keep(rows).tolist() == [1.0, 2.0, 3.0]
        assert memory.stack([rows, rows]).shape == (2, 3)
        assert [t.kind for t in gpu.transfers].count("to device") == 2
        memory.disable_cache()
        assert memory.keep(rows) is rows and not memory.has_copies


def test_copies_are_freed_with_their_originals() -> None:
    with PretendGPU():
        memory = DeviceMemory(torch.device("cuda"))
        rows = torch.arange(3.0)
        memory.keep(rows)
        assert memory._copies is not None and len(memory._copies) == 1
        del rows
        gc.collect()
        other = torch.arange(2.0)
        memory.keep(other)
        assert len(memory._copies) == 1


def test_tensors_that_do_not_fit_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with PretendGPU():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (32, 64))
        monkeypatch.setattr(device_memory, "CACHE_SHARE", 0.5)
        memory = DeviceMemory(torch.device("cuda"))
        small, other, large = torch.zeros(3), torch.zeros(3), torch.zeros(5)
        assert memory.keep(large) is large and memory.stack([large, large]).is_cuda
        kept = memory.keep(small)
        assert kept.is_cuda
        # Takes the memory.
        memory.keep(other)
        assert memory.keep(small) is not kept


def test_nothing_is_copied_on_a_cpu() -> None:
    rows = torch.arange(3.0)
    assert DeviceMemory(torch.device("cpu")).keep(rows) is rows


def test_copies_are_freed_when_training_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    run_fit, rows = serial.run_fit, torch.zeros(5)
    failures: list[str] = []

    def limited(participant: Participant, fit: Fit, templates: Templates) -> FitReport:
        if not failures:
            failures.append(participant.participant_id)
            templates.memory.keep(rows)
            # The fit had started.
            participant.stream(fit.label)
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not templates.memory.has_copies
        return run_fit(participant, fit, templates)

    with PretendGPU():
        source = config("fedavg", "mlp", clients=3)
        source["runtime"] = {"threads": 1, "device": "cuda", "executor": "serial"}
        wanted = rounds_of(source, num_rounds=0).run_round()["train_loss"]
        monkeypatch.setattr(serial, "run_fit", limited)
        assert rounds_of(source, num_rounds=0).run_round()["train_loss"] == wanted
    assert failures == ["site_1"]


class OwnMethod(FedAvg):
    """A user-defined method that changes a tensor without changing its version."""

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        before = yield Predict("model", Rows("test"))
        client.models["model"]["head.bias"].data.add_(torch.arange(10.0))
        after = yield Predict("model", Rows("test"))
        assert torch.allclose(after - before, torch.arange(10.0), atol=1e-4)


def test_custom_method_may_change_tensors_in_place() -> None:
    with PretendGPU():
        source = config(f"python:{__name__}:OwnMethod", "mlp", clients=2)
        source["runtime"] = {"threads": 1, "device": "cuda", "executor": "serial"}
        rounds_of(source, num_rounds=1).evaluate()


@each_case("executor", ["serial", "batched"])
def test_rows_are_copied_to_the_device_in_the_first_round_only(executor: str) -> None:
    with PretendGPU() as gpu:
        source = config("fedavg", MIXED, clients=6)
        source["runtime"] = {"threads": 1, "device": "cuda", "executor": executor}
        trainer = rounds_of(source, num_rounds=1)
        trainer.evaluate()
        rows = sum(
            columns["x"].nbytes
            for client in trainer.federation.client_infos
            for columns in [
                trainer.federation.data.columns(
                    client, "train", trainer.federation.client_infos[client].preprocess
                )
            ]
        )
        models = sum(t.nbytes for m in trainer.server.models.values() for t in m.values())
        gpu.transfers.clear()
        trainer.run_round()
        sent = sum(t.nbytes for t in gpu.transfers if t.kind == "to device")
        # Each model once, and row numbers.
        assert sent < models + rows / 10


@each_case(
    ("changes", "stays"),
    [
        ({}, True),
        ({"runtime__mode": "async", "method": "fedbuff"}, True),
        ({"channel": {"compress": [{"quantize": 8}]}}, False),
        ({"channel": {"compress_down": [{"quantize": 8}]}}, False),
        ({"channel": {"secure_sum": {"threshold": 2}}}, False),
        ({"aggregation": {"rule": "median"}}, False),
        ({"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-4}}, False),
        ({"method": "python:tests.support.failing_methods:Fails"}, False),
    ],
)
def test_tensors_read_by_the_cpu_are_not_stored_on_the_device(
    changes: dict[str, object], stays: bool
) -> None:
    prepared = prepare(config(**{"models": "cnn_gn_small", **changes}))  # type: ignore[arg-type]
    assert stays_on_device(prepared.method, prepared.federation) is stays


def test_tensors_are_stored_on_the_device_or_the_cpu() -> None:
    with PretendGPU():
        cuda = torch.device("cuda:0")
        tree = {"a": [torch.ones(2)], "b": {"c": 1.5}}
        assert DeviceMemory(cuda).to_storage(tree)["a"][0].is_cpu
        stored = DeviceMemory(cuda, stores_tensors=True).to_storage(tree)
        assert stored["a"][0].is_cuda and stored["b"] == {"c": 1.5}

        payload = Payload({"x": torch.ones(2), "model": {"w": torch.zeros(3)}}).to(cuda)
        assert payload["x"].is_cuda and payload["model"]["w"].is_cuda
        assert payload.to(DeviceMemory(torch.device("cuda")).device) is payload
        assert payload.encode() == payload.to(torch.device("cpu")).encode()


def test_rows_that_do_not_fit_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: 100)
    with PretendGPU():
        memory = DeviceMemory(torch.device("cuda:0"), stores_tensors=True)
        columns = {"x": torch.ones(40), "y": torch.ones(4)}
        found = memory.columns_to_storage(columns)
        assert found["x"] is columns["x"] and found["y"].is_cuda


def test_private_state_stays_on_the_device_if_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with PretendGPU():
        for room, stays_on_device in ((2**30, True), (100, False)):
            monkeypatch.setattr(device_memory, "free_bytes", lambda device, room=room: room)
            source = config("fedper", clients=2)
            source["runtime"] = {"threads": 1, "device": "cuda", "executor": "serial"}
            trainer = rounds_of(source, num_rounds=1)
            kept = trainer.store.get("site_1").models["model"].values()
            assert all(tensor.is_cuda is stays_on_device for tensor in kept)


def test_only_a_gpu_stores_tensors() -> None:
    assert DeviceMemory(torch.device("mps"), stores_tensors=True).storage_device.type == "cpu"
