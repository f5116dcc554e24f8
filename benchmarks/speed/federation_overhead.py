#!/usr/bin/env python3
"""Compare the duration of a federation round without computation between hetero-fl and Flower.

    python -m benchmarks federation_overhead [--nodes 4] [--pairs 5] [--bytes 0] [--out FILE]

Both federations have a SuperLink and SuperNodes on this machine. In a round, every node receives
one message and sends one reply. The Flower app, which runs in a separate process for each message,
does nothing. It is timed with default settings (`send_and_receive`) and with short polling
intervals of 0.05 s, at which SuperExec looks for work (FLWR_SUPEREXEC_TASK_POLL_INTERVAL) and the
ServerApp polls for replies. hetero-fl passes each message to a persistent worker process. With
`warm`, Flower starts a process for each message. With `forked`, these processes are forked after
the imports. The two federations take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from benchmarks.common import add_quick
from hetero_fl.deployment.config import ServerConnectionConfig
from hetero_fl.deployment.flower.commands import free_port
from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink
from hetero_fl.deployment.flower.supernode import SuperNode
from hetero_fl.deployment.flower.worker import WorkerListener
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.transport import Envelope

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
bytes = 0
pause = 0.0
"""
APP = '''\
"""Source of a Flower app without computation; a file requests each round."""
import pathlib, time
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.query()
def query(message, context):
    return Message(message.content, reply_to=message)

@server.main()
def main(grid, context):
    config = context.run_config
    folder, n = pathlib.Path(config["folder"]), config["nodes"]
    while len(nodes := list(grid.get_node_ids())) < n:
        time.sleep(0.1)
    (folder / "ready").touch()
    while not (folder / "end").exists():
        if not (folder / "go").exists():
            time.sleep(0.01)
            continue
        (folder / "go").unlink()
        data = bytes(config["bytes"])
        body = ArrayRecord({"b": Array("uint8", (len(data),), "bytes", data)} if data else {})
        began = time.perf_counter()
        messages = [Message(RecordDict({"body": body}), node, "query") for node in nodes]
        if config["pause"] == 0:
            got = list(grid.send_and_receive(messages))
        else:
            waiting, got = set(grid.push_messages(messages)), []
            while waiting:
                new = list(grid.pull_messages(waiting))
                got += new
                waiting -= {m.metadata.reply_to_message_id for m in new}
                time.sleep(config["pause"] if waiting else 0)
        took = time.perf_counter() - began
        assert len(got) == n and all(m.has_content() for m in got), got
        (folder / "took.tmp").write_text(str(took))
        (folder / "took.tmp").rename(folder / "took")
'''


def echo(address: str, folder: Path, forks: bool) -> None:
    """Run a SuperNode and the worker of its site, which returns each message as the reply.

    Args:
        address: Address of the SuperLink.
        folder: New folder for the files of the node.
        forks: Whether ClientApps are forked from a process that has imported Flower.
    """
    folder.mkdir()
    log = EventLog()
    log.quiet = True
    site = SimpleNamespace(handle=lambda envelope: envelope)
    server = ServerConnectionConfig(address=address)
    with (
        WorkerListener(folder / "worker", site, log) as worker,  # type: ignore[arg-type]
        SuperNode(server, folder / "worker", folder, log, None if forks else folder) as node,
    ):
        while True:
            node.keep_running()
            worker.serve(0.1)


@contextmanager
def ours(nodes: int, size: int, forks: bool) -> Iterator[Callable[[], float]]:
    """Run a hetero-fl federation and yield a function that times a round.

    Args:
        nodes: Number of SuperNodes.
        size: Size of each message in bytes.
        forks: Whether ClientApps are forked from a process that has imported Flower.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        transport = FlowerTransport(SuperLink())
        stack.callback(transport.close)
        for index in range(nodes):
            process = context.Process(
                target=echo,
                args=(transport._superlink.address, scratch / str(index), forks),
                daemon=True,
            )
            process.start()
            stack.callback(process.kill)
        while len(transport.nodes()) < nodes:
            time.sleep(0.1)
        body = bytes(size)

        def one() -> float:
            began = time.perf_counter()
            waiting = {transport.push(node, Envelope({}, body), 600) for node in transport.nodes()}
            while waiting:
                got = transport.pull(waiting, 10)
                assert all(answer is not None for answer in got.values())
                waiting -= set(got)
            return time.perf_counter() - began

        yield one


@contextmanager
def flowers(nodes: int, size: int, pause: float) -> Iterator[Callable[[], float]]:
    """Run a Flower federation and yield a function that times a round.

    Args:
        nodes: Number of SuperNodes.
        size: Size of each message in bytes.
        pause: Polling interval in seconds. If 0, Flower's default settings are used.
    """
    scratch = Path(tempfile.mkdtemp())
    tools, port = Path(sys.executable).parent, free_port("127.0.0.1", 0)
    environment = {
        **os.environ,
        "FLWR_HOME": str(scratch / "home"),
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    if pause:
        environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(pause)
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
        app = scratch / "app"
        (app / "empty").mkdir(parents=True)
        (app / "pyproject.toml").write_text(PROJECT)
        (app / "empty" / "__init__.py").touch()
        (app / "empty" / "app.py").write_text(APP)
        (scratch / "home").mkdir()
        (scratch / "home" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        start(
            "flower-superlink",
            "--insecure",
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        )
        _wait(lambda: httpx.get(f"http://127.0.0.1:{port}/health").is_success, started, scratch)
        for _ in range(nodes):
            own = str(free_port("127.0.0.1", 0))
            start(
                "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", own
            )
        settings = f'folder="{scratch}" nodes={nodes} bytes={size} pause={pause}'
        start("flwr", "run", str(app), "here", "--run-config", settings)
        _wait((scratch / "ready").exists, started, scratch)

        def one() -> float:
            (scratch / "go").touch()
            _wait((scratch / "took").exists, started, scratch)
            took = float((scratch / "took").read_text())
            (scratch / "took").unlink()
            return took

        yield one
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


def _wait(there: Callable[[], Any], started: list[subprocess.Popen[bytes]], logs: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if there():
                return
        if any(process.poll() for process in started):
            break
        time.sleep(0.02)
    text = {log.name: log.read_text()[-600:] for log in logs.glob("*.log")}
    raise SystemExit(f"Flower's federation does not reply: {json.dumps(text, indent=1)}")


def main() -> None:
    """Time rounds of both federations in turns, for each combination of settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument(
        "--pairs", type=int, default=5, help="timed rounds of each side after one warm-up round (5)"
    )
    parser.add_argument("--bytes", type=int, default=0, help="bytes of each message and reply (0)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    add_quick(parser)
    options = parser.parse_args()
    if options.quick:
        options.nodes = 2
        options.pairs = 1
    figures: dict[str, Any] = {"nodes": options.nodes, "bytes": options.bytes}
    for name, pause in (("as shipped", 0.0), ("tuned", 0.05)):
        for kind in ("forked", "warm"):
            with (
                ours(options.nodes, options.bytes, kind == "forked") as mine,
                flowers(options.nodes, options.bytes, pause) as theirs,
            ):
                pairs = []
                for turn in range(options.pairs + 1):
                    one = mine(), theirs()
                    print(f"  {turn or 'not counted'}: {one[0]:.3f} {one[1]:.3f}", flush=True)
                    pairs += [one] if turn else []
            a, b = ([pair[i] for pair in pairs] for i in (0, 1))
            ratios = [x / y for x, y in pairs]
            figures[f"{kind}, Flower {name}"] = {"ours": a, "flower": b}
            print(
                f"{kind}: {_spread(a)} s, Flower {name}: {_spread(b)} s a round, "
                f"ratio {_spread(ratios)}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
