"""Loggers in complete, resumed, extended and compared runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hetero_fl import compare, run
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import config, stop_after


def tensorboard_steps(path: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("communication/up_bytes")]


def csv_rounds(path: Path) -> list[int]:
    return pd.read_csv(path / "metrics.csv")["round"].tolist()


@each_case("before", [[], ["csv", "tensorboard"]])
def test_resumed_run_continues_its_loggers_and_starts_others(
    before: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(config(rounds=3, output__loggers=before), out=out, callbacks=[stop_after(2)])

    run(config(rounds=3, output__loggers=["csv", "tensorboard"]), out=out, resume=True)

    assert csv_rounds(out) == [1, 2, 3]
    assert tensorboard_steps(out) == [1, 2, 3]
    assert [each["kind"] for each in RunDirectory(out).config()["output"]["loggers"]] == [
        "csv",
        "tensorboard",
    ]


def test_extended_run_continues_its_loggers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    # Round 3 is evaluated only because it is the last one, and is repeated without evaluation.
    loggers = ["csv", "tensorboard"]
    changes = {"evaluation__every": 2, "output__loggers": loggers}
    run(config("fedavg", rounds=3, **changes), out=out)

    run(config("fedavg", rounds=5, **changes), out=out, resume=True)

    table = pd.read_csv(out / "metrics.csv")
    assert table["round"].tolist() == [1, 2, 3, 4, 5]
    assert table["test/global/loss"].isna().tolist() == [True, False, True, False, False]
    assert tensorboard_steps(out) == [1, 2, 3, 4, 5]


def test_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    source = config("fedavg", rounds=2)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(source, out=out, callbacks=[stop_after(1)])
    directory = RunDirectory(out)
    recorded = directory.config()
    del recorded["output"]["loggers"]
    recorded["output"]["tensorboard"] = False
    directory.write_config(recorded)

    finished = run(out / "config.yaml", out=out, resume=True)

    assert finished.summary["rounds_completed"] == 2


def test_missing_module_is_reported_before_the_run_directory_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    source = config(output__loggers=["csv", "mlflow"])
    line = (
        r"^output\.loggers\.1: mlflow requires mlflow, which is not installed; "
        r"run pip install 'mlflow' or remove the logger$"
    )

    with pytest.raises(UserError, match=line):
        run(source, out=tmp_path / "run")
    with pytest.raises(UserError, match=line):
        compare(source, ["local"], out=tmp_path / "comparison", jobs=1)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_compared_runs_log_to_their_own_folders(tmp_path: Path) -> None:
    source = config("fedavg", rounds=2, output__loggers=["csv"])

    comparison = compare(source, ["local", "fedavg"], seeds=[0, 1], out=tmp_path / "c", jobs=1)
    # The finished runs are reused, although a logger was added.
    source["output"]["loggers"] = ["csv", "tensorboard"]
    compare(source, ["local", "fedavg"], seeds=[0, 1], out=tmp_path / "c", jobs=1)

    assert len(comparison.runs) == 4
    for finished in comparison.runs:
        assert csv_rounds(finished.path) == [1, 2]


@pytest.mark.slow
def test_compared_runs_share_a_new_mlflow_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # MLflow writes artifacts to the current folder
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    source = config("fedavg", output__loggers=[{"kind": "mlflow", "tracking_uri": uri}])

    compare(source, ["local", "fedavg"], seeds=[0, 1], out=tmp_path / "c", jobs=2)

    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [
        ("fedavg-seed0", "FINISHED"),
        ("fedavg-seed1", "FINISHED"),
        ("local-seed0", "FINISHED"),
        ("local-seed1", "FINISHED"),
    ]
