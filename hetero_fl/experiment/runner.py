"""Run an experiment, from a configuration to a finished run directory."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.config import Config, describe_difference, resolve_config, resume_relevant
from hetero_fl.config.load import Overrides
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data import Dataset
from hetero_fl.experiment.preparation import ExecutorFactory, PreparedRun, prepare
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.executors.choose import ExecutorChoice, choose_executor, require_engine
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.trainer import EvaluationResult, FederatedTrainer, Record, add_evaluation
from hetero_fl.reporting.integrity import (
    NODES,
    check_resumable,
    evidence_of_start,
    identity,
    inspect,
)
from hetero_fl.reporting.progress import Progress, writer_callback
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import LOG, RunDirectory, check_vacant, has_run, lock_folder
from hetero_fl.reporting.summary import Patience, collect_details, summarize
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.environment import describe_environment
from hetero_fl.utils.errors import Interrupted, UserError
from hetero_fl.utils.processes import exit_if_importing
from hetero_fl.utils.serialization import write_atomically
from hetero_fl.utils.text import pluralize

if TYPE_CHECKING:
    from rich.console import Console


Callback = Callable[[Record], None]


class RunSession:
    """Training session of a run, an iterable that trains one round per iteration.

    Each round is committed to disk before its record is yielded. The models, the summary and the
    report are written after the last round.

    Args:
        prepared: The run.
        directory: The run directory.
        choice: Executor, device and threads to use.
        progress: Receives log lines and progress.
        executor_factory: Function that creates the executor if the clients train on other machines.

    Attributes:
        trainer: The trainer. Its executor must be closed with `close`.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        directory: RunDirectory,
        choice: ExecutorChoice,
        progress: Progress,
        executor_factory: ExecutorFactory | None = None,
    ) -> None:
        self._prepared = prepared
        self._directory = directory
        self._choice = choice
        self._progress = progress
        self._started = time.perf_counter()
        memory = prepared.config.runtime.store_memory << 20
        store = StateStore(directory.path / "checkpoint", memory)
        self.trainer = prepared.make_trainer(choice, store, progress.log, executor_factory)
        if progress.is_terminal:
            self.trainer.executor.set_listener(progress.show_task)

    def close(self) -> None:
        """Close the executor. An unfinished run can be resumed later."""
        self.trainer.executor.close()

    def __iter__(self) -> Iterator[Record]:
        """Train the remaining rounds and yield the record of each round.

        Raises:
            UserError: If the run directory does not match the run.
        """
        prepared, directory, trainer = self._prepared, self._directory, self.trainer
        progress, config = self._progress, prepared.config
        budget = prepared.budget
        planned = config.rounds if budget is None else budget.affordable_rounds()
        checkpoints = Checkpoints(trainer.store, progress.log)
        metadata = _start_or_resume(
            prepared,
            directory,
            trainer,
            checkpoints,
            choice=self._choice,
            planned=planned,
            progress=progress,
        )
        write_events = writer_callback(directory.path) if config.output.tensorboard else None
        patience = Patience(
            prepared.federation.task, config.evaluation.patience, _read_history(directory)
        )
        setup_seconds = time.perf_counter() - self._started
        progress.unit = prepared.federation.task.unit
        progress.start(config.rounds, len(prepared.federation.client_infos), trainer.completed)
        evaluation: EvaluationResult | None = None
        while trainer.completed < planned and not patience.exhausted:
            record = trainer.run_round()
            is_last = trainer.completed == planned
            if budget is not None:
                record["privacy"] = budget.spent(trainer.completed)
            if trainer.completed % config.evaluation.every == 0 or is_last:
                result = _evaluate(trainer, record, directory if is_last else None)
                patience.update(record)
                evaluation = result if is_last else None
            directory.append_metrics(record)
            metadata["directory"]["metrics"] = directory.metrics_checksum()
            trainer.save(checkpoints, metadata)
            yield record
            if write_events is not None:
                write_events(record)
            progress.finish_round(record)
        if patience.exhausted:
            progress.log(
                f"stopped after round {trainer.completed}: validation has not improved for "
                f"{config.evaluation.patience} evaluations (evaluation.patience)"
            )
        if budget is not None and trainer.completed == planned < config.rounds:
            next_epsilon = budget.epsilon(planned + 1)
            progress.log(
                f"stopped after round {planned}: another round would raise ε to {next_epsilon:.3g},"
                f" above privacy.target_epsilon={budget.privacy.target_epsilon:g}"
            )
        _finish(
            prepared,
            directory,
            trainer,
            evaluation=evaluation,
            history=_read_history(directory),
            setup_seconds=setup_seconds,
            progress=progress,
        )


def _start_or_resume(
    prepared: PreparedRun,
    directory: RunDirectory,
    trainer: FederatedTrainer,
    checkpoints: Checkpoints,
    *,
    choice: ExecutorChoice,
    planned: int,
    progress: Progress,
) -> dict[str, Any]:
    """Restore the newest checkpoint or save the first one.

    Returns:
        Metadata to save in later checkpoints.
    """
    rounds = prepared.config.rounds
    metadata: dict[str, Any] = {
        "data": prepared.data.content_hash(),
        "traces": trainer.fingerprint,
        "choice": choice.record(),
    }
    saved = checkpoints.load_newest()
    if saved is not None:
        saved = _restore(
            saved, prepared, directory, trainer, checkpoints, metadata=metadata, planned=planned
        )
        threads = pluralize(choice.threads, "thread")
        workers = pluralize(choice.workers, "worker")
        progress.log(
            f"resumed after round {trainer.completed}; "
            f"{choice.executor} executor, {threads}, {workers}"
        )
    elif evidence := evidence_of_start(directory):
        raise UserError(
            f"{directory.path / 'checkpoint'}: missing, although {evidence}; "
            "restore it, or start a new run in another folder"
        )
    directory.rewind_metrics(trainer.completed)
    extended = _extend(directory, saved, rounds, progress)
    prepared.notes += extended
    metadata["directory"] = {**identity(directory), "rounds": rounds, "extended": extended}
    if saved is None:
        prepared.start.load_into(trainer)
        metadata["directory"]["metrics"] = directory.metrics_checksum()
        trainer.save(checkpoints, metadata)
        for note in [prepared.headline, *prepared.notes, *choice.reasons]:
            progress.log(note)
    return metadata


def _restore(
    saved: dict[str, Any],
    prepared: PreparedRun,
    directory: RunDirectory,
    trainer: FederatedTrainer,
    checkpoints: Checkpoints,
    *,
    metadata: Mapping[str, Any],
    planned: int,
) -> dict[str, Any]:
    """Restore the trainer's state and return the checkpoint that it was restored from.

    Args:
        saved: The newest checkpoint.
        prepared: The run.
        directory: The run directory.
        trainer: The trainer to restore.
        checkpoints: All checkpoints of the run.
        metadata: Metadata that the checkpoint must match.
        planned: Total number of rounds.

    Raises:
        UserError: If the checkpoint was written with different data or devices.
    """
    config = prepared.config
    check_resumable(directory, saved)
    if saved["data"] != metadata["data"]:
        raise UserError(
            f"{directory.path}: the data differs from the data that this run started with; "
            "restore it, or start a new run"
        )
    if saved.get("traces", "") != metadata["traces"]:
        raise UserError(
            f"devices.file: {config.devices and config.devices.file} differs from the file that "
            "this run started with; restore it, or start a new run"
        )
    if saved["run"]["completed"] < planned:
        saved = _reopen_directory(directory, checkpoints, saved, config.evaluation.every)
    trainer.load_state_dict(saved["run"])
    trainer.on_checkpoint()
    return saved


def _reopen_directory(
    directory: RunDirectory, checkpoints: Checkpoints, saved: dict[str, Any], every: int
) -> dict[str, Any]:
    """Prepare a run directory for additional rounds and return the checkpoint to continue from.

    The last round of the shorter run was evaluated regardless of `evaluation.every`. If the longer
    run does not evaluate this round, the round is repeated from the previous checkpoint.
    """
    directory.reopen()
    completed = saved["run"]["completed"]
    if completed % every and "validation" in directory.metrics()[completed - 1]:
        return checkpoints.load_before(completed) or checkpoints.load_newest() or saved
    return saved


def _extend(
    directory: RunDirectory, saved: Mapping[str, Any] | None, rounds: int, progress: Progress
) -> list[str]:
    """Write the number of rounds to `config.yaml` and return a note on each extension so far."""
    recorded = directory.config()
    if recorded.get("rounds") != rounds:
        directory.write_config({**recorded, "rounds": rounds})
    if saved is None:
        return []
    recorded_run = saved.get("directory", {})
    extended = list(recorded_run.get("extended", []))
    if (planned := recorded_run.get("rounds", recorded.get("rounds", rounds))) < rounds:
        completed = saved["run"]["completed"]
        line = (
            f"extended from {planned} to {pluralize(rounds, 'round')} after round {completed}; "
            "schedules use the new total"
        )
        progress.log(line)
        extended.append(line)
    return extended


def _read_history(directory: RunDirectory) -> list[Record]:
    """Read the records of all rounds so far from disk, where they are kept to save memory."""
    return directory.metrics() if (directory.path / "metrics.jsonl").exists() else []


def _evaluate(
    trainer: FederatedTrainer, record: Record, directory: RunDirectory | None
) -> EvaluationResult:
    """Evaluate the current models and add the result to the record of the round.

    Args:
        trainer: The trainer.
        record: Record of the round, which is modified.
        directory: Where to save the models; None except in the last evaluation.
    """
    started = time.perf_counter()
    down_bytes = trainer.traffic.down
    result = trainer.evaluate() if directory is None else _evaluate_fully(trainer, directory)
    add_evaluation(record, result)
    record["down_bytes"] += trainer.traffic.down - down_bytes
    record["seconds"]["evaluation"] = time.perf_counter() - started
    return result


def _finish(
    prepared: PreparedRun,
    directory: RunDirectory,
    trainer: FederatedTrainer,
    *,
    evaluation: EvaluationResult | None,
    history: list[Record],
    setup_seconds: float,
    progress: Progress,
) -> None:
    """Write the models, summary, plots and report of a run after the last round."""
    if evaluation is None:
        # The run stopped early, or the process was killed after the last round. The models were
        # evaluated before, so the traffic of this evaluation is not counted.
        down_bytes = trainer.traffic.down
        evaluation = _evaluate_fully(trainer, directory)
        trainer.traffic.down = down_bytes
    directory.write_json(
        "details.json",
        collect_details(prepared.federation, evaluation, prepared.notes, prepared.method),
    )
    summary = summarize(
        prepared.config,
        prepared.federation,
        history=history,
        traffic=trainer.traffic,
        setup_seconds=setup_seconds,
        evaluation=evaluation,
    )
    directory.finish(summary)
    write_presentation(prepared.config, directory, progress.log)
    progress.finish(summary)


def write_presentation(config: Config, directory: RunDirectory, log: Callable[[str], None]) -> None:
    """Write the plots and the report, unless they exist.

    Errors while drawing are logged and do not fail the run.

    Args:
        config: The configuration of the run.
        directory: The run directory.
        log: Function called with each log line.
    """
    if (directory.path / "report.html").exists():
        return
    # Slow to import, and not needed before the last round.
    from hetero_fl.reporting.plots import write_plots
    from hetero_fl.reporting.report import write_report

    if config.output.plots:
        write_plots(directory.path, log)
    if config.output.report:
        write_report(directory.path, log)


def _evaluate_fully(trainer: FederatedTrainer, directory: RunDirectory) -> EvaluationResult:
    """Evaluate with all details for the report, and save each model when it is evaluated."""

    def save(name: str, model: bytes) -> None:
        # The model is empty if a remote client does not upload it.
        if model:
            write_atomically(directory.path / "models" / f"{name}.safetensors", model)

    result = trainer.evaluate(details=True, save=save)
    slot = trainer.algorithm.server_model(trainer.server)
    if slot is not None:
        federation = trainer.federation
        server = trainer.server
        preprocess = asdict(federation.preprocessing_of(slot))
        layout = federation.data.layout
        model = SavedModel(
            trainer.server_tensors(slot),
            server.arch[slot],
            preprocess,
            federation.task,
            None,
            layout.columns,
            layout.categories,
        )
        save("server", model.encode())
    return result


def run(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    quiet: bool | None = None,
    allow_code: bool | CodePermission = False,
) -> Run:
    """Train a federation as configured and write the run directory.

    Args:
        source: A configuration file, a dictionary or a configuration.
        out: The run directory. None: `runs/<name>-<time>`.
        resume: Whether to continue from the newest intact checkpoint in `out`.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
        callbacks: Functions called with the record of each round (a line of `metrics.jsonl`) after
            the round has been committed to disk.
        dataset: Examples in memory that replace `data.name`.
        quiet: Whether to hide the progress display. None shows it in notebooks only.
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
    """Return the default directory of a run that starts now."""
    return Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def check_resumed_choice(path: Path, on_nodes: bool) -> dict[str, Any]:
    """Return the recorded executor, threads and device of a run that is to be resumed.

    Args:
        path: The run directory.
        on_nodes: Whether the run is resumed on several machines.

    Raises:
        UserError: If the run was started on several machines and is resumed on one machine, or
            vice versa, or if the record is missing.
    """
    started_with = RunDirectory.open(path).environment().get("choice")
    if not isinstance(started_with, dict) or not isinstance(started_with.get("executor"), str):
        raise _missing_choice_error(path)
    if (started_with["executor"] == NODES) != on_nodes:
        advice = (
            "on one machine; resume it with `hetero-fl train`"
            if on_nodes
            else "on nodes; resume it with `hetero-fl federate` or `hetero-fl server`"
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
        out: The run directory. None: `runs/<name>-<time>`.
        resume: Whether to continue from the newest intact checkpoint in `out`.
        callbacks: Functions called with the record of each round after the round has been
            committed to disk.
        quiet: Whether to hide the progress display. None shows it in notebooks only.
        executor_factory: Function that creates the executor if the clients train on other machines.
        console: Receives the progress display. None: the terminal.

    Returns:
        The finished run.

    Raises:
        UserError: If the directory contains a different run, or if another process uses it.
        RunFailedError: If the run cannot continue.
        Interrupted: After a `KeyboardInterrupt`, if the run can be resumed.
    """
    path = Path(out) if out is not None else default_out(prepared.config)
    with open_session(
        prepared,
        path,
        resume=resume,
        quiet=quiet,
        executor_factory=executor_factory,
        console=console,
    ) as session:
        for record in session or ():
            for callback in callbacks:
                callback(record)
    return Run(path, CodePermission(granted=find_references(prepared.config.model_dump())))


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
        quiet: Whether to hide the progress display. None shows it in notebooks only.
        executor_factory: Function that creates the executor if the clients train on other machines.
        console: Receives the progress display. None: the terminal.

    Yields:
        The session; None if the run has already finished.

    Raises:
        UserError: If the directory contains a different run, or if another process uses it.
        Interrupted: After a `KeyboardInterrupt`, if the run can be resumed.
    """
    config = prepared.config
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
    """Choose the executor settings for a run in which each client trains on its own node.

    Each node uses as many threads as a simulation would use on this machine.
    """
    config = prepared.config
    executor = (
        config.runtime.executor if config.runtime.executor in ("serial", "processes") else "auto"
    )
    runtime = config.runtime.model_copy(update={"executor": executor, "chunk": None})
    updated = config.model_copy(update={"runtime": runtime})
    chosen = choose_executor(updated, prepared.federation, measure=False)
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
    """Create or open the run directory, or return None if the run in it has finished."""
    config = prepared.config
    if not (resume and (path / "config.yaml").exists()):
        environment = {"run": secrets.token_hex(8), **describe_environment(choice.record())}
        return RunDirectory.create(path, config=resolve_config(config), environment=environment)
    directory = _open_for_resume(path, prepared, on_nodes)
    if not directory.finished:
        return directory
    inspect(path).require_whole()
    if config.rounds != directory.config().get("rounds", config.rounds):
        return directory
    write_presentation(config, directory, progress.log)
    progress.log(f"{path}: {_finished_message(directory, prepared, on_nodes)}")
    return None


def _finished_message(directory: RunDirectory, prepared: PreparedRun, on_nodes: bool) -> str:
    """Return a line that says that the run has finished and, if possible, how to extend it."""
    completed = directory.summary()["rounds_completed"]
    planned = prepared.config.rounds
    rounds = (
        f"{completed} of {pluralize(planned, 'round')}"
        if completed < planned
        else pluralize(planned, "round")
    )
    # The privacy cost of another round is only known once that round is configured.
    limited = prepared.budget is not None and prepared.budget.privacy.target_epsilon is not None
    is_final = limited or _reason_not_extendable(directory, prepared, planned, on_nodes)
    return f"this run has finished, after {rounds}" + (
        "" if is_final else "; add `rounds=N` to extend it"
    )


def _reason_not_extendable(
    directory: RunDirectory, prepared: PreparedRun, planned: int, on_nodes: bool
) -> str:
    """Return why a run cannot be extended to more rounds; empty if it can."""
    config = prepared.config
    if prepared.method.needs.one_upload:
        return f"{prepared.name} is a one-shot method, whose runs cannot be extended"
    if on_nodes:
        agreed = pluralize(planned, "round")
        return f"a run on nodes cannot be extended; its clients agreed to {agreed}"
    if config.evaluation.patience is not None and directory.lines():
        # The last round of a shorter run may be evaluated only because it is the last.
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


def _open_for_resume(path: Path, prepared: PreparedRun, on_nodes: bool) -> RunDirectory:
    """Open the directory of a run to resume or extend the run.

    Raises:
        UserError: If the configuration differs from the recorded one, or if the run cannot be
            extended to this number of rounds.
    """
    directory = RunDirectory.open(path)
    config = prepared.config
    old = directory.config()
    planned = old.get("rounds", config.rounds)
    if not isinstance(planned, int):
        raise UserError(f"{path / 'config.yaml'}: rounds: expected an integer, got {planned!r}")
    if config.rounds != planned:
        changed = f"{path}: rounds: was {planned}, is now {config.rounds}"
        if config.rounds < planned:
            raise UserError(f"{changed}; a resumed run may have more rounds, not fewer")
        if reason := _reason_not_extendable(directory, prepared, planned, on_nodes):
            raise UserError(f"{changed}; {reason}")
    if differs := describe_difference(
        resume_relevant(old), resume_relevant(resolve_config(config))
    ):
        raise UserError(f"{path}: cannot be resumed: the configuration differs: {differs}")
    affordable = (
        prepared.budget.affordable_rounds() if prepared.budget is not None else config.rounds
    )
    if config.rounds > planned >= affordable:
        raise UserError(f"{changed}; privacy.target_epsilon allows at most {affordable}")
    return directory
