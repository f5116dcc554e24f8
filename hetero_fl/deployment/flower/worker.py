"""Worker process of a site, which answers messages and keeps models and data in memory.

`worker_socket.py` starts the worker at the first message.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from hetero_fl.deployment.config import check_site_data, load_site_config
from hetero_fl.deployment.flower.worker_socket import LISTENING, listen, receive, send
from hetero_fl.deployment.monitoring import EventLog, LoggedNode
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_keys import load_node_key
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import is_process_running

# Seconds between checks for a request to stop.
POLL_SECONDS = 0.2
# Seconds between checks that the parent process is running.
PARENT_SECONDS = 0.5


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
    key = None if site.key is None else load_node_key(Path(site.key))
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
