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

from hetero_fl.config import Config, deciding, difference, resolved
from hetero_fl.config.load import Overrides
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.data import Dataset
from hetero_fl.experiment.preparation import Engage, Prepared, prepare
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.executors.choose import Choice, choose, engine
from hetero_fl.federation.state_store import Private, Store
from hetero_fl.federation.trainer import Readings, Record, Session, record_readings
from hetero_fl.reporting.integrity import check_resumable, evidence_of_start, identity, inspect
from hetero_fl.reporting.progress import Progress, writer_callback
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import LOG, RunDirectory, check_vacant, has_run, locked
from hetero_fl.reporting.summary import Patience, details_of, summarise
from hetero_fl.utils.code_permission import CodePermission, references
from hetero_fl.utils.environment import describe_environment
from hetero_fl.utils.errors import Interrupted, UserError
from hetero_fl.utils.processes import leave_if_importing
from hetero_fl.utils.serialization import write_atomically
from hetero_fl.utils.text import plural

if TYPE_CHECKING:
    from rich.console import Console


# The course of a run: rounds, evaluations, checkpoints, and what is left behind at the end.

Callback = Callable[[Record], None]


def carry_out(
    prepared: Prepared,
    directory: RunDirectory,
    choice: Choice,
    progress: Progress,
    callbacks: Sequence[Callback],
    engage: Engage | None = None,
) -> None:
    """All rounds that are still to be held, and what is made of them; every round is safe on disk before the next."""
    begun, config = time.perf_counter(), prepared.config
    store = Store(directory.path / "checkpoint", config.runtime.store_memory << 20)
    rounds = prepared.rounds(choice, store, progress.log, engage)
    rounds.executor.watch(progress.task)
    try:
        _hold(prepared, directory, rounds, choice, progress, callbacks, begun)
    finally:
        rounds.executor.close()


def _hold(
    prepared: Prepared,
    directory: RunDirectory,
    rounds: Session,
    choice: Choice,
    progress: Progress,
    callbacks: Sequence[Callback],
    begun: float,
) -> None:
    config = prepared.config
    checkpoints = Checkpoints(rounds.store, progress.log)
    fingerprint, traces = prepared.data.content_hash(), rounds.conditions.devices.fingerprint

    about: dict[str, Any] = {}

    def save() -> None:
        state = {
            "run": rounds.tree(),
            "data": fingerprint,
            "traces": traces,
            "choice": choice.record(),
        }
        state["directory"] = about | {"metrics": directory.metrics_checksum()}
        checkpoints.save(rounds.completed, state)
        rounds.saved()

    planned = config.rounds if prepared.budget is None else prepared.budget.affordable()
    saved = checkpoints.newest()
    if saved is not None:
        check_resumable(directory, saved)
        if saved["data"] != fingerprint:
            raise UserError(
                f"{directory.path}: the data is not what this run began with; restore it, or start anew"
            )
        if saved.get("traces", "") != traces:
            raise UserError(
                f"devices.file: {config.devices and config.devices.file} is not what this run began with"
            )
        if saved["run"]["completed"] < planned:
            saved = _reopened(directory, checkpoints, saved, config.evaluation.every)
        rounds.restore(saved["run"])
        rounds.saved()
        how = f"{choice.executor} executor, {plural(choice.threads, 'thread')}, {plural(choice.workers, 'worker')}"
        progress.log(f"resumed after round {rounds.completed}; {how}")
    elif evidence := evidence_of_start(directory):
        raise UserError(
            f"{directory.path / 'checkpoint'}: missing, although {evidence}; "
            "restore it, or start a new run with another --out"
        )
    directory.rewind_metrics(rounds.completed)
    extended = _extend(directory, saved, config.rounds, progress)
    prepared.notes += extended
    about |= {**identity(directory), "rounds": config.rounds, "extended": extended}
    if saved is None:
        start_from(prepared.inherited, rounds)
        save()
        for note in [prepared.headline, *prepared.notes, *choice.reasons]:
            progress.log(note)
    listeners = [
        *callbacks,
        *([writer_callback(directory.path)] if config.output.tensorboard else []),
    ]
    patience = Patience(prepared.federation.task, config.evaluation.patience, _history(directory))
    setup = time.perf_counter() - begun
    progress.unit = prepared.federation.task.unit
    progress.start(config.rounds, len(prepared.federation.cards), rounds.completed)
    readings: Readings | None = None
    while rounds.completed < planned and not patience.exhausted:
        record = rounds.round()
        if prepared.budget is not None:
            spent = prepared.budget.epsilon(rounds.completed)
            privacy = prepared.budget.privacy
            record["privacy"] = {"epsilon": spent, "delta": privacy.delta, "unit": privacy.unit}
        if rounds.completed % config.evaluation.every == 0 or rounds.completed == planned:
            last = rounds.completed == planned
            readings = _evaluate(rounds, record, directory if last else None)
            patience.look(record)
            readings = readings if last else None
        directory.append_metrics(record)
        save()
        for callback in listeners:
            callback(record)
        progress.round(record)
    if patience.exhausted:
        progress.log(
            f"stopped after round {rounds.completed}: no better validation in {config.evaluation.patience} evaluations"
        )
    if prepared.budget is not None and rounds.completed == planned < config.rounds:
        over, target = prepared.budget.epsilon(planned + 1), prepared.budget.privacy.target_epsilon
        progress.log(
            f"stopped after round {planned}: the next would bring ε to {over:.3g}, above privacy.target_epsilon {target:g}"
        )
    _finish(prepared, directory, rounds, readings, _history(directory), setup, progress)


def _reopened(
    directory: RunDirectory, checkpoints: Checkpoints, saved: dict[str, Any], every: int
) -> dict[str, Any]:
    """Prepare a run directory for more rounds; returns the checkpoint from which they follow.

    The last round of a shorter run was evaluated whatever `evaluation.every` says. In the longer run it is not, so that
    round is repeated from the checkpoint before it.
    """
    directory.reopen()
    completed = saved["run"]["completed"]
    if completed % every and "validation" in directory.metrics()[completed - 1]:
        return checkpoints.back_before(completed) or checkpoints.newest() or saved
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
        line = f"extended from {planned} to {plural(rounds, 'round')} after round {completed}; schedules use the new total"
        progress.log(line)
        extended.append(line)
    return extended


def _history(directory: RunDirectory) -> list[Record]:
    """The records so far; they are not held in memory while a run goes on, however long."""
    return directory.metrics() if (directory.path / "metrics.jsonl").exists() else []


def _evaluate(rounds: Session, record: Record, directory: RunDirectory | None) -> Readings:
    """`directory`: where the models go, if this is the last evaluation."""
    begun, down = time.perf_counter(), rounds.traffic.down
    readings = rounds.evaluate() if directory is None else _read_whole(rounds, directory)
    record_readings(record, readings)
    record["down_bytes"] += rounds.traffic.down - down
    record["seconds"]["evaluation"] = time.perf_counter() - begun
    return readings


def _finish(
    prepared: Prepared,
    directory: RunDirectory,
    rounds: Session,
    readings: Readings | None,
    history: list[Record],
    setup: float,
    progress: Progress,
) -> None:
    """Models, summary, pictures and report of a run whose rounds are done."""
    if readings is None:  # stopped early, or killed after the last round
        traffic = rounds.traffic.down
        readings = _read_whole(rounds, directory)
        rounds.traffic.down = traffic  # the same reading once more: nobody would send it again
    directory.write_json(
        "details.json", details_of(prepared.federation, readings, prepared.notes, prepared.method)
    )
    summary = summarise(
        prepared.config,
        prepared.method,
        prepared.federation,
        history,
        rounds.traffic,
        setup,
        readings,
    )
    directory.finish(summary)
    present(prepared.config, directory, progress.log)
    progress.finish(summary)


def present(config: Config, directory: RunDirectory, say: Callable[[str], None]) -> None:
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


def _read_whole(rounds: Session, directory: RunDirectory) -> Readings:
    """An evaluation with all that a report shows; every model, and the server's own, goes to its file as it comes."""

    def save(name: str, model: bytes) -> None:
        if model:  # a real site may keep its own
            write_atomically(directory.path / "models" / f"{name}.safetensors", model)

    readings = rounds.evaluate(details=True, save=save)
    slot = rounds.algorithm.server_slot(rounds.server)
    if slot is not None:
        federation, server = rounds.federation, rounds.server
        view = asdict(federation.view_of(slot))
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


def start_from(models: Mapping[str, SavedModel], rounds: Session) -> None:
    """Begin with another run's models: each client with its own, each group at the server with the mean of its members'."""
    groups: dict[str, list[SavedModel]] = {}
    for model in models.values():
        groups.setdefault(model.arch.id, []).append(model)
    states = {id: Private({"model": model.tensors}) for id, model in models.items()}
    if rounds.apart is not None:
        rounds.apart.give(states)
    else:
        for id, private in states.items():
            rounds.store.stage(id, private)
    rounds.store.commit()
    for group, members in groups.items():
        for name, tensor in rounds.server.models[group].items():
            if tensor.is_floating_point():
                rounds.server.models[group][name] = torch.stack(
                    [m.tensors[name] for m in members]
                ).mean(0)


# One run: configuration in, finished run directory out.

NODES = "nodes"  # the executor of a run across machines


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
        RunFailed: The run itself cannot go on.
        Interrupted: A KeyboardInterrupt, once there is something to resume.
    """
    leave_if_importing()
    try:
        prepared = prepare(source, overrides, dataset, allow_code=allow_code)
    except KeyboardInterrupt as stop:
        if resume and out is not None and (Path(out) / "config.yaml").exists():
            raise Interrupted(Path(out)) from stop  # what lies there is still there
        raise
    return hold(prepared, out=out, resume=resume, callbacks=callbacks, quiet=quiet)


def default_out(config: Config) -> Path:
    """Where a run goes that is started now."""
    return Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"


def check_begun(path: Path, on_nodes: bool) -> dict[str, Any]:
    """What a run that is gone on with was begun with: executor, threads, device. Raises UserError if it was the other way."""
    began = RunDirectory.open(path).environment().get("choice")
    if not isinstance(began, dict) or not isinstance(began.get("executor"), str):
        raise _no_choice(path)
    if (began["executor"] == NODES) != on_nodes:
        how = (
            "on one machine; hetero-fl train"
            if on_nodes
            else "on nodes; hetero-fl federate or server"
        )
        raise UserError(f"{path}: --resume: this run was begun {how} goes on with it")
    return began


def _no_choice(path: Path) -> UserError:
    return UserError(f"{path / 'environment.json'}: choice does not say how the run was computed")


def hold(
    prepared: Prepared,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    engage: Engage | None = None,
    console: Console | None = None,
) -> Run:
    """Carry out what was prepared (see `run`); `engage`: who computes the clients, if not this machine; `console`: where what is
    shown goes, if not to a terminal."""
    config = prepared.config
    path = Path(out) if out is not None else default_out(config)
    going_on = resume and has_run(path)
    if not going_on:
        check_vacant(path)  # before anything is put there
    # The same bits need the same executor, threads and device, whatever this machine would choose.
    began = check_begun(path, engage is not None) if going_on else None
    try:
        with engine(
            config.runtime,
            began["executor"] if began else NODES if engage else config.runtime.executor,
        ):
            if began:
                try:
                    choice = Choice.recorded(began, config.runtime)
                except (TypeError, KeyError):
                    raise _no_choice(path) from None
            else:
                choice = (
                    choose(config, prepared.federation)
                    if engage is None
                    else choose_for_nodes(prepared)
                )
            with locked(path) as unheld:
                prepared.notes[:0] = unheld
                _run_in(
                    path,
                    prepared,
                    choice,
                    resume,
                    callbacks,
                    engage,
                    Progress(path / LOG, quiet, console),
                )
    except KeyboardInterrupt as stop:
        if (path / "config.yaml").exists():
            raise Interrupted(path) from stop
        raise
    return Run(path, CodePermission(granted=references(config.model_dump())))


def choose_for_nodes(prepared: Prepared) -> Choice:
    """What a run across machines computes with: one client at a time, with as many threads as a simulation would have here."""
    config = prepared.config
    asked = (
        config.runtime.executor if config.runtime.executor in ("serial", "processes") else "auto"
    )
    runtime = config.runtime.model_copy(update={"executor": asked, "chunk": None})
    chosen = choose(config.model_copy(update={"runtime": runtime}), prepared.federation)
    reasons = (f"on nodes, {plural(chosen.threads, 'thread')} each",)
    return replace(
        chosen, executor=NODES, chunk=1, workers=len(prepared.federation.cards), reasons=reasons
    )


def _run_in(
    path: Path,
    prepared: Prepared,
    choice: Choice,
    resume: bool,
    callbacks: Sequence[Callback],
    engage: Engage | None,
    shown: Progress,
) -> None:
    config = prepared.config
    if resume and (path / "config.yaml").exists():
        directory = _reopen(path, prepared, engage is not None)
        if directory.finished:
            inspect(path).require_whole()
            if config.rounds == directory.config().get("rounds", config.rounds):
                present(config, directory, shown.log)
                shown.log(f"{path}: {_finished(directory, prepared, engage is not None)}")
                return
    else:
        environment = {"run": secrets.token_hex(8), **describe_environment(choice.record())}
        directory = RunDirectory.create(path, config=resolved(config), environment=environment)
    with shown as progress:
        carry_out(prepared, directory, choice, progress, callbacks, engage)


def _finished(directory: RunDirectory, prepared: Prepared, on_nodes: bool) -> str:
    """Return that a run has finished, and how to extend it if that is known to be possible."""
    completed, planned = directory.summary()["rounds_completed"], prepared.config.rounds
    rounds = (
        f"{completed} of {plural(planned, 'round')}"
        if completed < planned
        else plural(planned, "round")
    )
    # What a further round would spend is known only once it is configured.
    limited = prepared.budget is not None and prepared.budget.privacy.target_epsilon is not None
    final = limited or _why_final(directory, prepared, planned, on_nodes)
    return f"this run has finished, after {rounds}" + (
        "" if final else "; add `rounds=N` to extend it"
    )


def _why_final(directory: RunDirectory, prepared: Prepared, planned: int, on_nodes: bool) -> str:
    """Return why a run cannot have more rounds than planned; empty if it can."""
    config = prepared.config
    if prepared.method.one_shot:
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


def _reopen(path: Path, prepared: Prepared, on_nodes: bool) -> RunDirectory:
    """The run directory of a run that is resumed, or extended. Raises UserError naming the keys that differ."""
    directory, config = RunDirectory.open(path), prepared.config
    old = directory.config()
    planned = old.get("rounds", config.rounds)
    if not isinstance(planned, int):
        raise UserError(f"{path / 'config.yaml'}: rounds: expected an integer, got {planned!r}")
    if config.rounds != planned:
        changed = f"{path}: rounds: was {planned}, is now {config.rounds}"
        if config.rounds < planned:
            raise UserError(f"{changed}; a run that is resumed may have more rounds, not fewer")
        if reason := _why_final(directory, prepared, planned, on_nodes):
            raise UserError(f"{changed}; {reason}")
    if differs := difference(deciding(old), deciding(resolved(config))):
        raise UserError(f"{path}: --resume with another configuration: {differs}")
    affordable = prepared.budget.affordable() if prepared.budget is not None else config.rounds
    if config.rounds > planned >= affordable:
        raise UserError(f"{changed}; privacy.target_epsilon allows {affordable}")
    return directory
