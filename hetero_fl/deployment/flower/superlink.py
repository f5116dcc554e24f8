"""Flower's SuperLink as a child process, and the transport over a ServerApp of the SuperLink."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from hetero_fl.deployment.certificates import ServerFiles, make_server_files
from hetero_fl.deployment.flower.app import write_bridge_app
from hetero_fl.deployment.flower.bridge import RemoteTransport
from hetero_fl.deployment.flower.commands import (
    START_SECONDS,
    FlowerCommand,
    environment,
    free_port,
    is_listening,
    run_flwr,
)
from hetero_fl.deployment.flower.worker_socket import listen
from hetero_fl.deployment.transport import MESSAGE_BYTES, Envelope
from hetero_fl.utils.errors import RunFailedError, UserError

T = TypeVar("T")

LOCAL = "127.0.0.1"
# Name of the SuperLink in Flower's settings.
NAME = "hetero-fl"
# A process that ends sooner than this number of seconds after its start is not restarted.
MIN_LIFETIME = 10.0
# Offset between the node numbers of consecutive Flower runs.
GENERATION = 2**32


class SuperLink:
    """Flower's SuperLink in a child process.

    Without certificates, the SuperLink accepts connections from this machine only. With
    certificates, a gateway listens at `host` and `port` and forwards the requests of nodes, which
    authenticate with registered keys.

    Args:
        host: Address at which nodes connect.
        port: Port at which nodes connect. If 0, any free port is used.
        files: Certificates and key of the server. If None, connections are not encrypted.
        nodes: Files with the public keys of the nodes, used only with `files`.

    Raises:
        UserError: If the port is not available, or `host` can be reached from other machines
            without `files`.
        RunFailedError: If a process does not start.
    """

    def __init__(
        self,
        host: str = LOCAL,
        port: int = 0,
        files: ServerFiles | None = None,
        nodes: Iterable[Path] = (),
    ) -> None:
        if files is None and host not in (LOCAL, "localhost", "::1"):
            raise UserError(
                f"server.host: {host} can be reached from other machines and requires TLS; set "
                f"certificates, or choose {LOCAL} for this machine only"
            )
        self.host = host
        self.port = free_port(host, port)
        self.folder = Path(tempfile.mkdtemp(prefix="hetero_fl-flower-"))
        self._files = files
        self._nodes = list(nodes)
        self._inner_host = host if files is None else LOCAL
        self._inner_port = self.port if files is None else free_port(LOCAL)
        self._inner_files: ServerFiles | None = None
        self._gateway: FlowerCommand | None = None
        self._environment = environment(self.folder / "home")
        try:
            if files is not None:
                self._inner_files = make_server_files(self.folder / "tls", [LOCAL])
            self._write_settings()
            self._process = self._start()
            if files is not None:
                self._gateway = self._start_gateway(files)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Address for nodes on this machine."""
        host = {"0.0.0.0": LOCAL, "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the SuperLink is running."""
        return self._process.is_running

    def revive_gateway(self) -> None:
        """Restart the gateway if there is one and its process has ended."""
        if self._gateway is not None and not self._gateway.is_running:
            assert self._files is not None
            self._gateway.kill()
            self._gateway = self._start_gateway(self._files)

    def revive(self) -> None:
        """Restart the SuperLink and the gateway if these processes have ended.

        Raises:
            RunFailedError: If the SuperLink ended shortly after its start.
        """
        self.revive_gateway()
        if self._process.is_running:
            return
        if time.monotonic() - self._process.started < MIN_LIFETIME:
            raise RunFailedError(
                f"flower-superlink: ended within {MIN_LIFETIME:.0f} s of its start; "
                f"{self._process.last_output()}"
            )
        self._process.kill()
        self._process = self._start()

    def run(self, app: Path) -> None:
        """Start a run of an app.

        Raises:
            RunFailedError: If Flower rejects the app.
        """
        run_flwr(self._environment, "run", str(app), NAME)

    def last_output(self) -> str:
        """Return the last error in the SuperLink's log, or the last line if there is no error."""
        return self._process.last_output()

    def close(self) -> None:
        """Kill all processes and delete the scratch folder."""
        for process in (self._gateway, getattr(self, "_process", None)):
            if process is not None:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_settings(self) -> None:
        home = self.folder / "home"
        home.mkdir()
        files = self._inner_files
        security = (
            "insecure = true" if files is None else f'root-certificates = "{files.authority}"'
        )
        host = f"[{self._inner_host}]" if ":" in self._inner_host else self._inner_host
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\n'
            f'address = "{host}:{self._inner_port}"\n{security}\n'
        )

    def _start(self) -> FlowerCommand:
        command = ["flower-superlink", "--host", self._inner_host, "--port", str(self._inner_port)]
        # All dependencies of the app are installed.
        command.append("--disable-runtime-dependency-installation")
        if (files := self._inner_files) is None:
            command.append("--insecure")
        else:
            command += ["--ssl-ca-certfile", str(files.authority), "--enable-supernode-auth"]
            command += ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
        process = FlowerCommand(
            command, self._environment, self.folder / "superlink.log", self.folder
        )
        try:
            process.wait_for(lambda: is_listening(self._inner_host, self._inner_port))
            for key in self._nodes if files is not None else ():
                run_flwr(self._environment, "supernode", "register", str(key), NAME)
        except BaseException:
            process.kill()
            raise
        return process

    def _start_gateway(self, files: ServerFiles) -> FlowerCommand:
        assert self._inner_files is not None
        command = [sys.executable, "-P", "-m", "hetero_fl.deployment.flower.gateway"]
        command += ["--host", self.host, "--port", str(self.port)]
        command += ["--certificate", str(files.certificate), "--key", str(files.key)]
        command += ["--superlink", f"https://{self._inner_host}:{self._inner_port}"]
        command += ["--superlink-authority", str(self._inner_files.authority)]
        gateway = FlowerCommand(command, self._environment, self.folder / "gateway.log")
        host, _, port = self.address.rpartition(":")
        gateway.wait_for(lambda: is_listening(host.strip("[]"), int(port)))
        return gateway


class FlowerTransport:
    """Transport over a `SuperLink`.

    If the SuperLink or its app ends, the app is restarted. Pending messages are then lost, and
    nodes get new numbers.

    Args:
        superlink: SuperLink, which is closed together with the transport.
        message_bytes: Maximum size of a message in bytes.
    """

    def __init__(self, superlink: SuperLink, message_bytes: int = MESSAGE_BYTES) -> None:
        self._superlink = superlink
        self._generation = 0
        self._is_closed = False
        self._app = superlink.folder / "app"
        address = superlink.folder / "socket"
        self._listener = listen(address)
        try:
            write_bridge_app(self._app, address, message_bytes)
            self._remote = self._start_app()
        except BaseException:
            self._listener.close()
            superlink.close()
            raise

    def nodes(self) -> Mapping[int, bytes]:
        """See `Transport.nodes`."""
        if self._is_closed:
            return {}
        self._superlink.revive_gateway()
        found = self._call(lambda remote: remote.nodes())
        return {self._generation * GENERATION + node: key for node, key in found.items()}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """See `Transport.push`."""
        generation, number = divmod(node, GENERATION)
        if self._is_closed or generation != self._generation:
            return "lost"
        pushed = self._call(lambda remote: remote.push(number, envelope, within))
        return f"{generation}/{pushed}" if generation == self._generation else "lost"

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """See `Transport.pull`."""
        current = f"{self._generation}/"
        lost = [number for number in numbers if not number.startswith(current)]
        if lost or not numbers or self._is_closed:
            return dict.fromkeys(lost)
        wanted = [number.removeprefix(current) for number in numbers]
        pulled = self._call(lambda remote: remote.pull(wanted, wait))
        return {f"{current}{number}": answer for number, answer in pulled.items()}

    def close(self) -> None:
        """Stop the app and the SuperLink.

        The nodes are not notified and keep trying to connect.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._remote.close()
        self._listener.close()
        self._superlink.close()

    def _call(self, call: Callable[[RemoteTransport], T]) -> T:
        """Call the app, which is restarted without the pending messages if it has ended.

        Raises:
            RunFailedError: If the app reports an error, or ends shortly after its start.
        """
        while True:
            try:
                return call(self._remote)
            except (EOFError, OSError, RunFailedError) as error:
                if isinstance(error, RunFailedError) and self._superlink.is_running:
                    raise
            if time.monotonic() - self._app_start < MIN_LIFETIME:
                raise RunFailedError(
                    f"Flower ended the server's app within {MIN_LIFETIME:.0f} s of its start; "
                    f"{self._superlink.last_output()}"
                )
            self._superlink.revive()
            self._remote.close()
            self._remote = self._start_app()

    def _start_app(self) -> RemoteTransport:
        """Start a run of the app and wait until it connects."""
        self._superlink.run(self._app)
        self._listener.settimeout(1.0)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._superlink.is_running:
            with suppress(TimeoutError):
                connection = self._listener.accept()[0]
                connection.setblocking(True)
                self._app_start = time.monotonic()
                self._generation += 1
                return RemoteTransport(Connection(connection.detach()))
        raise RunFailedError(
            f"Flower did not start the server's app; {self._superlink.last_output()}"
        )
