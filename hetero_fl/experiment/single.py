"""One run: configuration in, finished run directory out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm, algorithm
from hetero_fl.algorithms.base import own_objective
from hetero_fl.config import Config, difference, expand, load_config, resolved
from hetero_fl.data import Dataset, FederatedData, federate, load_source
from hetero_fl.environment import choose_device, choose_threads, describe_environment
from hetero_fl.errors import Interrupted, UserError
from hetero_fl.experiment.guard import leave_if_importing
from hetero_fl.files import write_atomically
from hetero_fl.reporting.plots import write_plots
from hetero_fl.reporting.progress import Progress
from hetero_fl.reporting.report import write_report
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import RunDirectory, check_vacant, locked
from hetero_fl.reporting.summary import Patience, details_of, summarise
from hetero_fl.reporting.tensorboard import writer_callback
from hetero_fl.runtime.checkpoint import Checkpoints
from hetero_fl.runtime.choose import make_executor
from hetero_fl.runtime.compatibility import check
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.rounds import Readings, Record, Rounds, record_readings
from hetero_fl.runtime.store import Private, Store
from hetero_fl.saved import SavedModel

Callback = Callable[[Record], None]


@dataclass
class Prepared:
    """Everything about a run that is known before it computes; nothing has been written."""

    config: Config
    method: Algorithm
    federation: Federation
    data: FederatedData
    notes: list[str]
    inherited: dict[str, SavedModel]  # models of another run to start from, by client

    @property
    def name(self) -> str:
        """The algorithm's name."""
        return str(self.config.algorithm["name"])


def prepare(
    source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = (), dataset: Dataset | None = None
) -> Prepared:
    """Load, build and check everything; trains and writes nothing. `dataset`: examples in memory in place of `data.name`.

    Raises UserError for whatever is wrong.
    """
    config = load_config(source, overrides)
    clients = expand(config.clients)
    if config.clients.per_round is not None and config.clients.per_round > len(clients):
        raise UserError(f"clients.per_round: found {config.clients.per_round}, but there are {len(clients)} clients")
    rare = [kind.first for kind in clients.kinds if kind.settings.share_every > 1]
    if config.clients.per_round is not None and rare:
        raise UserError(
            f"clients.per_round: cannot be combined with share_every ({rare[0]}): who is drawn may not be who shares"
        )
    if (
        config.data.train_limit is not None
        and config.data.proxy.source is None
        and config.data.proxy.size >= config.data.train_limit
    ):
        raise UserError(
            f"data.proxy.size: found {config.data.proxy.size}, but data.train_limit leaves {config.data.train_limit} rows"
        )
    dataset = dataset or load_source(config.data, Path(config.data.root).expanduser())
    settings = {k: v for k, v in config.algorithm.items() if k != "name"}
    method = algorithm[config.algorithm["name"]].model_validate(settings)
    own_view = config.server.preprocess if config.server.model and method.distils else None
    data = federate(dataset, config.data, clients, config.seed, server=own_view)
    student = method.distils and data.n_proxy > 0
    federation = Federation.of(config, data, clients, student)
    notes = data.notes + check(config.algorithm["name"], method, federation)
    if config.server.model and not student:
        notes.append(
            "server.model is not used: without a consensus on a proxy set there is nothing to distil a student from"
        )
    if len(federation.readers) < len(clients):
        notes.append(
            f"the models of {len(federation.readers):,} of {len(clients):,} clients are read, each time the same "
            "(evaluation.clients)"
        )
    for own in {kind.settings.objective for kind in clients.kinds}:
        own_objective(own, federation.task)
    choose_device(config.runtime.device)
    return Prepared(config, method, federation, data, notes, _inherited(config.init_from, federation))


def run(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
    callbacks: Sequence[Callback] = (),
    dataset: Dataset | None = None,
    quiet: bool = True,
) -> Run:
    """Carry out a run and leave its directory behind; `resume` goes on from the newest whole checkpoint.

    `callbacks` are called with each round's record (a line of `metrics.jsonl`) once it is safe on disk. Raises UserError
    for a mistake in the configuration, the data or the call, or while another process is at work in `out`; RunFailed if the
    run itself cannot go on; Interrupted, a KeyboardInterrupt, once there is something to resume.
    """
    leave_if_importing()
    prepared = prepare(source, overrides, dataset)
    config = prepared.config
    path = Path(out) if out is not None else Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    if not (resume and (path / "config.yaml").exists()):
        check_vacant(path)  # before anything is put there
    with locked(path):
        try:
            _run_in(path, prepared, resume, callbacks, quiet)
        except KeyboardInterrupt as stop:
            if (path / "config.yaml").exists():
                raise Interrupted(path) from stop
            raise
    return Run(path)


def _run_in(path: Path, prepared: Prepared, resume: bool, callbacks: Sequence[Callback], quiet: bool) -> None:
    config = prepared.config
    device, (threads, why) = choose_device(config.runtime.device), choose_threads(config.runtime.threads)
    if resume and (path / "config.yaml").exists():
        directory = _reopen(path, config)
        began = (
            directory.environment()
        )  # the same bits need the same threads and device, whatever this machine would choose
        threads, device = began["threads"], choose_device(began["device"].split()[0])
    else:
        executor = (
            "serial executor: runtime.executor" if config.runtime.executor == "serial" else "serial executor: auto"
        )
        environment = describe_environment(device, threads, [why, executor])
        directory = RunDirectory.create(path, config=resolved(config), environment=environment)
    torch.set_num_threads(threads)
    if resume and (directory.path / "summary.json").exists():
        _present(config, directory)
        return
    with Progress(directory.log, quiet) as progress:
        _carry_out(prepared, directory, device, progress, callbacks)


def _deciding(recorded: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same when a run is resumed: all but memory and workers, which decide no result."""
    return {
        **recorded,
        "runtime": {k: v for k, v in recorded["runtime"].items() if k not in ("store_memory", "workers")},
    }


def _reopen(path: Path, config: Config) -> RunDirectory:
    """The run directory of an interrupted run. Raises UserError naming the keys that differ."""
    directory = RunDirectory.open(path)
    if differs := difference(_deciding(directory.config()), _deciding(resolved(config))):
        raise UserError(f"{path}: --resume with another configuration: {differs}")
    return directory


def _carry_out(
    prepared: Prepared, directory: RunDirectory, device: torch.device, progress: Progress, callbacks: Sequence[Callback]
) -> None:
    begun, config = time.perf_counter(), prepared.config
    store = Store(directory.path / "checkpoint", config.runtime.store_memory << 20)
    executor = make_executor(config.runtime, prepared.method, prepared.federation, device, store)
    executor.watch(progress.task)
    rounds = Rounds(
        prepared.method, prepared.federation, executor, config.clients.per_round, config.runtime.divergence == "stop"
    )
    checkpoints = Checkpoints(rounds.store, progress.log)
    fingerprint = prepared.data.content_hash()
    saved = checkpoints.newest()
    if saved is not None:
        if saved["data"] != fingerprint:
            raise UserError(f"{directory.path}: the data is not what this run began with; restore it, or start anew")
        rounds.restore(saved["run"])
        progress.log(f"resumed after round {rounds.completed}")
    else:
        _start_from(prepared.inherited, rounds)
        checkpoints.save(0, {"run": rounds.tree(), "data": fingerprint})
        for note in prepared.notes:
            progress.log(note)
    directory.rewind_metrics(rounds.completed)
    listeners = [*callbacks, *([writer_callback(directory.path)] if config.output.tensorboard else [])]
    history = directory.metrics() if (directory.path / "metrics.jsonl").exists() else []
    patience = Patience(prepared.federation.task, config.evaluation.patience, history)
    setup = time.perf_counter() - begun
    progress.start(config.rounds, len(prepared.federation.cards), rounds.completed)
    readings: Readings | None = None
    while rounds.completed < config.rounds and not patience.exhausted:
        record = rounds.round()
        if rounds.completed % config.evaluation.every == 0 or rounds.completed == config.rounds:
            readings = _evaluate(rounds, record, last=rounds.completed == config.rounds)
            patience.look(record)
        directory.append_metrics(record)
        checkpoints.save(rounds.completed, {"run": rounds.tree(), "data": fingerprint})
        history.append(record)
        for callback in listeners:
            callback(record)
        progress.round(record)
    if patience.exhausted:
        progress.log(
            f"stopped after round {rounds.completed}: no better validation in {config.evaluation.patience} evaluations"
        )
    _finish(prepared, directory, rounds, readings, history, setup, progress)


def _evaluate(rounds: Rounds, record: Record, last: bool) -> Readings:
    begun, down = time.perf_counter(), rounds.traffic.down
    readings = rounds.evaluate(details=last)
    record_readings(record, readings)
    record["down_bytes"] += rounds.traffic.down - down
    record["seconds"]["evaluation"] = time.perf_counter() - begun
    return readings


def _finish(
    prepared: Prepared,
    directory: RunDirectory,
    rounds: Rounds,
    readings: Readings | None,
    history: list[Record],
    setup: float,
    progress: Progress,
) -> None:
    """Models, summary, pictures and report of a run whose rounds are done."""
    if (
        readings is None or not next(iter(readings.clients.values())).model
    ):  # stopped early, or killed after the last round
        traffic = rounds.traffic.down
        readings = rounds.evaluate(details=True)
        rounds.traffic.down = traffic  # the same reading once more: nobody would send it again
    for name, model in _models(rounds, readings).items():
        write_atomically(directory.path / "models" / f"{name}.safetensors", model)
    directory.write_json("details.json", details_of(prepared.federation, readings, prepared.notes, prepared.method))
    summary = summarise(prepared.config, prepared.federation, history, rounds.traffic, setup)
    directory.write_json("summary.json", summary)
    _present(prepared.config, directory)
    progress.finish(summary)


def _present(config: Config, directory: RunDirectory) -> None:
    """Pictures and report, unless a process that finished has left them."""
    if (directory.path / "report.html").exists():
        return
    if config.output.plots:
        write_plots(directory.path)
    if config.output.report:
        write_report(directory.path)


def _models(rounds: Rounds, readings: Readings) -> dict[str, bytes]:
    """The files of all models: each client's, and the server's own if it has one."""
    models = {id: reading.model for id, reading in readings.clients.items()}
    slot = rounds.algorithm.server_slot(rounds.server)
    if slot is not None:
        federation, server = rounds.federation, rounds.server
        saved = SavedModel(server.models[slot], server.arch[slot], asdict(federation.view_of(slot)), federation.task)
        models["server"] = saved.encode()
    return models


def _inherited(path: str | None, federation: Federation) -> dict[str, SavedModel]:
    """The models of another run that fit clients of this one: same id, same architecture."""
    if path is None:
        return {}
    try:
        models = Run(path).models
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    known = sorted((place, id) for id in models if (place := federation.cards.clients.place(id)) is not None)
    fitting = {id: models[id] for _, id in known if models[id].arch == federation.cards[id].arch}
    if not fitting:
        raise UserError(f"init_from: none of the models in {path} fits a client of this run (same id, same model)")
    return fitting


def _start_from(models: Mapping[str, SavedModel], rounds: Rounds) -> None:
    """Begin with another run's models: each client with its own, each group at the server with the mean of its members'."""
    groups: dict[str, list[SavedModel]] = {}
    for id, model in models.items():
        rounds.store.stage(id, Private({"model": model.tensors}))
        groups.setdefault(model.arch.id, []).append(model)
    rounds.store.commit()
    for group, members in groups.items():
        for name, tensor in rounds.server.models[group].items():
            if tensor.is_floating_point():
                rounds.server.models[group][name] = torch.stack([m.tensors[name] for m in members]).mean(0)
