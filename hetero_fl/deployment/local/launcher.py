"""A real federation on one machine: server, transport and a process for each client, all of it gone when the run is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from hetero_fl.config import Config, expand_population, resolve_config
from hetero_fl.deployment.certificates import make_node_key
from hetero_fl.deployment.server import check_deployable, run_federation
from hetero_fl.deployment.transport import Transport
from hetero_fl.experiment.preparation import load_config
from hetero_fl.experiment.runner import Callback, default_out
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import SITES, check_vacant, lock_folder
from hetero_fl.utils.code_permission import CodePermission, find_references
from hetero_fl.utils.processes import CompanionProcess

LAUNCHER = "hetero_fl.deployment.local.fork_server"
TELLS = {"labels": True, "details": True, "model": True}  # all of it: nobody is a stranger here


def run_local_federation(
    source: str | Path | Mapping[str, Any] | Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overrides: Iterable[str] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    launcher: CompanionProcess | None = None,
    allow_code: bool | CodePermission = False,
) -> Run:
    """`hetero_fl.experiment.run`, carried out by a process for each client; what these keep is in `OUT/sites`.

    `launcher`: the process that starts them, if it has been begun already. `allow_code` permits the clients' processes to run
    the code that the configuration names, too.

    Raises:
        UserError, RunFailedError, Interrupted: as `run` does; Flower is not installed.
    """
    from hetero_fl.deployment.flower.commands import check_installed

    check_installed()
    from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink

    with launcher or CompanionProcess(LAUNCHER) as launcher, ExitStack() as stack:
        config = load_config(source, overrides, allow_code)
        check_deployable(config)
        path = default_out(config) if out is None else Path(out)
        if resume and (path / "config.yaml").exists():
            with lock_folder(path):  # nobody else is at work there
                pass
        else:
            check_vacant(path)
        launcher.send(resolve_config(config))
        superlink = SuperLink()
        stack.callback(superlink.close)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hetero_fl-sites-")))
        sites = []
        allows = {"own_code": list(find_references(config.model_dump()))}
        for client in expand_population(config.clients):
            folder = str((path / SITES / client).resolve())
            # Next to the log that it signs: a resumed run uses both.
            key = Path(folder) / "key"
            if not key.exists():
                make_node_key(key)
            server = {"address": superlink.address, "key": str(key)}
            about = {
                "client": client,
                "folder": folder,
                "tells": TELLS,
                "server": server,
                "allows": allows,
            }
            sites.append(scratch / client / "site.yaml")
            sites[-1].parent.mkdir()
            sites[-1].write_text(yaml.safe_dump(about))
        transport = _WatchedTransport(FlowerTransport(superlink), launcher)
        launcher.send([str(site) for site in sites])
        return run_federation(
            config,
            transport,
            out=path,
            resume=resume,
            callbacks=callbacks,
            quiet=quiet,
        )


class _WatchedTransport:
    """A transport to nodes that are our own: it fails when they do, instead of waiting for them."""

    def __init__(self, transport: Transport, launcher: CompanionProcess) -> None:
        self._transport = transport
        self._launcher = launcher
        self.push = transport.push
        self.pull = transport.pull
        self.close = transport.close

    def nodes(self) -> Mapping[int, bytes]:
        self._launcher.check()
        return self._transport.nodes()
