"""Reach the worker process of a site over a Unix socket, and start it when there is none.

Imports the standard library and filelock only: Flower starts a process for every message.
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
# Keys of the node's configuration.
SITE = "site"  # path of the site's file
ALLOW_CODE = "allow-code"
SOCKET = "socket"  # of a worker that runs already; given by `hetero-fl node`
LISTENING = "listening"  # what it prints once it can be connected to
# Longest path of a Unix socket that all systems accept.
MAX_PATH_BYTES = 100


class WorkerError(Exception):
    """The worker of a site could not be started. The message is one line that says why."""


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a name for a Unix socket that is short enough, however long its path is."""
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
    """Return a Unix socket that listens at a path."""
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
    """Return the path of a site's socket, in a folder that only this user can enter.

    Raises:
        WorkerError: If the folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"hetero_fl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise WorkerError(f"{folder}: belongs to another user, or others can enter it")
    return folder / hashlib.sha256(os.fsencode(site.resolve())).hexdigest()[:32]


def forward(envelope: Envelope, site: Path, allow_code: bool = False) -> Envelope:
    """Return the worker's answer to a message.

    Args:
        envelope: The message.
        site: The site's file, which names the worker.
        allow_code: Whether a worker that is started here may run the code that its files name.

    Raises:
        WorkerError: If the worker cannot be started.
        EOFError, OSError: If it ends before it answers.
    """
    address = socket_path(site)
    try:
        connection = connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        # Two messages that come at once start one worker.
        with FileLock(address.with_suffix(".lock")):
            connection = _connect_or_start(site, address, allow_code)
    return _exchange(connection, envelope)


def ask(envelope: Envelope, address: Path) -> Envelope:
    """Return the answer of the worker that listens at a socket.

    Raises:
        EOFError, OSError: If there is none, or it ends before it answers.
    """
    return _exchange(connect(address), envelope)


def send(connection: Connection, envelope: Envelope) -> None:
    """Write a message to a connection: its head as JSON, then its body."""
    head = {
        name: {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in envelope.head.items()
    }
    connection.send_bytes(json.dumps(head).encode())
    connection.send_bytes(envelope.body)


def receive(connection: Connection) -> Envelope:
    """Read a message from a connection."""
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
    """Start a site's worker and wait until it listens.

    The worker ends with the parent of this process, which Flower's SuperNode starts and stops.
    """
    arguments = [str(site), str(address), str(os.getppid())]
    if allow_code:
        arguments.append("--allow-code")
    process = subprocess.Popen(
        # -P: do not search the working directory for modules
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
