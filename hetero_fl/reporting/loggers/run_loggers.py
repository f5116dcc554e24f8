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

    A logger that fails during the run does not stop the run. The failure is printed once, and the
    logger receives the missing rounds again after the next round and at the end.

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
        self._pending: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in loggers}
        self._state: dict[str, dict[str, Any]] = {}
        self._written: dict[str, dict[str, Any]] = {}
        self._failing: set[str] = set()
        self._started: list[str] = []

    def start(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Start all loggers, and log the completed rounds that a logger has not received.

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
            known = self._state.get(kind, {"rounds": 0})
            rounds = known["rounds"]
            run = LoggedRun(
                name=self._name,
                path=self._directory.path,
                run_id=run_id,
                config=deepcopy(config),
                first_round=1 if logger.rewrites else rounds + 1,
                log=self._log,
                state=dict(known.get("state", {})),
            )
            self._started.append(kind)
            try:
                logger.start(run)
                self._written[kind] = _copy_state(run.state)
            except (Exception, SystemExit) as error:
                raise RunFailedError(
                    f"output.loggers: {kind} did not start ({_describe(error)}); correct or remove "
                    "the logger and continue with --resume"
                ) from error
            self._state[kind] = {"rounds": 0 if logger.rewrites else rounds, "state": run.state}
        self._write_state()
        for record in history:
            self._receive(record)
        self._log_pending()

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a round."""
        self._receive(record)
        self._log_pending()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the end of the run.

        Args:
            summary: Content of `summary.json`.
        """
        self._log_pending()
        for kind, logger in self._loggers.items():
            if missing := self._pending[kind]:
                self._log(f"{kind}: {pluralize(len(missing), 'round')} could not be logged")
            self._call(kind, partial(logger.finish, deepcopy(summary)), "the end of the run")

    def close(self) -> None:
        """Close all loggers that were started."""
        while self._started:
            kind = self._started.pop()
            self._call(kind, self._loggers[kind].close, "the end of the run")

    def _receive(self, record: Mapping[str, Any]) -> None:
        """Add a record to the records that each logger has not received."""
        for kind, waiting in self._pending.items():
            # A resumed run may repeat rounds that were logged before the interruption.
            if record["round"] > self._state[kind]["rounds"]:
                waiting.append(record)

    def _log_pending(self) -> None:
        for kind, logger in self._loggers.items():
            waiting = self._pending[kind]
            while waiting:
                number = waiting[0]["round"]
                # A logger may modify its copy.
                log = partial(logger.log, deepcopy(waiting[0]))
                if not self._call(kind, log, f"round {number}"):
                    break
                self._state[kind]["rounds"] = number
                del waiting[0]
        self._write_state()

    def _call(self, kind: str, action: Callable[[], None], what: str) -> bool:
        """Call a logger and return whether it succeeded.

        Only the first of several failures in succession is printed.
        """
        try:
            action()
        # A failure of a service or of a user-defined logger must not stop the run.
        except (Exception, SystemExit) as error:
            if kind not in self._failing:
                self._log(f"{kind}: {what} could not be logged ({_describe(error)})")
            self._failing.add(kind)
            return False
        self._failing.discard(kind)
        return True

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
        for kind, entry in self._state.items():
            try:
                self._written[kind] = _copy_state(entry.get("state", {}))
            except (ValueError, TypeError, RecursionError) as error:
                if kind not in self._failing:
                    self._log(f"{kind}: the state could not be saved ({_describe(error)})")
                self._failing.add(kind)
        content = {
            kind: {**entry, "state": self._written.get(kind, {})}
            for kind, entry in self._state.items()
        }
        self._directory.write_json(STATE, content)


def _copy_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the state of a logger.

    Raises:
        ValueError: If the state contains NaN or a circular reference.
        TypeError: If the state contains a value that JSON does not support.
    """
    return dict(json.loads(json.dumps(state, allow_nan=False)))


def _describe(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 200)
