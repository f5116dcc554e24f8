"""Flower's SuperNode as a child process of a site's process."""

from __future__ import annotations

import shutil
import socket
import ssl
import sys
import time
from pathlib import Path

from hetero_fl.deployment.config import ServerConnectionConfig
from hetero_fl.deployment.flower.commands import FlowerCommand, environment, free_port
from hetero_fl.deployment.flower.prefork import CALLS, COMMAND, write_launcher
from hetero_fl.deployment.flower.worker_socket import SOCKET
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.utils.errors import UserError

# Seconds between attempts to reach the server or to start the SuperNode.
RETRY_SECONDS = 2.0
# Seconds after which a running SuperNode counts as admitted by the server.
ADMITTED_SECONDS = 30.0
# Seconds after which a SuperNode that ends repeatedly is no longer restarted.
PATIENCE = 120.0


class SuperNode:
    """Context manager for a SuperNode, which is started when the server can be reached.

    Args:
        server: Section `server` of the site file.
        worker: Path of the socket of the site's process.
        folder: Scratch folder.
        log: Log for connection problems and the end of the SuperNode.
    """

    def __init__(
        self, server: ServerConnectionConfig, worker: Path, folder: Path, log: EventLog
    ) -> None:
        self._server = server
        self._worker = worker
        self._folder = folder
        self._log = log
        self._prefork = start_prefork(folder)
        self._environment = environment(folder / "home", folder)
        self._process: FlowerCommand | None = None
        self._next_attempt = 0.0
        self._failing_since: float | None = None
        self._last_line = ""

    def __enter__(self) -> SuperNode:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
        self._prefork.kill()

    def keep_running(self) -> None:
        """Start the SuperNode if it is not running and the server can be reached.

        Raises:
            UserError: If the server cannot be authenticated or does not admit this node, or if the
                command `flwr-clientapp` is not found.
        """
        now = time.monotonic()
        if not self._prefork.is_running:
            self._prefork.kill()
            self._prefork = start_prefork(self._folder)
        if self._process is not None and self._process.is_running:
            return
        if now < self._next_attempt:
            return
        self._next_attempt = now + RETRY_SECONDS
        if self._process is not None:
            self._report_end(self._process, now)
            self._process.kill()
            self._process = None
        if problem := self._find_problem():
            self._failing_since = None
            self._log_once(f"waiting for the server; {problem}")
            return
        self._process = self._start()

    def _report_end(self, process: FlowerCommand, now: float) -> None:
        """Log why the SuperNode ended.

        Raises:
            UserError: If, for more than `PATIENCE` seconds, each SuperNode process ends within
                `ADMITTED_SECONDS` of its start although the server can be reached.
        """
        self._log_once(f"Flower's SuperNode ended; {process.last_output()}")
        if self._failing_since is None or now - process.started > ADMITTED_SECONDS:
            self._failing_since = now
        if now - self._failing_since > PATIENCE:
            raise UserError(
                f"{self._server.address}: the server does not admit this node "
                f"({process.last_output()}); add its public key to nodes of the server's file, "
                "stop other nodes with this key, or set the clock (at most 5 s may differ)"
            )

    def _find_problem(self) -> str:
        """Return why the server cannot be reached, or an empty string if it can be reached.

        Raises:
            UserError: If `server.authority` is set, and the server's certificate is not valid or
                the server does not use TLS.
        """
        address = self._server.address
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            with socket.create_connection((host, int(port)), timeout=10.0) as connection:
                if self._server.authority is None:
                    return ""
                context = ssl.create_default_context(cafile=self._server.authority)
                with context.wrap_socket(connection, server_hostname=host):
                    return ""
        except ssl.SSLCertVerificationError as error:
            raise UserError(
                f"{address}: the server's certificate is not valid ({error.verify_message}); "
                "check the address and server.authority"
            ) from None
        except ssl.SSLError as error:
            if error.reason == "WRONG_VERSION_NUMBER":
                raise UserError(
                    f"{address}: the server does not use TLS; set certificates in its file"
                ) from None
            return f"{address}: {error.reason or error}"
        except OSError as error:
            return f"{address}: {error}"

    def _start(self) -> FlowerCommand:
        server = self._server
        command = ["flower-supernode", "--superlink", server.address]
        if server.authority is None:
            command.append("--insecure")
        else:
            command += ["--root-certificates", server.authority]
            command += ["--auth-supernode-private-key", server.key]
        command += ["--port", str(free_port("127.0.0.1"))]
        command += ["--node-config", f"{SOCKET}={str(self._worker)!r}"]
        log = self._folder / "supernode.log"
        return FlowerCommand(command, self._environment, log, self._folder)

    def _log_once(self, line: str) -> None:
        """Log a line unless it is empty or equal to the previous line."""
        if line and line != self._last_line:
            self._log(line)
        self._last_line = line


def start_prefork(folder: Path) -> FlowerCommand:
    """Start the process that forks for each message, and write the launcher (see `prefork.py`).

    Args:
        folder: Folder for the launcher and the socket of the process.

    Raises:
        UserError: If the command `flwr-clientapp` is not found.
    """
    environ = environment(folder / "home")
    command = shutil.which(COMMAND, path=environ["PATH"])
    if command is None:
        raise UserError(f"{COMMAND}: command not found; run pip install --force-reinstall flwr")
    (folder / CALLS).unlink(missing_ok=True)
    write_launcher(folder, command)
    module = [sys.executable, "-P", "-m", "hetero_fl.deployment.flower.prefork", str(folder)]
    return FlowerCommand(module, environ, folder / "prefork.log")
