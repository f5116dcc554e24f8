"""The rounds that loggers receive in resumed and failing runs, and the start of loggers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import PrivateAttr

from hetero_fl import Logger, load_config
from hetero_fl.reporting.loggers import (
    LoggedRun,
    RunLoggers,
    check_loggers,
    register_logger,
    round_scalars,
)
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case

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
) -> RunLoggers:
    """Start a logger when some rounds are done, and log the rounds until `end`."""
    records = directory.metrics()
    loggers = RunLoggers({"memory": logger}, directory, "trial", log)
    loggers.start(records[:done])
    for record in records[done:end]:
        loggers.log(record)
    return loggers


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
    assert "test/personal/auroc" not in second
    assert "test/personal/auroc_std" in second
    expected = {"logged/gap": 1.5, "logged/drift": 5, "privacy/epsilon": 2.5}
    assert {name: last[name] for name in expected} == expected
    assert not any("server" in name for name in last)


def test_logger_receives_each_round_once(made_run: MakeRun) -> None:
    directory = made_run(rounds=3)
    logger = MemoryLogger()

    loggers = log_rounds(logger, directory)
    loggers.finish(directory.summary())
    loggers.close()
    loggers.close()

    assert logger._calls == [("start", 1, {}), 1, 2, 3, "finish", "close"]


@each_case(
    ("kind", "before", "after", "calls"),
    [
        # Round 4 was committed but not logged.
        (MemoryLogger, (0, 3), (4, 5), [("start", 4, {"id": "abc"}), 4, 5]),
        # The newest checkpoint is from round 2, so round 3 is repeated.
        (MemoryLogger, (3, 3), (2, 4), [("start", 4, {"id": "abc"}), 4]),
        (RewritingLogger, (2, 2), (2, 2), [("start", 1, {"id": "abc"}), 1, 2]),
    ],
)
def test_resumed_run_logs_missing_rounds_only(
    made_run: MakeRun,
    kind: type[MemoryLogger],
    before: tuple[int, int],
    after: tuple[int, int],
    calls: list[Any],
) -> None:
    directory = made_run(rounds=6)
    log_rounds(kind(), directory, *before).close()
    logger = kind()

    log_rounds(logger, directory, *after)

    assert logger._calls == calls


@each_case(
    ("failures", "calls", "lines"),
    [
        # The round is logged with a later one.
        ([None, LOST, LOST, None, None, None], [1, 2, 3, 4, "finish"], []),
        ([None, *[LOST] * 9], [1, "finish"], ["memory: 3 rounds could not be logged"]),
    ],
)
def test_failure_is_printed_once_and_rounds_that_were_never_logged_are_counted(
    made_run: MakeRun, failures: list[Any], calls: list[Any], lines: list[str]
) -> None:
    directory = made_run(rounds=4)
    printed: list[str] = []
    logger = MemoryLogger(on_log=Mock(side_effect=failures))

    loggers = log_rounds(logger, directory, log=printed.append)
    loggers.finish(directory.summary())
    loggers.close()

    assert logger._calls[1:] == [*calls, "close"]
    failed = "memory: round 2 could not be logged (OSError: no route to 2)"
    assert printed == [failed, *lines]


@each_case("content", ["[]", "{", '{"memory": 3}', '{"memory": {"rounds": "x"}}'])
def test_damaged_state_is_reported(made_run: MakeRun, content: str) -> None:
    directory = made_run(rounds=1)
    (directory.path / "loggers.json").write_text(content)

    with pytest.raises(UserError, match=r"loggers.json: not valid; restore the file, or delete"):
        log_rounds(MemoryLogger(), directory)


def test_state_of_a_removed_logger_is_kept(made_run: MakeRun) -> None:
    directory = made_run(rounds=1)
    log_rounds(MemoryLogger(), directory)

    RunLoggers({"other": MemoryLogger()}, directory, "trial", print).start([])

    assert json.loads((directory.path / "loggers.json").read_text())["memory"]["rounds"] == 1


def test_logger_neither_stops_the_run_nor_modifies_its_records(made_run: MakeRun) -> None:
    directory = made_run(rounds=2)
    history = directory.metrics()
    lines: list[str] = []

    def clear_and_exit(record: Any) -> None:
        record["train_loss"].clear()
        raise SystemExit(3)

    loggers = RunLoggers(
        {"memory": MemoryLogger(on_log=clear_and_exit)}, directory, "", lines.append
    )
    loggers.start(history)

    assert lines == ["memory: round 1 could not be logged (SystemExit: 3)"]
    assert history == directory.metrics()


def test_state_that_cannot_be_saved_gives_one_line(made_run: MakeRun) -> None:
    directory = made_run(rounds=2)
    runs: list[LoggedRun] = []
    lines: list[str] = []

    def spoil(record: Any) -> None:
        runs[0].state["id"] = {1}

    log_rounds(MemoryLogger(on_start=runs.append, on_log=spoil), directory, log=lines.append)

    (line,) = lines
    assert line.startswith("memory: the state could not be saved (TypeError: ")
    saved = json.loads((directory.path / "loggers.json").read_text())
    assert saved["memory"] == {"rounds": 2, "state": {"id": "abc"}}


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
    monkeypatch.setattr(register_logger, "_known", dict(register_logger._known))
    register_logger("invalid")(type("Invalid", (MemoryLogger,), {"model_post_init": _fail}))

    with pytest.raises(UserError) as caught:
        check_loggers(load_config({"output": {"loggers": ["invalid"]}}))

    assert str(caught.value).endswith("output.loggers.0: invalid is not valid (KeyError: 'host')")


def _fail(logger: Logger, context: Any) -> None:
    raise KeyError("host")
