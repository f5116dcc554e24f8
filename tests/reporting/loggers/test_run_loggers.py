"""Validation of loggers, and the rounds that they receive in resumed and failing runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import Field, PrivateAttr

from hetero_fl import Logger, load_config
from hetero_fl.config.schema import OutputConfig
from hetero_fl.reporting.loggers import (
    LoggedRun,
    RunLoggers,
    check_loggers,
    register_logger,
    round_scalars,
)
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import RunFailedError, UserError


class MemoryLogger(Logger):
    """Record all calls. Calls of `log` fail in the rounds `failing`."""

    limit: int = Field(3, gt=0)
    failing: list[int] = []

    _calls: list[Any] = PrivateAttr(default_factory=list)
    _failing: list[int] = PrivateAttr()

    def start(self, run: LoggedRun) -> None:
        self._failing = list(self.failing)
        self._calls.append(("start", run.first_round, dict(run.state)))
        run.state["id"] = "abc"

    def log(self, record: Mapping[str, Any]) -> None:
        if record["round"] in self._failing:
            self._failing.remove(record["round"])
            raise OSError(f"no route\nto {record['round']}")
        self._calls.append(record["round"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._calls.append("finish")

    def close(self) -> None:
        self._calls.append("close")


class BrokenLogger(Logger):
    """Fail at the start."""

    def start(self, run: LoggedRun) -> None:
        raise ConnectionError("refused")


class RewritingLogger(MemoryLogger):
    rewrites = True


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_logger, "_known", dict(register_logger._known))
    register_logger("memory")(MemoryLogger)


def run_loggers(
    logger: Logger, directory: RunDirectory, lines: list[str] | None = None
) -> RunLoggers:
    return RunLoggers(
        {"memory": logger}, directory, "trial", ([] if lines is None else lines).append
    )


def calls(logger: MemoryLogger) -> list[Any]:
    return [call for call in logger._calls if not isinstance(call, tuple)]


def test_scalars_are_all_defined_numbers_of_a_round(
    made_run: Callable[..., RunDirectory],
) -> None:
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
    assert "test/personal/auroc" not in second
    assert "test/personal/auroc_std" in second
    assert last["logged/gap"] == 1.5
    assert last["logged/drift"] == 5
    assert last["privacy/epsilon"] == 2.5
    assert not any("server" in name for name in last)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["wand"], "output.loggers.0.kind: unknown logger 'wand'; did you mean 'wandb'?"),
        (["csv", {"kind": "wandb", "projekt": "x"}],
         "output.loggers.1.projekt: unknown key; did you mean 'project'? (kind=wandb)"),
        ([{"kind": "wandb", "mode": "ofline"}], "output.loggers.0.mode: expected 'online', "),
        ([{"kind": "memory", "limit": 0}], "output.loggers.0.limit: must be > 0, got 0"),
        ([{"kind": "csv", "file": "x"}],
         "output.loggers.0.file: unknown key; this logger has no settings (kind=csv)"),
        ([{"kind": "wandb", "file": "x"}], "output.loggers.0.file: unknown key; choose from "),
        (["csv", "csv"], "output.loggers: each kind of logger may occur once, got 'csv' twice"),
        ("csv", "output.loggers: expected a list, got 'csv'; write [csv]"),
        ([{"project": "x"}], "output.loggers.0.kind: missing"),
        ([{"kind": 3}], "output.loggers.0.kind: expected a string, got 3"),
        ([None], "output.loggers.0: expected a mapping, got null"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line(written: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config({"output": {"loggers": written}})

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistake_in_an_override_names_the_override() -> None:
    with pytest.raises(UserError, match=r"^output.loggers=\[wand\]: output.loggers.0.kind: "):
        load_config({}, overrides=["output.loggers=[wand]"])


def test_former_key_adds_the_tensorboard_logger() -> None:
    with pytest.warns(FutureWarning, match=r"use output.loggers=\[tensorboard\]"):
        config = load_config({"output": {"tensorboard": True, "loggers": ["csv"]}})

    assert [entry.kind for entry in config.output.loggers] == ["csv", "tensorboard"]


def test_former_key_with_false_adds_no_logger() -> None:
    with pytest.warns(FutureWarning):
        output = OutputConfig(tensorboard=False)

    assert output.loggers == []


def test_missing_module_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = load_config({"output": {"loggers": ["csv", "mlflow"]}})

    with pytest.raises(UserError) as caught:
        check_loggers(config)

    assert str(caught.value) == (
        "output.loggers.1: mlflow requires mlflow, which is not installed; "
        "run pip install 'hetero_fl[mlflow]' or remove the logger"
    )


def test_logger_receives_each_round_once(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=3)
    records = directory.metrics()
    logger = MemoryLogger()

    loggers = run_loggers(logger, directory)
    loggers.start([])
    for record in records:
        loggers.log(record)
    loggers.finish(directory.summary())
    loggers.close()
    loggers.close()

    assert logger._calls == [("start", 1, {}), 1, 2, 3, "finish", "close"]


def test_resumed_run_logs_missing_rounds_only(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=6)
    records = directory.metrics()
    first = run_loggers(MemoryLogger(), directory)
    first.start([])
    for record in records[:3]:
        first.log(record)
    first.close()
    # Round 4 was committed but not logged.
    logger = MemoryLogger()
    second = run_loggers(logger, directory)

    second.start(records[:4])
    second.log(records[4])

    assert logger._calls == [("start", 4, {"id": "abc"}), 4, 5]


def test_repeated_rounds_are_not_logged_again(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=4)
    records = directory.metrics()
    first = run_loggers(MemoryLogger(), directory)
    first.start(records[:3])
    # The newest checkpoint is from round 2, so round 3 is repeated.
    logger = MemoryLogger()
    second = run_loggers(logger, directory)

    second.start(records[:2])
    second.log(records[2])
    second.log(records[3])

    assert calls(logger) == [4]


def test_rewriting_logger_receives_all_rounds_on_resume(
    made_run: Callable[..., RunDirectory],
) -> None:
    directory = made_run(rounds=3)
    records = directory.metrics()
    run_loggers(RewritingLogger(), directory).start(records[:2])
    logger = RewritingLogger()

    run_loggers(logger, directory).start(records[:2])

    assert logger._calls == [("start", 1, {"id": "abc"}), 1, 2]


def test_failure_is_printed_once_and_the_rounds_are_logged_later(
    made_run: Callable[..., RunDirectory],
) -> None:
    directory = made_run(rounds=4)
    lines: list[str] = []
    logger = MemoryLogger(failing=[2, 2])
    loggers = RunLoggers({"memory": logger}, directory, "trial", lines.append)
    loggers.start([])

    for record in directory.metrics():
        loggers.log(record)

    assert calls(logger) == [1, 2, 3, 4]
    assert lines == ["memory: round 2 could not be logged (OSError: no route to 2)"]


def test_rounds_that_were_never_logged_are_counted(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=2)
    lines: list[str] = []
    logger = MemoryLogger(failing=[2] * 9)
    loggers = RunLoggers({"memory": logger}, directory, "trial", lines.append)
    loggers.start([])

    for record in directory.metrics():
        loggers.log(record)
    loggers.finish(directory.summary())
    loggers.close()

    assert calls(logger) == [1, "finish", "close"]
    assert lines[-1] == "memory: 1 round could not be logged"


def test_logger_that_cannot_start_fails_the_run(made_run: Callable[..., RunDirectory]) -> None:
    loggers = run_loggers(BrokenLogger(), made_run(rounds=1))

    with pytest.raises(RunFailedError, match=r"memory did not start \(ConnectionError: refused\)"):
        loggers.start([])


@pytest.mark.parametrize("content", ["[]", "{", '{"memory": 3}', '{"memory": {"rounds": "x"}}'])
def test_damaged_state_is_reported(made_run: Callable[..., RunDirectory], content: str) -> None:
    directory = made_run(rounds=1)
    (directory.path / "loggers.json").write_text(content)

    with pytest.raises(UserError, match=r"loggers.json: not valid; restore the file, or delete"):
        run_loggers(MemoryLogger(), directory).start([])


def test_state_of_a_removed_logger_is_kept(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=1)
    run_loggers(MemoryLogger(), directory).start(directory.metrics())

    RunLoggers({"other": MemoryLogger()}, directory, "trial", print).start([])

    assert json.loads((directory.path / "loggers.json").read_text())["memory"]["rounds"] == 1


class ExitingLogger(MemoryLogger):
    def log(self, record: Mapping[str, Any]) -> None:
        raise SystemExit(3)


class ChangingLogger(MemoryLogger):
    def log(self, record: Mapping[str, Any]) -> None:
        record["train_loss"].clear()


class UnsavedLogger(MemoryLogger):
    """Store a state that JSON does not support."""

    at_start: bool = False

    _run: LoggedRun = PrivateAttr()

    def start(self, run: LoggedRun) -> None:
        self._run = run
        run.state["id"] = {1} if self.at_start else "abc"

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.state["id"] = {1}


class InvalidLogger(Logger):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    def model_post_init(self, context: Any) -> None:
        raise KeyError("host")


def test_logger_that_exits_does_not_stop_the_run(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=2)
    lines: list[str] = []
    loggers = run_loggers(ExitingLogger(), directory, lines)

    loggers.start(directory.metrics())

    assert lines == ["memory: round 1 could not be logged (SystemExit: 3)"]


def test_logger_cannot_modify_the_record(made_run: Callable[..., RunDirectory]) -> None:
    directory = made_run(rounds=1)
    history = directory.metrics()

    run_loggers(ChangingLogger(), directory).start(history)

    assert history == directory.metrics()


def test_state_that_cannot_be_saved_gives_one_line(
    made_run: Callable[..., RunDirectory],
) -> None:
    directory = made_run(rounds=2)
    lines: list[str] = []

    run_loggers(UnsavedLogger(), directory, lines).start(directory.metrics())

    (line,) = lines
    assert line.startswith("memory: the state could not be saved (TypeError: ")
    saved = json.loads((directory.path / "loggers.json").read_text())
    assert saved["memory"] == {"rounds": 2, "state": {"id": "abc"}}
    with pytest.raises(RunFailedError, match="memory did not start"):
        run_loggers(UnsavedLogger(at_start=True), directory).start([])


def test_exception_in_validation_gives_one_line() -> None:
    register_logger("invalid")(InvalidLogger)

    with pytest.raises(UserError) as caught:
        check_loggers(load_config({"output": {"loggers": ["invalid"]}}))

    assert str(caught.value).endswith("output.loggers.0: invalid is not valid (KeyError: 'host')")
