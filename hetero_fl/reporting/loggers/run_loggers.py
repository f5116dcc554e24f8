"""The loggers of one run: validation, start, rounds, resume and failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from hetero_fl.config.errors import describe_error
from hetero_fl.config.schema import Config, LoggerConfig
from hetero_fl.reporting.loggers.base import LoggedRun, Logger, register_logger
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import RunFailedError, UserError, one_line
from hetero_fl.utils.text import pluralize

STATE = "loggers.json"
"""File in the run directory with the number of logged rounds and the state of each logger."""


def make_logger(entry: LoggerConfig, index: int = 0) -> Logger:
    """Create the logger of an entry of `output.loggers`.

    Args:
        entry: The entry.
        index: Index of the entry, for error messages.

    Raises:
        UserError: If the kind is unknown or a setting is invalid.
    """
    where = f"output.loggers.{index}"
    try:
        logger_type = register_logger[entry.kind]
    except UserError as error:
        message = str(error).removeprefix("logger: ")
        raise UserError(f"{where}.kind: {message}") from None
    try:
        return logger_type.model_validate(entry.settings)
    except ValidationError as error:
        problem = describe_error(error, entry.settings, logger_type, where.split("."))
        raise UserError(f"{problem} (kind={entry.kind})") from None
    # The validation of a user-defined logger may raise any exception.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {entry.kind} is not valid ({_describe(error)})") from error


def make_loggers(config: Config) -> dict[str, Logger]:
    """Create the loggers of a configuration, keyed by kind.

    Raises:
        UserError: If a kind is unknown or a setting is invalid.
    """
    return {
        entry.kind: make_logger(entry, index) for index, entry in enumerate(config.output.loggers)
    }


def check_loggers(config: Config) -> None:
    """Check that the modules that the loggers require are installed.

    Raises:
        UserError: If a module is missing.
    """
    for index, (kind, logger) in enumerate(make_loggers(config).items()):
        if logger.module and find_spec(logger.module) is None:
            target = f"hetero_fl[{logger.extra}]" if logger.extra else logger.module
            raise UserError(
                f"output.loggers.{index}: {kind} requires {logger.module}, which is not installed; "
                f"run pip install '{target}' or remove the logger"
            )


class RunLoggers:
    """The loggers of a run.

    `loggers.json` contains the last round that each logger has accepted. A logger that fails during
    the run does not stop the run. The failure is printed once, and the logger receives the missing
    rounds after the next round and at the end, from `metrics.jsonl`.

    Args:
        loggers: The loggers, keyed by kind.
        directory: The run directory.
        name: Name of the run.
        log: Function that prints one line.
    """

    def __init__(
        self,
        loggers: Mapping[str, Logger],
        directory: RunDirectory,
        name: str,
        log: Callable[[str], None],
    ) -> None:
        self._loggers = dict(loggers)
        self._directory = directory
        self._name = name
        self._log = log
        self._runs: dict[str, LoggedRun] = {}
        self._state: dict[str, dict[str, Any]] = {}
        self._failing: set[str] = set()

    def start(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Start all loggers, and log the completed rounds that a logger has not accepted.

        Args:
            history: Records of the completed rounds.

        Raises:
            RunFailedError: If a logger cannot be started.
        """
        if not self._loggers:
            return
        self._state = self._read_state()
        config = self._directory.config()
        run_id = str(self._directory.environment().get("run") or self._directory.path.name)
        for kind, logger in self._loggers.items():
            known = self._state.get(kind, {})
            rounds = 0 if logger.rewrites else known.get("rounds", 0)
            run = LoggedRun(
                name=self._name,
                path=self._directory.path,
                run_id=run_id,
                config=deepcopy(config),
                first_round=rounds + 1,
                log=self._log,
                state=dict(known.get("state", {})),
            )
            self._runs[kind] = run
            try:
                logger.start(run)
                self._state[kind] = {"rounds": rounds, "state": _copy_state(run.state)}
            except (Exception, SystemExit) as error:
                raise RunFailedError(
                    f"output.loggers: {kind} did not start ({_describe(error)}); correct or remove "
                    "the logger and continue with --resume"
                ) from error
        self._write_state()
        self._send(history)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a round, after earlier rounds that a logger has not accepted."""
        self._catch_up(record["round"] - 1)
        self._send([record])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the end of the run.

        Args:
            summary: Content of `summary.json`.
        """
        completed = summary["rounds_completed"]
        self._catch_up(completed)
        for kind, logger in self._loggers.items():
            missing = completed - self._state[kind]["rounds"]
            if missing > 0:
                self._log(f"{kind}: {pluralize(missing, 'round')} could not be logged")
            self._call(kind, partial(logger.finish, deepcopy(summary)), "the end of the run")

    def close(self) -> None:
        """Close all loggers that were started."""
        while self._runs:
            kind, _ = self._runs.popitem()
            self._call(kind, self._loggers[kind].close, "the end of the run")

    def _catch_up(self, completed: int) -> None:
        """Log the rounds in `metrics.jsonl`, up to a round, that a logger has not accepted."""
        if any(self._state[kind]["rounds"] < completed for kind in self._loggers):
            self._send(self._directory.metrics()[:completed])

    def _send(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Pass on records to each logger, in order, from the first round that it has not accepted.

        A resumed run may repeat rounds that were logged before the interruption.
        """
        for kind, logger in self._loggers.items():
            state = self._state[kind]
            for record in records:
                if record["round"] != state["rounds"] + 1:
                    continue
                # A logger may modify its copy.
                log = partial(logger.log, deepcopy(record))
                if self._call(kind, log, f"round {record['round']}"):
                    state["rounds"] = record["round"]
        self._write_state()

    def _call(self, kind: str, action: Callable[[], None], what: str) -> bool:
        """Call a logger and return whether it succeeded."""
        try:
            action()
        # A failure of a service or of a user-defined logger must not stop the run.
        except (Exception, SystemExit) as error:
            self._warn(kind, f"{kind}: {what} could not be logged", error)
            return False
        self._failing.discard(kind)
        return True

    def _warn(self, what: str, line: str, error: BaseException) -> None:
        """Print the first of several failures in succession."""
        if what not in self._failing:
            self._log(f"{line} ({_describe(error)})")
        self._failing.add(what)

    def _read_state(self) -> dict[str, Any]:
        if not (self._directory.path / STATE).exists():
            return {}
        where = self._directory.path / STATE
        try:
            state = json.loads(self._directory.read_text(STATE))
            if all(isinstance(entry["rounds"], int) for entry in state.values()):
                return dict(state)
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise UserError(
            f"{where}: not valid; restore the file, or delete it to log all rounds again"
        )

    def _write_state(self) -> None:
        """Write the state of each logger, or its last valid state."""
        if not self._loggers:
            return
        for kind, run in self._runs.items():
            try:
                self._state[kind]["state"] = _copy_state(run.state)
            except (ValueError, TypeError, RecursionError) as error:
                self._warn(f"state of {kind}", f"{kind}: the state could not be saved", error)
        self._directory.write_json(STATE, self._state)


def _copy_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the state of a logger.

    Raises:
        ValueError: If the state contains NaN or a circular reference.
        TypeError: If the state contains a value that JSON does not support.
    """
    return dict(json.loads(json.dumps(state, allow_nan=False)))


def _describe(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
