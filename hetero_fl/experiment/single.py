"""One run: configuration in, finished run directory out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.children import leave_if_importing
from hetero_fl.config import Config, deciding, difference, resolved
from hetero_fl.config.load import Overrides
from hetero_fl.data import Dataset
from hetero_fl.environment import describe_environment
from hetero_fl.errors import Interrupted, UserError
from hetero_fl.experiment.course import Callback, carry_out, present
from hetero_fl.experiment.prepared import Engage, Prepared, prepare
from hetero_fl.own_code import CodePermission, references
from hetero_fl.reporting.integrity import inspect
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import LOG, RunDirectory, check_vacant, has_run, locked
from hetero_fl.reporting.summary import Patience
from hetero_fl.reporting.wording import plural
from hetero_fl.runtime.choose import Choice, choose
from hetero_fl.runtime.engines import engine

if TYPE_CHECKING:
    from rich.console import Console

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
        how = "on one machine; hetero-fl train" if on_nodes else "on nodes; hetero-fl federate or server"
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
        with engine(config.runtime, began["executor"] if began else NODES if engage else config.runtime.executor):
            if began:
                try:
                    choice = Choice.recorded(began, config.runtime)
                except (TypeError, KeyError):
                    raise _no_choice(path) from None
            else:
                choice = choose(config, prepared.federation) if engage is None else choose_for_nodes(prepared)
            with locked(path) as unheld:
                prepared.notes[:0] = unheld
                _run_in(path, prepared, choice, resume, callbacks, engage, Progress(path / LOG, quiet, console))
    except KeyboardInterrupt as stop:
        if (path / "config.yaml").exists():
            raise Interrupted(path) from stop
        raise
    return Run(path, CodePermission(granted=references(config.model_dump())))


def choose_for_nodes(prepared: Prepared) -> Choice:
    """What a run across machines computes with: one client at a time, with as many threads as a simulation would have here."""
    config = prepared.config
    asked = config.runtime.executor if config.runtime.executor in ("serial", "processes") else "auto"
    runtime = config.runtime.model_copy(update={"executor": asked, "chunk": None})
    chosen = choose(config.model_copy(update={"runtime": runtime}), prepared.federation)
    reasons = (f"on nodes, {plural(chosen.threads, 'thread')} each",)
    return replace(chosen, executor=NODES, chunk=1, workers=len(prepared.federation.cards), reasons=reasons)


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
    rounds = f"{completed} of {plural(planned, 'round')}" if completed < planned else plural(planned, "round")
    # What a further round would spend is known only once it is configured.
    limited = prepared.budget is not None and prepared.budget.privacy.target_epsilon is not None
    final = limited or _why_final(directory, prepared, planned, on_nodes)
    return f"this run has finished, after {rounds}" + ("" if final else "; add `rounds=N` to extend it")


def _why_final(directory: RunDirectory, prepared: Prepared, planned: int, on_nodes: bool) -> str:
    """Return why a run cannot have more rounds than planned; empty if it can."""
    config = prepared.config
    if prepared.method.one_shot:
        return f"{prepared.name} is a one-shot method, whose runs cannot be extended"
    if on_nodes:
        return f"a run on nodes cannot be extended, its sites agreed to {planned}"
    if config.evaluation.patience is not None and directory.lines():
        # The last round of a shorter run may be evaluated only because it is the last.
        history = [record for record in directory.metrics() if record["round"] % config.evaluation.every == 0]
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
