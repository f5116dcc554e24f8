"""A SuperLink of our own with SuperNodes: what arrives, what is lost, and who is admitted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from hetero_fl.deployment.certificates import (
    ServerFiles,
    load_node_key,
    make_node_key,
    make_server_files,
    public_bytes,
)
from hetero_fl.deployment.flower import superlink as superlink_module, supernode as supernode_module
from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink
from hetero_fl.deployment.transport import Envelope
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.echo_node import EchoNode
from tests.support.flower_federation import SOON, until

pytestmark = pytest.mark.slow


@pytest.fixture
def transport() -> Iterator[FlowerTransport]:
    result = FlowerTransport(SuperLink())
    yield result
    result.close()


def only_node(transport: FlowerTransport) -> int:
    """Wait until one node is connected and return its number."""
    until(lambda: len(transport.nodes()) == 1)
    (number,) = transport.nodes()
    return number


def answer(transport: FlowerTransport, number: str) -> Envelope | None:
    """Wait for the answer to a message."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        if got := transport.pull([number], 1.0):
            return got[number]
    raise AssertionError("neither an answer nor the word that there will be none")


def kill_superlink(transport: FlowerTransport) -> None:
    """Kill the SuperLink's own process."""
    guard = transport._superlink._process._process.pid
    (process,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    os.kill(int(process), signal.SIGKILL)


def test_messages_arrive_and_failures_are_noticed(transport: FlowerTransport) -> None:
    head = {"text": "ä", "whole": -(2**60), "real": 0.1, "truth": True, "bytes": b"\0\xff"}

    def reverse(envelope: Envelope) -> Envelope:
        if envelope.head.get("fail"):
            raise ConnectionError("on purpose")
        return Envelope(envelope.head, envelope.body[::-1])

    with EchoNode(transport._superlink.address, reverse) as node:
        number = only_node(transport)
        for size in (0, 10_000, 2**16 + 1, 12_000_000):
            body = os.urandom(size)
            sent = transport.push(number, Envelope(head, body), SOON)
            assert answer(transport, sent) == Envelope(head, body[::-1])
        failed = transport.push(number, Envelope({"fail": True}), SOON)
        assert answer(transport, failed) is None
        assert node.failure is None

    assert transport.pull(["of another run"], 0.0) == {"of another run": None}
    lost = transport.push(number + 1, Envelope(), SOON)
    assert transport.pull([lost], 0.0) == {lost: None}


def test_killed_superlink_is_replaced(
    transport: FlowerTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink_module, "MIN_LIFETIME", 0.0)
    resume = threading.Event()

    def wait(envelope: Envelope) -> Envelope:
        if envelope.head.get("wait"):
            resume.wait(SOON)
        return envelope

    with EchoNode(transport._superlink.address, wait):
        first = only_node(transport)
        waiting = transport.push(first, Envelope({"wait": True}), SOON)
        assert transport.pull([waiting], 3.0) == {}
        kill_superlink(transport)
        assert answer(transport, waiting) is None
        resume.set()
        second = only_node(transport)
        assert second != first
        sent = transport.push(second, Envelope({"a": 1}), SOON)
        assert answer(transport, sent) == Envelope({"a": 1})

    monkeypatch.setattr(superlink_module, "MIN_LIFETIME", 1e9)
    kill_superlink(transport)
    with pytest.raises(RunFailedError, match="Flower ended the server's app within"):
        until(transport.nodes)


class Admission:
    """A SuperLink with TLS that admits one node."""

    def __init__(self, folder: Path) -> None:
        self.files: ServerFiles = make_server_files(folder / "server", ["localhost", "127.0.0.1"])
        self.other: ServerFiles = make_server_files(folder / "other", ["127.0.0.1"])
        self.north = folder / "north"
        self.stranger = folder / "stranger"
        for path in (self.north, self.stranger):
            make_node_key(path)
        public = self.north.with_suffix(".pub")
        self.transport = FlowerTransport(SuperLink(files=self.files, nodes=[public]))
        self.address = self.transport._superlink.address


def test_superlink_admits_only_known_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Admission(tmp_path)
    monkeypatch.setattr(supernode_module, "PATIENCE", 1.0)
    try:
        with EchoNode(server.address, lambda e: e, server.files.authority, server.north):
            number = only_node(server.transport)
            known = public_bytes(load_node_key(server.north).public_key())
            assert server.transport.nodes()[number].strip() == known.strip()
            sent = server.transport.push(number, Envelope({"a": 1}, b"b"), SOON)
            assert answer(server.transport, sent) == Envelope({"a": 1}, b"b")

            refusals = (
                (server.files.authority, server.stranger, "does not admit this node ("),
                (server.other.authority, server.north, "the server's certificate is not valid"),
            )
            for authority, key, line in refusals:
                with EchoNode(server.address, lambda e: e, authority, key) as refused_node:
                    until(lambda node=refused_node: node.failure is not None)
                assert isinstance(refused_node.failure, UserError)
                assert line in str(refused_node.failure)

            url = f"https://{server.address}"
            for path, status in (
                ("/v1/control/list-runs", {404}),
                ("/v1/runtime/acquire-task", {404}),
                ("/v1/fleet/pull-messages", {400, 401, 403, 412, 415, 422}),
            ):
                refused = httpx.post(f"{url}{path}", verify=False)
                assert refused.status_code in status, path
            assert list(server.transport.nodes()) == [number]
    finally:
        server.transport.close()
