"""Server of a federation that trains with nodes on other machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import is_reference
from hetero_fl.config import Config, expand_population
from hetero_fl.deployment.conversations import PATIENCE, Connections, EventFunction
from hetero_fl.deployment.handshake import Handshake, perform_handshake
from hetero_fl.deployment.monitoring import RunStatus
from hetero_fl.deployment.node_storage import NodeStorage
from hetero_fl.deployment.remote_executor import NodeExecutor
from hetero_fl.deployment.transport import MESSAGE_BYTES, BoundedTransport, Transport
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.experiment.runner import Callback, check_resumed_choice, run_prepared
from hetero_fl.federation.evaluation import Record
from hetero_fl.federation.executors.choose import ExecutorChoice
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.conditions import unused_simulation_keys
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.trainer import min_clients
from hetero_fl.privacy.noise import SecretNoiseSource
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import UserError, one_line
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
