"""The process of a site under Flower's SuperNode: it keeps models and data between messages.

`worker_socket.py` starts it at the first message. It ends with the process that is named to it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from hetero_fl.deployment.certificates import load_node_key
from hetero_fl.deployment.config import load_site_config
from hetero_fl.deployment.flower.worker_socket import (
    LISTENING,
    receive,
    send,
)
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.node import LoggedNode, Node, check_site_data
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.errors import UserError

PARENT_SECONDS = 0.5  # between two looks whether the parent process still runs


def run_worker(path: Path, address: Path, parent: int, allow_code: bool = False) -> None:
    """Answer the messages that come over a site's socket.

    Prints `listening` once it does, and its log to stderr.

    Args:
        path: The site's file.
        address: Path of the socket.
        parent: Number of the process with which this one ends.
        allow_code: Whether to run the code that the site's file names.

    Raises:
        UserError: If the site's file, or something that it names, is wrong.
    """
    site, folder = load_site_config(path, allow_code)
    check_site_data(path, site)
    key = None if site.server is None else load_node_key(Path(site.server.key))
    import torch._dynamo  # noqa: F401 optimizers load it at their first step

    log = EventLog(site.logs, client=site.client)
    with lock_folder(folder) as notes, socket.socket(socket.AF_UNIX) as listener:
        for line in notes:
            log(line)
        node = LoggedNode(Node(site, folder, log, key=key), log)
        address.unlink(missing_ok=True)  # of a worker that was killed
        listener.bind(str(address))
        listener.listen()
        threading.Thread(target=_end_with, args=(parent, address), daemon=True).start()
        print(LISTENING, flush=True)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        while True:
            _answer(listener, node, log)


def _answer(listener: socket.socket, node: LoggedNode, log: EventLog) -> None:
    """Answer the next message."""
    connection = Connection(listener.accept()[0].detach())
    with connection:
        try:
            send(connection, node.handle(receive(connection)))
        except (EOFError, OSError) as error:
            log(f"an answer could not be handed to Flower ({error}); it is kept")


def _end_with(parent: int, address: Path) -> None:
    """End this process when its parent has ended. What it has answered is on disk."""
    while _runs(parent):
        time.sleep(PARENT_SECONDS)
    address.unlink(missing_ok=True)
    os._exit(0)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main() -> int:
    """Run as a process; see `worker_socket.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("socket", type=Path)
    parser.add_argument("parent", type=int)
    parser.add_argument("--allow-code", action="store_true")
    arguments = parser.parse_args()
    try:
        run_worker(arguments.site, arguments.socket, arguments.parent, arguments.allow_code)
    except UserError as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
