"""Server of a federation that trains with nodes on other machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import is_reference
from hetero_fl.config import Config, expand_population
from hetero_fl.deployment.monitoring import RunStatus
from hetero_fl.deployment.node_files import NodeStorage
from hetero_fl.deployment.remote_executor import NodeExecutor
from hetero_fl.deployment.sites import PATIENCE, EventFunction, Sites, SitesState
from hetero_fl.deployment.transport import MESSAGE_BYTES, Transport
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import PreparedRun, check_method
from hetero_fl.experiment.runner import Callback, check_resumed_choice, run_prepared
from hetero_fl.federation.executors.choose import ExecutorChoice
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.simulation.conditions import unused_simulation_keys
from hetero_fl.federation.store import StateStore, checkpoint_files
from hetero_fl.federation.trainer import min_clients
from hetero_fl.privacy.noise import SecretNoiseSource
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant
from hetero_fl.reporting.run_loggers import check_loggers
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import write_atomically

# File in the run directory with the result of `Sites.state`.
IDENTITY_FILE = "federation.json"


def run_federation(
    source: str | Path | Mapping[str, Any] | Config,
    transport: Transport,
    *,
    out: Path,
    resume: bool = False,
    wait: float = 120.0,
    deadline: float = 3600.0,
    patience: float = PATIENCE,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    keys: Mapping[str, bytes] | None = None,
    log: EventFunction | None = None,
    message_bytes: int = MESSAGE_BYTES,
) -> Run:
    """Train with the connected nodes of a transport.

    The run directory has the same files as in a simulation.

    Args:
        source: Configuration, or path of a configuration file.
        transport: Transport for the messages, which is closed at the end.
        out: Run directory.
        resume: Whether to continue from the newest checkpoint in `out`.
        wait: Seconds to wait for all clients of the configuration.
        deadline: Seconds that a node may take for a task, unless `cohort.deadline` is smaller.
        patience: Seconds to wait for a disconnected node while enough other nodes are connected.
        callbacks: Functions that are called with the record of each round.
        quiet: Whether to hide progress.
        keys: Public key of each client's node in PEM format. If None, a client belongs to the first
            node that claims to be the client, until that node disconnects.
        log: Function that is called for each node that connects, disconnects or is refused. If
            None, these events are not logged.
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
        config = load_config(source)
        check_deployable(config)
        check_method(config)
        check_loggers(config)
        is_resumed = _check_out(out, resume)
        clients = list(expand_population(config.clients))
        status = RunStatus(out, clients, log)
        sites = Sites(
            transport,
            clients,
            status.report,
            patience=patience,
            keys=keys,
            message_bytes=message_bytes,
        )
        status.log_heads = lambda: sites.log_heads.longest
        status.present = sites.connected
        with _report_outcome(status, sites):
            status.update(
                name=config.name, algorithm=config.algorithm["name"], rounds=config.rounds
            )
            if is_resumed:
                # Including rounds that will be repeated.
                with suppress(UserError):
                    for record in RunDirectory.open(out).metrics():
                        status.add_record(record)
            prepared = sites.join(config, wait, _sites_state(out) if is_resumed else None)
            status.update(phase="running", run=sites.run)
            prepared.notes.extend(unused_simulation_keys(prepared.federation, config))
            factory = partial(_make_executor, sites=sites, out=out, deadline=deadline)
            return run_prepared(
                prepared,
                out=out,
                resume=resume,
                callbacks=[status.add_record, *callbacks],
                quiet=quiet,
                executor_factory=factory,
            )
    finally:
        transport.close()


def _check_out(out: Path, resume: bool) -> bool:
    """Check that a run can be started or resumed in a folder, and return whether it is resumed."""
    if resume and (out / "config.yaml").exists():
        check_resumed_choice(out, on_nodes=True)
        return True
    check_vacant(out)
    return False


def _make_executor(
    prepared: PreparedRun,
    choice: ExecutorChoice,
    store: StateStore,
    *,
    sites: Sites,
    out: Path,
    deadline: float,
) -> tuple[NodeExecutor, FederationSpec]:
    """Create the executor of a run, and write the files that a restarted server needs.

    Args:
        prepared: The run.
        choice: Device and threads of the server.
        store: Store of the server.
        sites: The sites, which have joined the run.
        out: Run directory, which exists.
        deadline: Seconds that a node may take for a task, unless `cohort.deadline` is smaller.

    Returns:
        The executor, and the federation with the server's secret source of noise.
    """
    torch.set_num_threads(choice.server_threads)
    device = torch.device(choice.device)
    use_deterministic_algorithms(device, choice.deterministic)
    write_atomically(out / IDENTITY_FILE, sites.state().model_dump_json().encode())
    memory = DeviceMemory(device, keeps_copies=False)
    backend = make_backend(memory, 1, choice.precision)
    cohort = prepared.config.cohort
    seconds = min(deadline, cohort.deadline or deadline)
    required = min_clients(cohort, prepared.federation)
    executor = NodeExecutor(sites, store, backend, seconds, required=required)
    # Privacy noise must not depend on the seed, which every node knows.
    noise = SecretNoiseSource(NodeStorage(out / "secrets").secret("noise"))
    return executor, replace(prepared.federation, noise=noise)


@contextmanager
def _report_outcome(status: RunStatus, sites: Sites) -> Iterator[None]:
    """Set the phase of the status when the run ends, and notify the nodes unless it may resume."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        # Flower stops its processes with SystemExit.
        status.update(phase="interrupted")
        raise
    except Exception:
        status.update(phase="failed")
        with suppress(RunFailedError):
            sites.leave("the server ended with an error; see its log")
        raise
    status.update(phase="done")
    sites.leave()


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


def _sites_state(out: Path) -> SitesState | None:
    """Return the state of the sites in a run, or None if nothing was trained yet.

    Raises:
        UserError: If the file is missing or invalid.
    """
    if not checkpoint_files(out / "checkpoint"):
        return None
    path = out / IDENTITY_FILE
    try:
        return SitesState.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise UserError(
            f"{path}: missing or invalid; restore the file, or start a new run"
        ) from None
