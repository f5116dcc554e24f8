"""The choice of executor, workers and threads from estimates, and its record."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from hetero_fl.cli import main
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.templates import prefers_channels_last
from hetero_fl.experiment import prepare, run
from hetero_fl.federation.executors import choose as module
from hetero_fl.federation.executors.choose import ExecutorChoice, RunLoad, choose_executor
from hetero_fl.utils import extras
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of, same_bits


def chosen(monkeypatch: pytest.MonkeyPatch, cores: int = 2, **changes: Any) -> ExecutorChoice:
    monkeypatch.setattr(module, "available_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    prepared = prepare(config("local", **{"runtime": {}, **deepcopy(changes)}))
    return choose_executor(prepared.config, prepared.federation)


# Much computation per transfer.
LONG: dict[str, Any] = {"rounds": 1_000_000, "clients__defaults": {"epochs": 50}}
EQUAL: dict[str, Any] = {
    "models": "mlp",
    "clients": 12,
    "data": {"name": "digits", "partition": {"kind": "iid"}, "proxy": {"size": 0}},
}
SMALL_DATA = {"data__partition__min_size": 5}
CROWD = {**EQUAL, **LONG, **SMALL_DATA, "clients": 70}
# A step of these models takes 32 and 4 MFLOP; recurrent models are not stacked.
STACKED = {**EQUAL, **SMALL_DATA, "models": "fedavg_cnn"}
CHOICES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"models": MIXED}, {"executor": "serial", "threads": 1, "workers": 1}),
    (
        2,
        {"models": MIXED, **LONG},
        {"executor": "processes", "threads": 1, "server_threads": 1, "workers": 2},
    ),
    (1, {"models": MIXED, **LONG}, {"executor": "serial"}),
    (2, {"models": MIXED, **LONG, "runtime": {"threads": 2}}, {"executor": "serial"}),
    # The number of workers changes no result.
    (2, {"models": MIXED, **LONG, "runtime": {"workers": 1}}, {"executor": "processes"}),
    (2, {"clients": 1, "rounds": 1_000_000}, {"executor": "serial"}),
    (2, EQUAL, {"executor": "batched", "chunk": 128}),
    (2, {**EQUAL, "clients__per_round": 4}, {"executor": "serial"}),
    (2, {**EQUAL, "models": "gru"}, {"executor": "serial"}),
    (2, {**EQUAL, "models": {"name": "mlp", "hidden": [2000, 2000]}}, {"executor": "serial"}),
    (2, CROWD, {"executor": "processes", "chunk": 8}),
    # Eight chunks would leave half of the cores idle.
    (16, CROWD, {"executor": "processes", "chunk": 1}),
    (2, {**STACKED, "runtime": {"executor": "batched"}}, {"threads": 2}),
    (2, {**STACKED, "runtime": {"executor": "batched", "chunk": 2}}, {"threads": 2}),
    (2, {**STACKED, "runtime": {"executor": "batched", "chunk": 1}}, {"threads": 1}),
    (2, {**STACKED, "models": "gru", "runtime": {"executor": "batched"}}, {"threads": 1}),
    (
        2,
        {"runtime": {"executor": "batched", "threads": 3, "chunk": 5}},
        {"executor": "batched", "threads": 3, "chunk": 5},
    ),
    # `auto` selects the serial executor.
    (2, {"models": MIXED, "runtime": {"chunk": 16}}, {"chunk": 1}),
]


@each_case(("cores", "changes", "expected"), CHOICES)
def test_choice_follows_load_and_settings(
    cores: int,
    changes: dict[str, Any],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = chosen(monkeypatch, cores, **changes)

    assert {name: getattr(choice, name) for name in expected} == expected


def test_choice_gives_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "12 clients" in chosen(monkeypatch, **EQUAL).reasons[0]
    assert "8 clients at a time" in chosen(monkeypatch, **CROWD).reasons[-1]


@each_case(("name", "limit"), [("TRANSFER_RATE", 1.0), ("thread_limit", lambda: 2)])
def test_limits_of_traffic_and_threads_exclude_workers(
    name: str, limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, limit)

    assert chosen(monkeypatch, models=MIXED, **LONG).executor == "serial"


@each_case(
    ("clients", "seconds", "busy", "step", "cores", "threads", "expected"),
    [
        (6, 20, 6, 1e6, 2, None, "processes"),
        (6, 8, 6, 1e6, 2, None, "serial"),
        # Two threads would take 13 s.
        (6, 100, 6, 1e9, 2, None, "processes"),
        (6, 20, 6, 1e9, 2, None, "serial"),
        # One client has nearly all of the work.
        (6, 1000, 1.05, 1e6, 2, None, "serial"),
        (6, 1000, 1.5, 1e6, 2, None, "processes"),
        (6, 1000, 1.5, 1e9, 2, None, "serial"),
        (6, 1000, 2.5, 1e9, 4, None, "serial"),
        (6, 1000, 4, 1e9, 4, None, "processes"),
        # Two workers of two threads each.
        (8, 20, 8, 1e6, 4, None, "processes"),
        (8, 20, 8, 1e6, 4, 2, "processes"),
        # The cores suffice for one worker.
        (8, 20, 8, 1e6, 4, 4, "serial"),
        (8, 20, 8, 1e9, 4, 4, "serial"),
        # Compared with one thread, not two.
        (8, 20, 8, 1e9, 2, None, "serial"),
        (8, 20, 8, 1e9, 2, 1, "processes"),
    ],
)
def test_workers_are_chosen_if_they_save_more_than_their_start(
    clients: int,
    seconds: float,
    busy: float,
    step: float,
    cores: int,
    threads: int | None,
    expected: str,
) -> None:
    load = module.RunLoad(clients, seconds, 1e7, busy, step)

    found, *_ = module._select_executor(load, 0, torch.device("cpu"), cores, threads)

    assert found == expected


def test_estimate_grows_with_rounds_and_model() -> None:
    """Count a second per GB of sent models, and the time of small steps."""
    loads = {
        (name, rounds): RunLoad.estimate(prepared.config, prepared.federation)
        for name in ("linear", "fedavg_cnn")
        for rounds in (1, 10)
        for prepared in [prepare(config("local", name, clients=4, rounds=rounds, runtime={}))]
    }
    small, large = loads["linear", 1], loads["fedavg_cnn", 1]

    assert loads["linear", 10].seconds == pytest.approx(10 * small.seconds)
    assert loads["linear", 10].model_bytes == 10 * small.model_bytes
    assert large.seconds > 10 * small.seconds and large.step > small.step
    assert small.busy == pytest.approx(4, rel=0.5)
    saved = large.seconds_saved(2, None)
    sent = replace(large, model_bytes=large.model_bytes + module.TRANSFER_RATE)
    assert sent.seconds_saved(2, None) == pytest.approx(saved - 1)


def test_large_steps_get_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_STEP", 0.0)
    few, many = (
        chosen(monkeypatch, models=MIXED),
        chosen(monkeypatch, models=MIXED, clients=6, **LONG),
    )
    assert (few.threads, few.server_threads) == (2, 2) and (many.threads, many.server_threads) == (
        1,
        2,
    )
    assert chosen(monkeypatch, cores=16, models=MIXED).threads == 4


def test_chunk_of_the_serial_executor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^runtime\.chunk: must be 1 with runtime\.executor=serial, got 16"
    ):
        chosen(monkeypatch, runtime={"executor": "serial", "chunk": 16})


def test_settings_without_effect_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignored(**runtime: Any) -> list[str]:
        reasons = chosen(monkeypatch, models=MIXED, runtime=runtime).reasons
        return [reason.split(":")[0] for reason in reasons if "has no effect" in reason]

    assert ignored(executor="serial", workers=2, address="auto") == [
        "runtime.workers",
        "runtime.address",
    ]
    # `auto` selects the serial executor.
    assert ignored(chunk=16, workers=2) == ["runtime.workers", "runtime.chunk"]
    assert (
        ignored(executor="batched", chunk=16)
        == ignored(executor="processes", workers=2, chunk=2)
        == []
    )


def test_channels_last_is_chosen_by_model() -> None:
    def innermost(name: str, *shape: int) -> bool:
        return prefers_channels_last(ModelSpec.from_config(name, 10, shape))

    assert (
        innermost("cnn_bn_small", 1, 28, 28)
        and innermost("fedavg_cnn", 3, 32, 32)
        and innermost("resnet20", 3, 32, 32)
    )
    assert not any(innermost(n, 1, 28, 28) for n in ("resnet18", "vit", "mlp", "gru"))
    for width, expected in ((4, False), (8, True)):
        options = {"widths": [width, 16, 32]}
        narrow = ModelSpec.from_config("resnet", 10, (1, 28, 28), options=options)
        assert prefers_channels_last(narrow) == expected


class Viewing(nn.Module):
    """A backbone that flattens its features with `view`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(c, 16, 3, padding=1) for c in (channels, 16)), nn.AvgPool2d(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.convolutions(x)
        return found.view(len(x), -1)


class OwnModel(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.head = Viewing(in_channels), nn.Linear(64, num_classes)


def test_custom_model_may_view_its_features() -> None:
    rounds_of(
        config("fedavg", "python:tests.federation.executors.test_choose:OwnModel"), num_rounds=1
    ).evaluate()


def test_choice_is_recorded_and_kept_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = config("local", "mlp", clients=2, rounds=1)
    run(source, out=tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["choice"]
    assert recorded["executor"] == "serial" and recorded["reasons"]
    assert "serial executor" in (tmp_path / "run" / "log.txt").read_text()
    again = ExecutorChoice.from_record(
        {**recorded, "threads": 7, "workers": 3}, prepare(source).config.runtime
    )
    assert (again.threads, again.workers) == (7, 3)


def test_bfloat16_keeps_parameters_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, reduced = (
        rounds_of(config("fedavg", MIXED, clients=6, runtime={"threads": 1, "precision": p}))
        for p in ("float32", "bfloat16")
    )
    for slot, tensors in reduced.server.models.items():
        assert all(t.dtype == plain.server.models[slot][n].dtype for n, t in tensors.items())
        assert not same_bits(tensors, plain.server.models[slot])
        gap = [
            (t - plain.server.models[slot][n]).abs().max()
            for n, t in tensors.items()
            if t.is_floating_point()
        ]
        assert torch.stack(gap).max() < 0.2


needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'hetero_fl[ray]'"
)


def refused(out: Path, **runtime: object) -> str:
    with pytest.raises(UserError) as error:
        run(config("fedavg", "mlp", runtime=runtime), out=out)
    assert not out.exists()
    return str(error.value)


def test_missing_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    line = refused(tmp_path / "out", executor="ray")
    assert line == (
        "runtime.executor needs ray, which is not installed; run pip install 'hetero_fl[ray]'"
    )


@needs_ray
@each_case("address", ["somewhere", "ray://127.0.0.1:10001", "127.0.0.1:1", "127.0.0.1:123456"])
def test_unreachable_ray_address_is_refused(address: str, tmp_path: Path) -> None:
    line = refused(tmp_path / "out", executor="ray", address=address)
    assert line.startswith("runtime.address: ")
    assert f"'{address}'" in line


def test_torchrun_executor_requires_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "torchrun --nproc-per-node 3" in refused(tmp_path / "out", executor="torchrun")
    # A check needs no other processes.
    source = config("fedavg", "mlp", runtime={"executor": "torchrun"})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source))
    assert main(["train", "--check", "--config", str(tmp_path / "c.yaml")]) == 0

    monkeypatch.setattr(module, "num_ranks", lambda: 3)
    line = refused(tmp_path / "out", executor="processes")
    assert line == (
        "runtime.executor: must be torchrun, because torchrun started 3 processes, got 'processes'"
    )
