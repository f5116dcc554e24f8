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
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.nodes import LONG, until
from tests.support.workers import running_processes

COMMANDS = Path(sys.executable).parent


class FlowerFederation:
    """A SuperLink without TLS and a SuperNode for each site; use it as a context manager.

    Args:
        folder: Folder for sites, logs and Flower's files.
        sites: The content of each client's site file.
    """

    def __init__(self, folder: Path, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self.port = _free_port()
        home = folder / "flower"
        home.mkdir(parents=True)
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        }
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for client, about in sites.items():
            site = self.site(client)
            site.parent.mkdir()
            site.write_text(yaml.safe_dump({"client": client, **about}))

    def site(self, client: str) -> Path:
        return self.folder / client / "site.yaml"

    def __enter__(self) -> FlowerFederation:
        arguments = ["--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        self._start("superlink", "flower-superlink", *arguments)
        until(self._answers)
        for client in [path.parent.name for path in self.folder.glob("*/site.yaml")]:
            self.start_node(client)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.kill(name)
        shutil.rmtree(self.folder / "flower", ignore_errors=True)

    def start_node(self, client: str) -> None:
        """Start a site's SuperNode."""
        arguments = ["--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        arguments += ["--port", str(_free_port())]
        arguments += ["--node-config", f'site="{self.site(client)}"']
        self._start(client, "flower-supernode", *arguments)

    def kill(self, name: str) -> None:
        """Kill a SuperNode or the `superlink`, including its child processes."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, app: Path, **settings: Any) -> str:
        """Run an app until it ends and return how it ended."""
        chosen = " ".join(f"{k.replace('_', '-')}={json.dumps(v)}" for k, v in settings.items())
        started = self._flwr("run", str(app), "test", "--run-config", chosen, "--format", "json")
        number = str(started["run-id"])
        while True:
            (found,) = self._flwr("list", "test", "--run-id", number, "--format", "json")["runs"]
            status = str(found["status"])
            if status.startswith("finished"):
                return f"{status} {found['status-details']}".strip()
            time.sleep(0.5)

    def log(self, name: str) -> str:
        """Return what a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _flwr(self, *arguments: str) -> Any:
        done = subprocess.run(
            ["flwr", *arguments],
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
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health").is_success
        except httpx.TransportError:
            return False


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
