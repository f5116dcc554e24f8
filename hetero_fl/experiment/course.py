"""The course of a run: rounds, evaluations, checkpoints, and what is left behind at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from hetero_fl.config import Config
from hetero_fl.errors import UserError
from hetero_fl.experiment.prepared import Engage, Prepared
from hetero_fl.files import write_atomically
from hetero_fl.reporting.integrity import check_resumable, evidence_of_start, identity
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.rundir import RunDirectory
from hetero_fl.reporting.summary import Patience, details_of, summarise
from hetero_fl.reporting.tensorboard import writer_callback
from hetero_fl.reporting.wording import plural
from hetero_fl.runtime.checkpoint import Checkpoints
from hetero_fl.runtime.choose import Choice
from hetero_fl.runtime.readings import Readings, Record, record_readings
from hetero_fl.runtime.session import Session
from hetero_fl.runtime.store import Private, Store
from hetero_fl.saved import SavedModel

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
        state = {"run": rounds.tree(), "data": fingerprint, "traces": traces, "choice": choice.record()}
        state["directory"] = about | {"metrics": directory.metrics_checksum()}
        checkpoints.save(rounds.completed, state)
        rounds.saved()

    planned = config.rounds if prepared.budget is None else prepared.budget.affordable()
    saved = checkpoints.newest()
    if saved is not None:
        check_resumable(directory, saved)
        if saved["data"] != fingerprint:
            raise UserError(f"{directory.path}: the data is not what this run began with; restore it, or start anew")
        if saved.get("traces", "") != traces:
            raise UserError(f"devices.file: {config.devices and config.devices.file} is not what this run began with")
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
    listeners = [*callbacks, *([writer_callback(directory.path)] if config.output.tensorboard else [])]
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


def _reopened(directory: RunDirectory, checkpoints: Checkpoints, saved: dict[str, Any], every: int) -> dict[str, Any]:
    """Prepare a run directory for more rounds; returns the checkpoint from which they follow.

    The last round of a shorter run was evaluated whatever `evaluation.every` says. In the longer run it is not, so that
    round is repeated from the checkpoint before it.
    """
    directory.reopen()
    completed = saved["run"]["completed"]
    if completed % every and "validation" in directory.metrics()[completed - 1]:
        return checkpoints.back_before(completed) or checkpoints.newest() or saved
    return saved


def _extend(directory: RunDirectory, saved: Mapping[str, Any] | None, rounds: int, progress: Progress) -> list[str]:
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
        line = (
            f"extended from {planned} to {plural(rounds, 'round')} after round {completed}; schedules use the new total"
        )
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
    directory.write_json("details.json", details_of(prepared.federation, readings, prepared.notes, prepared.method))
    summary = summarise(prepared.config, prepared.method, prepared.federation, history, rounds.traffic, setup, readings)
    directory.finish(summary)
    present(prepared.config, directory, progress.log)
    progress.finish(summary)


def present(config: Config, directory: RunDirectory, say: Callable[[str], None]) -> None:
    """Draw the pictures and the report, unless a process that finished has left them.

    The run is finished whatever becomes of them: an error in a drawing is reported to `say` in one line.
    """
    if (directory.path / "report.html").exists():
        return
    from hetero_fl.reporting.plots import write_plots  # not needed before the last round, and slow to load
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
            server.models[slot], server.arch[slot], view, federation.task, None, layout.columns, layout.categories
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
                rounds.server.models[group][name] = torch.stack([m.tensors[name] for m in members]).mean(0)
