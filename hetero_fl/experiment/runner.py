"""Execution of a run, from its configuration to the finished run directory."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.config import Config, resolve_config
from hetero_fl.config.load import Overrides
from hetero_fl.data import Dataset
from hetero_fl.experiment.configuration import describe_changes
from hetero_fl.experiment.preparation import ExecutorFactory, PreparedRun, prepare
from hetero_fl.experiment.session import RunSession, write_presentation
from hetero_fl.federation.executors.base import NODES
from hetero_fl.federation.executors.choose import ExecutorChoice, choose_executor, require_engine
from hetero_fl.federation.round import Record
from hetero_fl.reporting.integrity import check_inputs, refuse_damaged, verify
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import LOG, RunDirectory, check_vacant, has_run, lock_folder
from hetero_fl.reporting.run_loggers import check_loggers
from hetero_fl.reporting.summary import Patience
from hetero_fl.utils.code_permission import AllowCode, find_references
from hetero_fl.utils.environment import describe_environment
from hetero_fl.utils.errors import Interrupted, UserError, translate_exits
from hetero_fl.utils.processes import exit_if_importing
from hetero_fl.utils.text import pluralize
from model_zoo.generators import own_generators

if TYPE_CHECKING:
    from rich.console import Console


Callback = Callable[[Record], None]


def run(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    quiet: bool | None = None,
    allow_code: AllowCode = False,
) -> Run:
    """Train a federation as configured and write the run directory.

    Args:
        source: A configuration file, a dictionary or a configuration.
        out: The run directory. Default: `runs/<name>-<time>`.
        resume: Whether to continue from the newest intact checkpoint in `out`.
        overrides: Changes to the configuration, as `key.path=value` or as a dictionary.
        callbacks: Functions that are called with the record of each round, which is a line of
            `metrics.jsonl`, after the round has been committed to disk.
        dataset: Data set in memory that replaces the source `data.name`.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        allow_code: Whether code that a file refers to (`python:package.module:Name`) may be
            executed. References in a dictionary or in `overrides` are always allowed.

    Returns:
        The finished run.

    Raises:
        UserError: If the configuration, the data or an argument is invalid, or if another process
            uses `out`.
        RunFailedError: If the run cannot continue.
        Interrupted: After a `KeyboardInterrupt`, if the run can be resumed.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> no_report = ["output.plots=false", "output.report=false"]
        >>> run = hetero_fl.run(config, out=mkdtemp(), overrides=["clients.count=3", *no_report])
        >>> sorted(run.models)
        ['client_1', 'client_2', 'client_3', 'server']
        >>> run.summary["rounds_completed"]
        1
    """
    exit_if_importing()
    try:
        prepared = prepare(source, overrides, dataset, allow_code=allow_code)
    except KeyboardInterrupt as stop:
        if resume and out is not None and (Path(out) / "config.yaml").exists():
            # Preparation writes nothing, so the run in `out` can still be resumed.
            raise Interrupted(Path(out)) from stop
        raise
    return run_prepared(prepared, out=out, resume=resume, callbacks=callbacks, quiet=quiet)


def default_out(config: Config) -> Path:
    """Return the default run directory, `runs/<name>-<time>` with the current local time."""
    return Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def check_resumed_choice(path: Path, on_nodes: bool) -> dict[str, Any]:
    """Read the executor, threads and device that a run was started with.

    Args:
        path: The run directory.
        on_nodes: Whether the run is resumed on several machines.

    Returns:
        The entry `choice` of `environment.json`.

    Raises:
        UserError: If the run was started on several machines and is resumed on one machine, or
            vice versa, or if the entry is missing or invalid.
    """
    started_with = RunDirectory.open(path).environment().get("choice")
    if not isinstance(started_with, dict) or not isinstance(started_with.get("executor"), str):
        raise _missing_choice_error(path)
    if (started_with["executor"] == NODES) != on_nodes:
        advice = (
            "on one machine; resume it with `hetero-fl train`"
            if on_nodes
            else "on nodes; resume it with `hetero-fl federate`, or `flwr run` with resume=true"
        )
        raise UserError(f"{path}: cannot be resumed here: the run was started {advice}")
    return started_with


def _missing_choice_error(path: Path) -> UserError:
    return UserError(f"{path / 'environment.json'}: choice: missing or invalid; restore the file")


def run_prepared(
    prepared: PreparedRun,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool | None = None,
    executor_factory: ExecutorFactory | None = None,
    console: Console | None = None,
) -> Run:
    """Train a prepared run and write the run directory (see `run`).

    Args:
        prepared: The run, from `prepare`.
        out: The run directory. Default: `runs/<name>-<time>`.
        resume: Whether to continue from the newest intact checkpoint in `out`.
        callbacks: Functions that are called with the record of each round, after the round has been
            committed to disk.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        executor_factory: Function that creates the executor for clients on other machines. If None,
            the clients train on this machine.
        console: Console for the progress display. If None, the terminal is used.

    Returns:
        The finished run.

    Raises:
        UserError: If the directory contains a different run or is used by another process.
        RunFailedError: If the run cannot continue.
        Interrupted: After a `KeyboardInterrupt`, if the run can be resumed.
    """
    path = Path(out) if out is not None else default_out(prepared.config)
    session_of_run = open_session(
        prepared,
        path,
        resume=resume,
        quiet=quiet,
        executor_factory=executor_factory,
        console=console,
    )
    with own_generators(), session_of_run as session, translate_exits():
        for record in session or ():
            for callback in callbacks:
                callback(record)
    return Run(path, find_references(prepared.config.model_dump()))


@contextmanager
def open_session(
    prepared: PreparedRun,
    path: Path,
    *,
    resume: bool = False,
    quiet: bool | None = None,
    executor_factory: ExecutorFactory | None = None,
    console: Console | None = None,
) -> Iterator[RunSession | None]:
    """Create or open a run directory and yield the session that trains the run.

    Args:
        prepared: The run.
        path: The run directory.
        resume: Whether to continue from the newest intact checkpoint.
        quiet: Whether to hide the progress display. If None, progress is shown in notebooks only.
        executor_factory: Function that creates the executor for clients on other machines. If None,
            the clients train on this machine.
        console: Console for the progress display. If None, the terminal is used.

    Yields:
        The session, or None if the run has already finished.

    Raises:
        UserError: If the directory contains a different run or is used by another process.
        Interrupted: After a `KeyboardInterrupt`, if the run can be resumed.
    """
    config = prepared.config
    check_loggers(config)
    on_nodes = executor_factory is not None
    is_resumed = resume and has_run(path)
    if not is_resumed:
        check_vacant(path)
    if resume and not is_resumed:
        prepared.notes.insert(0, f"{path}: no run to resume; starting a new one")
    # Identical results require the same executor, threads and device as before the interruption.
    started_with = check_resumed_choice(path, on_nodes) if is_resumed else None
    try:
        executor = NODES if on_nodes else config.runtime.executor
        if started_with is not None:
            executor = started_with["executor"]
        with require_engine(config.runtime, executor):
            if started_with is not None:
                choice = _recorded_choice(path, started_with, config)
            elif on_nodes:
                choice = choose_for_nodes(prepared)
            else:
                choice = choose_executor(config, prepared.federation)
            with lock_folder(path) as lock_notes:
                prepared.notes[:0] = lock_notes
                progress = Progress(path / LOG, quiet, console)
                directory = _open_directory(
                    path, prepared, choice, progress, resume=resume, on_nodes=on_nodes
                )
                if directory is None:
                    yield None
                    return
                with progress:
                    session = RunSession(prepared, directory, choice, progress, executor_factory)
                    with closing(session):
                        yield session
    except KeyboardInterrupt as stop:
        if (path / "config.yaml").exists():
            raise Interrupted(path) from stop
        raise


def _recorded_choice(path: Path, record: dict[str, Any], config: Config) -> ExecutorChoice:
    try:
        return ExecutorChoice.from_record(record, config.runtime)
    except (TypeError, KeyError):
        raise _missing_choice_error(path) from None


def choose_for_nodes(prepared: PreparedRun) -> ExecutorChoice:
    """Choose the executor settings for a run in which each client trains on a separate node.

    Each node uses as many threads as a simulation on this machine.
    """
    config = prepared.config
    executor = (
        config.runtime.executor if config.runtime.executor in ("serial", "processes") else "auto"
    )
    runtime = config.runtime.model_copy(update={"executor": executor, "chunk": None})
    updated = config.model_copy(update={"runtime": runtime})
    chosen = choose_executor(updated, prepared.federation)
    reasons = (f"each client on its own node with {pluralize(chosen.threads, 'thread')}",)
    return replace(
        chosen,
        executor=NODES,
        chunk=1,
        workers=len(prepared.federation.client_infos),
        reasons=reasons,
    )


def _open_directory(
    path: Path,
    prepared: PreparedRun,
    choice: ExecutorChoice,
    progress: Progress,
    *,
    resume: bool,
    on_nodes: bool,
) -> RunDirectory | None:
    """Create or open a run directory.

    Returns:
        The run directory, or None if it contains a finished run that is not extended.
    """
    config = prepared.config
    if not (resume and (path / "config.yaml").exists()):
        environment = {
            "run": secrets.token_hex(8),
            **describe_environment(choice.record()),
            **prepared.inputs(),
        }
        return RunDirectory.create(path, config=resolve_config(config), environment=environment)
    directory = _open_for_resume(path, prepared)
    if not directory.finished:
        return directory
    refuse_damaged(path, verify(path))
    if config.rounds != directory.config().get("rounds", config.rounds):
        return directory
    check_inputs(directory, prepared.inputs())
    write_presentation(config, directory, progress.log)
    progress.log(f"{path}: {_finished_message(directory, prepared, on_nodes)}")
    return None


def _finished_message(directory: RunDirectory, prepared: PreparedRun, on_nodes: bool) -> str:
    """Describe a finished run in one line, with advice on how to extend the run if possible."""
    completed = directory.summary()["rounds_completed"]
    planned = prepared.config.rounds
    rounds = (
        f"{completed} of {pluralize(planned, 'round')}"
        if completed < planned
        else pluralize(planned, "round")
    )
    # The privacy cost of another round is only known once that round is configured.
    limited = prepared.budget is not None and prepared.budget.privacy.target_epsilon is not None
    is_final = limited or on_nodes or _reason_not_extendable(directory, prepared)
    return f"this run has finished, after {rounds}" + (
        "" if is_final else "; add `rounds=N` to extend it"
    )


def _reason_not_extendable(directory: RunDirectory, prepared: PreparedRun) -> str:
    """Return why a run cannot be extended to more rounds.

    The result is empty if the run can be extended.
    """
    config = prepared.config
    if prepared.method.needs.one_upload:
        return f"{prepared.name} is a one-shot method, whose runs cannot be extended"
    if config.evaluation.patience is not None and directory.lines():
        # An extended run does not repeat an evaluation that took place only in the last round.
        history = [
            record
            for record in directory.metrics()
            if record["round"] % config.evaluation.every == 0
        ]
        if Patience(prepared.federation.task, config.evaluation.patience, history).exhausted:
            completed = history[-1]["round"]
            return (
                f"evaluation.patience={config.evaluation.patience} stopped the run after "
                f"round {completed}"
            )
    return ""


def _open_for_resume(path: Path, prepared: PreparedRun) -> RunDirectory:
    """Open the directory of a run that is resumed or extended.

    Raises:
        UserError: If the configuration differs from the configuration in the directory, or if the
            run cannot be extended to the configured number of rounds.
    """
    directory = RunDirectory.open(path)
    config = prepared.config
    old = directory.config()
    planned = old.get("rounds", config.rounds)
    if not isinstance(planned, int):
        raise UserError(f"{path / 'config.yaml'}: rounds: expected an integer, got {planned!r}")
    changed = f"{path}: rounds: was {planned}, is now {config.rounds}"
    if config.rounds != planned:
        if config.rounds < planned:
            raise UserError(f"{changed}; a resumed run may have more rounds, not fewer")
        if reason := _reason_not_extendable(directory, prepared):
            raise UserError(f"{changed}; {reason}")
    if differs := describe_changes({**old, "rounds": config.rounds}, resolve_config(config)):
        raise UserError(f"{path}: cannot be resumed: the configuration differs: {differs}")
    affordable = (
        prepared.budget.affordable_rounds() if prepared.budget is not None else config.rounds
    )
    if config.rounds > planned >= affordable:
        raise UserError(f"{changed}; privacy.target_epsilon allows at most {affordable}")
    return directory
