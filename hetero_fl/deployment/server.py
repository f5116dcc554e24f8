"""The server process of a real federation."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import torch
from rich.console import Console

from hetero_fl.algorithms import register_algorithm
from hetero_fl.algorithms.requirements import is_bound
from hetero_fl.config import Config, expand_population
from hetero_fl.deployment.certificates import (
    ServerFiles,
    check_server_files,
    load_public_key,
    public_bytes,
)
from hetero_fl.deployment.config import load_server_config
from hetero_fl.deployment.conversations import PATIENCE, Connections
from hetero_fl.deployment.handshake import perform_handshake
from hetero_fl.deployment.monitoring import EventLog, LineStream, RunStatus, serve_status
from hetero_fl.deployment.node_storage import NodeStorage
from hetero_fl.deployment.remote_executor import NodeExecutor
from hetero_fl.deployment.transport import MESSAGE_BYTES, BoundedTransport, Transport
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment.preparation import PreparedRun, load_config
from hetero_fl.experiment.runner import Callback, check_resumed_choice, default_out, run_prepared
from hetero_fl.federation.executors.choose import ExecutorChoice
from hetero_fl.federation.simulation.schedule import unused_simulation_keys
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.trainer import Record
from hetero_fl.privacy.mechanisms import SecretNoiseSource
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory, check_vacant
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.serialization import write_atomically

# The server's side of a federation: nodes come, and a run is carried out with them as in a
# simulation.

IDENTITY = "federation.json"  # in the run directory: which run nodes know it as, and what they told


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
    say: Callable[[str], None] = lambda line: None,
    status: RunStatus | None = None,
    console: Console | None = None,
    message_bytes: int = MESSAGE_BYTES,
) -> Run:
    """Carry out a run with the nodes that a transport reaches; leaves the run directory that a simulation leaves.

    Args:
        wait: seconds until all clients of the configuration have to be there.
        deadline: seconds that a node may take for a task; `cohort.deadline` can ask for fewer.
        patience: seconds that a node which has gone is waited for, as long as enough others are there.
        keys: public key of each client's node in PEM; none: a client belongs to the node that
            first claims it, until that node disconnects.
        say: told, in one line, of whoever comes, goes or is refused.
        status: kept up to date.
        console: where the run's progress is shown, if not in a terminal.
        message_bytes: bytes of a node's answer, at most; a longer one is refused before it is read.

    Raises:
        UserError: a mistake in the configuration, the data or the call.
        RunFailedError: nodes are missing or refuse before the first round, or the run itself cannot go on.
        Interrupted: once there is something to resume.
    """
    over = False
    try:
        config = load_config(source, overrides)
        check_deployable(config)
        if resume and (out / "config.yaml").exists():  # before anybody is waited for
            check_resumed_choice(out, on_nodes=True)
        else:
            check_vacant(out)
        clients = list(expand_population(config.clients))
        status = status or RunStatus(out, clients)

        def tell(line: str) -> None:
            line = one_line(line)
            status.add_event(line)
            say(line)

        transport = BoundedTransport(transport, message_bytes)
        connections = Connections(transport, clients, tell, patience, keys)
        status.set_log_source(lambda: connections.log_heads.longest)
        status.set_presence_source(lambda: connections.node_of)
    except BaseException:
        transport.close()
        raise
    try:
        with _report_outcome(status):
            status.update(
                name=config.name, algorithm=config.algorithm["name"], rounds=config.rounds
            )
            handshake = perform_handshake(
                config, connections, wait, _run_identity(out) if resume else None
            )
            status.update(phase="running", run=handshake.run)
            for record in _completed_rounds(out) if resume else []:
                status.add_record(record)

            def executor_factory(
                prepared: PreparedRun, choice: ExecutorChoice, store: StateStore
            ) -> NodeExecutor:
                torch.set_num_threads(choice.server_threads)
                device = torch.device(choice.device)
                use_deterministic_algorithms(device, choice.deterministic)
                write_atomically(out / IDENTITY, json.dumps(handshake.state_dict()).encode())
                # What is drawn at the server must not follow from the seed, which every node is told.
                noise = SecretNoiseSource(NodeStorage(out / "secrets").secret("noise"))
                prepared.federation = replace(prepared.federation, noise=noise)
                memory = DeviceMemory(device, keeps_copies=False)
                backend = make_backend(memory, 1, choice.precision)
                seconds = min(deadline, config.cohort.deadline or deadline)
                return NodeExecutor(handshake, store, backend, seconds, _min_clients(prepared))

            notes = handshake.prepared.notes
            notes += unused_simulation_keys(handshake.prepared.federation, config)
            told = [status.add_record, *callbacks]
            run = run_prepared(
                handshake.prepared,
                out=out,
                resume=resume,
                callbacks=told,
                quiet=quiet,
                executor_factory=executor_factory,
                console=console,
            )
        over = True
        return run
    finally:
        connections.close(over)


@contextmanager
def _report_outcome(status: RunStatus) -> Iterator[None]:
    """How it ends goes to the status."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        # Flower ends a process that it stops with the second.
        status.update(phase="interrupted")
        raise
    except BaseException:
        status.update(phase="failed")
        raise
    status.update(phase="done")


def _completed_rounds(out: Path) -> list[Record]:
    """The rounds that a checkpoint holds; of later ones, which are held again, there may be a line."""
    with suppress(UserError):
        return RunDirectory.open(out).metrics()
    return []


def check_deployable(config: Config) -> None:
    """Refuse (UserError) what only a simulation has."""
    if config.attacks is not None:
        raise UserError(
            "attacks: found some, but nobody's part in a federation is simulated; leave it out"
        )
    name = config.algorithm["name"]
    if is_bound(register_algorithm[name]):
        raise UserError(
            f"algorithm.name: {name} wants everybody's rows or models in one place; it is for simulations"
        )


def _min_clients(prepared: PreparedRun) -> int:
    """Clients without whom nothing comes of a round."""
    secret = prepared.config.channel.secure_sum
    cohort = prepared.federation.cohort
    return max(
        prepared.config.cohort.least, secret.min_survivors(cohort) if secret is not None else 1
    )


def _run_identity(out: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads((out / IDENTITY).read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        return None


# The server's process: it listens, holds a run with the nodes that come, shows how that stands, and
# ends politely.


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
    """Carry out a run with nodes on other machines, as the server's `file` says.

    SIGTERM ends it after the round in hand, with its checkpoint; once more, or Ctrl-C: at once, with that of the round before.

    Args:
        source: The configuration.
        file: The server's own file.
        out: The run directory; None: `runs/<name>-<time>`.
        resume: Go on from the newest whole checkpoint in `out`.
        overrides: Changes to the configuration, `key.path=value`.
        allow_code: Whether code that a file names may run at the server (see `hetero_fl.load_config`).
        quiet: Write no log to stderr.

    Raises:
        UserError: what is wrong with one of the files, or what it names; Flower is missing; a port is taken.
        RunFailedError, Interrupted: as `serve` does.
    """
    server = load_server_config(file)
    config = load_config(source, overrides, allow_code)
    check_deployable(config)
    server.check_clients(list(expand_population(config.clients)), file)
    files = None
    if (made := server.certificates) is not None:
        files = ServerFiles(Path(made.authority), Path(made.certificate), Path(made.key))
        check_server_files(files)
    keys = {
        client: public_bytes(load_public_key(Path(path))) for client, path in server.nodes.items()
    }
    _check_distinct(keys, file)
    path = default_out(config) if out is None else out
    from hetero_fl.deployment.flower.commands import check_installed

    check_installed()
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
            f"waiting at {server.host}:{superlink.port} for {', '.join(expand_population(config.clients))}"
        )
        transport = FlowerTransport(superlink, server.message_bytes)
        ending = stack.enter_context(_handle_termination(status, log))
        return run_federation(
            config, transport, out=path, resume=resume, wait=server.wait, deadline=server.deadline,
            callbacks=[log.log_round, ending], quiet=quiet, say=log, status=status, console=log.console(),
            keys=None if files is None else keys, patience=server.patience, message_bytes=server.message_bytes,
        )  # fmt: skip


def _check_distinct(keys: Mapping[str, bytes], file: Path) -> None:
    owner: dict[bytes, str] = {}
    for client, key in keys.items():
        if (other := owner.setdefault(key, client)) != client:
            raise UserError(f"{file}: nodes: '{other}' and '{client}' have the same key")


class _RunLog(EventLog):
    """A log whose lines say which run and which round they are about."""

    def __init__(self, form: str, status: RunStatus) -> None:
        super().__init__(form)
        self._status = status

    def __call__(self, line: str, **about: object) -> None:
        tree = self._status.to_dict()
        named = [
            client
            for client in tree["nodes"]
            if line.startswith(f"{client} ") or f"'{client}'" in line
        ]
        client = named[0] if len(named) == 1 else None
        super().__call__(
            line, run=tree["run"], round=tree["round"], phase=tree["phase"], client=client, **about
        )

    def log_round(self, record: Record) -> None:
        """A round is complete. (For a reader there is the line on its figures.)"""
        if self.form == "json":
            tree = self._status.to_dict()
            told = {
                name: tree[name] for name in ("seconds", "epsilon", "personal", "global", "server")
            }
            sizes = {name: record[name] for name in ("up_bytes", "down_bytes")}
            self(f"round {record['round']} is complete", failed=record["failed"], **sizes, **told)

    def console(self) -> Console | None:
        """Where the run's own lines go, if not to the terminal."""
        return (
            Console(file=cast("TextIO", LineStream(self)), highlight=False, soft_wrap=True)
            if self.form == "json"
            else None
        )


@contextmanager
def _handle_termination(status: RunStatus, log: EventLog) -> Iterator[Callable[[Record], None]]:
    """SIGTERM lets the round in hand be finished; yields what is to be called after each."""
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or status.to_dict()["phase"] == "waiting":
            raise KeyboardInterrupt
        asked = True
        # this thread may hold the locks of the log and the status
        threading.Thread(target=_announce_stop).start()

    def _announce_stop() -> None:
        status.update(phase="stopping")
        log("stopping after the round in hand; once more: at once")

    def after_round(record: Record) -> None:
        if asked and record["round"] < status.to_dict()["rounds"]:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield after_round
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield after_round
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
