"""A federation equals the simulation, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.algorithms import Centralized
from hetero_fl.deployment.config import DisclosureConfig, SiteConfig
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.experiment import run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import config
from tests.support.loopback import LoopbackTransport
from tests.support.models import DRIFTING
from tests.support.nodes import LONG, models

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


CHANGES_DOWN = ["rounds=3", "channel.compress_down=[topk: 0.2, quantize: 6]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("hybrid", []),
        ("fedavg", []),
        ("fedmd", []),
        ("fedproto", []),
        ("hybrid", CHANGES_DOWN),
        ("fedavg", CHANGES_DOWN),
    ],
)
def test_deployment_equals_simulation(
    name: str, more: list[str], loopback: LoopbackTransport, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "digits_quickstart.yaml"
    changes = [*QUICK, f"algorithm.name={name}", *more]
    deployed = in_federation(
        loopback, tmp_path, ["cnn_1", "cnn_2", "mlp", "vit"], source=config, overrides=changes
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
        config, loopback, out=tmp_path / "federation", wait=LONG, overrides=changes
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
