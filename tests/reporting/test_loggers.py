"""The built-in loggers, and the rounds that loggers receive in resumed and failing runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
from pydantic import PrivateAttr

from hetero_fl import Logger, load_config
from hetero_fl.reporting.loggers import (
    CSVLogger,
    LoggedRun,
    MLflowLogger,
    TensorBoardLogger,
    WandbLogger,
    register_logger,
    round_scalars,
)
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.run_loggers import RunLoggers, check_loggers
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.loggers import read_finished_wandb_run

MakeRun = Callable[..., RunDirectory]
LOST = OSError("no route\nto 2")


class MemoryLogger(Logger):
    """Record all calls of which the functions of a test raise no exception."""

    on_start: Callable[[LoggedRun], object] = print
    on_log: Callable[[Mapping[str, Any]], object] = print

    _calls: list[Any] = PrivateAttr(default_factory=list)

    def start(self, run: LoggedRun) -> None:
        self._calls.append(("start", run.first_round, dict(run.state)))
        run.state["id"] = "abc"
        self.on_start(run)

    def log(self, record: Mapping[str, Any]) -> None:
        self.on_log(record)
        self._calls.append(record["round"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._calls.append("finish")

    def close(self) -> None:
        self._calls.append("close")


class RewritingLogger(MemoryLogger):
    rewrites = True


def log_rounds(
    logger: Logger,
    directory: RunDirectory,
    done: int = 0,
    end: int | None = None,
    log: Callable[[str], object] = print,
) -> None:
    """Start a logger when some rounds are done, and log the rounds until `end` or the whole run."""
    records = directory.metrics()
    loggers = RunLoggers({"memory": logger}, directory, "trial", log)
    loggers.start(records[:done])
    for record in records[done:end]:
        loggers.log(record)
    if end is None:
        loggers.finish(directory.summary())
    loggers.close()


def test_scalars_are_all_defined_numbers_of_a_round(made_run: MakeRun) -> None:
    records = made_run(rounds=4, every=2, server=False, kind="multiclass", classes=10).metrics()
    records[1]["personal"]["auroc"] = None
    records[3]["logged"] = {"a": {"gap": 1.0}, "b": {"gap": 2.0}, "c": {"drift": 5.0}}
    records[3]["privacy"] = {"epsilon": 2.5, "delta": 1e-5, "unit": "record"}

    first, second, _, last = map(round_scalars, records)

    assert second["test/global/auroc"] == records[1]["global"]["auroc"]
    assert last["validation/personal/loss"] == records[3]["validation"]["personal"]["loss"]
    assert last["communication/up_bytes"] == records[3]["up_bytes"]
    assert first["train/loss"] == pytest.approx(sum(records[0]["train_loss"].values()) / 6)
    assert "test/global/auroc" not in first
    assert "test/personal/auroc" not in second and "test/personal/auroc_std" in second
    expected = {"logged/gap": 1.5, "logged/drift": 5, "privacy/epsilon": 2.5}
    assert {name: last[name] for name in expected} == expected
    assert not any("server" in name for name in last)


@each_case(
    ("kind", "before", "after", "calls"),
    [
        # Round 4 was committed but not logged.
        (MemoryLogger, (0, 3), (4, 5), [("start", 4, {"id": "abc"}), 4, 5, "close"]),
        # The newest checkpoint is from round 2, so round 3 is repeated.
        (MemoryLogger, (3, 3), (2, 4), [("start", 4, {"id": "abc"}), 4, "close"]),
        (MemoryLogger, (0, 5), (5, None), [("start", 6, {"id": "abc"}), 6, "finish", "close"]),
        (RewritingLogger, (2, 2), (2, 2), [("start", 1, {"id": "abc"}), 1, 2, "close"]),
    ],
)
def test_resumed_run_logs_missing_rounds_only(
    made_run: MakeRun,
    kind: type[MemoryLogger],
    before: tuple[int, int],
    after: tuple[int, int | None],
    calls: list[Any],
) -> None:
    directory = made_run(rounds=6)
    log_rounds(kind(), directory, *before)
    RunLoggers({"other": MemoryLogger()}, directory, "trial", print).start([])
    logger = kind()

    log_rounds(logger, directory, *after)

    assert logger._calls == calls


@each_case(
    ("failures", "calls", "lines"),
    [
        # The round is logged with a later one.
        ([None, LOST, LOST, None, None, None], [1, 2, 3, 4, "finish"], []),
        ([None, *[LOST] * 9], [1, "finish"], ["memory: 3 rounds could not be logged"]),
        ([SystemExit(3), *[None] * 4], [1, 2, 3, 4, "finish"], []),
    ],
)
def test_failure_is_printed_once_and_rounds_that_were_never_logged_are_counted(
    made_run: MakeRun, failures: list[Any], calls: list[Any], lines: list[str]
) -> None:
    directory = made_run(rounds=4)
    printed: list[str] = []
    logger = MemoryLogger(on_log=Mock(side_effect=failures))

    log_rounds(logger, directory, log=printed.append)

    failed = "memory: round 2 could not be logged (OSError: no route to 2)"
    if failures[0] is not None:
        failed = "memory: round 1 could not be logged (SystemExit: 3)"
    assert logger._calls[1:] == [*calls, "close"]
    assert printed == [failed, *lines]


def test_logger_can_modify_neither_records_nor_spoil_the_saved_state(made_run: MakeRun) -> None:
    directory = made_run(rounds=2)
    history = directory.metrics()
    runs: list[LoggedRun] = []
    lines: list[str] = []

    def spoil(record: Any) -> None:
        record["train_loss"].clear()
        runs[0].state["id"] = {1}

    logger = MemoryLogger(on_start=runs.append, on_log=spoil)
    loggers = RunLoggers({"memory": logger}, directory, "trial", lines.append)
    loggers.start(history)

    (line,) = lines
    saved = json.loads((directory.path / "loggers.json").read_text())
    assert history == directory.metrics()
    assert line.startswith("memory: the state could not be saved (TypeError: ")
    assert saved == {"memory": {"rounds": 2, "state": {"id": "abc"}}}


@each_case("content", ["[]", "{", '{"memory": 3}', '{"memory": {"rounds": "x"}}'])
def test_damaged_state_is_reported(made_run: MakeRun, content: str) -> None:
    directory = made_run(rounds=1)
    (directory.path / "loggers.json").write_text(content)

    with pytest.raises(UserError, match=r"loggers.json: not valid; restore the file, or delete"):
        log_rounds(MemoryLogger(), directory)


@each_case(
    ("on_start", "message"),
    [
        (lambda run: run.state.update(id={1}), "memory did not start"),
        (
            Mock(side_effect=ConnectionError("refused")),
            r"memory did not start \(ConnectionError: refused\)",
        ),
    ],
)
def test_logger_that_cannot_start_fails_the_run(
    made_run: MakeRun, on_start: Callable[[LoggedRun], object], message: str
) -> None:
    with pytest.raises(RunFailedError, match=message):
        log_rounds(MemoryLogger(on_start=on_start), made_run(rounds=1))


def test_exception_in_validation_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Logger, context: Any) -> None:
        raise KeyError("host")

    monkeypatch.setattr(register_logger, "_known", dict(register_logger._known))
    register_logger("invalid")(type("Invalid", (MemoryLogger,), {"model_post_init": fail}))

    with pytest.raises(UserError) as caught:
        check_loggers(load_config({"output": {"loggers": ["invalid"]}}))

    assert str(caught.value).endswith("output.loggers.0: invalid is not valid (KeyError: 'host')")


def log_in_two_parts(
    make: Callable[[], Logger], directory: RunDirectory, log: Callable[[str], object] = print
) -> None:
    """Log half of the rounds, then resume from the beginning of the last logged round."""
    half = len(directory.metrics()) // 2
    log_rounds(make(), directory, end=half)
    log_rounds(make(), directory, half - 1, log=log)


def test_csv_has_one_row_per_round(made_run: MakeRun) -> None:
    directory = made_run(rounds=6, every=2)
    records = directory.metrics()

    log_in_two_parts(CSVLogger, directory)

    table = pd.read_csv(directory.path / "metrics.csv")
    assert table["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["communication/up_bytes"].tolist() == [r["up_bytes"] for r in records]
    assert table["test/global/accuracy"].isna().tolist() == [True, False] * 3
    assert table["test/global/accuracy"][5] == records[5]["global"]["accuracy"]


def test_tensorboard_events_are_read_back(made_run: MakeRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = made_run(rounds=6, every=2)
    records = directory.metrics()

    log_in_two_parts(TensorBoardLogger, directory)

    events = EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    sent = [(event.step, event.value) for event in events.Scalars("communication/up_bytes")]
    scores = {event.step: event.value for event in events.Scalars("test/server/auroc")}
    assert sent == [(r["round"], r["up_bytes"]) for r in records]
    assert scores == pytest.approx({i: records[i - 1]["server"]["auroc"] for i in (2, 4, 6)})
    assert events.Tags()["tensors"] == ["config/text_summary"]


@pytest.mark.filterwarnings("ignore")
def test_wandb_continues_the_offline_run(
    made_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    directory = made_run(rounds=4)
    directory.write_json("environment.json", {**directory.environment(), "run": "0123456789abcdef"})
    lines: list[str] = []

    log_in_two_parts(
        lambda: WandbLogger(project="hospitals", mode="offline"), directory, lines.append
    )

    files = sorted(directory.path.glob("wandb/offline-run-*/*.wandb"))
    parts = [read_finished_wandb_run(file) for file in files]
    runs = [record.run for part in parts for record in part if record.HasField("run")]
    steps = [[r.history.step.num for r in part if r.HasField("history")] for part in parts]
    exits = [record.exit.exit_code for part in parts for record in part if record.HasField("exit")]
    found = {(run.run_id, run.project, run.display_name, run.run_group) for run in runs}
    assert found == {("0123456789abcdef", "hospitals", "run", "trial")}
    assert steps == [[1, 2], [3, 4]] and exits == [1, 0]
    assert lines == [
        f"wandb: offline; to upload: wandb sync {directory.path}/wandb/*-0123456789abcdef*"
    ]


def test_mlflow_logger_continues_its_run(
    made_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = Mock()
    mlflow.start_run.return_value.info.run_id = "a"
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    directory = made_run(rounds=4, every=2)
    directory.write_text("report.html", "<p>report</p>")

    log_in_two_parts(lambda: MLflowLogger(tracking_uri="file:x", tags={"site": "a"}), directory)

    started = [each.kwargs for each in mlflow.start_run.call_args_list]
    logged = mlflow.log_metrics.call_args_list
    (params,) = mlflow.log_params.call_args.args
    artifacts = [Path(each.args[0]).name for each in mlflow.log_artifact.call_args_list]
    mlflow.set_tracking_uri.assert_called_with("file:x")
    mlflow.set_experiment.assert_called_with("trial")
    mlflow.log_params.assert_called_once()
    assert [(each["run_id"], each["run_name"]) for each in started] == [(None, "run"), ("a", "run")]
    assert started[0]["tags"]["site"] == "a"
    assert [each.kwargs for each in logged] == [{"step": i, "run_id": "a"} for i in (1, 2, 3, 4)]
    assert (params["data.partition.kind"], params["rounds"]) == ("dirichlet", "4")
    assert artifacts == ["config.yaml", "summary.json", "report.html"]
    assert [each.args for each in mlflow.end_run.call_args_list] == [("KILLED",), ("FINISHED",)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["sqlite:///{}/store.db", "file:{}/store"])
def test_mlflow_stores_are_read_back(
    made_run: MakeRun, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    directory = made_run(rounds=4, every=2)
    records = directory.metrics()
    uri = store.format(tmp_path)

    log_in_two_parts(lambda: MLflowLogger(tracking_uri=uri, experiment="hospitals"), directory)

    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("hospitals").experiment_id])
    history = client.get_metric_history(found.info.run_id, "test/global/accuracy")
    expected = [(i, records[i - 1]["global"]["accuracy"]) for i in (2, 4)]
    assert found.info.status == "FINISHED"
    assert found.data.params["algorithm.name"] == "hybrid"
    assert [(m.step, m.value) for m in history] == expected
