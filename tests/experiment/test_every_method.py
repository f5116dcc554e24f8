"""Every method of the contract runs on the quickest configuration by its name alone, with no warning."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hetero_fl.algorithms import register_algorithm
from hetero_fl.experiment import prepare, run
from tests.federation.test_synchronous import METHODS
from tests.helpers.small_federations import QUICK

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_list_is_whole() -> None:
    assert sorted(METHODS) == sorted(
        n for n in register_algorithm if register_algorithm[n].__module__.startswith("hetero_fl.")
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_by_its_name_alone(method: str, tmp_path: Path) -> None:
    """Three architectures, two rounds; of DENSE's many steps at the server only a few."""
    few = [f"algorithm.{key}={value}" for key, value in QUICK.get(method, {}).items()]
    wanted = [
        f"algorithm.name={method}",
        "rounds=2",
        "runtime.threads=1",
        "output.plots=false",
        "output.report=false",
        *few,
    ]
    finished = run(CONFIGS / "digits_quickstart.yaml", overrides=wanted, out=tmp_path / "run")
    summary = finished.summary
    assert summary["algorithm"] == method and summary["rounds_completed"] == 2
    models = [client["model"] for client in summary["clients"]]
    own = ["cnn_gn_small", "cnn_gn_small", "mlp", "vit"]
    assert all(m.startswith(own[0]) for m in models) if method == "heterofl" else models == own
    for reading in ("personal", "global"):
        accuracy = summary[reading]["last"]["accuracy"]
        assert math.isfinite(accuracy) and 0 < accuracy <= 1
    assert "arning" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_is_ready_for_the_main_job(method: str) -> None:
    assert (
        prepare(CONFIGS / "medical_hetero.yaml", [f"algorithm.name={method}"]).config.algorithm[
            "name"
        ]
        == method
    )
