"""Every built-in method runs on the quickstart configuration without further settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hetero_fl.algorithms import register_algorithm
from hetero_fl.experiment import prepare, run
from tests.federation.test_synchronous import METHODS
from tests.support.federations import QUICK

CONFIGS = Path(__file__).parents[2] / "configs"


def test_list_of_methods_is_complete() -> None:
    assert sorted(METHODS) == sorted(
        n for n in register_algorithm if register_algorithm[n].__module__.startswith("hetero_fl.")
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_method_runs_by_name(method: str, tmp_path: Path) -> None:
    """Run two rounds with three architectures and few server steps."""
    few = [f"algorithm.{key}={value}" for key, value in QUICK.get(method, {}).items()]
    overrides = [
        f"algorithm.name={method}",
        "rounds=2",
        "runtime.threads=1",
        "output.plots=false",
        "output.report=false",
        *few,
    ]
    finished = run(CONFIGS / "digits_quickstart.yaml", overrides=overrides, out=tmp_path / "run")
    summary = finished.summary
    assert summary["algorithm"] == method and summary["rounds_completed"] == 2
    models = [client["model"] for client in summary["clients"]]
    expected_models = ["cnn_gn_small", "cnn_gn_small", "mlp", "vit"]
    assert (
        all(m.startswith(expected_models[0]) for m in models)
        if method == "heterofl"
        else models == expected_models
    )
    for test_set in ("personal", "global"):
        accuracy = summary[test_set]["last"]["accuracy"]
        assert math.isfinite(accuracy) and 0 < accuracy <= 1
    assert "arning" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_method_is_prepared_for_the_medical_configuration(method: str) -> None:
    assert (
        prepare(CONFIGS / "medical_hetero.yaml", [f"algorithm.name={method}"]).config.algorithm[
            "name"
        ]
        == method
    )
