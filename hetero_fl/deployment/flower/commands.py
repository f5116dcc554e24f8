"""Commands of Flower, run as child processes that end with this process."""

from __future__ import annotations

import errno
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hetero_fl.utils.errors import RunFailedError, UserError

MIN_VERSION = (1, 41)
GUARD = Path(__file__).with_name("guard.py")
# Seconds that a process may take to start.
START_SECONDS = 120.0
# Seconds that a process may take to end after a request.
STOP_SECONDS = 10.0
COLORS = re.compile(r"\x1b\[[0-9;]*m")
# Environment variables that are set unless the user has set them: no telemetry, no update check,
# and no log lines for every message.
DEFAULT_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "WARNING",
}


def check_flower() -> None:
    """Check that a supported version of Flower is installed, without importing Flower.

    Raises:
        UserError: If Flower is not installed, or if the operating system or the version of Python
            or Flower is not supported.
    """
    if not hasattr(os, "fork"):
        raise UserError(
            f"deployments need fork and Unix sockets, which {platform.system()} does not have; use "
            "Linux, macOS or the Windows Subsystem for Linux"
        )
    wanted = ".".join(map(str, MIN_VERSION))
    advice = f"run pip install 'hetero_fl[flower]', which installs flwr {wanted} or later"
    if sys.version_info < (3, 11):
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise UserError(f"flwr {wanted} requires Python >= 3.11, got {found}")
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        raise UserError(f"flwr: not installed; {advice}") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if not MIN_VERSION <= numbers < (MIN_VERSION[0] + 1,):
        supported = f"version >= {wanted} and < {MIN_VERSION[0] + 1}"
        raise UserError(f"flwr: expected {supported}, got {installed}; {advice}")


def environment(home: Path, *folders: Path) -> dict[str, str]:
    """Return the environment variables for Flower's commands.

    Args:
        home: Flower's folder for settings and installed apps.
        *folders: Folders that come first in the search path.
    """
    scripts = (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent)
    path = os.pathsep.join([*map(str, (*folders, *scripts)), os.environ.get("PATH", "")])
    return {**DEFAULT_ENVIRONMENT, **os.environ, "FLWR_HOME": str(home), "PATH": path}


class FlowerCommand:
    """Child process that runs a command of Flower, such as `flower-superlink`.

    Args:
        command: Name and arguments of the command.
        environ: Environment variables of the process, as returned by `environment`.
        log: File to which the output is appended.
        scratch: Folder that is deleted if the parent process is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: dict[str, str],
        log: Path,
        scratch: Path | None = None,
    ) -> None:
        self.name = command[0]
        self.log = log
        self.started = time.monotonic()
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                # With -P, modules are not searched in the folder of the script.
                [sys.executable, "-P", str(GUARD), str(scratch or ""), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                # Ctrl-C in a terminal must interrupt the parent process only.
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """Ask the process to end, and kill the process if it does not end in time."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the process and its child processes."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # The guard process does not respond.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_for(self, is_ready: Callable[[], bool]) -> None:
        """Wait until the process is ready.

        Args:
            is_ready: Function that returns whether the process is ready.

        Raises:
            RunFailedError: If the process ends or is not ready within 120 seconds.
        """
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if not self.is_running:
                raise RunFailedError(f"{self.name}: did not start; {self.last_output()}")
            if time.monotonic() > deadline:
                raise RunFailedError(
                    f"{self.name}: not ready after {START_SECONDS:.0f} s; {self.last_output()}"
                )
            time.sleep(0.05)

    def last_output(self) -> str:
        """Return the last error in the log, or the last line if there is no error.

        The text is a clause for an error message, such as "it printed nothing".
        """
        with suppress(OSError):
            text = COLORS.sub("", self.log.read_text(errors="replace"))
            if lines := [line.strip() for line in text.splitlines() if line.strip()]:
                errors = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
                found = lines[errors[-1] : errors[-1] + 3] if errors else lines[-1:]
                return f"it printed: {' '.join(' '.join(found).split())[:300]}"
        return "it printed nothing"


def run_flwr(environ: dict[str, str], *arguments: str) -> str:
    """Run a `flwr` command and return the output.

    Args:
        environ: Environment variables of the process.
        *arguments: Arguments of the command.

    Raises:
        RunFailedError: If the command fails or does not end in time.
    """
    try:
        completed = subprocess.run(
            ["flwr", *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunFailedError(
            f"flwr {' '.join(arguments[:2])}: timed out after {START_SECONDS:.0f} s"
        ) from None
    printed = COLORS.sub("", completed.stdout.decode(errors="replace")).strip()
    if completed.returncode != 0:
        lines = " ".join(printed.split())[-300:]
        raise RunFailedError(f"flwr {' '.join(arguments[:2])}: failed: {lines}")
    return printed


def is_listening(host: str, port: int) -> bool:
    """Return whether a process accepts connections at an address."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def free_port(host: str, port: int = 0) -> int:
    """Return an available port.

    Args:
        host: Address to listen on.
        port: Port to check. If 0, any free port is returned.

    Raises:
        UserError: If the address or the port is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"server.host: {host} is not an address of this machine ({why}); "
                    "choose one of its addresses, or 0.0.0.0 for all of them"
                ) from None
            raise UserError(
                f"server.port: {port} is not available ({why}); choose another port, "
                "or 0 for any free port"
            ) from None
        return int(probe.getsockname()[1])
