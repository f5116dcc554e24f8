"""Script that runs a command, and kills all processes of the command when stdin is closed.

No process of the command outlives the parent of this script, even if the parent is killed. A byte
on stdin terminates the command. The first argument is a folder to delete if the parent has ended,
or an empty string. This script imports only the standard library.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

# Seconds that child processes may take to end after the command has ended.
GRACE_SECONDS = 1.0


def main() -> None:
    """Run the command in `sys.argv`, and kill all child processes when the command has ended."""
    scratch = sys.argv[1]
    parent = os.getppid()
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_read_requests, args=(command,), daemon=True).start()
    # The child processes end on their own after the command has ended.
    command.wait()
    time.sleep(GRACE_SECONDS)
    if scratch and os.getppid() != parent:
        shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _read_requests(command: "subprocess.Popen[bytes]") -> None:
    # A thread that reads `sys.stdin` would interfere with the shutdown of the interpreter.
    while os.read(0, 1):
        command.terminate()
    command.kill()


if __name__ == "__main__":
    main()
