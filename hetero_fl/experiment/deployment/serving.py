"""The server's side of a federation: nodes come, and a run is carried out with them as in a simulation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hetero_fl.algorithms import algorithm
from hetero_fl.channel.privacy.noise import SecretNoise
from hetero_fl.config import Config, expand, load_config
from hetero_fl.errors import UserError, one_line
from hetero_fl.experiment.course import Callback
from hetero_fl.experiment.deployment.convening import convene
from hetero_fl.experiment.deployment.identity import ServerKeys, Signed
from hetero_fl.experiment.deployment.post import NUDGE, PATIENCE, Post
from hetero_fl.experiment.deployment.remote import Remote
from hetero_fl.experiment.deployment.status import Status
from hetero_fl.experiment.deployment.transport import MESSAGE_BYTES, Bounded, Transport
from hetero_fl.experiment.deployment.vault import Vault
from hetero_fl.experiment.prepared import Prepared
from hetero_fl.experiment.single import check_begun, hold
from hetero_fl.files import write_atomically
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.rundir import RunDirectory, check_vacant
from hetero_fl.runtime.choose import Choice
from hetero_fl.runtime.conditions import unused
from hetero_fl.runtime.performers import make_performer
from hetero_fl.runtime.readings import Record
from hetero_fl.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console

IDENTITY = "federation.json"  # in the run directory: which run nodes know it as, and what they told


def serve(
    source: str | Path | Mapping[str, Any] | Config,
    transport: Transport,
    *,
    out: Path,
    resume: bool = False,
    overrides: Iterable[str] = (),
    wait: float = 120.0,
    deadline: float = 3600.0,
    patience: float = PATIENCE,
    nudge: float = NUDGE,
    callbacks: Sequence[Callback] = (),
    quiet: bool = True,
    keys: ServerKeys | None = None,
    say: Callable[[str], None] = lambda line: None,
    status: Status | None = None,
    console: Console | None = None,
    message_bytes: int = MESSAGE_BYTES,
) -> Run:
    """Carry out a run with the nodes that a transport reaches; leaves the run directory that a simulation leaves.

    Args:
        wait: seconds until all clients of the configuration have to be there.
        deadline: seconds that a node may take for a task; `cohort.deadline` can ask for fewer.
        patience: seconds that a node which has gone is waited for, as long as enough others are there.
        nudge: seconds of silence after which a node is asked whether it is there.
        keys: with which messages are signed, and answers checked; none: for rehearsals on one machine.
        say: told, in one line, of whoever comes, goes or is refused.
        status: kept up to date.
        console: where the run's progress is shown, if not in a terminal.
        message_bytes: bytes of a node's answer, at most; a longer one is refused before it is read.

    Raises:
        UserError: a mistake in the configuration, the data or the call.
        RunFailed: nodes are missing or refuse before the first round, or the run itself cannot go on.
        Interrupted: once there is something to resume.
    """
    over = False
    try:
        config = load_config(source, overrides)
        check_deployable(config)
        if resume and (out / "config.yaml").exists():  # before anybody is waited for
            check_begun(out, on_nodes=True)
        else:
            check_vacant(out)
        clients = list(expand(config.clients))
        status = status or Status(out, clients)

        def tell(line: str) -> None:
            line = one_line(line)
            status.happened(line)
            say(line)

        transport = Bounded(transport, message_bytes)
        if keys is not None:
            transport = signed = Signed(transport, keys, tell)
            status.watch_logs(lambda: signed.logs)
        post = Post(transport, clients, tell, patience, nudge)
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

            def engage(prepared: Prepared, choice: Choice, store: Store) -> Remote:
                torch.set_num_threads(choice.server_threads)
                write_atomically(out / IDENTITY, json.dumps(convened.known()).encode())
                # What is drawn at the server must not follow from the seed, which every node is told.
                noise = SecretNoise(Vault(out / "secrets").secret("noise"))
                prepared.federation = replace(prepared.federation, noise=noise)
                performer = make_performer(torch.device(choice.device), 1, choice.precision)
                seconds = min(deadline, config.cohort.deadline or deadline)
                return Remote(convened, store, performer, seconds, _need(prepared))

            notes = convened.prepared.notes
            notes += unused(convened.prepared.federation, config)
            if keys is None:
                notes.append("no keys were given: messages are not signed, and anybody may speak for anybody")
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
    name = config.algorithm["name"]
    if algorithm[name].everybody:
        raise UserError(f"algorithm.name: {name} wants everybody's rows or models in one place; it is for simulations")


def _need(prepared: Prepared) -> int:
    """Clients without whom nothing comes of a round."""
    secret, cohort = prepared.config.channel.secure_sum, prepared.federation.cohort
    return max(prepared.config.cohort.least, secret.survivors(cohort) if secret is not None else 1)


def _identity(out: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads((out / IDENTITY).read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        return None
