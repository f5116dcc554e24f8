"""Run one experiment: from a configuration to a finished run directory."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hetero_fl.config import Config, describe_difference, resolve_config, resume_relevant
from hetero_fl.config.load import Overrides
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data import Dataset
from hetero_fl.experiment.preparation import Engage, PreparedRun, prepare
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.executors.choose import ExecutorChoice, choose_executor, require_engine
from hetero_fl.federation.state_store import PrivateState, StateStore
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


# The course of a run: rounds, evaluations, checkpoints, and what is left behind at the end.

Callback = Callable[[Record], None]


def run_rounds(
    prepared: PreparedRun,
    directory: RunDirectory,
    choice: ExecutorChoice,
    progress: Progress,
    callbacks: Sequence[Callback],
    executor_factory: Engage | None = None,
) -> None:
    """All rounds that are still to be held, and what is made of them; every round is safe on disk before the next."""
    run_started = time.perf_counter()
    config = prepared.config
    store = StateStore(directory.path / "checkpoint", config.runtime.store_memory << 20)
    trainer = prepared.make_trainer(choice, store, progress.log, executor_factory)
    if progress.is_terminal:
        trainer.executor.set_listener(progress.show_task)
    try:
        _run_remaining_rounds(
            prepared, directory, trainer, choice, progress, callbacks, run_started
        )
    finally:
        trainer.executor.close()


def _run_remaining_rounds(
    prepared: PreparedRun,
    directory: RunDirectory,
    trainer: FederatedTrainer,
    choice: ExecutorChoice,
    progress: Progress,
    callbacks: Sequence[Callback],
    run_started: float,
) -> None:
    config = prepared.config
    planned = config.rounds if prepared.budget is None else prepared.budget.affordable_rounds()
    checkpoints = Checkpoints(trainer.store, progress.log)
    about: dict[str, Any] = {
        "data": prepared.data.content_hash(),
        "traces": trainer.fingerprint,
        "choice": choice.record(),
    }
    saved = checkpoints.load_newest()
    if saved is not None:
        saved = _restore(saved, prepared, directory, trainer, checkpoints, about, planned)
        threads = pluralize(choice.threads, "thread")
        workers = pluralize(choice.workers, "worker")
        progress.log(
            f"resumed after round {trainer.completed}; {choice.executor} executor, {threads}, {workers}"
        )
    elif evidence := evidence_of_start(directory):
        raise UserError(
            f"{directory.path / 'checkpoint'}: missing, although {evidence}; "
            "restore it, or start a new run with another --out"
        )
    directory.rewind_metrics(trainer.completed)
    extended = _extend(directory, saved, config.rounds, progress)
    prepared.notes += extended
    about["directory"] = {**identity(directory), "rounds": config.rounds, "extended": extended}
    if saved is None:
        load_inherited_models(prepared.inherited, trainer)
        about["directory"]["metrics"] = directory.metrics_checksum()
        trainer.save(checkpoints, about)
        for note in [prepared.headline, *prepared.notes, *choice.reasons]:
            progress.log(note)
    listeners = list(callbacks)
    if config.output.tensorboard:
        listeners.append(writer_callback(directory.path))
    patience = Patience(
        prepared.federation.task, config.evaluation.patience, _read_history(directory)
    )
    setup = time.perf_counter() - run_started
    progress.unit = prepared.federation.task.unit
    progress.start(config.rounds, len(prepared.federation.client_infos), trainer.completed)
    evaluation: EvaluationResult | None = None
    is_exhausted = patience.exhausted
    while trainer.completed < planned and not is_exhausted:
        record = trainer.run_round()
        is_last = trainer.completed == planned
        if prepared.budget is not None:
            record["privacy"] = {
                "epsilon": prepared.budget.epsilon(trainer.completed),
                "delta": prepared.budget.privacy.delta,
                "unit": prepared.budget.privacy.unit,
            }
        if trainer.completed % config.evaluation.every == 0 or is_last:
            result = _evaluate(trainer, record, directory if is_last else None)
            patience.look(record)
            is_exhausted = patience.exhausted
            evaluation = result if is_last else None
        directory.append_metrics(record)
        about["directory"]["metrics"] = directory.metrics_checksum()
        trainer.save(checkpoints, about)
        for callback in listeners:
            callback(record)
        progress.finish_round(record)
    if is_exhausted:
        progress.log(
            f"stopped after round {trainer.completed}: "
            f"no better validation in {config.evaluation.patience} evaluations"
        )
    if prepared.budget is not None and trainer.completed == planned < config.rounds:
        over = prepared.budget.epsilon(planned + 1)
        target = prepared.budget.privacy.target_epsilon
        progress.log(
            f"stopped after round {planned}: the next would bring ε to {over:.3g}, "
            f"above privacy.target_epsilon {target:g}"
        )
    _finish(prepared, directory, trainer, evaluation, _read_history(directory), setup, progress)


def _restore(
    saved: dict[str, Any],
    prepared: PreparedRun,
    directory: RunDirectory,
    trainer: FederatedTrainer,
    checkpoints: Checkpoints,
    about: Mapping[str, Any],
    planned: int,
) -> dict[str, Any]:
    """Restore the trainer's state and return the checkpoint that it was restored from.

    Args:
        saved: The newest checkpoint.
        prepared: The run.
        directory: Where it is recorded.
        trainer: The trainer.
        checkpoints: All checkpoints.
        about: What the run must have in common with the checkpoint.
        planned: Rounds of the whole run.

    Raises:
        UserError: If the checkpoint was written with other data or devices.
    """
    config = prepared.config
    check_resumable(directory, saved)
    if saved["data"] != about["data"]:
        raise UserError(
            f"{directory.path}: the data is not what this run began with; restore it, or start a new run"
        )
    if saved.get("traces", "") != about["traces"]:
        raise UserError(
            f"devices.file: {config.devices and config.devices.file} is not what this run began with"
        )
    if saved["run"]["completed"] < planned:
        saved = _reopen_directory(directory, checkpoints, saved, config.evaluation.every)
    trainer.load_state_dict(saved["run"])
    trainer.on_checkpoint()
    return saved


def _reopen_directory(
    directory: RunDirectory, checkpoints: Checkpoints, saved: dict[str, Any], every: int
) -> dict[str, Any]:
    """Prepare a run directory for more rounds; returns the checkpoint from which they follow.

    The last round of a shorter run was evaluated whatever `evaluation.every` says. In the longer run it is not, so that
    round is repeated from the checkpoint before it.
    """
    directory.reopen()
    completed = saved["run"]["completed"]
    if completed % every and "validation" in directory.metrics()[completed - 1]:
        return checkpoints.load_before(completed) or checkpoints.load_newest() or saved
    return saved


def _extend(
    directory: RunDirectory, saved: Mapping[str, Any] | None, rounds: int, progress: Progress
) -> list[str]:
    """Write the number of rounds to `config.yaml` if it has grown; returns a line for each time that it has."""
    recorded = directory.config()
    if recorded.get("rounds") != rounds:
        directory.write_config({**recorded, "rounds": rounds})
    if saved is None:
        return []
    about = saved.get("directory", {})
    extended = list(about.get("extended", []))
    if (planned := about.get("rounds", recorded.get("rounds", rounds))) < rounds:
        completed = saved["run"]["completed"]
        line = f"extended from {planned} to {pluralize(rounds, 'round')} after round {completed}; schedules use the new total"
        progress.log(line)
        extended.append(line)
    return extended


def _read_history(directory: RunDirectory) -> list[Record]:
    """The records so far; they are not held in memory while a run goes on, however long."""
    return directory.metrics() if (directory.path / "metrics.jsonl").exists() else []


def _evaluate(
    trainer: FederatedTrainer, record: Record, directory: RunDirectory | None
) -> EvaluationResult:
    """`directory`: where the models go, if this is the last evaluation."""
    started = time.perf_counter()
    down = trainer.traffic.down
    readings = trainer.evaluate() if directory is None else _evaluate_fully(trainer, directory)
    add_evaluation(record, readings)
    record["down_bytes"] += trainer.traffic.down - down
    record["seconds"]["evaluation"] = time.perf_counter() - started
    return readings


def _finish(
    prepared: PreparedRun,
    directory: RunDirectory,
    trainer: FederatedTrainer,
    evaluation: EvaluationResult | None,
    history: list[Record],
    setup: float,
    progress: Progress,
) -> None:
    """Models, summary, pictures and report of a run whose rounds are done."""
    if evaluation is None:  # stopped early, or killed after the last round
        traffic = trainer.traffic.down
        evaluation = _evaluate_fully(trainer, directory)
        trainer.traffic.down = traffic  # the same reading once more: nobody would send it again
    directory.write_json(
        "details.json",
        collect_details(prepared.federation, evaluation, prepared.notes, prepared.method),
    )
    summary = summarize(
        prepared.config,
        prepared.method,
        prepared.federation,
        history,
        trainer.traffic,
        setup,
        evaluation,
    )
    directory.finish(summary)
    write_presentation(prepared.config, directory, progress.log)
    progress.finish(summary)


def write_presentation(config: Config, directory: RunDirectory, say: Callable[[str], None]) -> None:
    """Draw the pictures and the report, unless a process that finished has left them.

    The run is finished whatever becomes of them: an error in a drawing is reported to `say` in one line.
    """
    if (directory.path / "report.html").exists():
        return
    # not needed before the last round, and slow to load
    from hetero_fl.reporting.plots import write_plots
    from hetero_fl.reporting.report import write_report

    if config.output.plots:
        write_plots(directory.path, say)
    if config.output.report:
        write_report(directory.path, say)


def _evaluate_fully(trainer: FederatedTrainer, directory: RunDirectory) -> EvaluationResult:
    """An evaluation with all that a report shows; every model, and the server's own, goes to its file as it comes."""

    def save(name: str, model: bytes) -> None:
        if model:  # a real site may keep its own
            write_atomically(directory.path / "models" / f"{name}.safetensors", model)

    readings = trainer.evaluate(details=True, save=save)
    slot = trainer.algorithm.server_model(trainer.server)
    if slot is not None:
        federation = trainer.federation
        server = trainer.server
        view = asdict(federation.preprocessing_of(slot))
        layout = federation.data.layout
        model = SavedModel(
            server.models[slot],
            server.arch[slot],
            view,
            federation.task,
            None,
            layout.columns,
            layout.categories,
        )
        save("server", model.encode())
    return readings


def load_inherited_models(models: Mapping[str, SavedModel], trainer: FederatedTrainer) -> None:
    """Begin with another run's models: each client with its own, each group at the server with the mean of its members'."""
    groups: dict[str, list[SavedModel]] = {}
    for model in models.values():
        groups.setdefault(model.arch.spec_id, []).append(model)
    states = {id: PrivateState({"model": model.tensors}) for id, model in models.items()}
    trainer.load_client_states(states)
    for group, members in groups.items():
        for name, tensor in trainer.server.models[group].items():
            if tensor.is_floating_point():
                mean = torch.stack([m.tensors[name] for m in members]).mean(0)
                trainer.server.models[group][name] = mean.to(tensor.device)


# One run: configuration in, finished run directory out.


def run(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    quiet: bool = True,
    allow_code: bool | CodePermission = False,
) -> Run:
    """Carry out a run and leave its directory behind.

    Args:
        source: A configuration file, a dictionary or a configuration.
        out: The run directory; None: `runs/<name>-<time>`.
        resume: Go on from the newest whole checkpoint in `out`.
        overrides: Changes to the configuration, `key.path=value`, or a dictionary of them.
        callbacks: Called with each round's record (a line of `metrics.jsonl`) once it is safe on disk.
        dataset: Examples in memory in place of `data.name`.
        quiet: Show no progress.
        allow_code: Whether code that a file names (`python:package.module:Name`) may run. Names in a dictionary or in
            `overrides` are the caller's own and always allowed.

    Raises:
        UserError: A mistake in the configuration, the data or the call; another process is at work in `out`.
        RunFailedError: The run itself cannot go on.
        Interrupted: A KeyboardInterrupt, once there is something to resume.
    """
    exit_if_importing()
    try:
        prepared = prepare(source, overrides, dataset, allow_code=allow_code)
    except KeyboardInterrupt as stop:
        if resume and out is not None and (Path(out) / "config.yaml").exists():
            raise Interrupted(Path(out)) from stop  # what lies there is still there
        raise
    return run_prepared(prepared, out=out, resume=resume, callbacks=callbacks, quiet=quiet)


def default_out(config: Config) -> Path:
    """Where a run goes that is started now."""
    return Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def check_resumed_choice(path: Path, on_nodes: bool) -> dict[str, Any]:
    """What a run that is gone on with was begun with: executor, threads, device. Raises UserError if it was the other way."""
    began = RunDirectory.open(path).environment().get("choice")
    if not isinstance(began, dict) or not isinstance(began.get("executor"), str):
        raise _missing_choice_error(path)
    if (began["executor"] == NODES) != on_nodes:
        how = (
            "on one machine; hetero-fl train"
            if on_nodes
            else "on nodes; hetero-fl federate or server"
        )
        raise UserError(f"{path}: --resume: this run was begun {how} goes on with it")
    return began


def _missing_choice_error(path: Path) -> UserError:
    return UserError(f"{path / 'environment.json'}: choice does not say how the run was computed")


def run_prepared(
    prepared: PreparedRun,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    executor_factory: Engage | None = None,
    console: Console | None = None,
) -> Run:
    """Carry out what was prepared (see `run`); `executor_factory`: who computes the clients, if not this machine; `console`: where what is
    shown goes, if not to a terminal."""
    config = prepared.config
    path = Path(out) if out is not None else default_out(config)
    going_on = resume and has_run(path)
    if not going_on:
        check_vacant(path)  # before anything is put there
    if resume and not going_on:
        prepared.notes.insert(0, f"{path}: there is no run to resume; a new one starts")
    # The same bits need the same executor, threads and device, whatever this machine would choose.
    began = check_resumed_choice(path, executor_factory is not None) if going_on else None
    try:
        with require_engine(
            config.runtime,
            began["executor"] if began else NODES if executor_factory else config.runtime.executor,
        ):
            if began:
                try:
                    choice = ExecutorChoice.from_record(began, config.runtime)
                except (TypeError, KeyError):
                    raise _missing_choice_error(path) from None
            else:
                choice = (
                    choose_executor(config, prepared.federation)
                    if executor_factory is None
                    else choose_for_nodes(prepared)
                )
            with lock_folder(path) as unheld:
                prepared.notes[:0] = unheld
                _run_in_directory(
                    path,
                    prepared,
                    choice,
                    resume,
                    callbacks,
                    executor_factory,
                    Progress(path / LOG, quiet, console),
                )
    except KeyboardInterrupt as stop:
        if (path / "config.yaml").exists():
            raise Interrupted(path) from stop
        raise
    return Run(path, CodePermission(granted=find_references(config.model_dump())))


def choose_for_nodes(prepared: PreparedRun) -> ExecutorChoice:
    """What a run across machines computes with: one client at a time, with as many threads as a simulation would have here."""
    config = prepared.config
    asked = (
        config.runtime.executor if config.runtime.executor in ("serial", "processes") else "auto"
    )
    runtime = config.runtime.model_copy(update={"executor": asked, "chunk": None})
    updated = config.model_copy(update={"runtime": runtime})
    chosen = choose_executor(updated, prepared.federation, measure=False)
    reasons = (f"on nodes, {pluralize(chosen.threads, 'thread')} each",)
    return replace(
        chosen,
        executor=NODES,
        chunk=1,
        workers=len(prepared.federation.client_infos),
        reasons=reasons,
    )


def _run_in_directory(
    path: Path,
    prepared: PreparedRun,
    choice: ExecutorChoice,
    resume: bool,
    callbacks: Sequence[Callback],
    executor_factory: Engage | None,
    shown: Progress,
) -> None:
    config = prepared.config
    if resume and (path / "config.yaml").exists():
        directory = _open_for_resume(path, prepared, executor_factory is not None)
        if directory.finished:
            inspect(path).require_whole()
            if config.rounds == directory.config().get("rounds", config.rounds):
                write_presentation(config, directory, shown.log)
                shown.log(
                    f"{path}: {_finished_message(directory, prepared, executor_factory is not None)}"
                )
                return
    else:
        environment = {"run": secrets.token_hex(8), **describe_environment(choice.record())}
        directory = RunDirectory.create(
            path, config=resolve_config(config), environment=environment
        )
    with shown as progress:
        run_rounds(prepared, directory, choice, progress, callbacks, executor_factory)


def _finished_message(directory: RunDirectory, prepared: PreparedRun, on_nodes: bool) -> str:
    """Return that a run has finished, and how to extend it if that is known to be possible."""
    completed = directory.summary()["rounds_completed"]
    planned = prepared.config.rounds
    rounds = (
        f"{completed} of {pluralize(planned, 'round')}"
        if completed < planned
        else pluralize(planned, "round")
    )
    # What a further round would spend is known only once it is configured.
    limited = prepared.budget is not None and prepared.budget.privacy.target_epsilon is not None
    final = limited or _reason_not_extendable(directory, prepared, planned, on_nodes)
    return f"this run has finished, after {rounds}" + (
        "" if final else "; add `rounds=N` to extend it"
    )


def _reason_not_extendable(
    directory: RunDirectory, prepared: PreparedRun, planned: int, on_nodes: bool
) -> str:
    """Return why a run cannot have more rounds than planned; empty if it can."""
    config = prepared.config
    if prepared.method.needs.one_upload:
        return f"{prepared.name} is a one-shot method, whose runs cannot be extended"
    if on_nodes:
        return f"a run on nodes cannot be extended, its sites agreed to {planned}"
    if config.evaluation.patience is not None and directory.lines():
        # The last round of a shorter run may be evaluated only because it is the last.
        history = [
            record
            for record in directory.metrics()
            if record["round"] % config.evaluation.every == 0
        ]
        if Patience(prepared.federation.task, config.evaluation.patience, history).exhausted:
            completed = history[-1]["round"]
            return f"evaluation.patience ({config.evaluation.patience}) stopped the run after round {completed}"
    return ""


def _open_for_resume(path: Path, prepared: PreparedRun, on_nodes: bool) -> RunDirectory:
    """The run directory of a run that is resumed, or extended. Raises UserError naming the keys that differ."""
    directory = RunDirectory.open(path)
    config = prepared.config
    old = directory.config()
    planned = old.get("rounds", config.rounds)
    if not isinstance(planned, int):
        raise UserError(f"{path / 'config.yaml'}: rounds: expected an integer, got {planned!r}")
    if config.rounds != planned:
        changed = f"{path}: rounds: was {planned}, is now {config.rounds}"
        if config.rounds < planned:
            raise UserError(f"{changed}; a run that is resumed may have more rounds, not fewer")
        if reason := _reason_not_extendable(directory, prepared, planned, on_nodes):
            raise UserError(f"{changed}; {reason}")
    if differs := describe_difference(
        resume_relevant(old), resume_relevant(resolve_config(config))
    ):
        raise UserError(f"{path}: --resume with another configuration: {differs}")
    affordable = (
        prepared.budget.affordable_rounds() if prepared.budget is not None else config.rounds
    )
    if config.rounds > planned >= affordable:
        raise UserError(f"{changed}; privacy.target_epsilon allows {affordable}")
    return directory
