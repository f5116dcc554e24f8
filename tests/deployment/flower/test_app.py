"""A configuration exported as a Flower app and run by Flower's own commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

import yaml

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.deployment.flower.app import write_app
from hetero_fl.utils.errors import UserError
from tests.support.federations import config
from tests.support.flower_federation import FlowerFederation, worker_processes
from tests.support.nodes import until

CLIENTS = ("site_1", "site_2", "site_3")
TELLS = {"labels": True, "details": True, "model": True}


def test_app_can_be_built_by_flower(tmp_path: Path) -> None:
    source = tmp_path / "config.yaml"
    source.write_text(yaml.safe_dump(config("fedmd")))

    status = main(["flower-app", str(tmp_path / "app"), "--config", str(source), "rounds=7"])

    assert status == 0
    packed = yaml.safe_load((tmp_path / "app" / "hetero_fl_app" / "config.yaml").read_text())
    assert packed["rounds"] == 7
    command = [str(Path(sys.executable).with_name("flwr")), "build", "--app", "app"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr


def test_app_does_not_overwrite_files(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match="app: already exists; choose a new folder"):
        write_app(tmp_path / "app", config("fedmd"))

    assert [path.name for path in (tmp_path / "app").iterdir()] == ["notes.txt"]


def test_app_refuses_simulation_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attacks"):
        write_app(tmp_path / "app", config("fedavg", attacks={"fraction": 0.34, "kind": "noise"}))

    assert not (tmp_path / "app").exists()


@pytest.mark.slow
def test_flwr_run_equals_simulation(tmp_path: Path) -> None:
    source = config(
        "hybrid", "cnn_gn_small", rounds=1, runtime={"executor": "serial", "threads": 1}
    )
    write_app(tmp_path / "app", source)
    sites = {client: {"tells": TELLS} for client in CLIENTS}

    with FlowerFederation(tmp_path / "federation", sites) as federation:
        ended = federation.run(tmp_path / "app", out=str(tmp_path / "run"))
        assert ended.startswith("finished:completed"), federation.log("superlink")[-3000:]
        files = [federation.site(client) for client in CLIENTS]
        assert len(worker_processes(files)) == len(CLIENTS)

    until(lambda: not worker_processes(files))
    simulated = hetero_fl.run(source, out=tmp_path / "simulated")
    models = sorted(path.name for path in (simulated.path / "models").glob("*.safetensors"))
    assert models
    for name in models:
        expected = (simulated.path / "models" / name).read_bytes()
        assert (tmp_path / "run" / "models" / name).read_bytes() == expected
