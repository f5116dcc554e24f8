"""Flower's SuperLink as a process of ours: started, waited for, started anew when it has died, ended with us."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
from flwr.common.constant import FLWR_HOME, ISOLATION_MODE_PROCESS

from hetero_fl.deployment.certificates import ServerFiles
from hetero_fl.utils.errors import RunFailedError, UserError

STARTING = 120.0  # seconds; two of them are usual
LAUNCH = Path(__file__).with_name("launch.py")
TOO_SOON = 10.0  # seconds: one that lives no longer is not started again


class SuperLink:
    """A SuperLink on `host`:`port` (0: any free port), with TLS if there are files for it.

    Its state is in memory and its scratch folder is taken away with it; `log` is a file that it writes to. It answers only us
    when it gives out the right to send messages: a secret that is made here guards it. Without TLS nodes on other machines are
    refused (`host` must be this machine's own).

    Raises UserError if the port is taken, RunFailedError if it does not start.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        files: ServerFiles | None = None,
        log: Path | None = None,
    ) -> None:
        if files is None and host not in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"server.host: {host} can be reached from elsewhere, which needs certificates; or 127.0.0.1"
            )
        self.secret = secrets.token_bytes(32)
        self.files = files
        self._host = host
        self._scratch = Path(tempfile.mkdtemp(prefix="hetero_fl-flower-"))
        self._log = log or self._scratch / "superlink.log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.port = free_port(host, port)
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Where a client on this machine finds it, and a node that runs on it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self._process is not None
        return self._process.pid

    def verification(self) -> ssl.SSLContext | bool:
        """For clients in this process: its very certificate, whatever host it is made out to."""
        if self.files is None:
            return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cafile=self.files.certificate)
        return context

    def restart_if_dead(self) -> bool:
        """Start it anew, on the same port, if it has died. Returns whether it had. Raises RunFailedError if that is of no use."""
        assert self._process is not None
        if self._process.poll() is None:
            return False
        if time.monotonic() - self._started < TOO_SOON:
            raise RunFailedError(
                f"Flower's SuperLink has died within {TOO_SOON:.0f} s of its start; {self._last_words()}"
            )
        self._start()
        return True

    def close(self) -> None:
        """End it, and take its scratch folder away."""
        if self._process is not None:
            self._process.kill()  # it keeps nothing
            self._process.wait()
            assert self._process.stdin is not None
            with suppress(OSError):
                self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        secret = self._scratch / "secret"
        secret.touch(0o600)
        secret.write_bytes(self.secret)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                # -P: the folder of the script is not searched for modules
                [sys.executable, "-P", str(LAUNCH), str(self._scratch), *self._arguments(secret)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, FLWR_HOME: str(self._scratch / "home")},
                start_new_session=True,  # Ctrl-C in a terminal is ours to hear
            )
        self._started = time.monotonic()
        self._wait_until_it_answers()

    def _arguments(self, secret: Path) -> list[str]:
        common = [
            "--host",
            self._host,
            "--port",
            str(self.port),
            "--isolation",
            ISOLATION_MODE_PROCESS,
        ]
        common += [
            "--superexec-auth-secret-file",
            str(secret),
            "--disable-runtime-dependency-installation",
        ]
        if self.files is None:
            return [*common, "--insecure"]
        tls = [
            "--ssl-ca-certfile",
            str(self.files.authority),
            "--ssl-certfile",
            str(self.files.certificate),
        ]
        return [*common, *tls, "--ssl-keyfile", str(self.files.key), "--enable-supernode-auth"]

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        url = f"{'http' if self.files is None else 'https'}://{self.address}/health"
        end = time.monotonic() + STARTING
        with httpx.Client(verify=self.verification(), timeout=5.0) as client:
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    raise RunFailedError(f"Flower's SuperLink did not start; {self._last_words()}")
                with suppress(httpx.TransportError):
                    if client.get(url).is_success:
                        return
                time.sleep(0.05)
        raise RunFailedError(
            f"Flower's SuperLink did not answer within {STARTING:.0f} s; {self._last_words()}"
        )

    def _last_words(self) -> str:
        """The last line of the log that says something."""
        with suppress(OSError):
            lines = [
                line.strip()
                for line in self._log.read_text(errors="replace").splitlines()
                if line.strip()
            ]
            if lines:
                return f"its last line: {lines[-1][:300]}"
        return "it said nothing"


def free_port(host: str, port: int) -> int:
    """The port, or any that is free for 0. Raises UserError, naming host or port, if nobody can listen there."""
    with _socket(host) as probe:
        if port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"server.host: {host} is no address of this machine ({why}); 0.0.0.0 is all that it has"
                ) from None
            raise UserError(
                f"server.port: {port} cannot be had ({why}); another, or 0 for any that is free"
            ) from None
        return int(probe.getsockname()[1])


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
