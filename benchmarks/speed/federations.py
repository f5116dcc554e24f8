"""Real federations on this machine as contenders of the benchmark `speed`, without computation.

In a round, every node receives one message and sends one reply. Over Flower, the app runs on a
SuperLink and SuperNodes on this machine, which start a process for each message, and poll for
messages every 0.05 s. The app of hetero-fl passes each message to the worker process of the site;
that of Flower imports torch and returns the message. Over pipes, the sites are those of `hetero-fl
federate`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.contenders import Contender, Task, Turns
from hetero_fl.config import expand_population
from hetero_fl.deployment.local import PipeTransport, _make_sites
from hetero_fl.deployment.transport import Envelope
from hetero_fl.experiment.configuration import load_config
from tests.support.flower_federation import FlowerFederation
from tests.support.nodes import until

# Seconds between two polls of a SuperExec and of a ServerApp.
PAUSE = 0.05
PROJECT = """\
[project]
name = "empty"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "nobody"
fab-include = ["**/*.py"]

[tool.flwr.app.components]
serverapp = "empty.app:server"
clientapp = "empty.app:client"

[tool.flwr.app.config]
folder = ""
nodes = 0
"""
# A file requests each round, and another returns its duration.
SERVER = """\
import pathlib
import time

from flwr.serverapp import ServerApp

server = ServerApp()


@server.main()
def main(grid, context):
    folder, count = pathlib.Path(context.run_config["folder"]), context.run_config["nodes"]
    while len(list(grid.get_node_ids())) < count:
        time.sleep(0.1)
    run_round = make_round(grid)
    (folder / "ready").touch()
    while not (folder / "end").exists():
        if not (folder / "go").exists():
            time.sleep(0.01)
            continue
        (folder / "go").unlink()
        began = time.perf_counter()
        run_round()
        (folder / "took.tmp").write_text(str(time.perf_counter() - began))
        (folder / "took.tmp").rename(folder / "took")
"""
FLOWER = """\
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

client = ClientApp()


@client.query()
def query(message, context):
    return Message(message.content, reply_to=message)


def make_round(grid):
    def run_round():
        messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        waiting = set(grid.push_messages(messages))
        while waiting:
            waiting -= {m.metadata.reply_to_message_id for m in grid.pull_messages(waiting)}
            time.sleep(PAUSE if waiting else 0)

    return run_round


"""
OURS = """\
from hetero_fl.deployment.flower.client_app import app
from hetero_fl.deployment.flower.server_app import GridTransport
from hetero_fl.deployment.transport import Envelope

client = app


def make_round(grid):
    transport = GridTransport(grid)

    def run_round():
        hello = Envelope({"ask": "hello"})
        waiting = {transport.push(node, hello, 600.0) for node in transport.nodes()}
        while waiting:
            waiting -= transport.pull(waiting, 10.0).keys()

    return run_round


"""


@dataclass(frozen=True)
class Pipes(Contender):
    """Sites that `hetero-fl federate` starts."""

    @contextmanager
    def start(self, tasks: Sequence[Task], folder: Path) -> Iterator[Turns]:
        """Start the sites of the only configuration."""
        (task,) = tasks
        transport = PipeTransport(_make_sites(load_config(task["config"]), folder))

        def run_round() -> float:
            began = time.perf_counter()
            hello = Envelope({"ask": "hello"})
            waiting = {transport.push(node, hello, 600.0) for node in transport.nodes()}
            while waiting:
                waiting -= transport.pull(waiting, 10.0).keys()
            return time.perf_counter() - began

        try:
            yield Turns(run_round)
        finally:
            transport.close()


@dataclass(frozen=True)
class FlowerApp(Contender):
    """An app on a Flower federation.

    Args:
        app: Source of the client and of `make_round`.
    """

    app: str

    @contextmanager
    def start(self, tasks: Sequence[Task], folder: Path) -> Iterator[Turns]:
        """Start a SuperLink, a SuperNode for each client of the only configuration, and the app.

        Raises:
            SystemExit: If the federation does not reply.
        """
        (task,) = tasks
        package = folder / "app" / "empty"
        package.mkdir(parents=True)
        (package.parent / "pyproject.toml").write_text(PROJECT)
        (package / "__init__.py").touch()
        (package / "app.py").write_text(f"{SERVER}\n\nPAUSE = {PAUSE}\n{self.app}")
        clients = expand_population(load_config(task["config"]).clients)
        sites = {client: {"folder": client} for client in clients}
        pause = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(PAUSE)}

        def wait_for(name: str) -> Path:
            try:
                until((folder / name).exists)
            except AssertionError:
                logs = {log.name: log.read_text()[-600:] for log in folder.glob("*.log")}
                text = json.dumps(logs, indent=1)
                raise SystemExit(f"Flower's federation does not reply: {text}") from None
            return folder / name

        def run_round() -> float:
            (folder / "go").touch()
            report = wait_for("took")
            seconds = float(report.read_text())
            report.unlink()
            return seconds

        with FlowerFederation(folder, sites, environment=pause) as federation:
            federation.start_run(package.parent, folder=str(folder), nodes=len(sites))
            wait_for("ready")
            yield Turns(run_round)
            (folder / "end").touch()
