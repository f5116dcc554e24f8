"""Start `flwr-clientapp` without importing Flower every time; runs as a process.

A SuperNode starts this command for every message, and most of its time goes into imports. This
process has done them and forks for each. The SuperNode finds, first in its search path, a launcher
of that name that asks this process, and runs Flower's own command if this process has ended.
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
CALLS = "calls"  # socket in the folder of the launcher

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
    """Write the launcher.

    Args:
        folder: Its folder, which goes first in the SuperNode's search path.
        command: Path of Flower's own command.
    """
    launcher = folder / COMMAND
    name = repr(str(folder / CALLS))
    if sys.platform == "linux":
        # The path of a socket must be short.
        opened = f"os.open({str(folder)!r}, os.O_RDONLY)"
        name = f"'/proc/self/fd/%d/{CALLS}' % {opened}"
    text = LAUNCHER.format(python=sys.executable, name=name, command=command)
    launcher.write_text(text)
    launcher.chmod(0o700)


def serve(folder: Path) -> None:
    """Fork a process for each call of the launcher, without end."""
    (run,) = [e for e in entry_points(group="console_scripts") if e.name == COMMAND]
    command = run.load()
    import hetero_fl.deployment.flower.client_app  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
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
