"""The loggers of one run: validation, start, rounds, resume and failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from hetero_fl.config.describe import describe_error
from hetero_fl.config.schema import Config, LoggerConfig
from hetero_fl.reporting.loggers import LoggedRun, Logger, register_logger
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import RunFailedError, UserError, one_line
from hetero_fl.utils.text import pluralize

STATE = "loggers.json"
"""File in the run directory with the number of logged rounds and the state of each logger."""


def make_loggers(config: Config) -> dict[str, Logger]:
    """Create the loggers of a configuration, keyed by kind.

    Raises:
        UserError: If a kind is unknown or a setting is invalid.
    """
    return {
        entry.kind: _make_logger(entry, f"output.loggers.{index}")
        for index, entry in enumerate(config.output.loggers)
    }


def _make_logger(entry: LoggerConfig, where: str) -> Logger:
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
        self._unsaved: set[str] = set()

    def start(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Start all loggers, and log the completed rounds that a logger has not accepted.

        Args:
            history: Records of the completed rounds.

        Raises:
            RunFailedError: If a logger cannot be started.
        """
        if not self._loggers:
            return
        self._state = _read_state(self._directory)
        environment = self._directory.environment()
        for kind, logger in self._loggers.items():
            known = self._state.setdefault(kind, {"rounds": 0, "state": {}})
            if logger.rewrites:
                known["rounds"] = 0
            self._runs[kind] = LoggedRun(
                name=self._name,
                path=self._directory.path,
                run_id=str(environment.get("run") or self._directory.path.name),
                config=self._directory.config(),
                first_round=known["rounds"] + 1,
                log=self._log,
                state=known["state"],
            )
            try:
                logger.start(self._runs[kind])
                self._keep_state(kind)
            except (Exception, SystemExit) as error:
                raise RunFailedError(
                    f"output.loggers: {kind} did not start ({_describe(error)}); correct or remove "
                    "the logger and continue with --resume"
                ) from error
        # A run that is killed now continues with the state of the loggers.
        self._directory.write_json(STATE, self._state)
        self._send(history)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a round, after earlier rounds that a logger has not accepted."""
        completed = record["round"]
        is_behind = any(self._state[kind]["rounds"] < completed - 1 for kind in self._loggers)
        self._send(self._directory.metrics()[:completed] if is_behind else [record])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the end of the run.

        Args:
            summary: Content of `summary.json`.
        """
        completed = summary["rounds_completed"]
        if any(self._state[kind]["rounds"] < completed for kind in self._loggers):
            self._send(self._directory.metrics()[:completed])
        for kind, logger in self._loggers.items():
            missing = completed - self._state[kind]["rounds"]
            if missing > 0:
                self._log(f"{kind}: {pluralize(missing, 'round')} could not be logged")
            self._try(kind, partial(logger.finish, deepcopy(summary)), "the end of the run")

    def close(self) -> None:
        """Close all loggers that were started."""
        for kind in list(self._runs):
            self._try(kind, self._loggers[kind].close, "the end of the run")
            del self._runs[kind]

    def _send(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Pass on records to each logger, in order, from the first round that it has not accepted.

        A resumed run may repeat rounds that were logged before the interruption.
        """
        for kind, logger in self._loggers.items():
            state = self._state[kind]
            for record in records:
                # A logger may modify its copy.
                log = partial(logger.log, deepcopy(record))
                is_next = record["round"] == state["rounds"] + 1
                if is_next and self._try(kind, log, f"round {record['round']}"):
                    state["rounds"] = record["round"]
        if self._loggers:
            self._directory.write_json(STATE, self._state)

    def _try(self, kind: str, action: Callable[[], None], what: str) -> bool:
        """Call a logger and return whether it succeeded.

        A failure of a service or of a user-defined logger does not stop the run. The first of
        several failures in succession is printed.
        """
        try:
            action()
        except (Exception, SystemExit) as error:
            if kind not in self._failing:
                self._log(f"{kind}: {what} could not be logged ({_describe(error)})")
            self._failing.add(kind)
            return False
        self._failing.discard(kind)
        try:
            self._keep_state(kind)
        except (TypeError, ValueError, RecursionError) as error:
            if kind not in self._unsaved:
                self._log(f"{kind}: the state could not be saved ({_describe(error)})")
            self._unsaved.add(kind)
        return True

    def _keep_state(self, kind: str) -> None:
        """Keep a copy of the state of a logger, which must be serializable as JSON."""
        text = json.dumps(self._runs[kind].state, allow_nan=False)
        self._state[kind]["state"] = json.loads(text)


def _read_state(directory: RunDirectory) -> dict[str, Any]:
    """Return the number of logged rounds and the state of each logger, keyed by kind."""
    if not (directory.path / STATE).exists():
        return {}
    try:
        state = json.loads(directory.read_text(STATE))
        return {
            kind: {"rounds": int(e["rounds"]), "state": dict(e["state"])}
            for kind, e in state.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{directory.path / STATE}: not valid; restore the file, or delete it to log all "
            "rounds again"
        ) from None


def _describe(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
