"""Server of a federation that trains with nodes on other machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from rich.console import Console

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import is_reference
from hetero_fl.config import Config, expand_population
from hetero_fl.deployment.certificates import (
    ServerFiles,
    check_server_files,
    load_public_key,
    public_bytes,
)
from hetero_fl.deployment.config import load_server_config
from hetero_fl.deployment.conversations import PATIENCE, Connections, EventFunction
from hetero_fl.deployment.handshake import Handshake, perform_handshake
from hetero_fl.deployment.monitoring import EventLog, LineStream, RunStatus, serve_status
from hetero_fl.deployment.node_storage import NodeStorage
from hetero_fl.deployment.remote_executor import NodeExecutor
from hetero_fl.deployment.transport import MESSAGE_BYTES, BoundedTransport, Transport
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.experiment.runner import Callback, check_resumed_choice, default_out, run_prepared
from hetero_fl.federation.evaluation import Record
from hetero_fl.federation.executors.choose import ExecutorChoice
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.conditions import unused_simulation_keys
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.trainer import min_clients
from hetero_fl.privacy.mechanisms import SecretNoiseSource
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant
from hetero_fl.reporting.terminal import Terminal
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.processes import handle_termination
from hetero_fl.utils.serialization import write_atomically

# File in the run directory with the result of `Handshake.state_dict`.
IDENTITY_FILE = "federation.json"


def run_federation(
    source: str | Path | Mapping[str, Any] | Config,
    transport: Transport,
    *,
    out: Path,
    resume: bool = False,
    overrides: Iterable[str] = (),
    wait: float = 120.0,
    deadline: float = 3600.0,
    patience: float = PATIENCE,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    keys: Mapping[str, bytes] | None = None,
    log: EventFunction | None = None,
    status: RunStatus | None = None,
    console: Console | None = None,
    message_bytes: int = MESSAGE_BYTES,
) -> Run:
    """Train with the connected nodes of a transport.

    The run directory has the same files as in a simulation.

    Args:
        source: Configuration, or path of a configuration file.
        transport: Transport for the messages, which is closed at the end.
        out: Run directory.
        resume: Whether to continue from the newest checkpoint in `out`.
        overrides: Changes to the configuration in the format `key.path=value`.
        wait: Seconds to wait for all clients of the configuration.
        deadline: Seconds that a node may take for a task, unless `cohort.deadline` is smaller.
        patience: Seconds to wait for a disconnected node while enough other nodes are connected.
        callbacks: Functions that are called with the record of each round.
        quiet: Whether to hide progress.
        keys: Public key of each client's node in PEM format. If None, a client belongs to the first
            node that claims to be the client, until that node disconnects.
        log: Function that is called for each node that connects, disconnects or is refused. If
            None, these events are not logged.
        status: Status that is updated during the run. If None, a new status is created.
        console: Console for progress. If None, progress is shown in the terminal.
        message_bytes: Maximum size of a node's answer in bytes.

    Returns:
        The finished run.

    Raises:
        UserError: If the configuration, the data or an argument is invalid.
        RunFailedError: If a node is missing or refuses the run before the first round, or the run
            cannot continue.
        Interrupted: If the run is interrupted after its first checkpoint.
    """
    try:
        config = load_config(source, overrides)
        check_deployable(config)
        _check_out(out, resume)
        clients = list(expand_population(config.clients))
        status = status or RunStatus(out, clients)
        bounded = BoundedTransport(transport, message_bytes)
        connections = Connections(bounded, clients, _make_reporter(status, log), patience, keys)
        status.set_log_source(lambda: connections.log_heads.longest)
        status.set_presence_source(lambda: connections.node_of)
    except BaseException:
        transport.close()
        raise
    is_complete = False
    try:
        with _report_outcome(status):
            status.update(
                name=config.name, algorithm=config.algorithm["name"], rounds=config.rounds
            )
            identity = _run_identity(out) if resume else None
            handshake = perform_handshake(config, connections, wait, identity)
            status.update(phase="running", run=handshake.run)
            for record in _completed_rounds(out) if resume else []:
                status.add_record(record)
            prepared = handshake.prepared
            prepared.notes.extend(unused_simulation_keys(prepared.federation, config))
            run = run_prepared(
                prepared,
                out=out,
                resume=resume,
                callbacks=[status.add_record, *callbacks],
                quiet=quiet,
                executor_factory=partial(
                    _make_executor, handshake=handshake, out=out, deadline=deadline
                ),
                console=console,
            )
        is_complete = True
        return run
    finally:
        connections.close(is_complete)


def _check_out(out: Path, resume: bool) -> None:
    """Check, before waiting for nodes, that a run can be started or resumed in a folder."""
    if resume and (out / "config.yaml").exists():
        check_resumed_choice(out, on_nodes=True)
    else:
        check_vacant(out)


def _make_reporter(status: RunStatus, log: EventFunction | None) -> EventFunction:
    """Return a function that adds an event to the status and the log."""

    def report(line: str, *, client: str | None = None) -> None:
        line = one_line(line)
        status.add_event(line)
        if log is not None:
            log(line, client=client)

    return report


def _make_executor(
    prepared: PreparedRun,
    choice: ExecutorChoice,
    store: StateStore,
    *,
    handshake: Handshake,
    out: Path,
    deadline: float,
) -> tuple[NodeExecutor, FederationSpec]:
    """Create the executor of a run, and write the files that a restarted server needs.

    Args:
        prepared: The run.
        choice: Device and threads of the server.
        store: Store of the server.
        handshake: The completed handshake with the nodes.
        out: Run directory, which exists.
        deadline: Seconds that a node may take for a task, unless `cohort.deadline` is smaller.

    Returns:
        The executor, and the federation with the server's secret source of noise.
    """
    torch.set_num_threads(choice.server_threads)
    device = torch.device(choice.device)
    use_deterministic_algorithms(device, choice.deterministic)
    write_atomically(out / IDENTITY_FILE, json.dumps(handshake.state_dict()).encode())
    memory = DeviceMemory(device, keeps_copies=False)
    backend = make_backend(memory, 1, choice.precision)
    cohort = prepared.config.cohort
    seconds = min(deadline, cohort.deadline or deadline)
    required = min_clients(cohort, prepared.federation)
    executor = NodeExecutor(handshake, store, backend, seconds, required=required)
    # Privacy noise must not depend on the seed, which every node knows.
    noise = SecretNoiseSource(NodeStorage(out / "secrets").secret("noise"))
    return executor, replace(prepared.federation, noise=noise)


@contextmanager
def _report_outcome(status: RunStatus) -> Iterator[None]:
    """Set the phase of the status when the run ends."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        # Flower stops its processes with SystemExit.
        status.update(phase="interrupted")
        raise
    except BaseException:
        status.update(phase="failed")
        raise
    status.update(phase="done")


def _completed_rounds(out: Path) -> list[Record]:
    """Return the records of completed rounds, including rounds that will be repeated."""
    with suppress(UserError):
        return RunDirectory.open(out).metrics()
    return []


def check_deployable(config: Config) -> None:
    """Check that a configuration can be run outside a simulation.

    Raises:
        UserError: If the configuration requires a simulation.
    """
    if config.attacks is not None:
        raise UserError("attacks: available in simulations only; remove it")
    if config.evaluation.metrics:
        raise UserError("evaluation.metrics: available in simulations only; remove it")
    name = config.algorithm["name"]
    if is_reference(register_algorithm[name]):
        raise UserError(
            f"algorithm.name: {name} is available in simulations only: "
            "it needs the rows or models of all clients in one place"
        )


def _run_identity(out: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads((out / IDENTITY_FILE).read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        return None


def run_server(
    source: str | Path | Config,
    file: Path,
    *,
    out: Path | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
    allow_code: bool | CodePermission = False,
    quiet: bool = False,
) -> Run:
    """Train with nodes on other machines.

    SIGTERM stops the run after the current round, with a checkpoint. A second SIGTERM, or Ctrl-C,
    stops the run immediately. In this case, the last checkpoint is from the previous round.

    Args:
        source: Configuration, or path of a configuration file.
        file: Path of the server file.
        out: Run directory. If None, `runs/<name>-<time>` is used.
        resume: Whether to continue from the newest complete checkpoint in `out`.
        overrides: Changes to the configuration in the format `key.path=value`.
        allow_code: Whether the server may run the code that the configuration references (see
            `hetero_fl.load_config`).
        quiet: Whether to suppress the log on stderr.

    Returns:
        The finished run.

    Raises:
        UserError: If a file is invalid, Flower is not installed, or a port is in use.
        RunFailedError: If a node is missing or refuses the run, or the run cannot continue.
        Interrupted: If the run is interrupted after its first checkpoint.
    """
    server = load_server_config(file)
    config = load_config(source, overrides, allow_code)
    check_deployable(config)
    server.check_clients(list(expand_population(config.clients)), file)
    files = None
    if (paths := server.certificates) is not None:
        files = ServerFiles(Path(paths.authority), Path(paths.certificate), Path(paths.key))
        check_server_files(files)
    keys = {
        client: public_bytes(load_public_key(Path(path))) for client, path in server.nodes.items()
    }
    _check_distinct(keys, file)
    path = default_out(config) if out is None else out
    from hetero_fl.deployment.flower.commands import check_flower

    check_flower()
    from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink

    status = RunStatus(path, list(expand_population(config.clients)))
    log = _RunLog(server.logs, status)
    log.quiet = quiet
    with ExitStack() as stack:
        if server.metrics is not None:
            port = stack.enter_context(
                serve_status(status, server.metrics.host, server.metrics.port)
            )
            log(f"status, metrics and health: http://{server.metrics.host}:{port}")
        superlink = SuperLink(server.host, server.port, files, map(Path, server.nodes.values()))
        stack.callback(superlink.close)
        log(
            f"waiting at {server.host}:{superlink.port} for "
            f"{', '.join(expand_population(config.clients))}"
        )
        transport = FlowerTransport(superlink, server.message_bytes)
        after_round = stack.enter_context(_stop_after_round(status, log))
        return run_federation(
            config,
            transport,
            out=path,
            resume=resume,
            wait=server.wait,
            deadline=server.deadline,
            patience=server.patience,
            callbacks=[log.log_round, after_round],
            quiet=quiet,
            keys=None if files is None else keys,
            log=log,
            status=status,
            console=log.console(),
            message_bytes=server.message_bytes,
        )


def _check_distinct(keys: Mapping[str, bytes], file: Path) -> None:
    owner: dict[bytes, str] = {}
    for client, key in keys.items():
        if (other := owner.setdefault(key, client)) != client:
            raise UserError(f"{file}: nodes: '{other}' and '{client}' have the same key")


class _RunLog(EventLog):
    """Log in which each line has the run, the round, the phase and the client as fields.

    Args:
        line_format: "text" or "json", see `EventLog`.
        status: Status of the run.
    """

    def __init__(self, line_format: str, status: RunStatus) -> None:
        super().__init__(line_format)
        self._status = status

    def __call__(self, line: str, **fields: object) -> None:
        tree = self._status.to_dict()
        super().__call__(line, run=tree["run"], round=tree["round"], phase=tree["phase"], **fields)

    def log_round(self, record: Record) -> None:
        """Log a completed round in JSON format.

        In text format, nothing is logged, because the console shows the results.
        """
        if self.line_format == "json":
            tree = self._status.to_dict()
            names = ("seconds", "epsilon", "personal", "global", "server")
            results = {name: tree[name] for name in names}
            sizes = {name: record[name] for name in ("up_bytes", "down_bytes")}
            line = f"round {record['round']} completed"
            self(line, failed=record["failed"], **sizes, **results)

    def console(self) -> Console | None:
        """Return a console that writes to the log in JSON format, or None in text format."""
        return (
            Terminal(file=cast("TextIO", LineStream(self)), highlight=False, soft_wrap=True)
            if self.line_format == "json"
            else None
        )


@contextmanager
def _stop_after_round(status: RunStatus, log: EventLog) -> Iterator[Callable[[Record], None]]:
    """Stop the run after the current round on SIGTERM.

    Yields:
        Callback for each round, which stops the run if a SIGTERM has arrived.
    """

    def announce() -> None:
        status.update(phase="stopping")
        log("stopping after the current round; repeat the signal to stop immediately")

    def is_waiting() -> bool:
        return bool(status.to_dict()["phase"] == "waiting")

    with handle_termination(announce, is_waiting) as is_stopping:

        def after_round(record: Record) -> None:
            if is_stopping() and record["round"] < status.to_dict()["rounds"]:
                raise KeyboardInterrupt

        yield after_round
