"""The built-in loggers: their files are read back, or a mock receives the calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pandas as pd
import pytest

from hetero_fl.reporting.loggers import (
    CSVLogger,
    Logger,
    MLflowLogger,
    RunLoggers,
    TensorBoardLogger,
    WandbLogger,
)
from hetero_fl.reporting.run_directory import RunDirectory
from tests.support.loggers import read_finished_wandb_run


def log_in_two_parts(
    make: Callable[[], Logger], directory: RunDirectory, lines: list[str] | None = None
) -> None:
    """Log half of the rounds, then resume from the beginning of the last logged round."""
    records = directory.metrics()
    half = len(records) // 2
    loggers = RunLoggers({"it": make()}, directory, "trial", print)
    loggers.start([])
    for record in records[:half]:
        loggers.log(record)
        csv = directory.path / "metrics.csv"
        assert not csv.exists() or len(pd.read_csv(csv)) == record["round"]
    loggers.close()

    log = print if lines is None else lines.append
    loggers = RunLoggers({"it": make()}, directory, "trial", log)
    loggers.start(records[: half - 1])
    for record in records[half - 1 :]:
        loggers.log(record)
    loggers.finish(directory.summary())
    loggers.close()


def test_csv_has_one_row_per_round(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=6, every=2)

    log_in_two_parts(CSVLogger, directory)

    table = pd.read_csv(directory.path / "metrics.csv")
    records = directory.metrics()
    assert table["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["communication/up_bytes"].tolist() == [r["up_bytes"] for r in records]
    assert table["test/global/accuracy"].isna().tolist() == [True, False] * 3
    assert table["test/global/accuracy"][5] == records[5]["global"]["accuracy"]
    assert (directory.path / "metrics.csv").read_bytes().endswith(b"\n")


def test_tensorboard_events_are_read_back(made_run: Callable[..., RunDirectory]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = made_run(rounds=6, every=2)

    log_in_two_parts(TensorBoardLogger, directory)

    events = EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    records = directory.metrics()
    sent = [(event.step, event.value) for event in events.Scalars("communication/up_bytes")]
    assert sent == [(r["round"], r["up_bytes"]) for r in records]
    scores = {event.step: event.value for event in events.Scalars("test/server/auroc")}
    assert scores == pytest.approx({i: records[i - 1]["server"]["auroc"] for i in (2, 4, 6)})
    assert events.Tags()["tensors"] == ["config/text_summary"]


@pytest.mark.filterwarnings("ignore")
def test_wandb_continues_the_offline_run(
    made_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    directory = made_run(rounds=4)
    directory.write_json("environment.json", {**directory.environment(), "run": "0123456789abcdef"})
    lines: list[str] = []

    log_in_two_parts(
        lambda: WandbLogger(project="hospitals", mode="offline", tags=["x"]), directory, lines
    )

    files = sorted(directory.path.glob("wandb/offline-run-*/*.wandb"))
    parts = [read_finished_wandb_run(file) for file in files]
    runs = [record.run for part in parts for record in part if record.HasField("run")]
    assert {run.run_id for run in runs} == {"0123456789abcdef"}
    assert {(run.project, run.display_name, run.run_group) for run in runs} == {
        ("hospitals", "run", "trial")
    }
    steps = [
        [record.history.step.num for record in part if record.HasField("history")] for part in parts
    ]
    exits = [record.exit.exit_code for part in parts for record in part if record.HasField("exit")]
    assert steps == [[1, 2], [3, 4]]
    assert exits == [1, 0]
    assert lines == [
        f"wandb: offline; to upload: wandb sync {directory.path}/wandb/*-0123456789abcdef*"
    ]


def test_mlflow_logger_continues_its_run(
    made_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = Mock()
    mlflow.set_experiment.return_value.experiment_id = "7"
    mlflow.start_run.return_value.info.run_id = "a"
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    directory = made_run(rounds=4, every=2)
    directory.write_text("report.html", "<p>report</p>")

    log_in_two_parts(lambda: MLflowLogger(tracking_uri="file:x", tags={"site": "a"}), directory)

    started = [each.kwargs for each in mlflow.start_run.call_args_list]
    logged = mlflow.log_metrics.call_args_list
    (params,) = mlflow.log_params.call_args.args
    artifacts = [Path(each.args[0]).name for each in mlflow.log_artifact.call_args_list]
    assert mlflow.set_tracking_uri.call_args_list == [call("file:x")] * 2
    assert mlflow.set_experiment.call_args_list == [call("trial")] * 2
    assert [each["run_id"] for each in started] == [None, "a"]
    assert (started[0]["experiment_id"], started[0]["run_name"]) == ("7", "run")
    assert started[0]["tags"]["site"] == "a"
    assert [each.kwargs for each in logged] == [{"step": i, "run_id": "a"} for i in (1, 2, 3, 4)]
    assert [each.args[0]["communication/up_bytes"] for each in logged] == [
        record["up_bytes"] for record in directory.metrics()
    ]
    mlflow.log_params.assert_called_once()
    assert (params["data.partition.kind"], params["rounds"]) == ("dirichlet", "4")
    assert artifacts == ["config.yaml", "summary.json", "report.html"]
    assert mlflow.end_run.call_args_list == [call("KILLED"), call("FINISHED")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["sqlite:///{}/store.db", "file:{}/store"])
def test_mlflow_stores_are_read_back(
    made_run: Callable[..., RunDirectory],
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    directory = made_run(rounds=4, every=2)
    uri = store.format(tmp_path)

    log_in_two_parts(lambda: MLflowLogger(tracking_uri=uri, experiment="hospitals"), directory)

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("hospitals")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "test/global/accuracy")
    records = directory.metrics()
    assert found.info.status == "FINISHED"
    assert found.data.params["algorithm.name"] == "hybrid"
    assert [(m.step, m.value) for m in history] == [
        (i, records[i - 1]["global"]["accuracy"]) for i in (2, 4)
    ]
    assert {a.path for a in client.list_artifacts(found.info.run_id)} == {
        "config.yaml",
        "summary.json",
    }
