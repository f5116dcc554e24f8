"""Run Flower's commands as child processes that end with this process."""

from __future__ import annotations

import errno
import os
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
START_SECONDS = 120.0  # seconds that a process may take until it listens
STOP_SECONDS = 10.0  # seconds that a process may take to end by itself
COLORS = re.compile(r"\x1b\[[0-9;]*m")
DEFAULT_ENVIRONMENT = {  # unless the environment says otherwise
    "FLWR_TELEMETRY_ENABLED": "0",  # Flower reports its use to its makers by default
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "WARNING",  # otherwise there are several lines for every message
}


def check_installed() -> None:
    """Check the version of Flower without importing it.

    Raises:
        UserError: If Flower is missing or too old.
    """
    wanted = ".".join(map(str, MIN_VERSION))
    advice = f"pip install 'hetero_fl[flower]' installs flwr {wanted} or later"
    if sys.version_info < (3, 11):
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise UserError(f"Flower {wanted} needs Python 3.11; found {found}")
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        raise UserError(f"Flower is not installed; {advice}") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if not MIN_VERSION <= numbers < (MIN_VERSION[0] + 1,):
        raise UserError(f"flwr {installed} is installed; {advice}")


def environment(home: Path, *folders: Path) -> dict[str, str]:
    """Return the environment for Flower's commands.

    Args:
        home: Flower's folder for settings and installed apps.
        folders: Folders that are searched for commands before others.
    """
    scripts = (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent)
    path = os.pathsep.join([*map(str, (*folders, *scripts)), os.environ.get("PATH", "")])
    return {**DEFAULT_ENVIRONMENT, **os.environ, "FLWR_HOME": str(home), "PATH": path}


class FlowerCommand:
    """A running command of Flower, such as `flower-superlink`.

    Args:
        command: The command and its arguments.
        environ: Its environment; see `environment`.
        log: File to which its output is appended.
        scratch: Folder that is deleted if this process is killed.
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
                # -P: do not search the folder of the script for modules
                [sys.executable, "-P", str(GUARD), str(scratch or ""), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,  # Ctrl-C in a terminal is for the parent
            )

    @property
    def is_running(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """Ask it to end by itself; end it if it does not."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it and what it has started."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # The guard itself was stopped.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait_for(self, listens: Callable[[], bool]) -> None:
        """Wait until it listens.

        Raises:
            RunFailedError: If it ends before, or does not listen in time.
        """
        end = time.monotonic() + START_SECONDS
        while not listens():
            if not self.is_running:
                raise RunFailedError(f"{self.name} did not start; {self.last_output()}")
            if time.monotonic() > end:
                raise RunFailedError(
                    f"{self.name} did not answer within {START_SECONDS:.0f} s; {self.last_output()}"
                )
            time.sleep(0.05)

    def last_output(self) -> str:
        """Return the last error in its log, or the last line."""
        with suppress(OSError):
            text = COLORS.sub("", self.log.read_text(errors="replace"))
            if lines := [line.strip() for line in text.splitlines() if line.strip()]:
                errors = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
                found = lines[errors[-1] : errors[-1] + 3] if errors else lines[-1:]
                return f"it printed: {' '.join(' '.join(found).split())[:300]}"
        return "it printed nothing"


def run_flwr(environ: dict[str, str], *arguments: str) -> str:
    """Run a command of Flower's command line and return what it prints.

    Raises:
        RunFailedError: If it fails.
    """
    try:
        done = subprocess.run(
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
            f"flwr {' '.join(arguments[:2])} has not ended within {START_SECONDS:.0f} s"
        ) from None
    printed = COLORS.sub("", done.stdout.decode(errors="replace")).strip()
    if done.returncode != 0:
        lines = " ".join(printed.split())[-300:]
        raise RunFailedError(f"flwr {' '.join(arguments[:2])} failed: {lines}")
    return printed


def is_listening(host: str, port: int) -> bool:
    """Return whether a process accepts connections at an address."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def free_port(host: str, port: int = 0) -> int:
    """Return the port, or one that is free for 0.

    Raises:
        UserError: If nobody can listen there; the message names `server.host` or `server.port`.
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
                    f"server.host: {host} is no address of this machine ({why}); "
                    "0.0.0.0 stands for all of its addresses"
                ) from None
            raise UserError(
                f"server.port: {port} is not available ({why}); choose another, or 0 for a free one"
            ) from None
        return int(probe.getsockname()[1])
