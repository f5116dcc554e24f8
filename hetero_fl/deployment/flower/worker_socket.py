"""Connection to the worker process of a site over a Unix socket.

The worker is started if it is not running. Flower starts a process for every message. To start
quickly, this module imports only the standard library and filelock.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from pathlib import Path

from filelock import FileLock

from hetero_fl.deployment.transport import Envelope, Head

WORKER = "hetero_fl.deployment.flower.worker"
# Keys of Flower's node configuration: path of the site file, and permission to run code.
SITE = "site"
ALLOW_CODE = "allow-code"
# Line that a worker prints when its socket is ready.
LISTENING = "listening"
# Maximum length of the path of a Unix socket in bytes that all systems accept.
MAX_PATH_BYTES = 100


class WorkerError(Exception):
    """Raised if the worker of a site cannot be started.

    The message is one line.
    """


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a path to a Unix socket that does not exceed the maximum length.

    On systems other than Linux, the original path is yielded.
    """
    if len(os.fsencode(path)) <= MAX_PATH_BYTES or sys.platform != "linux":
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect(path: Path) -> Connection:
    """Connect to a Unix socket."""
    with short_path(path) as name:
        return Client(name)


def listen(path: Path) -> socket.socket:
    """Create a Unix socket that listens at a path."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with short_path(path) as name:
            listener.bind(name)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def socket_path(site: Path) -> Path:
    """Return the path of a site's socket, in a folder that only this user can access.

    Raises:
        WorkerError: If the folder belongs to another user, other users can access it, or the
            system has no Unix sockets.
    """
    if not hasattr(os, "getuid"):
        raise WorkerError("sites need Unix sockets, which this system does not have")
    folder = Path(tempfile.gettempdir()) / f"hetero_fl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise WorkerError(f"{folder}: belongs to another user, or others can enter it")
    return folder / hashlib.sha256(os.fsencode(site.resolve())).hexdigest()[:32]


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
    try:
        connection = connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        # The lock ensures that two simultaneous messages start only one worker.
        with FileLock(address.with_suffix(".lock")):
            connection = _connect_or_start(site, address, allow_code)
    return _exchange(connection, envelope)


def send(connection: Connection, envelope: Envelope) -> None:
    """Write a message to a connection.

    The head is written as JSON and is followed by the body.
    """
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


def _exchange(connection: Connection, envelope: Envelope) -> Envelope:
    with connection:
        send(connection, envelope)
        return receive(connection)


def _connect_or_start(site: Path, address: Path, allow_code: bool) -> Connection:
    try:
        return connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        _start_worker(site, address, allow_code)
        return connect(address)


def _start_worker(site: Path, address: Path, allow_code: bool) -> None:
    """Start a site's worker and wait until its socket is ready.

    The worker ends when the parent of this process ends. Flower's SuperNode starts and stops this
    parent process.
    """
    arguments = [str(site), str(address), str(os.getppid())]
    if allow_code:
        arguments.append("--allow-code")
    process = subprocess.Popen(
        # With -P, modules are not searched in the working directory.
        [sys.executable, "-P", "-m", WORKER, *arguments],
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
