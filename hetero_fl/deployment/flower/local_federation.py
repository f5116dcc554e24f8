"""Federated runs with a server and one process per client on this machine."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import Self

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.config import Config, expand_population
from hetero_fl.deployment.certificates import make_node_key
from hetero_fl.deployment.flower.commands import check_flower
from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink
from hetero_fl.deployment.flower.supernode import start_prefork
from hetero_fl.deployment.flower.worker import run_node
from hetero_fl.deployment.policy import named_sources, source_tree
from hetero_fl.deployment.server import check_deployable, run_federation
from hetero_fl.deployment.transport import Envelope, Transport
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import SHARED_KEY_FILE
from hetero_fl.experiment.runner import Callback, default_out
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import SITES, check_vacant, lock_folder
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import (
    adopt_environment,
    ignore_interrupts_in_children,
    worker_context,
)

# Log file in the scratch folder of a site.
LOG = "log.txt"


def run_local_federation(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    allow_code: bool | CodePermission = False,
) -> Run:
    """Train with a server and one process per client on this machine.

    Private state is stored in the folder `sites` of the run directory.

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
        UserError: If the configuration, the data or an argument is invalid, or Flower is not
            installed.
        RunFailedError: If the process of a client fails, or the run cannot continue.
        Interrupted: If the run is interrupted after its first checkpoint.
    """
    check_flower()
    config = load_config(source, overrides, allow_code)
    check_deployable(config)
    path = default_out(config) if out is None else Path(out)
    if resume and (path / "config.yaml").exists():
        # Fail early if another process uses the folder.
        with lock_folder(path):
            pass
    else:
        check_vacant(path)
    with ExitStack() as stack:
        superlink = SuperLink()
        stack.callback(superlink.close)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hetero_fl-sites-")))
        sites = _write_sites(config, path / SITES, superlink.address, scratch)
        nodes = stack.enter_context(LocalNodes(sites, scratch))
        transport = _WatchedTransport(FlowerTransport(superlink), nodes)
        return run_federation(
            config,
            transport,
            out=path,
            resume=resume,
            callbacks=callbacks,
            quiet=quiet,
        )


def _write_sites(config: Config, folder: Path, address: str, scratch: Path) -> list[Path]:
    """Write the site file of each client."""
    own_code = list(find_references(config.model_dump()))
    sources = [source_tree(source) for source in named_sources(config).values()]
    sites = []
    for client in expand_population(config.clients):
        # A resumed run uses the same key, because it signs the audit log in this folder.
        key = folder.resolve() / client / "key"
        if not key.exists():
            make_node_key(key)
        site: dict[str, Any] = {
            "client": client,
            "folder": str(key.parent),
            "tells": {"labels": True, "details": True, "model": True, "errors": True},
            "server": {"address": address, "key": str(key)},
            "root": config.data.root,
            "allows": {"own_code": own_code, "data": sources},
        }
        if config.channel.homomorphic is not None:
            # The server process creates the key for the sites, and does not use it.
            shared = folder.resolve() / SHARED_KEY_FILE
            if not shared.exists():
                SharedKey.generate().save(shared)
            site["shared_key"] = str(shared)
        sites.append(scratch / client / "site.yaml")
        sites[-1].parent.mkdir()
        sites[-1].write_text(yaml.safe_dump(site))
    return sites


class LocalNodes:
    """Context manager that runs one process per site and restarts killed processes.

    Args:
        sites: Paths of the site files, each in a separate folder.
        folder: Scratch folder that contains the folders of the site files.
    """

    def __init__(self, sites: Sequence[Path], folder: Path) -> None:
        self._folder = folder
        self._context = worker_context("hetero_fl.deployment.flower.worker")
        self._prefork = start_prefork(folder)
        self._processes = {site: self._start(site) for site in sites}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        self._prefork.kill()

    def check(self) -> None:
        """Restart processes that were killed.

        Raises:
            RunFailedError: If a process ended with an error.
        """
        for site, process in self._processes.items():
            if process.exitcode is None:
                continue
            if process.exitcode >= 0:
                raise RunFailedError(_last_output(site))
            self._processes[site] = self._start(site)

    def _start(self, site: Path) -> BaseProcess:
        process = self._context.Process(
            target=_run_site, args=(site, self._folder, dict(os.environ)), daemon=True
        )
        with ignore_interrupts_in_children():
            process.start()
        return process


def _run_site(site: Path, launcher: Path, environ: Mapping[str, str]) -> None:
    """Run a site until this process is killed or its parent process ends."""
    adopt_environment(environ)
    threading.Thread(target=_end_with_parent, args=(launcher,), daemon=True).start()
    log = os.open(site.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        # The parent process has checked the permission for all code in the site file.
        run_node(site, allow_code=True, launcher=launcher, scratch=site.parent)
    except (RunFailedError, UserError) as error:
        print(error, flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _end_with_parent(scratch: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def _last_output(site: Path) -> str:
    """Return an error message with the last output line of a site's process."""
    message = f"{site.parent.name}: its process ended"
    with suppress(OSError):
        lines = (site.parent / LOG).read_text(errors="replace").split("\n")
        if printed := [line.strip() for line in lines if line.strip()]:
            return f"{message}: {printed[-1][:300]}"
    return message


class _WatchedTransport:
    """Transport to nodes on this machine that raises an error if a node fails."""

    def __init__(self, transport: Transport, nodes: LocalNodes) -> None:
        self._transport = transport
        self._nodes = nodes

    def nodes(self) -> Mapping[int, bytes]:
        self._nodes.check()
        return self._transport.nodes()

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        return self._transport.push(node, envelope, within)

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        return self._transport.pull(numbers, wait)

    def close(self) -> None:
        self._transport.close()
