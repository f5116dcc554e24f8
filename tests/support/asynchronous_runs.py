"""Asynchronous runs with task durations and faults set by a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.config.simulation import FaultsConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.experiment import prepare
from hetero_fl.federation.asynchronous import AsynchronousTrainer
from hetero_fl.federation.executors.base import Executor
from hetero_fl.federation.round import RoundUploads
from hetero_fl.federation.simulation.conditions import Devices, FaultOutcome, TaskTimes
from hetero_fl.federation.simulation.executor import SimulatedExecutor
from tests.support.calls import record_calls
from tests.support.federations import MIXED, changed, config

FAULTS = {
    "before": 0.1,
    "during": 0.1,
    "after": 0.1,
    "lost": 0.1,
    "late": 0.1,
    "twice": 0.1,
    "corrupted": 0.1,
}
SLOW = {"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5, "down": 1e6, "jitter": 0.3}


def source(method: str = "hybrid", **changes: Any) -> dict[str, Any]:
    """Return a run with clients of three architectures, ten-fold speed ratios and faults."""
    run_config = config(
        method,
        MIXED,
        clients=4,
        rounds=3,
        clients__per_round=3,
        server={"model": "linear"},
        devices=SLOW,
        faults={**FAULTS, "delay": 5.0},
        runtime={"threads": 1, "mode": "async", "buffer": 2},
    )
    return changed(run_config, **changes)


class ScriptedDevices(Devices):
    """Task durations given by a function of client and task."""

    def __init__(self, seconds: Callable[[str, int], float]) -> None:
        self.seconds = seconds

    def task_times(
        self, client_id: str, down_bytes: int, up_bytes: int, at: float, task: int | None
    ) -> TaskTimes:
        assert task is not None
        return TaskTimes(at, at, at + self.seconds(client_id, task))


class ScriptedFaults:
    """Fault outcomes by task number; other tasks have no faults."""

    def __init__(self, fates: Mapping[int, FaultOutcome]) -> None:
        self.fates, self.config = fates, FaultsConfig()

    def outcome(self, client_id: str, task: int) -> FaultOutcome:
        return self.fates.get(task, FaultOutcome())


def session(
    run_config: dict[str, Any],
    executor: Executor | None = None,
    seconds: Callable[[str, int], float] | None = None,
    fates: Mapping[int, FaultOutcome] | None = None,
) -> AsynchronousTrainer:
    """Return a new run, optionally with another executor, task durations or fault outcomes."""
    run = prepare(run_config).make_trainer()
    assert isinstance(run, AsynchronousTrainer)
    assert isinstance(run.executor, SimulatedExecutor)
    if executor is not None:
        run.executor.inner = executor
        run.executor.store = executor.store
        run.executor.backend = executor.backend
    if seconds is not None:
        run.executor.devices = ScriptedDevices(seconds)
    if fates is not None:
        run.executor.faults = ScriptedFaults(fates)  # type: ignore[assignment]
    return run


def record_updates(
    run: AsynchronousTrainer, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensors, list[Upload], Tensors]]:
    """Record a model of the server before and after each aggregation, and the uploads."""
    updates: list[tuple[Tensors, list[Upload], Tensors]] = []
    added = record_calls(monkeypatch, Uploads, "add", lambda _, upload: upload)
    update_server = run.update_server

    def update(uploads: RoundUploads) -> str:
        before = next(iter(run.server.models.values()))
        sent = list(added)
        diverged = update_server(uploads)
        updates.append((before, sent, next(iter(run.server.models.values()))))
        added.clear()
        return diverged

    monkeypatch.setattr(run, "update_server", update)
    return updates
