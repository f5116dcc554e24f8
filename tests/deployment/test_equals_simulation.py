"""A federation equals the simulation, bit for bit, in all modes and on the data of sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from hetero_fl.algorithms import Centralized
from hetero_fl.deployment import remote_executor
from hetero_fl.deployment.config import DisclosureConfig, SiteConfig, load_site_config
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.experiment import run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.session import _evaluate
from hetero_fl.federation import asynchronous
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.asynchronous_runs import session
from tests.support.benchmark_folders import (
    write_camelyon17,
    write_client_folder,
    write_femnist,
    write_iwildcam,
    write_shakespeare,
)
from tests.support.cases import each_case
from tests.support.federations import MIXED, TOP, config
from tests.support.loopback import LoopbackTransport
from tests.support.models import DRIFTING
from tests.support.nodes import (
    LONG,
    LossyTransport,
    OrderedTransport,
    Sites,
    federation,
    figures,
    models,
    records,
    same,
    until,
)

ROOT = Path(__file__).parents[2]


QUICK = [
    "rounds=2",
    "runtime.executor=serial",
    "runtime.threads=1",
    "output.plots=false",
    "output.report=false",
]


ALL = DisclosureConfig(labels=True, details=True, model=True)


@pytest.fixture
def loopback() -> Iterator[LoopbackTransport]:
    transport = LoopbackTransport()
    yield transport
    transport.close()


def in_federation(
    loopback: LoopbackTransport, tmp_path: Path, clients: list[str], **more: Any
) -> Run:
    for client in clients:
        loopback.join(
            Node(SiteConfig(client=client, tells=ALL), tmp_path / "sites" / client).handle
        )
    return run_federation(transport=loopback, out=tmp_path / "federation", wait=LONG, **more)


QUANTIZED = ["rounds=3", "channel.compress_down=[quantize: 8]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("hybrid", []),
        ("fedavg", []),
        ("fedmd", []),
        ("fedproto", []),
        ("hybrid", QUANTIZED),
    ],
)
def test_deployment_equals_simulation(
    name: str, more: list[str], loopback: LoopbackTransport, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "digits_quickstart.yaml"
    changes = [*QUICK, f"algorithm.name={name}", *more]
    deployed = in_federation(
        loopback, tmp_path, ["cnn_1", "cnn_2", "mlp", "vit"], source=load_config(config, changes)
    )
    simulated = run(config, out=tmp_path / "simulation", overrides=changes)
    for key in (
        "personal",
        "global",
        "server",
        "clients",
        "communication",
        "rounds_completed",
        "data",
    ):
        assert deployed.summary[key] == simulated.summary[key], key
    # Including those of the rounds that are best on validation rows.
    assert models(deployed) == models(simulated) and len(models(simulated)) >= 8


@pytest.mark.slow
def test_local_models_are_saved_at_the_sites(loopback: LoopbackTransport, tmp_path: Path) -> None:
    config, changes = ROOT / "configs" / "digits_quickstart.yaml", [*QUICK, "rounds=1"]
    clients = ["cnn_1", "cnn_2", "mlp", "vit"]
    for client in clients:
        loopback.join(Node(SiteConfig(client=client), tmp_path / "sites" / client).handle)
    deployed = run_federation(
        load_config(config, changes), loopback, out=tmp_path / "federation", wait=LONG
    )
    simulated = run(config, out=tmp_path / "simulation", overrides=changes)
    assert not [path for path in (deployed.path / "models").glob("*") if path.stem in clients]
    for client in clients:
        (kept,) = (tmp_path / "sites" / client / "runs").glob("*/model.safetensors")
        assert (
            kept.read_bytes() == (simulated.path / "models" / f"{client}.safetensors").read_bytes()
        )


def test_own_module_keeps_its_state_at_a_node(loopback: LoopbackTransport, tmp_path: Path) -> None:
    clients = ["site_1", "site_2"]
    source = config("fedavg", DRIFTING, clients=2)
    for client in clients:
        site = SiteConfig(client=client, tells=ALL, allows={"own_code": [DRIFTING]})
        loopback.join(Node(site, tmp_path / "sites" / client).handle)
    loaded = load_config(source, allow_code=True)

    deployed = run_federation(loaded, loopback, out=tmp_path / "federation", wait=LONG)
    simulated = run(loaded, out=tmp_path / "simulation")

    for client in clients:
        assert deployed.models[client].tensors["backbone.peak"].count_nonzero()
        for name, tensor in deployed.models[client].tensors.items():
            assert torch.equal(tensor, simulated.models[client].tensors[name]), name


class Pooled(Centralized):
    """A user-defined method that needs all clients' rows."""


@each_case("name", ["centralized", "ensemble", f"python:{__name__}:Pooled"])
def test_centralized_method_is_refused(
    name: str, loopback: LoopbackTransport, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=rf"algorithm\.name: {name} is available in simulations only"
    ):
        run_federation(config(name), loopback, out=tmp_path / "out", wait=0.1)
    assert not (tmp_path / "out").exists()


CLIENTS = ["site_1", "site_2", "site_3", "site_4"]


def source(
    method: str = "hybrid", clients: int = 4, places: int = 3, channel: dict[str, Any] = TOP
) -> dict[str, Any]:
    own = {"algorithm__heads": "keep"} if method == "hybrid" else {}
    runtime = {
        "threads": 1,
        "mode": "async",
        "executor": "serial",
        **({} if method == "fedbuff" else {"buffer": 2}),
    }
    return config(
        method,
        MIXED,
        clients=clients,
        rounds=3,
        clients__per_round=places,
        channel=channel,
        runtime=runtime,
        **own,
    )


def without(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "wall", "simulated", "tasks")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_single_node_equals_simulation(tmp_path: Path) -> None:
    run_config = source(clients=1, places=1)
    deployed = federation(run_config, Sites(["site"], tmp_path / "sites"), tmp_path / "deployed")
    simulated = run(run_config, out=tmp_path / "simulated")
    assert without(records(deployed)) == without(records(simulated)) and models(deployed) == models(
        simulated
    )


@pytest.mark.slow
@pytest.mark.parametrize(("method", "channel"), [("hybrid", TOP), ("fedbuff", TOP)])
def test_run_in_the_same_order_equals_simulation(
    method: str, channel: dict[str, Any], tmp_path: Path
) -> None:
    run_config = source(method, channel=channel)
    deployed = federation(
        run_config,
        Sites(CLIENTS, tmp_path / "sites", transport=OrderedTransport()),
        tmp_path / "deployed",
    )
    pace, lines = session(run_config, seconds=lambda client, task: 10 + task / 1000), []
    for _ in range(3):
        lines.append(pace.run_round())
        _evaluate(pace, lines[-1], None)
    assert without(records(deployed)) == without(lines)
    # there was something to be out of order
    assert any(record["staleness"].keys() - {"0"} for record in lines)


@pytest.mark.slow
def test_tasks_in_flight_are_repeated_after_server_restart(tmp_path: Path) -> None:
    run_config = source()
    plain = federation(
        run_config, Sites(CLIENTS, tmp_path / "a", transport=OrderedTransport()), tmp_path / "plain"
    )
    sites = Sites(CLIENTS, tmp_path / "b", transport=OrderedTransport())
    killed = federation(run_config, sites, tmp_path / "killed", crashes=[14, 17, 22, 20])
    assert without(records(killed)) == without(records(plain)) and models(killed) == models(plain)


@pytest.mark.slow
def test_slots_are_given_to_connected_nodes(tmp_path: Path) -> None:
    kills = {("site_1", 0, "train"): "before", ("site_2", 0, "train"): "during"}
    sites = Sites(CLIENTS, tmp_path / "sites", kills, away=None)

    absent = ("site_1", "site_2")

    def back(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            sites.request_counts.clear()
            for client in absent:
                sites.start(client)
        if record["round"] == 4:  # greeted since
            until(lambda: all(sites.request_counts[client, -1, "hello"] for client in absent))
        # met and given tasks since, which the rounds that are left hear of
        if record["round"] == 6:
            until(
                lambda: {client for client, _, what in sites.done if what == "train"} >= set(absent)
            )

    run_config = {**source(places=4), "rounds": 10, "evaluation": {"every": 10}}
    deployed = records(
        federation(run_config, sites, tmp_path / "deployed", patience=0.1, callbacks=[back])
    )
    assert len(deployed) == 10 and not sites.kills
    assert all(record["counts"]["arrived"] == 4 for record in deployed)
    failed = {client: reason for record in deployed for client, reason in record["failed"].items()}
    assert failed == dict.fromkeys(absent, "its node is not connected")
    assert set(absent) <= {client for record in deployed[2:] for client in record["cohort"]}


def test_refusing_nodes_are_asked_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Node, "_run_task", Mock(side_effect=RequestRefusedError("not today")))
    monkeypatch.setattr(remote_executor, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(asynchronous, "MAX_CONSECUTIVE_FAULTS", 3)
    with pytest.raises(
        RunFailedError, match=r"round 1: no usable upload from 9 tasks; site_\d: not today$"
    ):
        federation(source(), Sites(CLIENTS, tmp_path / "sites"), tmp_path / "deployed")


def test_empty_slot_does_not_block_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_executor, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(asynchronous, "MAX_WAIT", 0.1)
    monkeypatch.setattr(remote_executor.NodeExecutor, "available", lambda self: [])
    with pytest.raises(RunFailedError, match="round 1: no client connected for"):
        federation(source(), Sites(CLIENTS, tmp_path / "sites"), tmp_path / "deployed")


def test_init_from_gives_nodes_their_initial_models(tmp_path: Path) -> None:
    first = run(config("hybrid", MIXED, rounds=1), out=tmp_path / "first")
    run_config = config(
        "hybrid", MIXED, rounds=2, algorithm__heads="keep", init_from=str(first.path)
    )
    deployed = federation(
        run_config,
        Sites(CLIENTS[:3], tmp_path / "sites", transport=LossyTransport()),
        tmp_path / "deployed",
    )
    simulated = run(run_config, out=tmp_path / "simulated")
    same(deployed, simulated)
    assert figures(deployed) != figures(
        run({**run_config, "init_from": None}, out=tmp_path / "other")
    )


SITES = ("north", "south")


Source = Mapping[str, Any]


def federate(folder: Path, common: Source, own: Source, model: str) -> Run:
    """Run a round with two sites, whose site files have the section `own` as `data`.

    Args:
        folder: Folder with the folders of the sites.
        common: Section `data` of the server.
        own: Section `data` of the sites, with paths relative to their site files.
        model: Model of the sites.
    """
    config = {
        "rounds": 1,
        "data": {"partition": {"min_size": 4}, **common},
        "clients": {"groups": [{"name": name, "model": model} for name in SITES]},
        "algorithm": {"name": "fedavg"},
        "runtime": {"executor": "serial", "threads": 1},
        "output": {"plots": False, "report": False},
    }
    transport = LoopbackTransport()
    try:
        for name in SITES:
            file = folder / name / "site.yaml"
            tree = {"client": name, "data": dict(own), "tells": {"errors": True}}
            file.write_text(yaml.safe_dump(tree))
            site, state = load_site_config(file)
            transport.join(Node(site, state, lambda _: None).handle, b"")
        return run_federation(config, transport=transport, out=folder / "run", wait=LONG)
    finally:
        transport.close()


def write_hub_folder(path: Path, rows: int = 60) -> None:
    """Write a table with three classes like `save_to_disk`."""
    datasets = pytest.importorskip("datasets")
    draws = np.random.default_rng(0)
    y = draws.integers(0, 3, rows)
    features = datasets.Features(
        {
            "x": datasets.Sequence(datasets.Value("float32"), length=4),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    values = {"x": draws.normal(y[:, None], 0.3, (rows, 4)).tolist(), "label": y.tolist()}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(path))


CASES: dict[str, tuple[Any, str, Source, str]] = {
    "htfllib": (lambda p: write_client_folder(p, 1), "htfllib", {}, "lenet"),
    "leaf, images": (write_femnist, "leaf", {}, "lenet"),
    "leaf, text": (write_shakespeare, "leaf", {}, "text_gru"),
    "camelyon17": (write_camelyon17, "camelyon17", {}, "lenet"),
    "iwildcam": (write_iwildcam, "iwildcam", {"size": 12}, "lenet"),
    "hf": (write_hub_folder, "", {}, "mlp"),
}


@pytest.mark.parametrize("case", CASES)
def test_sites_train_on_folders(case: str, tmp_path: Path) -> None:
    write, name, keys, model = CASES[case]
    for place in ("public", *SITES):
        write(tmp_path / place / "rows")

    public = str(tmp_path / "public" / "rows")
    common = {"name": name, "path": public} if name else {"name": f"hf:{public}"}
    own = {"name": name, "path": "rows"} if name else {"name": "hf:rows"}
    run = federate(tmp_path, {**common, **keys}, {**own, **keys}, model)

    assert [client["id"] for client in run.summary["clients"]] == list(SITES)
    assert run.summary["personal"]["last"]["loss"] is not None
