"""Federated runs with a server and one process per client on this machine, connected by pipes."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hetero_fl.communication.homomorphic import SharedKey
from hetero_fl.config import Config, expand_population
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.flower.worker import receive, send
from hetero_fl.deployment.monitoring import open_node
from hetero_fl.deployment.node_files import make_node_key
from hetero_fl.deployment.policy import named_sources, source_tree
from hetero_fl.deployment.server import check_deployable, run_federation
from hetero_fl.deployment.transport import Envelope, SentMessage, ThreadedTransport
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import SHARED_KEY_FILE
from hetero_fl.experiment.runner import Callback, default_out
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import SITES, check_vacant, lock_folder
from hetero_fl.utils.code_permission import AllowCode, find_references
from hetero_fl.utils.errors import RunFailedError, UserError, echo
from hetero_fl.utils.processes import (
    begin_worker,
    ignore_interrupts_in_children,
    worker_context,
)

# Files in the folder of a site: private key, which signs the audit log, and log of its process.
KEY = "key"
LOG = "log.txt"


def run_local_federation(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    allow_code: AllowCode = False,
) -> Run:
    """Train with a server and one process per client on this machine.

    The folder `sites` of the run directory contains the private state, the audit log and the log
    of each client.

    Args:
        source: Configuration, or path of a configuration file.
        out: Run directory. If None, `runs/<name>-<time>` is used.
        resume: Whether to continue from the newest checkpoint in `out`.
        overrides: Changes to the configuration in the format `key.path=value`.
        callbacks: Functions that are called with the record of each round.
        quiet: Whether to hide progress.
        allow_code: Whether the server and the clients may run the code that the configuration
            references.

    Returns:
        The finished run.

    Raises:
        UserError: If the configuration, the data or an argument is invalid.
        RunFailedError: If the process of a client fails, or the run cannot continue.
        Interrupted: If the run is interrupted after its first checkpoint.
    """
    config = load_config(source, overrides, allow_code)
    check_deployable(config)
    path = default_out(config) if out is None else Path(out)
    if resume and (path / "config.yaml").exists():
        # Fail early if another process uses the folder.
        with lock_folder(path):
            pass
    else:
        check_vacant(path)
    return run_federation(
        config,
        PipeTransport(_make_sites(config, path.resolve() / SITES)),
        out=path,
        resume=resume,
        callbacks=callbacks,
        quiet=quiet,
    )


def _make_sites(config: Config, folder: Path) -> list[SiteConfig]:
    """Return the configuration of each client's site, and create the keys of the sites."""
    shared_key = None
    if config.channel.homomorphic is not None:
        # The server process creates the key for the sites, and does not use it.
        shared_key = folder / SHARED_KEY_FILE
        if not shared_key.exists():
            SharedKey.generate().save(shared_key)
    own_code = list(find_references(config.model_dump()))
    sources = [source_tree(source) for source in named_sources(config).values()]
    sites = []
    for client in expand_population(config.clients):
        # A resumed run uses the same key, because it signs the audit log in this folder.
        key = folder / client / KEY
        if not key.exists():
            make_node_key(key)
        site: dict[str, Any] = {
            "client": client,
            "folder": str(key.parent),
            "tells": {"labels": True, "details": True, "model": True, "errors": True},
            "root": config.data.root,
            "key": str(key),
            "allows": {"own_code": own_code, "data": sources},
            "shared_key": None if shared_key is None else str(shared_key),
        }
        sites.append(SiteConfig.model_validate(site))
    return sites


@dataclass(frozen=True)
class SiteProcess:
    """Process of a site, and the thread that exchanges messages with it, one at a time."""

    site: SiteConfig
    process: BaseProcess
    connection: Connection
    thread: ThreadPoolExecutor


class PipeTransport(ThreadedTransport):
    """Transport over pipes to one process per site. Processes that were killed are restarted.

    Args:
        sites: Configurations of the sites.
    """

    def __init__(self, sites: Sequence[SiteConfig]) -> None:
        super().__init__()
        self._context = worker_context(__name__)
        # Running processes, keyed by node number.
        self._processes: dict[int, SiteProcess] = {}
        for site in sites:
            self._start(site)

    def nodes(self) -> Mapping[int, bytes]:
        """Return empty public keys, keyed by node number.

        Raises:
            RunFailedError: If the process of a site ended with an error.
        """
        for node, running in list(self._processes.items()):
            exit_code = running.process.exitcode
            if exit_code is None:
                continue
            if exit_code >= 0:
                raise RunFailedError(_last_output(running.site))
            self._processes.pop(node).thread.shutdown(wait=False)
            self._start(running.site)
        return dict.fromkeys(self._processes, b"")

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Send a message to a site, and return the number of the message."""
        number = str(next(self._numbers))
        end = time.monotonic() + within
        if (running := self._processes.get(node)) is not None:
            answer = running.thread.submit(_exchange, running.connection, envelope, end)
            self._sent[number] = SentMessage(node, end, answer)
        return number

    def close(self) -> None:
        """Stop all processes."""
        for running in self._processes.values():
            running.process.kill()
            running.process.join()
            running.thread.shutdown()
        self._processes.clear()

    def _start(self, site: SiteConfig) -> None:
        connection, its_end = self._context.Pipe()
        process = self._context.Process(
            target=_run_site, args=(site, its_end, dict(os.environ)), daemon=True
        )
        with ignore_interrupts_in_children():
            process.start()
        its_end.close()
        thread = ThreadPoolExecutor(1)
        self._processes[next(self._numbers)] = SiteProcess(site, process, connection, thread)


def _exchange(connection: Connection, envelope: Envelope, end: float) -> Envelope | None:
    """Return a site's answer, or None if its process has ended or the message has expired."""
    if end < time.monotonic():
        return None
    try:
        send(connection, envelope)
        return receive(connection)
    except (EOFError, OSError):
        return None


def _run_site(site: SiteConfig, connection: Connection, environ: Mapping[str, str]) -> None:
    """Run a site until its parent process ends or kills it."""
    begin_worker(environ)
    log = os.open(Path(site.folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    try:
        _answer_messages(site, connection)
    except (RunFailedError, UserError) as error:
        echo(error)
    except BaseException:
        traceback.print_exc()
    # Other threads may still run.
    os._exit(1)


def _answer_messages(site: SiteConfig, connection: Connection) -> None:
    """Answer messages until the parent process closes the connection."""
    with open_node(site, Path(site.folder)) as node, suppress(EOFError):
        while True:
            send(connection, node.handle(receive(connection)))


def _last_output(site: SiteConfig) -> str:
    """Return an error message with the last output line of a site's process."""
    message = f"{site.client}: its process ended"
    with suppress(OSError):
        lines = (Path(site.folder) / LOG).read_text(errors="replace").split("\n")
        if printed := [line.strip() for line in lines if line.strip()]:
            return f"{message}: {printed[-1][:300]}"
    return message
