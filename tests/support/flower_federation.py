"""A Flower federation on this machine, started with Flower's commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.support.nodes import LONG, until
from tests.support.workers import running_processes

COMMANDS = Path(sys.executable).parent
MAKE_KEYS = Path(__file__).parents[2] / "examples" / "deployment" / "make_keys.sh"


class FlowerFederation:
    """A SuperLink and a SuperNode for each site; use it as a context manager.

    Args:
        folder: Folder for sites, logs and Flower's files.
        sites: The content of each client's site file.
        secure: Whether connections use TLS and sites authenticate with keys.
        environment: Further environment variables of the processes.
    """

    def __init__(
        self,
        folder: Path,
        sites: Mapping[str, Mapping[str, Any]],
        secure: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.secure = secure
        self.port = _free_port()
        home = folder / "flower"
        home.mkdir(parents=True)
        self._environment = {
            **os.environ,
            **(environment or {}),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        }
        self.keys = folder / "net"
        trust = f'root-certificates = "{self.keys / "authority.pem"}"'
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\n'
            f'address = "127.0.0.1:{self.port}"\n{trust if secure else "insecure = true"}\n'
        )
        if secure:
            command = [MAKE_KEYS, self.keys, "127.0.0.1", *sites]
            subprocess.run(command, check=True, capture_output=True)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for client, about in sites.items():
            site = self.site(client)
            site.parent.mkdir()
            site.write_text(yaml.safe_dump({"client": client, **about}))

    def site(self, client: str) -> Path:
        return self.folder / client / "site.yaml"

    def __enter__(self) -> FlowerFederation:
        arguments = ["--host", "127.0.0.1", "--port", str(self.port)]
        arguments.append("--disable-runtime-dependency-installation")
        if self.secure:
            arguments += ["--ssl-ca-certfile", str(self.keys / "authority.pem")]
            arguments += ["--ssl-certfile", str(self.keys / "server.pem")]
            arguments += ["--ssl-keyfile", str(self.keys / "server.key"), "--enable-supernode-auth"]
        else:
            arguments.append("--insecure")
        self._start("superlink", "flower-superlink", *arguments)
        until(self._answers)
        for client in self._clients() if self.secure else ():
            self._flwr("supernode", "register", str(self.keys / client / "key.pub"), "test")
        for client in self._clients():
            self.start_node(client)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.kill(name)
        shutil.rmtree(self.folder / "flower", ignore_errors=True)

    def start_node(
        self, client: str, name: str = "", key: Path | None = None, authority: Path | None = None
    ) -> None:
        """Start a site's SuperNode.

        Args:
            client: Name of the client in the site file.
            name: Name of the process. If empty, the name of the client.
            key: Private key. If None, the registered key of the client.
            authority: Certificate of the trusted authority. If None, that of the server.
        """
        arguments = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(_free_port())]
        if self.secure:
            authority = authority or self.keys / "authority.pem"
            arguments += ["--root-certificates", str(authority)]
            key = key or self.keys / client / "key"
            arguments += ["--auth-supernode-private-key", str(key)]
        else:
            arguments.append("--insecure")
        arguments += ["--node-config", f'site="{self.site(client)}"']
        self._start(name or client, "flower-supernode", *arguments)

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the SuperLink knows about the registered nodes."""
        return list(self._flwr("supernode", "list", "test")["nodes"])

    def wait_for(self, name: str) -> int:
        """Wait until a process ends, and return its exit status."""
        return self._processes[name].wait(LONG)

    def kill(self, name: str) -> None:
        """Kill a SuperNode or the `superlink`, including its child processes."""
        process = self._processes.pop(name)
        # The process and its child processes may have ended.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, app: Path, **settings: Any) -> str:
        """Run an app until it ends and return how it ended."""
        number = self.start_run(app, **settings)
        while True:
            (found,) = self._flwr("list", "test", "--run-id", number)["runs"]
            status = str(found["status"])
            if status.startswith("finished"):
                return f"{status} {found['status-details']}".strip()
            time.sleep(0.5)

    def start_run(self, app: Path, **settings: Any) -> str:
        """Start an app and return the id of the run."""
        chosen = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in settings.items())
        return str(self._flwr("run", str(app), "test", "--run-config", chosen)["run-id"])

    def log(self, name: str) -> str:
        """Return what a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _clients(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/site.yaml"))

    def _flwr(self, *arguments: str) -> Any:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            check=False,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=LONG,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def worker_processes(sites: Iterable[Path]) -> list[int]:
    """Return the processes of the workers of these sites."""
    wanted = {os.fsencode(site) for site in sites}
    return [
        number
        for number, command, _ in running_processes()
        if b"hetero_fl.deployment.flower.worker" in command and wanted & set(command)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
