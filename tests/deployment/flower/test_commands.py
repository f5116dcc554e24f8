"""Flower's commands as processes, and what is checked before they start."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import pytest

from hetero_fl.deployment.certificates import make_server_files
from hetero_fl.deployment.flower import commands
from hetero_fl.deployment.flower.commands import FlowerCommand, environment, free_port, run_flwr
from hetero_fl.deployment.flower.superlink import SuperLink
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.flower_federation import until

TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print(child.pid, flush=True)
time.sleep(1000)
"""


def test_version_of_flower_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("1.41.0", "1.57.2", "1.41.dev3"):
        monkeypatch.setattr(commands, "version", Mock(return_value=found))
        commands.check_flower()
    for found in ("1.40.9", "0.42.0", "2.0.0"):
        monkeypatch.setattr(commands, "version", Mock(return_value=found))
        with pytest.raises(UserError) as caught:
            commands.check_flower()
        assert f"flwr: expected version >= 1.41 and < 2, got {found}; run" in str(caught.value)
    monkeypatch.setattr(commands, "version", Mock(side_effect=PackageNotFoundError))
    with pytest.raises(UserError, match="flwr: not installed"):
        commands.check_flower()


def start_tree(folder: Path) -> tuple[FlowerCommand, int]:
    """Start a command that starts another; return it and the other's process ID."""
    log = folder / "log"
    command = FlowerCommand([sys.executable, "-c", TREE], dict(os.environ), log)
    until(lambda: log.read_text().strip())
    return command, int(log.read_text())


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@each_case("ending", ["terminate", "kill"])
def test_command_stops_its_child_processes(ending: str, tmp_path: Path) -> None:
    command, child = start_tree(tmp_path)
    assert command.is_running

    getattr(command, ending)()

    assert not command.is_running
    until(lambda: not is_alive(child))


def test_command_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from hetero_fl.deployment.flower.commands import FlowerCommand
FlowerCommand([sys.executable, "-c", {TREE!r}], dict(os.environ), Path({str(tmp_path / "log")!r}))
time.sleep(1000)
"""
    (tmp_path / "log").touch()
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until(lambda: (tmp_path / "log").read_text().strip())
        child = int((tmp_path / "log").read_text())
        assert is_alive(child)
        parent.send_signal(signal.SIGKILL)

    until(lambda: not is_alive(child))


def test_command_failing_to_start_is_reported(tmp_path: Path) -> None:
    code = "print('INFO: fine'); print('\\x1b[91mERROR \\x1b[0m: Exit Code: 7'); print('no key')"
    command = FlowerCommand([sys.executable, "-c", code], dict(os.environ), tmp_path / "log")

    with pytest.raises(RunFailedError, match="did not start; it printed: ERROR : Exit Code: 7 no"):
        command.wait_for(lambda: False)

    command.kill()


def test_failing_flwr_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    with pytest.raises(RunFailedError, match="flwr run none: failed: "):
        run_flwr(environment(tmp_path), "run", "none")


def test_superlink_without_certificates_is_local_only() -> None:
    with pytest.raises(UserError, match=r"0\.0\.0\.0 can be reached from other machines"):
        SuperLink("0.0.0.0")


def test_occupied_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        port = server_socket.getsockname()[1]
        with pytest.raises(UserError, match=rf"server.port: {port} is not available \(Address"):
            SuperLink(port=port)


@each_case(("host", "port"), itertools.product(["192.0.2.1", "nowhere.invalid"], [0, 9092]))
def test_remote_host_is_named(host: str, port: int, tmp_path: Path) -> None:
    files = make_server_files(tmp_path, [host])
    with pytest.raises(UserError, match=rf"server.host: {host} is not an address of this machine"):
        SuperLink(host, port, files)
    assert free_port("127.0.0.1") > 0
