"""Flower's commands as processes, the connection to them, and the gateway of a SuperLink."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from hetero_fl.deployment.certificates import make_server_files
from hetero_fl.deployment.flower import commands
from hetero_fl.deployment.flower.bridge import RemoteTransport, serve_transport
from hetero_fl.deployment.flower.commands import FlowerCommand, environment, free_port, run_flwr
from hetero_fl.deployment.flower.gateway import REQUEST_BYTES, Gateway
from hetero_fl.deployment.flower.prefork import COMMAND, write_launcher
from hetero_fl.deployment.flower.superlink import SuperLink
from hetero_fl.deployment.flower.supernode import start_prefork
from hetero_fl.deployment.transport import Envelope, UnreadableAnswer
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.loopback import LoopbackTransport
from tests.support.nodes import until

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


class Failing(LoopbackTransport):
    """A transport that reports unreadable answers, and breaks down on request."""

    is_down = False

    def pull(self, numbers: Any, wait: float) -> dict[str, Envelope | None]:
        if self.is_down:
            raise RunFailedError("Flower's SuperLink does not answer (on purpose)")
        return {
            number: UnreadableAnswer.with_reason("too long")
            if answer is not None and answer.head.get("is_long")
            else answer
            for number, answer in super().pull(numbers, wait).items()
        }


@pytest.fixture
def loopback() -> Failing:
    return Failing()


@pytest.fixture
def remote(loopback: Failing) -> Iterator[RemoteTransport]:
    local_end, remote_end = Pipe()
    thread = threading.Thread(target=serve_transport, args=(loopback, remote_end))
    thread.start()
    yield RemoteTransport(local_end)
    local_end.close()
    thread.join()
    loopback.close()


def test_remote_transport_matches_local_transport(
    loopback: Failing, remote: RemoteTransport
) -> None:
    north = loopback.join(lambda e: Envelope({**e.head, "by": "north"}, e.body[::-1]), b"key\0")
    south = loopback.join(lambda e: Envelope(head=1 // 0))
    head = {"text": "ä", "whole": -(2**60), "real": 0.1, "truth": True, "bytes": b"\0\xff"}

    assert remote.nodes() == {north: b"key\0", south: b""}
    numbers = [
        remote.push(north, Envelope(head, b"abc"), 60.0),
        remote.push(north, Envelope({"is_long": True}), 60.0),
        remote.push(south, Envelope(), 60.0),
    ]
    answers: dict[str, Envelope | None] = {}
    until(lambda: answers.update(remote.pull(numbers, 1.0)) or len(answers) == 3)

    assert answers[numbers[0]] == Envelope({**head, "by": "north"}, b"cba")
    assert isinstance(answers[numbers[1]], UnreadableAnswer)
    assert answers[numbers[2]] is None
    assert remote.pull([], 0.0) == {}


def test_transport_error_is_forwarded(loopback: Failing, remote: RemoteTransport) -> None:
    loopback.is_down = True

    with pytest.raises(RunFailedError, match="on purpose"):
        remote.pull(["1"], 0.0)
    assert remote.nodes() == {}


def test_closed_connection_is_detected() -> None:
    local_end, remote_end = Pipe()
    remote_end.close()

    with pytest.raises((EOFError, OSError)):
        RemoteTransport(local_end).nodes()


@pytest.fixture
def gateway(tmp_path: Path) -> tuple[Gateway, list[httpx.Request]]:
    """Make a gateway to a SuperLink that answers 201; also return the requests passed on."""
    files = make_server_files(tmp_path, ["127.0.0.1"])
    result = Gateway("https://127.0.0.1:1", files.authority)
    passed: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        passed.append(request)
        return httpx.Response(201, headers={"x-flower": "yes"}, content=b"answer")

    result._client = httpx.AsyncClient(
        base_url="https://127.0.0.1:1", transport=httpx.MockTransport(answer)
    )
    return result, passed


def ask(gateway: Gateway, method: str, path: str, **about: Any) -> httpx.Response:
    """Send a request to the gateway."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=gateway)
        async with httpx.AsyncClient(transport=transport, base_url="https://server") as client:
            return await client.request(method, path, **about)

    return asyncio.run(send())


def test_gateway_forwards_node_requests(gateway: tuple[Gateway, list[httpx.Request]]) -> None:
    result, passed = gateway

    answer = ask(result, "POST", "/v1/fleet/pull?a=1", content=b"body", headers={"x-key": "k"})

    assert (answer.status_code, answer.content, answer.headers["x-flower"]) == (
        201,
        b"answer",
        "yes",
    )
    (request,) = passed
    assert (request.url.path, request.url.query, request.content) == (
        "/v1/fleet/pull",
        b"a=1",
        b"body",
    )
    assert request.headers["x-key"] == "k"


@each_case(
    ("method", "path", "status"),
    [
        ("POST", "/v1/control/stop-run", 404),
        ("POST", "/v1/runtime/acquire-task", 404),
        ("POST", "/v1/fleet", 404),
        ("POST", "//v1/fleet/pull", 404),
        ("POST", "/V1/FLEET/pull", 404),
        ("GET", "/v1/fleet/pull", 404),
        ("GET", "/health", 404),
        ("POST", "/v1/fleet/%2e%2e/control/stop-run", 400),
        ("POST", "/v1/fleet/a%2fb", 400),
        ("LONG", "/v1/fleet/push", 413),
    ],
)
def test_gateway_refuses_other_requests(
    gateway: tuple[Gateway, list[httpx.Request]], method: str, path: str, status: int
) -> None:
    result, passed = gateway

    content = bytes(REQUEST_BYTES + 1) if method == "LONG" else b""
    method = method.replace("LONG", "POST")
    assert ask(result, method, path, content=content).status_code == status
    assert not passed


def test_gateway_reports_unreachable_superlink(tmp_path: Path) -> None:
    files = make_server_files(tmp_path, ["127.0.0.1"])

    answer = ask(Gateway("https://127.0.0.1:1", files.authority), "POST", "/v1/fleet/pull")

    assert answer.status_code == 503


@each_case("name", ["short", "long" * 40])
def test_launcher_asks_the_prefork_process(name: str, tmp_path: Path) -> None:
    tmp_path = tmp_path / name
    tmp_path.mkdir()
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    prefork = start_prefork(tmp_path)
    try:
        until((tmp_path / "calls").exists)
        done = subprocess.run(
            [tmp_path / COMMAND, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and not done.stdout
        until(lambda: "usage: flwr-clientapp" in (tmp_path / "prefork.log").read_text())
    finally:
        prefork.kill()


def test_launcher_runs_the_command_itself_without_prefork(tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.write_text(f"#!{sys.executable}\nimport sys\nprint('ran', *sys.argv[1:])\n")
    command.chmod(0o700)
    write_launcher(tmp_path, str(command))

    done = subprocess.run(
        [tmp_path / COMMAND, "--token", "t"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (0, "ran --token t\n")


def test_app_memory_is_limited() -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    code = """
from hetero_fl.deployment.flower.bridge import limit_memory
limit_memory(2**20)
bytes(2**26)
try:
    bytes(2**32)
except MemoryError:
    print("limited")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == "limited\n", done.stderr
