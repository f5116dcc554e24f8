"""Messages over Flower, with its SuperLink as a process: what comes through, and what is left when somebody dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message import make_message

from hetero_fl.deployment.certificates import (
    load_node_key,
    make_node_key,
    make_server_files,
    public_bytes,
)
from hetero_fl.deployment.envelope import Envelope, Handle
from hetero_fl.deployment.flower import installation
from hetero_fl.deployment.flower import node as node_module
from hetero_fl.deployment.flower.connection import (
    answer_message,
    message_to_node,
)
from hetero_fl.deployment.flower.node import serve
from hetero_fl.deployment.flower.records import SMALL_BODY_BYTES, from_message
from hetero_fl.deployment.flower.superlink import SuperLink
from hetero_fl.deployment.flower.transport import FlowerTransport
from hetero_fl.utils.errors import RunFailedError, UserError

SOON = 300.0  # seconds; this machine may be busy


class Keys(dict[str, EllipticCurvePrivateKey]):
    """Of nodes, by name; and where they lie."""

    folder: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    keys = Keys({name: make_node_key(folder / name) for name in ("north", "south", "stranger")})
    keys.folder = folder
    return keys


def over(superlink: SuperLink, keys: Keys) -> FlowerTransport:
    return FlowerTransport(
        superlink, {name: keys[name].public_key() for name in ("north", "south")}
    )


@pytest.fixture(scope="module")
def transport(keys: Keys) -> Iterator[FlowerTransport]:
    made = over(SuperLink(), keys)
    yield made
    made.close()


@contextmanager
def node(
    address: str, key: EllipticCurvePrivateKey, handle: Handle, **more: object
) -> Iterator[None]:
    """A node in a thread."""
    stop = threading.Event()
    thread = threading.Thread(
        target=serve, args=(handle, address, key), kwargs={"stop": stop, **more}
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def who(transport: FlowerTransport, name: str) -> int:
    """The number of a node, waited for."""
    until(lambda: name in transport.names().values())
    return next(number for number, other in transport.names().items() if other == name)


def answer(transport: FlowerTransport, message: str) -> Envelope | None:
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        if got := transport.pull([message], 1.0):
            return got[message]
    raise AssertionError("no answer, and no word that there will be none")


def test_messages_go_both_ways(transport: FlowerTransport, keys: Keys) -> None:
    head = {"text": "ä", "whole": -(2**60), "real": 0.1, "truth": True, "bytes": b"\0\xff"}
    bodies = [
        b"",
        os.urandom(SMALL_BODY_BYTES),
        os.urandom(SMALL_BODY_BYTES + 1),
        os.urandom(12_000_000),
    ]
    address = transport._superlink.address
    with (
        node(address, keys["north"], lambda e: Envelope({**e.head, "by": "north"}, e.body[::-1])),
        node(address, keys["south"], lambda e: Envelope({**e.head, "by": "south"}, e.body)),
    ):
        there = {name: who(transport, name) for name in ("north", "south")}
        for body in bodies:
            sent = {
                transport.push(number, Envelope(head, body), SOON): name
                for name, number in there.items()
            }
            for message, name in sent.items():
                assert answer(transport, message) == Envelope(
                    {**head, "by": name}, body[::-1] if name == "north" else body
                )
    until(lambda: not transport.nodes())  # who stops says so


def test_what_never_comes(
    transport: FlowerTransport, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(envelope: Envelope) -> Envelope:
        if envelope.head["do"] == "fail":
            raise ValueError("on purpose")
        time.sleep(1.5)
        return envelope

    with node(transport._superlink.address, keys["north"], handle):
        north = who(transport, "north")
        assert answer(transport, transport.push(north, Envelope({"do": "fail"}), SOON)) is None
        assert "on purpose" in caplog.text
        assert answer(transport, transport.push(north, Envelope({"do": "be late"}), 0.5)) is None
        assert (
            answer(transport, transport.push(north, Envelope({"do": "be in time"}), SOON))
            is not None
        )
    assert transport.pull([transport.push(north + 1, Envelope(), SOON)], 0.0) != {}
    assert transport.pull(["of another run"], 0.0) == {"of another run": None}
    began = time.monotonic()
    assert transport.pull([], SOON) == {} and time.monotonic() - began < SOON / 2


def never_answers(address: str, key: Path, memory: Path, busy: Path) -> None:
    """A node in a process of its own, to be killed at work. It is missed later than anybody waits."""
    node_module.HEARTBEAT_MIN_INTERVAL = 1000.0

    def handle(_: Envelope) -> Envelope:
        busy.touch()
        time.sleep(1000)
        raise AssertionError

    serve(handle, address, load_node_key(key), memory=memory)


@pytest.mark.slow
def test_a_node_that_is_killed_comes_back(
    transport: FlowerTransport, keys: Keys, tmp_path: Path
) -> None:
    address, memory, busy = transport._superlink.address, tmp_path / "memory", tmp_path / "busy"
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=never_answers, args=(address, keys.folder / "south", memory, busy), daemon=True
    )
    try:
        process.start()
        south = who(transport, "south")
        lost = transport.push(south, Envelope(), 1000)
        until(busy.exists)
        assert transport.pull([lost], 1.5) == {}  # it works, as far as anybody knows
    finally:
        process.kill()
        process.join()
    with node(address, keys["south"], lambda envelope: envelope, memory=memory):
        # what it had been given died with it; told sooner than by the heartbeat
        assert answer(transport, lost) is None
        assert who(transport, "south") == south  # recognised
        assert answer(transport, transport.push(south, Envelope({"a": 1}), SOON)) == Envelope(
            {"a": 1}
        )


@pytest.mark.slow
def test_a_superlink_that_is_killed_is_replaced(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hetero_fl.deployment.flower import superlink as module

    monkeypatch.setattr(module, "TOO_SOON", 0.0)
    transport, go_on = over(SuperLink(), keys), threading.Event()

    def handle(envelope: Envelope) -> Envelope:
        if envelope.head:
            go_on.wait(SOON)
        return envelope

    try:
        with node(transport._superlink.address, keys["north"], handle):
            under_way = transport.push(who(transport, "north"), Envelope({"slow": True}), SOON)
            assert transport.pull([under_way], 1.0) == {}
            os.kill(transport._superlink.pid, signal.SIGKILL)
            assert answer(transport, under_way) is None
            go_on.set()
            assert (
                answer(transport, transport.push(who(transport, "north"), Envelope(), SOON))
                == Envelope()
            )
            monkeypatch.setattr(module, "TOO_SOON", 1e9)
            os.kill(transport._superlink.pid, signal.SIGKILL)
            with pytest.raises(
                RunFailedError, match=r"SuperLink has died within .* of its start; its last line: "
            ):
                until(transport.nodes)
    finally:
        transport.close()


@pytest.mark.slow
def test_who_is_let_in(keys: Keys, tmp_path: Path) -> None:
    import httpx
    from flwr.proto.control_pb2 import RegisterNodeRequest
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.runtime import RuntimeHttpClient

    files = make_server_files(tmp_path / "server", ["localhost", "127.0.0.1"])
    other = make_server_files(tmp_path / "other", ["127.0.0.1"])
    transport = over(SuperLink(files=files), keys)
    address, echo = transport._superlink.address, lambda envelope: envelope
    try:
        with node(address, keys["north"], echo, authority=files.authority):
            north = who(transport, "north")
            assert answer(
                transport, transport.push(north, Envelope({"a": 1}, b"b"), SOON)
            ) == Envelope({"a": 1}, b"b")
            with pytest.raises(
                UserError, match=r"does not admit this node .* its key is not among those"
            ):
                serve(echo, address, keys["stranger"], files.authority, patience=1.0)
            with pytest.raises(
                UserError,
                match=r"server's certificate is refused \(.*self-signed|unable to get local",
            ):
                serve(echo, address, keys["south"], other.authority)
            # Flower's own door stands open to who reaches it: a stranger who registers there is not seen all the same.
            with ControlHttpClient(
                f"https://{address}", verify=transport._superlink.verification()
            ) as control:
                control.RegisterNode(
                    RegisterNodeRequest(public_key=public_bytes(keys["stranger"].public_key()))
                )
            with node(address, keys["stranger"], echo, authority=files.authority):
                time.sleep(1.5)
                assert transport.names() == {north: "north"}
        # Nobody sends messages without the secret: that door is shut.
        with RuntimeHttpClient(
            f"https://{address}", verify=transport._superlink.verification()
        ) as runtime:
            with pytest.raises(httpx.HTTPStatusError) as refusal:
                runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
            assert refusal.value.response.status_code == 401
    finally:
        transport.close()


def test_messages_of_somebody_else() -> None:
    ours = message_to_node(Envelope({"a": 1}, b"b"), 1, 2, 3.0)
    assert from_message(ours) == Envelope({"a": 1}, b"b")
    for content in (
        RecordDict({"head": ConfigRecord({"a": 1})}),
        RecordDict({"head": ConfigRecord({"a": [1]}), "body": ConfigRecord({"body": b""})}),
        RecordDict({"head": ConfigRecord(), "body": ConfigRecord({"body": 1})}),
        RecordDict({"body": ArrayRecord()}),
    ):
        assert from_message(make_message(ours.metadata, content=content)) is None
    assert from_message(answer_message(ours, None, 1.0)) is None


def test_what_stands_in_the_way_is_told() -> None:
    with pytest.raises(
        UserError, match=r"0.0.0.0 can be reached from elsewhere, which needs certificates"
    ):
        SuperLink("0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"server.port: {port} cannot be had \(Address already in use\)"
        ):
            SuperLink(port=port)


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
@pytest.mark.parametrize("port", [0, 9092])
def test_a_host_that_is_not_this_machine_is_told_from_a_port_that_is_taken(
    host: str, port: int, tmp_path: Path
) -> None:
    files = make_server_files(tmp_path, [host])
    with pytest.raises(
        UserError,
        match=rf"server.host: {host} is no address of this machine \(.*\); 0.0.0.0 is all",
    ):
        SuperLink(host, port, files)


def test_another_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "version", lambda _: "1.40.0")
    with pytest.raises(
        UserError,
        match=r"flwr 1.40.0 is installed; pip install 'hetero_fl\[flower\]' brings flwr 1.41",
    ):
        installation.check_installed()

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(installation, "version", missing)
    with pytest.raises(UserError, match="Flower is not installed"):
        installation.check_installed()


KILLED = """
import time
from hetero_fl.deployment.flower.superlink import SuperLink
superlink = SuperLink()
print(superlink.pid, superlink.port, superlink._scratch, flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_server_that_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        pid, port, scratch = process.stdout.readline().split()
        assert Path(scratch).is_dir()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    until(lambda: not Path(scratch).exists() and _free(int(port)))
    until(lambda: not Path(f"/proc/{pid}").exists())
