"""The server's process: it listens, holds a run with the nodes that come, shows how that stands, and ends politely."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

from rich.console import Console

from hetero_fl.config import Config, expand, load_config
from hetero_fl.experiment.deployment.certificates import ServerFiles, check_server_files, load_node_key, load_public_key
from hetero_fl.experiment.deployment.identity import ServerKeys
from hetero_fl.experiment.deployment.log import Lines, Log
from hetero_fl.experiment.deployment.server_file import load_server
from hetero_fl.experiment.deployment.serving import check_deployable, serve
from hetero_fl.experiment.deployment.status import Status
from hetero_fl.experiment.deployment.window import window
from hetero_fl.experiment.single import default_out
from hetero_fl.own_code import CodePermission
from hetero_fl.reporting.run import Run
from hetero_fl.runtime.readings import Record


def preside(
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
        RunFailed, Interrupted: as `serve` does.
    """
    server = load_server(file)
    config = load_config(source, overrides, allow_code)
    check_deployable(config)
    server.check_clients(list(expand(config.clients)), file)
    files = None
    if (made := server.certificates) is not None:
        files = ServerFiles(Path(made.authority), Path(made.certificate), Path(made.key))
        check_server_files(files)
    nodes = {client: load_public_key(Path(path)) for client, path in server.nodes.items()}
    keys = None if server.key is None else ServerKeys(load_node_key(Path(server.key), "the server's"), nodes)
    path = default_out(config) if out is None else out
    from hetero_fl.experiment.deployment.flower import FlowerTransport, Superlink

    status = Status(path, list(expand(config.clients)))
    log = _RunLog(server.logs, status)
    log.quiet = quiet
    with ExitStack() as stack:
        if server.metrics is not None:
            port = stack.enter_context(window(status, server.metrics.host, server.metrics.port))
            log(f"status, metrics and health: http://{server.metrics.host}:{port}")
        superlink = Superlink(server.host, server.port, files)
        log(f"waiting at {server.host}:{superlink.port} for {', '.join(expand(config.clients))}")
        transport = FlowerTransport(superlink, nodes, server.message_bytes)
        ending = stack.enter_context(_ending(status, log))
        return serve(
            config, transport, out=path, resume=resume, wait=server.wait, deadline=server.deadline,
            callbacks=[log.round, ending], quiet=quiet, say=log, status=status, console=log.console(),
            keys=keys, patience=server.patience, message_bytes=server.message_bytes,
        )  # fmt: skip


class _RunLog(Log):
    """A log whose lines say which run and which round they are about."""

    def __init__(self, form: str, status: Status) -> None:
        super().__init__(form)
        self._status = status

    def __call__(self, line: str, **about: object) -> None:
        tree = self._status.tree()
        named = [client for client in tree["nodes"] if line.startswith(f"{client} ") or f"'{client}'" in line]
        client = named[0] if len(named) == 1 else None
        super().__call__(line, run=tree["run"], round=tree["round"], phase=tree["phase"], client=client, **about)

    def round(self, record: Record) -> None:
        """A round is complete. (For a reader there is the line on its figures.)"""
        if self.form == "json":
            tree = self._status.tree()
            told = {name: tree[name] for name in ("seconds", "epsilon", "personal", "global", "server")}
            sizes = {name: record[name] for name in ("up_bytes", "down_bytes")}
            self(f"round {record['round']} is complete", failed=record["failed"], **sizes, **told)

    def console(self) -> Console | None:
        """Where the run's own lines go, if not to the terminal."""
        return (
            Console(file=cast("TextIO", Lines(self)), highlight=False, soft_wrap=True) if self.form == "json" else None
        )


@contextmanager
def _ending(status: Status, log: Log) -> Iterator[Callable[[Record], None]]:
    """SIGTERM lets the round in hand be finished; yields what is to be called after each."""
    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or status.tree()["phase"] == "waiting":
            raise KeyboardInterrupt
        asked = True
        threading.Thread(target=_tell).start()  # this thread may hold the locks of the log and the status

    def _tell() -> None:
        status.set(phase="stopping")
        log("stopping after the round in hand; once more: at once")

    def after_round(record: Record) -> None:
        if asked and record["round"] < status.tree()["rounds"]:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield after_round
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield after_round
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
