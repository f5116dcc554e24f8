"""Run a command, and end it and its child processes when stdin closes; runs as a script.

However the process that holds the other end of stdin dies, nothing of the command stays behind. A
byte on stdin asks the command to end by itself. The first argument is a folder to delete if that
process has died, or empty. Imports the standard library only.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

# Seconds in which the command's own processes may notice that it has ended.
GRACE_SECONDS = 1.0


def main() -> None:
    """Run the command in `sys.argv`; end what it leaves behind."""
    scratch = sys.argv[1]
    parent = os.getppid()
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_read_requests, args=(command,), daemon=True).start()
    # Until then its own processes see that it exists.
    command.wait()
    time.sleep(GRACE_SECONDS)
    if scratch and os.getppid() != parent:
        shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _read_requests(command: "subprocess.Popen[bytes]") -> None:
    # Not sys.stdin: a thread that reads it disturbs the end of the interpreter.
    while os.read(0, 1):
        command.terminate()
    command.kill()


if __name__ == "__main__":
    main()
