"""Simulated devices and faults, and rounds in simulated time with deadlines and too few uploads."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from hetero_fl.communication.compressor import UNSENT
from hetero_fl.config.simulation import DevicesConfig, FaultsConfig
from hetero_fl.engine.templates import training_flops
from hetero_fl.experiment import prepare
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.round import Record
from hetero_fl.federation.simulation.conditions import Device, Devices, Faults, flip_bytes
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.asynchronous_runs import FAULTS
from tests.support.cases import each_case
from tests.support.federations import (
    MIXED,
    TOP,
    config,
    poison_upload,
    rounds_of,
    same_bits,
    state_of,
)


def federation(**changes: Any) -> FederationSpec:
    return prepare(config("fedavg", "mlp", 3, **changes)).federation


def devices(spec: FederationSpec, **section: Any) -> Devices:
    return Devices(spec, DevicesConfig.model_validate(section))


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


def test_group_device_overrides_defaults() -> None:
    groups = [
        {
            "name": "slow",
            "model": "mlp",
            "machine": {"speed": 5, "availability": {"share": 0.5, "phase": 0.75}},
        },
        {"name": "fast", "model": "mlp"},
    ]
    result = devices(federation(clients__groups=groups), speed=100, up=9)
    slow, fast = result.device("slow"), result.device("fast")
    assert (slow.speed, slow.up, fast.speed, fast.up) == (5, 9, 100, 9)
    assert slow.online == ((0.0, 21600.0), (64800.0, 86400.0)) and fast.online == ()


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
        assert device.next_online(at) >= at
        assert any(start <= device.next_online(at) % 24 < end for start, end in device.online)
    assert Device().finish_time(5.0, 3.0) == 8.0


def test_task_durations_follow_bandwidth_and_speed() -> None:
    spec = federation()
    timed = devices(spec, speed=1e6, up=10, down=100)
    seconds = training_flops(spec.client_infos["site_1"]) / 1e6
    assert timed.task_times("site_1", 500, 30, at=7.0, task=0).arrived == pytest.approx(
        7 + 5 + seconds + 3
    )
    shaky = devices(spec, speed=1e6, jitter=0.3)
    assert shaky.training_seconds("site_1", 0) != shaky.training_seconds("site_1", 1)
    assert devices(spec).task_times("site_1", 500, 30, at=7.0, task=0).arrived == 7


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
        bool(faults.outcome("site_1", t).failure)
        == (fates[t].kind in ("before", "during", "after", "lost"))
        for t in range(99)
    )
    frail = Faults(None, devices(spec, failure=0.3))
    failed = [frail.outcome("site_1", task) for task in range(2000)]
    assert abs(sum(f.kind == "during" for f in failed) / 2000 - 0.3) < 0.03
    assert {f.kind for f in failed} == {"during", "fine"}


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
        ({"faults": {"late": 0.1}}, "faults.late: tasks of site_1"),
        ({"faults": {"late": 0.1}, "devices": {"speed": 1e6}}, None),
    ],
)
def test_instant_clients_are_refused_among_timed_ones(
    changes: dict[str, Any], who: str | None
) -> None:
    source = config("fedavg", "mlp", 3, **changes)
    prepare(source)
    source["runtime"]["mode"] = "async"
    if who is None:
        prepare(source)
    else:
        with pytest.raises(UserError, match=rf"^{who} take no time"):
            prepare(source)


SLOW = {"speed": {"median": 1e6, "sigma": 0.9}, "up": {"median": 1e5, "sigma": 0.9}, "down": 1e6}


# Clients share the few rows.
MANY = {"kind": "iid", "min_size": 10}


def run_rounds(source: dict[str, Any]) -> tuple[FederatedTrainer, list[Record]]:
    rounds = rounds_of(source, num_rounds=0)
    return rounds, [rounds.run_round() for _ in range(source["rounds"])]


def arithmetic(record: Record) -> None:
    """Check that invited = arrived + failed + late, and that time does not decrease."""
    counts, tasks = record["counts"], record["tasks"]
    assert counts["invited"] == counts["arrived"] + counts["failed"] + counts["late"] == len(tasks)
    found = Counter(what for *_, what in tasks)
    assert {n: found[n] for n in ("arrived", "failed", "late")} == {
        n: counts[n] for n in ("arrived", "failed", "late")
    }
    assert record["simulated"]["start"] <= record["simulated"]["end"]
    assert all(record["simulated"]["start"] <= start <= end for _, start, end, _ in tasks)


@pytest.mark.slow
@each_case("method", ["fedavg", "hybrid", "fedper"])
def test_devices_change_only_simulated_time(method: str) -> None:
    plain, records = run_rounds(config(method, MIXED, clients=4))
    timed, timed_records = run_rounds(config(method, MIXED, clients=4, devices=SLOW))
    assert state_of(plain) == state_of(timed)
    for without, record in zip(records, timed_records, strict=True):
        more = ("simulated", "counts", "tasks")
        assert {k: v for k, v in record.items() if k not in (*more, "seconds")} == {
            k: v for k, v in without.items() if k != "seconds"
        }
        arithmetic(record)
    assert timed_records[0]["simulated"]["end"] == timed_records[1]["simulated"]["start"] > 0


def test_transfer_time_follows_traffic() -> None:
    rounds = rounds_of(config("fedavg", "mlp", 2), num_rounds=0)
    link = rounds.link
    expected = [
        link.expectations.expected_size(client_info, link.broadcast(client_info), 0)
        for client_info in rounds.federation.client_infos.values()
    ]
    assert abs(rounds.run_round()["up_bytes"] - sum(expected)) <= 8


def test_deadline_drops_slow_clients_without_effect() -> None:
    source = config("fedper", clients=4, devices=SLOW)
    ends = sorted(end for *_, end, _ in run_rounds(source)[1][0]["tasks"])
    deadline = (ends[2] + ends[3]) / 2
    cut, records = run_rounds({**source, "cohort": {"deadline": deadline}})
    assert [r["counts"] for r in records] == [
        {"invited": 4, "arrived": 3, "failed": 0, "late": 1}
    ] * 2
    assert [r["simulated"]["end"] for r in records] == [deadline, 2 * deadline]
    (late,) = {client for client, _, _, what in records[0]["tasks"] if what == "late"}
    assert late not in records[0]["train_loss"] and cut.store.get(late).models == {}
    arithmetic(records[0])


def test_over_selection_takes_the_first_to_arrive() -> None:
    source = config(
        "fedavg", "mlp", 8, clients__per_round=4, devices=SLOW, cohort={"over_selection": 1.5}
    )
    _, records = run_rounds(source)
    for record in records:
        arithmetic(record)
        assert record["counts"] == {"invited": 6, "arrived": 4, "failed": 0, "late": 2}
        ends = sorted((end, what) for _, _, end, what in record["tasks"])
        assert [what for _, what in ends] == ["arrived"] * 4 + ["late"] * 2
        assert record["simulated"]["end"] == ends[3][0] and len(record["train_loss"]) == 4


def test_equal_devices_arrive_in_varying_order() -> None:
    same: dict[str, Any] = {"clients__defaults__steps": 1, "devices": {"speed": 1e6}}
    source = config(
        "fedavg", "mlp", 4, rounds=12, clients__per_round=2, cohort={"over_selection": 2}, **same
    )
    _, records = run_rounds(source)
    assert all(len({end for _, _, end, _ in record["tasks"]}) == 1 for record in records)
    arrivals = Counter(
        client for record in records for client, _, _, what in record["tasks"] if what == "arrived"
    )
    assert sum(arrivals.values()) == 24 and len(arrivals) == 4 and max(arrivals.values()) < 12
    assert [r["tasks"] for r in run_rounds(source)[1]] == [r["tasks"] for r in records]


@pytest.mark.parametrize(
    "chance", [0.0, 0.3, 0.9, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.1, 0.5, 0.7))]
)
@pytest.mark.parametrize("too_few", ["skip", None])
def test_runs_with_failures_complete_and_counts_add_up(chance: float, too_few: str) -> None:
    each = chance / 4
    faults = {"before": each, "during": each, "after": each, "lost": each}
    source = config(
        "hybrid",
        MIXED,
        clients=6,
        rounds=6,
        clients__per_round=4,
        faults=faults,
        cohort={"too_few": too_few},
    )
    rounds, records = run_rounds(source)
    assert rounds.completed == 6
    for record in records:
        arithmetic(record)
        failed = {
            client_id
            for client_id in record["cohort"]
            if rounds.executor.faults.outcome(client_id, record["round"] - 1).failure
        }
        assert record["counts"]["failed"] == len(failed) and set(record["failed"]) == failed
        assert record.get("skipped", False) == (len(failed) == 4)
    assert chance < 0.9 or any(r.get("skipped") for r in records)
    assert all(torch.isfinite(t).all() for m in rounds.server.models.values() for t in m.values())


def test_all_faults_together_add_up_and_are_not_aggregated() -> None:
    source = config(
        "fedavg", "mlp", 6, rounds=12, devices=SLOW, faults=FAULTS, cohort={"deadline": 60}
    )
    rounds, records = run_rounds(source)
    for record in records:
        arithmetic(record)
        fates = {
            client_id: rounds.executor.faults.outcome(client_id, record["round"] - 1).kind
            for client_id in record["cohort"]
        }
        arrived = {client for client, _, _, what in record["tasks"] if what == "arrived"}
        assert set(record["train_loss"]) == arrived and {
            fates[client_id] for client_id in arrived
        } <= {
            "fine",
            "twice",
            "late",
        }
    timed_records = Counter(reason for record in records for reason in record["failed"].values())
    assert len(timed_records) == 5
    assert "upload refused: checksum mismatch" in timed_records


def same_as_uninvited(faults: dict[str, float], method: str, channel: dict[str, Any]) -> None:
    """Compare rounds with these faults to rounds without the affected clients."""
    source = config(method, MIXED, clients=6, rounds=2, seed=3, channel=channel)
    affected, records = run_rounds({**source, "faults": faults, "cohort": {"deadline": 60}})
    without = rounds_of(source, num_rounds=0)
    for record in records:
        assert 0 < record["counts"]["arrived"] < 6
        came = sorted(client for client, _, _, what in record["tasks"] if what == "arrived")
        without.sample_cohort = lambda *a, came=came: came  # type: ignore[method-assign,misc]
        without.run_round()
    assert state_of(affected) == state_of(without)
    assert (
        not channel
        or sum(
            UNSENT in affected.store.get(client_id).state
            for client_id in affected.federation.client_infos
        )
        > 1
    )


@pytest.mark.slow
@each_case(
    ("method", "fault", "channel"),
    itertools.product(
        ["fedper", "hybrid"], ["before", "after", "lost", "late", "corrupted"], [{}, TOP]
    ),
)
def test_failed_task_has_no_effect(fault: str, method: str, channel: dict[str, Any]) -> None:
    same_as_uninvited({fault: 0.5}, method, channel)


def test_duplicate_upload_changes_only_traffic() -> None:
    plain, before = run_rounds(config("fedper", clients=4))
    twice, after = run_rounds(config("fedper", clients=4, faults={"twice": 1.0}))
    assert state_of(plain) == state_of(twice)
    assert [r["counts"]["arrived"] for r in after] == [4, 4]
    assert all(
        abs(b["up_bytes"] - 2 * a["up_bytes"]) < 64 for a, b in zip(before, after, strict=True)
    )


def test_checksum_detects_every_flipped_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounds = rounds_of(
        config("fedavg", "mlp", 4, rounds=1, faults={"corrupted": 1.0}), num_rounds=0
    )
    record = rounds.run_round()
    assert (
        record["counts"] == {"invited": 4, "arrived": 0, "failed": 4, "late": 0}
        and record["skipped"]
    )
    rounds = rounds_of(config("fedavg", "mlp", 4, faults={"corrupted": 0.5}), num_rounds=0)
    changes = []

    # Of the last number: finite and of the right shape.
    def last_bit(body: bytes, *parts: Any) -> bytes:
        changes.append(body[:-4] + bytes([body[-4] ^ 1]) + body[-3:])
        return changes[-1]

    monkeypatch.setattr("hetero_fl.federation.simulation.executor.flip_bytes", last_bit)
    record = rounds.run_round()
    assert 0 < len(changes) == record["counts"]["failed"]
    assert all("checksum mismatch" in reason for reason in record["failed"].values())
    for i in range(300):
        assert (
            flip_bytes(b"some bytes", i) != b"some bytes"
            and len(flip_bytes(b"some bytes", i)) == 10
        )


def test_too_few_uploads_skip_or_fail() -> None:
    source = config(
        "fedavg", "mlp", 6, clients__per_round=3, faults={"lost": 0.6}, rounds=4, seed=1
    )
    _, timed_records = run_rounds({**source, "cohort": {"least": 2, "too_few": "skip"}})
    again = rounds_of({**source, "cohort": {"least": 2, "too_few": "skip"}}, num_rounds=0)
    assert any(r.get("skipped") for r in timed_records)
    for record in timed_records:
        arithmetic(record)
        before = {slot: dict(model) for slot, model in again.server.models.items()}
        again.run_round()
        unchanged = all(same_bits(before[slot], again.server.models[slot]) for slot in before)
        assert unchanged == record.get("skipped", False) == (len(record["train_loss"]) < 2)
    with pytest.raises(RunFailedError, match=r"of at least 2 usable uploads from 3 clients"):
        run_rounds({**source, "cohort": {"least": 2, "too_few": "fail"}})


def test_failed_round_reports_client_outcomes() -> None:
    source = config("fedavg", "mlp", 4, devices=SLOW, cohort={"deadline": 1e-3, "too_few": "fail"})
    with pytest.raises(
        RunFailedError, match=r"^round 1: no usable upload from 4 clients; 4 of them late$"
    ):
        run_rounds(source)


def test_round_starts_when_enough_clients_are_online() -> None:
    devices = {"speed": 1e7, "availability": {"share": 0.25, "day": 240}}
    source = config(
        "fedavg", "mlp", 8, rounds=3, clients__per_round=3, devices=devices, data__partition=MANY,
        cohort={"sampling": "available", "least": 2, "too_few": "fail"},
    )  # fmt: skip
    rounds, records = run_rounds(source)
    assert all(record["counts"]["invited"] >= 2 for record in records)
    seen = [
        rounds.executor.devices.device(client_id) for client_id in rounds.federation.client_infos
    ]
    # Sometimes they are fewer.
    assert any(sum(d.next_online(10.0 * k) == 10.0 * k for d in seen) < 2 for k in range(24))


def test_skipped_round_discards_client_state() -> None:
    rounds = rounds_of(config("fedper", cohort={"least": 3, "too_few": "skip"}), num_rounds=1)
    before = dict(rounds.store.committed)
    poison_upload(rounds, "site_1", 1, "model")
    record = rounds.run_round()
    assert record["skipped"] and len(record["train_loss"]) == 2 and "counts" not in record
    assert rounds.store.committed == before


def test_only_online_clients_are_sampled() -> None:
    devices = {**SLOW, "availability": {"share": 0.4, "day": 600}}
    source = config(
        "fedavg",
        "mlp",
        9,
        rounds=6,
        clients__per_round=3,
        devices=devices,
        cohort={"sampling": "available"},
        data__partition=MANY,
    )
    rounds, records = run_rounds(source)
    for record in records:
        start = record["tasks"][0][1]
        assert all(
            rounds.executor.devices.device(client_id).next_online(start) == start
            for client_id in record["cohort"]
        )
    uniform = rounds_of({**source, "cohort": {}}, num_rounds=0)
    starts = [
        uniform.executor.devices.device(client_id).next_online(0.0)
        for client_id in uniform.sample_cohort(0)
    ]
    # Sampled anyway: their tasks wait.
    assert any(start > 0 for start in starts)


def sampled_at_start(rounds: FederatedTrainer, round_idx: int) -> list[str]:
    rounds.executor.now = 0.0
    return rounds.sample_cohort(round_idx)


def test_round_waits_for_the_secure_sum_threshold() -> None:
    def online(**changes: Any) -> int:
        source = config(
            "fedavg",
            "mlp",
            8,
            clients__per_round=5,
            devices={**SLOW, "availability": {"share": 0.4, "day": 600}},
            cohort={"sampling": "available"},
            data__partition=MANY,
            **changes,
        )
        rounds = rounds_of(source, num_rounds=0)
        return min(len(sampled_at_start(rounds, round_idx)) for round_idx in range(6))

    assert online() < 4 <= online(channel={"secure_sum": {"threshold": 4}})
