"""Simulated devices: distributions, availability, task durations and faults."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.config.simulation import DevicesConfig, FaultsConfig
from hetero_fl.engine.templates import training_flops
from hetero_fl.experiment import prepare
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.devices import Device, Devices, Timing
from hetero_fl.federation.simulation.faults import Faults
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import config


def federation(**changes: Any) -> FederationSpec:
    return prepare(config("fedavg", "mlp", 3, **changes)).federation


def devices(spec: FederationSpec, **section: Any) -> Devices:
    return Devices.from_config(spec, DevicesConfig.model_validate(section))


def test_speeds_depend_only_on_the_client_id() -> None:
    few, many = (
        federation(),
        federation(clients__count=6, clients__groups=[{"name": "site", "model": "mlp"}]),
    )
    section = {"speed": {"median": 1e9, "sigma": 0.9}, "up": 5e5}
    one, other = devices(few, **section), devices(many, **section)
    assert one.device("site_1") == other.device("site_1") == one.device("site_1")
    assert len({other.device(client_id).speed for client_id in many.client_infos}) == 6
    assert one.device("site_2").up == 5e5 and one.device("site_2").down == math.inf
    with pytest.raises(KeyError):
        one.device("stranger")


def test_log_normal_speeds_have_configured_median_and_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = federation(clients__groups=[{"name": "site", "count": 3, "model": "mlp"}])
    drawn = devices(spec, speed={"median": 2e9, "sigma": 0.9})
    monkeypatch.setattr(
        type(spec.client_infos), "profile", lambda self, client_id: self.profiles[0]
    )
    logs = [math.log(drawn.device(f"c{i}").speed / 2e9) for i in range(4000)]
    mean = sum(logs) / len(logs)
    assert (
        abs(mean) < 0.05
        and abs(math.sqrt(sum((v - mean) ** 2 for v in logs) / len(logs)) - 0.9) < 0.03
    )


def test_group_device_overrides_defaults(tmp_path: Path) -> None:
    traces = tmp_path / "traces.csv"
    traces.write_text("client,up,online\nfast,7,0-10;20-30\n,9,\n")
    groups = [
        {
            "name": "slow",
            "model": "mlp",
            "machine": {"speed": 5, "availability": {"share": 0.5, "phase": 0.75}},
        },
        {"name": "fast", "model": "mlp"},
    ]
    result = devices(federation(clients__groups=groups), speed=100, file=str(traces))
    slow, fast = result.device("slow"), result.device("fast")
    assert (slow.speed, slow.up, fast.speed, fast.up) == (5, 9, 100, 7)
    assert slow.online == ((0.0, 21600.0), (64800.0, 86400.0)) and fast.online == (
        (0.0, 10.0),
        (20.0, 30.0),
    )


def slowly(device: Device, at: float, busy: float) -> float:
    """Simulate in steps of one second."""
    while busy > 0:
        busy -= any(start <= at % device.day < end for start, end in device.online)
        at += 1
    return at


def test_work_progresses_only_while_online() -> None:
    draw = random.Random(0)
    for _ in range(200):
        cuts = sorted(draw.sample(range(25), 4))
        device = Device(online=((cuts[0], cuts[1]), (cuts[2], cuts[3])), day=24)
        at, busy = draw.randrange(60), draw.randrange(1, 90)
        done = device.finish_time(at, busy)
        assert done == slowly(device, at, busy)
        assert device.online_seconds(at, done) == busy and device.next_online(at) >= at
        assert any(start <= device.next_online(at) % 24 < end for start, end in device.online)
    assert Device().finish_time(5.0, 3.0) == 8.0 and Device().online_seconds(5.0, 3.0) == 0.0


def test_task_durations_follow_bandwidth_and_speed() -> None:
    spec = federation()
    timing = Timing(devices(spec, speed=1e6, up=10, down=100))
    seconds = training_flops(spec.client_infos["site_1"]) / 1e6
    assert timing.task_times("site_1", 500, 30, at=7.0, task=0).arrived == pytest.approx(
        7 + 5 + seconds + 3
    )
    half = timing.task_times("site_1", 500, 30, 7.0, 0, step_share=0.5)
    assert half.trained - half.received == pytest.approx(seconds / 2)
    share = timing.share_in_time("site_1", 500, 30, 7.0, 0, deadline=7 + 5 + 3 + seconds / 4)
    assert share == pytest.approx(0.25)
    assert timing.share_in_time("site_1", 500, 30, 7.0, 0, deadline=10.0) == 0
    assert timing.share_in_time("site_1", 500, 30, 7.0, 0, deadline=1e9) == 1
    shaky = Timing(devices(spec, speed=1e6, jitter=0.3))
    assert shaky.training_seconds("site_1", 0) != shaky.training_seconds("site_1", 1)
    assert Timing(devices(spec)).task_times("site_1", 500, 30, at=7.0, task=0).arrived == 7


def test_faults_are_drawn_by_client_and_task() -> None:
    spec = federation()
    section = FaultsConfig(
        before=0.1, during=0.1, after=0.1, lost=0.1, late=0.1, twice=0.1, corrupted=0.1
    )
    faults = Faults(section, devices(spec))
    fates = [faults.outcome("site_1", task) for task in range(3000)]
    assert fates == [faults.outcome("site_1", task) for task in range(3000)]
    assert fates[:50] != [faults.outcome("site_2", task) for task in range(50)]
    for what in (*section.probabilities, "fine"):
        share = sum(fate.kind == what for fate in fates) / 3000
        assert abs(share - (0.3 if what == "fine" else 0.1)) < 0.025
    assert {fate.delay for fate in fates if fate.kind == "late"} == {3600.0}
    assert all(
        faults.outcome("site_1", t).is_failure
        == (fates[t].kind in ("before", "during", "after", "lost"))
        for t in range(99)
    )
    frail = Faults(None, devices(spec, failure=0.3))
    failed = [frail.outcome("site_1", task) for task in range(2000)]
    assert abs(sum(f.kind == "during" for f in failed) / 2000 - 0.3) < 0.03
    assert {f.kind for f in failed} == {"during", "fine"}


def test_fingerprint_covers_file_content(tmp_path: Path) -> None:
    spec, file = federation(), tmp_path / "a.csv"
    prints = []
    for text in (
        "speed,up\n5,6\n",
        "speed,up\n5.0, 6\n",
        "speed,up\n5,7\n",
        "client,speed,up\nsite_1,5,6\n",
    ):
        file.write_text(text)
        prints.append(devices(spec, file=str(file)).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert devices(spec).fingerprint == devices(spec, speed=5).fingerprint == ""


@each_case(
    ("changes", "who"),
    [
        ({}, None),
        ({"devices": {"speed": 1e6}}, None),
        ({"devices": {"up": 1e6, "availability": {"share": 0.5}}}, None),
        ({"devices": {"failure": 0.5}}, None),
        ({"devices": {"availability": {"share": 0.5}}}, "devices: tasks of site_1"),
        (
            {"clients__overrides": [{"match": "site_2", "machine": {"speed": 5}}]},
            "devices: tasks of site_1",
        ),
        ({"traces": "client,speed\nsite_2,5\n"}, "devices: tasks of site_1"),
        ({"traces": "client,speed\nsite_1,5\nsite_2,5\nsite_3,5\n"}, None),
        ({"traces": 'speed,up\n5,\n,""\n'}, "devices: tasks of site_1"),
        ({"traces": "speed,up\n5,\n,6\n"}, None),
        ({"faults": {"late": 0.1}}, "faults.late: tasks of site_1"),
        ({"faults": {"late": 0.1}, "devices": {"speed": 1e6}}, None),
    ],
)
def test_instant_clients_are_refused_among_timed_ones(
    changes: dict[str, Any], who: str | None, tmp_path: Path
) -> None:
    changes = dict(changes)
    if (text := changes.pop("traces", None)) is not None:
        (tmp_path / "a.csv").write_text(text)
        changes["devices"] = {"file": str(tmp_path / "a.csv")}
    source = config("fedavg", "mlp", 3, **changes)
    prepare(source)
    source["runtime"]["mode"] = "async"
    if who is None:
        prepare(source)
    else:
        with pytest.raises(UserError, match=rf"^{who} take no time"):
            prepare(source)
