"""Process that runs `flwr-clientapp` without importing Flower every time.

A SuperNode runs the command for every message, and imports take most of the time. This process
imports Flower once and forks for each message. A launcher script with the name of the command is
first in the SuperNode's search path. The launcher requests a fork, or runs Flower's command if this
process has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

from hetero_fl.deployment.flower.worker_socket import listen

COMMAND = "flwr-clientapp"
# Name of the socket in the folder of the launcher.
CALLS = "calls"

LAUNCHER = """\
#!{python} -IS
import json, os, socket, sys

try:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect({name})
        connection.sendall(json.dumps(sys.argv[1:]).encode())
        connection.shutdown(socket.SHUT_WR)
        done = connection.recv(1)
except OSError:
    done = b""
if not done:
    os.execv({command!r}, [{command!r}, *sys.argv[1:]])
"""


def write_launcher(folder: Path, command: str) -> None:
    """Write the launcher script.

    Args:
        folder: Output folder, which must be the first entry of the SuperNode's search path.
        command: Path of Flower's command, which the launcher runs if the process that forks has
            ended.
    """
    launcher = folder / COMMAND
    name = repr(str(folder / CALLS))
    if sys.platform == "linux":
        # Unix limits the length of a socket path.
        open_folder = f"os.open({str(folder)!r}, os.O_RDONLY)"
        name = f"'/proc/self/fd/%d/{CALLS}' % {open_folder}"
    text = LAUNCHER.format(python=sys.executable, name=name, command=command)
    launcher.write_text(text, encoding="utf-8")
    launcher.chmod(0o700)


def serve(folder: Path) -> None:
    """Fork a process for each call of the launcher until this process is killed.

    Args:
        folder: Folder of the launcher, in which the socket is created.
    """
    (run,) = [e for e in entry_points(group="console_scripts") if e.name == COMMAND]
    command = run.load()
    import hetero_fl.deployment.flower.client_app  # noqa: F401

    # Let the system remove child processes that have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = listen(folder / CALLS)
    while True:
        connection = listener.accept()[0]
        with connection:
            connection.settimeout(5.0)
            try:
                arguments = json.loads(connection.makefile("rb").read())
            except (OSError, ValueError):
                continue
            if os.fork() != 0:
                with suppress(OSError):
                    connection.send(b"1")
                continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.argv = [COMMAND, *arguments]
        sys.exit(command())


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
