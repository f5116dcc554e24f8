"""Worker process of a site, which answers messages and keeps models and data in memory.

`hetero-fl node` is a worker that runs Flower's SuperNode as a child process. If a SuperNode is
started without `hetero-fl node`, `worker_socket.py` starts the worker at the first message.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from hetero_fl.deployment.certificates import check_authority, load_node_key
from hetero_fl.deployment.config import load_site_config
from hetero_fl.deployment.flower.commands import check_flower
from hetero_fl.deployment.flower.supernode import SuperNode
from hetero_fl.deployment.flower.worker_socket import LISTENING, listen, receive, send
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.site import LoggedNode, check_site_data
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import handle_termination, is_process_running

# Seconds between checks for a request to stop.
POLL_SECONDS = 0.2
# Seconds that Flower may take to send the last answer.
DELIVERY_SECONDS = 3.0
# Seconds between checks that the parent process is running.
PARENT_SECONDS = 0.5


def run_node(
    path: Path,
    once: bool = False,
    allow_code: bool | CodePermission = False,
    *,
    quiet: bool = False,
) -> bool:
    """Run a site with a SuperNode.

    SIGTERM stops the site after the current task. A second SIGTERM, or Ctrl-C, stops the site
    immediately.

    Args:
        path: Path of the site file.
        once: Whether to stop at the end of a run.
        allow_code: Whether the site may run the code that the site file references, including
            `allows.own_code`.
        quiet: Whether to suppress the log on stderr.

    Returns:
        Whether the site was stopped immediately, so that a task may be unfinished.

    Raises:
        UserError: If the site file or a file that it names is invalid, Flower is not installed, or
            the server cannot be authenticated.
        RunFailedError: If the server refuses this site.
    """
    site, folder = load_site_config(path, allow_code)
    if site.server is None:
        raise UserError(f"{path}: server: missing; expected address, authority and key")
    check_site_data(path, site)
    if site.server.authority is not None:
        check_authority(Path(site.server.authority))
    key = load_node_key(Path(site.server.key))
    check_flower()
    import torch._dynamo  # noqa: F401 optimizers load it at their first step

    log = EventLog(site.logs, client=site.client)
    log.quiet = quiet
    stop = threading.Event()

    def announce_stop() -> None:
        log("stopping after the current task; repeat the signal to stop immediately")
        stop.set()

    interrupted = False
    with ExitStack() as stack:
        for line in stack.enter_context(lock_folder(folder)):
            log(line)
        stack.enter_context(handle_termination(announce_stop))
        node = LoggedNode(Node(site, folder, log, key), log, stop, once)
        temporary = tempfile.TemporaryDirectory(prefix="hetero_fl-node-")
        scratch = Path(stack.enter_context(temporary))
        address = scratch / "worker"
        worker = stack.enter_context(WorkerListener(address, node, log))
        supernode = stack.enter_context(SuperNode(site.server, address, scratch, log))
        log(f"{site.client}: connecting to the server at {site.server.address}")
        try:
            while not stop.is_set():
                supernode.keep_running()
                worker.serve(POLL_SECONDS)
            time.sleep(DELIVERY_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
    log(f"{site.client}: stopped")
    if node.refused:
        raise RunFailedError(f"{site.client}: refused by the server: {node.refused}")
    return interrupted


def run_worker(path: Path, address: Path, parent: int, allow_code: bool = False) -> None:
    """Answer messages on a socket until another process ends.

    The function prints `listening` when the socket is ready, and writes the log to stderr.

    Args:
        path: Path of the site file.
        address: Path of the socket.
        parent: ID of the process with which this process ends.
        allow_code: Whether the site may run the code that the site file references.

    Raises:
        UserError: If the site file or a file that it names is invalid.
    """
    site, folder = load_site_config(path, allow_code)
    check_site_data(path, site)
    key = None if site.server is None else load_node_key(Path(site.server.key))
    import torch._dynamo  # noqa: F401 optimizers load it at their first step

    log = EventLog(site.logs, client=site.client)
    with lock_folder(folder) as notes:
        for line in notes:
            log(line)
        node = LoggedNode(Node(site, folder, log, key), log)
        with WorkerListener(address, node, log) as worker:
            threading.Thread(target=_end_with, args=(parent, address), daemon=True).start()
            print(LISTENING, flush=True)
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            while True:
                worker.serve(POLL_SECONDS)


class WorkerListener:
    """Context manager for the socket at which a site receives messages.

    Args:
        address: Path of the socket.
        node: Node that answers the messages.
        log: Log with a line for each answer that could not be sent.
    """

    def __init__(self, address: Path, node: LoggedNode, log: EventLog) -> None:
        self._address = address
        self._node = node
        self._log = log
        # A process that was killed may have left a socket.
        address.unlink(missing_ok=True)
        self._listener = listen(address)

    def __enter__(self) -> WorkerListener:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._address.unlink(missing_ok=True)

    def serve(self, seconds: float) -> None:
        """Answer a message if one arrives within the given number of seconds."""
        if not select.select([self._listener], [], [], seconds)[0]:
            return
        with Connection(self._listener.accept()[0].detach()) as connection:
            try:
                send(connection, self._node.handle(receive(connection)))
            except (EOFError, OSError) as error:
                self._log(f"an answer could not be sent to Flower ({error}); it is stored")


def _end_with(parent: int, address: Path) -> None:
    """End this process when the process `parent` ends, because all answers are stored on disk."""
    while is_process_running(parent):
        time.sleep(PARENT_SECONDS)
    address.unlink(missing_ok=True)
    os._exit(0)


def main() -> int:
    """Run the worker process that `worker_socket.py` starts, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("socket", type=Path)
    parser.add_argument("parent", type=int)
    parser.add_argument("--allow-code", action="store_true")
    arguments = parser.parse_args()
    try:
        run_worker(arguments.site, arguments.socket, arguments.parent, arguments.allow_code)
    except (RunFailedError, UserError) as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
