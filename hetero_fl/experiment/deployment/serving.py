"""The server's side of a federation: nodes come, and a run is carried out with them as in a simulation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hetero_fl.config import Config, expand, load_config
from hetero_fl.errors import UserError
from hetero_fl.experiment.course import Callback
from hetero_fl.experiment.deployment.convening import convene
from hetero_fl.experiment.deployment.post import Post
from hetero_fl.experiment.deployment.remote import Remote
from hetero_fl.experiment.deployment.status import Status
from hetero_fl.experiment.deployment.transport import Transport
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.experiment.single import hold
from hetero_fl.files import write_atomically
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import RunDirectory, check_vacant
from hetero_fl.runtime.choose import Choice
from hetero_fl.runtime.executor import Executor
from hetero_fl.runtime.performers import make_performer
from hetero_fl.runtime.readings import Record
from hetero_fl.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console

IDENTITY = "federation.json"  # in the run directory: which run nodes know it as


def serve(
    source: str | Path | Mapping[str, Any] | Config,
    transport: Transport,
    *,
    out: Path,
    resume: bool = False,
    overrides: Iterable[str] = (),
    wait: float = 120.0,
    deadline: float = 3600.0,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    say: Callable[[str], None] = lambda line: None,
    status: Status | None = None,
    console: Console | None = None,
) -> Run:
    """Carry out a run with the nodes that a transport reaches; leaves the run directory that a simulation leaves.

    Args:
        wait: seconds until all clients of the configuration have to be there.
        deadline: seconds that a node may take for a task.
        say: told, in one line, of whoever comes, goes or is refused.
        status: kept up to date.
        console: where the run's progress is shown, if not in a terminal.

    Raises:
        UserError: a mistake in the configuration, the data or the call.
        RunFailed: nodes are missing or refuse before the first round, or the run itself cannot go on.
        Interrupted: once there is something to resume.
    """
    over = False
    try:
        config = load_config(source, overrides)
        check_deployable(config)
        if not (resume and (out / "config.yaml").exists()):
            check_vacant(out)  # before anybody is waited for
        clients = list(expand(config.clients))
        status = status or Status(out, clients)

        def tell(line: str) -> None:
            status.happened(line)
            say(line)

        post = Post(transport, clients, tell)
        status.watch(lambda: post.node_of)
    except BaseException:
        transport.close()
        raise
    try:
        with _phases(status):
            status.set(name=config.name, algorithm=config.algorithm["name"], rounds=config.rounds)
            convened = convene(config, post, wait, _identity(out) if resume else None)
            status.set(phase="running", run=convened.run)
            for record in _before(out) if resume else []:
                status.record(record)

            def engage(prepared: Prepared, choice: Choice, store: Store) -> Executor:
                torch.set_num_threads(choice.server_threads)
                write_atomically(out / IDENTITY, json.dumps({"run": convened.run}).encode())
                performer = make_performer(torch.device(choice.device), 1, choice.precision)
                return Remote(convened, store, performer, deadline)

            told = [status.record, *callbacks]
            run = hold(
                convened.prepared, out=out, resume=resume, callbacks=told, quiet=quiet, engage=engage, console=console
            )
        over = True
        return run
    finally:
        post.close(over)


@contextmanager
def _phases(status: Status) -> Iterator[None]:
    """How it ends goes to the status."""
    try:
        yield
    except KeyboardInterrupt:
        status.set(phase="interrupted")
        raise
    except BaseException:
        status.set(phase="failed")
        raise
    status.set(phase="done")


def _before(out: Path) -> list[Record]:
    """The rounds that a checkpoint holds; of later ones, which are held again, there may be a line."""
    with suppress(UserError):
        return RunDirectory.open(out).metrics()
    return []


def check_deployable(config: Config) -> None:
    """Refuse (UserError) what only a simulation has."""
    if config.attacks is not None:
        raise UserError("attacks: found some, but nobody's part in a federation is simulated; leave it out")
    if config.init_from is not None:
        raise UserError("init_from: models of another run lie at its clients; not possible in a federation yet")
    if config.algorithm["name"] in ("centralized", "ensemble"):
        raise UserError(
            f"algorithm.name: {config.algorithm['name']} wants everybody's rows or models in one place; it is for simulations"
        )


def _identity(out: Path) -> str | None:
    try:
        return str(json.loads((out / IDENTITY).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError):
        return None
