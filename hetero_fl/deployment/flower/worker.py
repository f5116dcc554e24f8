"""Worker process of a site, which answers messages and keeps models and data in memory.

A process that forwards a message starts the worker if it is not running. To start quickly, it
imports only the standard library and filelock.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from filelock import FileLock

from hetero_fl.deployment.transport import Envelope, Head

# Line that a worker prints when its socket is ready.
LISTENING = "listening"
# Number of messages that wait while the worker answers another one.
BACKLOG = 64
# Maximum length of the path of a Unix socket in bytes that all systems accept.
MAX_PATH_BYTES = 100
# Seconds between checks that the parent process is running.
PARENT_SECONDS = 0.5


class WorkerError(Exception):
    """Raised if the worker of a site cannot be started.

    The message is one line.
    """


def forward(envelope: Envelope, site: Path, allow_code: bool = False) -> Envelope:
    """Send a message to a site's worker, which is started if needed, and return the answer.

    Args:
        envelope: Message to send.
        site: Path of the site file, which identifies the worker.
        allow_code: Whether a newly started worker may run the code that the site file references.

    Raises:
        WorkerError: If the worker cannot be started.
        EOFError, OSError: If the worker ends before it answers.
    """
    address = socket_path(site)
    # The lock ensures that two simultaneous messages start only one worker.
    with FileLock(address.with_suffix(".lock")):
        try:
            connection = Client(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            _start_worker(site, address, allow_code)
            connection = Client(str(address))
    with connection:
        send(connection, envelope)
        return receive(connection)


def send(connection: Connection, envelope: Envelope) -> None:
    """Write a message to a connection: the head as JSON, and the body."""
    head = {
        name: {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in envelope.head.items()
    }
    connection.send_bytes(json.dumps(head).encode())
    connection.send_bytes(envelope.body)


def receive(connection: Connection) -> Envelope:
    """Read a message that `send` wrote to a connection."""
    head: Head = {
        name: base64.b64decode(value["bytes"]) if isinstance(value, dict) else value
        for name, value in json.loads(connection.recv_bytes()).items()
    }
    return Envelope(head, connection.recv_bytes())


def socket_path(site: Path) -> Path:
    """Return the path of a site's socket, in a folder that only this user can access.

    Raises:
        WorkerError: If the folder belongs to another user or other users can access it, the path is
            too long, or the system has no Unix sockets.
    """
    if not hasattr(os, "getuid"):
        raise WorkerError("sites need Unix sockets, which this system does not have")
    folder = Path(tempfile.gettempdir()) / f"hetero_fl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise WorkerError(f"{folder}: belongs to another user, or others can enter it")
    path = folder / hashlib.sha256(os.fsencode(site.resolve())).hexdigest()[:32]
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise WorkerError(f"{folder}: too long for Unix sockets; set TMPDIR to a shorter path")
    return path


def _start_worker(site: Path, address: Path, allow_code: bool) -> None:
    """Start a site's worker and wait until its socket is ready.

    The worker ends when the parent of this process ends. Flower's SuperNode starts and stops this
    parent process.
    """
    arguments = [str(site), str(address), str(os.getppid()), "allow-code" if allow_code else ""]
    process = subprocess.Popen(
        # With -P, modules are not searched in the working directory.
        [sys.executable, "-P", "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline().decode(errors="replace").strip()
    threading.Thread(target=process.wait, daemon=True).start()
    if line != LISTENING:
        raise WorkerError(line or "its worker ended before it was ready; see the SuperNode's log")


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
    import torch._dynamo  # noqa: F401 optimizers load it at their first step

    from hetero_fl.deployment.config import check_site_data, load_site_config
    from hetero_fl.deployment.monitoring import open_node

    site, folder = load_site_config(path, allow_code)
    check_site_data(path, site)
    # A process that was killed may have left its socket.
    address.unlink(missing_ok=True)
    with open_node(site, folder) as node, Listener(str(address), backlog=BACKLOG) as listener:
        threading.Thread(target=_end_with, args=(parent, address), daemon=True).start()
        print(LISTENING, flush=True)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        while True:
            with listener.accept() as connection:
                try:
                    send(connection, node.handle(receive(connection)))
                except (EOFError, OSError) as error:
                    node.log(f"an answer could not be sent to Flower ({error}); it is stored")


def _end_with(parent: int, address: Path) -> None:
    """End this process when the process `parent` ends, because all answers are stored on disk."""
    from hetero_fl.utils.processes import is_process_running

    while is_process_running(parent):
        time.sleep(PARENT_SECONDS)
    address.unlink(missing_ok=True)
    os._exit(0)


def main() -> int:
    """Run the worker process that `forward` starts, and return the exit code."""
    from hetero_fl.utils.errors import RunFailedError, UserError

    site, address, parent, allow_code = sys.argv[1:]
    try:
        run_worker(Path(site), Path(address), int(parent), bool(allow_code))
    except (RunFailedError, UserError) as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
