#!/usr/bin/env python3
"""Compare the duration of a federation round without computation between hetero-fl and Flower.

    python -m benchmarks federation_overhead [--nodes 4] [--pairs 5] [--out FILE]

In a round, every node receives one message and sends one reply. Over Flower, both apps run on a
SuperLink and SuperNodes on this machine, which start a process for each message, and poll for
messages every 0.05 s. The app of hetero-fl passes each message to the worker process of the site;
that of Flower imports torch and returns the message. Over pipes, the sites are those of `hetero-fl
federate`. The federations take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import add_quick
from hetero_fl.config import expand_population
from hetero_fl.deployment.local import PipeTransport, _make_sites
from hetero_fl.deployment.transport import Envelope
from hetero_fl.experiment.configuration import load_config

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


@contextmanager
def over_pipes(nodes: int) -> Iterator[Callable[[], float]]:
    """Run sites as `hetero-fl federate` does, and yield a function that times a round."""
    with tempfile.TemporaryDirectory() as scratch:
        clients = {"groups": [{"name": "site", "count": nodes, "model": "mlp"}]}
        config = load_config({"data": {"name": "digits"}, "clients": clients})
        assert len(expand_population(config.clients)) == nodes
        transport = PipeTransport(_make_sites(config, Path(scratch)))
        try:

            def run_round() -> float:
                began = time.perf_counter()
                hello = Envelope({"ask": "hello"})
                waiting = {transport.push(node, hello, 600.0) for node in transport.nodes()}
                while waiting:
                    waiting -= transport.pull(waiting, 10.0).keys()
                return time.perf_counter() - began

            yield run_round
        finally:
            transport.close()


@contextmanager
def over_flower(nodes: int, app: str) -> Iterator[Callable[[], float]]:
    """Run an app on a Flower federation, and yield a function that times a round.

    Args:
        nodes: Number of SuperNodes.
        app: Source of the client and of `make_round`.
    """
    scratch = Path(tempfile.mkdtemp())
    tools, port = Path(sys.executable).parent, free_port()
    environment = {
        **os.environ,
        "FLWR_HOME": str(scratch / "home"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(PAUSE),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with open(scratch / f"{len(started)}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    [str(tools / command[0]), *command[1:]],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=scratch,
                )
            )

    try:
        package = scratch / "app" / "empty"
        package.mkdir(parents=True)
        (package.parent / "pyproject.toml").write_text(PROJECT)
        (package / "__init__.py").touch()
        (package / "app.py").write_text(f"{SERVER}\n\nPAUSE = {PAUSE}\n{app}")
        (scratch / "home").mkdir()
        (scratch / "home" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        installs = "--disable-runtime-dependency-installation"
        start("flower-superlink", "--insecure", "--port", str(port), installs)
        _wait(lambda: is_listening(port), started, scratch)
        for number in range(nodes):
            site = scratch / f"site_{number}.yaml"
            site.write_text(yaml.safe_dump({"client": site.stem, "folder": site.stem}))
            command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            command += ["--port", str(free_port()), "--node-config", f'site="{site}"']
            start(*command)
        settings = f'folder="{scratch}" nodes={nodes}'
        start("flwr", "run", str(scratch / "app"), "here", "--run-config", settings)
        _wait((scratch / "ready").exists, started, scratch)

        def run_round() -> float:
            (scratch / "go").touch()
            _wait((scratch / "took").exists, started, scratch)
            took = float((scratch / "took").read_text())
            (scratch / "took").unlink()
            return took

        yield run_round
    finally:
        (scratch / "end").touch()
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(scratch, ignore_errors=True)


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Return whether a server listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(there: Callable[[], Any], started: list[subprocess.Popen[bytes]], logs: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if there():
            return
        if any(process.poll() for process in started):
            break
        time.sleep(0.02)
    text = {log.name: log.read_text()[-600:] for log in logs.glob("*.log")}
    raise SystemExit(f"Flower's federation does not reply: {json.dumps(text, indent=1)}")


def main() -> None:
    """Time rounds of the three federations in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument(
        "--pairs", type=int, default=5, help="timed rounds of each side after one warm-up round (5)"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.nodes = 2
        options.pairs = 1
    seconds: dict[str, list[float]] = {"over Flower": [], "over pipes": [], "Flower's own": []}
    with (
        over_flower(options.nodes, OURS) as ours,
        over_pipes(options.nodes) as pipes,
        over_flower(options.nodes, FLOWER) as theirs,
    ):
        for turn in range(options.pairs + 1):
            for name, run_round in zip(seconds, (ours, pipes, theirs), strict=True):
                found = run_round()
                seconds[name] += [found] if turn else []
    print(f"a round of {options.nodes} nodes without computation")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["Flower's own"], strict=True)]
        print(f"  {name}: {_spread(found)} s, ratio {_spread(ratios)}")
    if options.out:
        options.out.write_text(json.dumps({"nodes": options.nodes, **seconds}, indent=1))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
