"""Run as a process, by its path: a command that ends, with what it has started, when stdin closes.

However the process that holds the other end of stdin dies, nothing of the command stays behind. A
line on stdin asks the command to end by itself. Imports the standard library only.
"""

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 1.0  # seconds in which the command's own processes may notice that it has ended


def main() -> None:
    """Run the command in `sys.argv`; end what it leaves behind."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_obey, args=(command,), daemon=True).start()
    command.wait()  # until then its own processes see that it exists
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _obey(command: "subprocess.Popen[bytes]") -> None:
    # Not sys.stdin: a thread that reads it disturbs the end of the interpreter.
    while os.read(0, 1):
        command.terminate()
    command.kill()


if __name__ == "__main__":
    main()
