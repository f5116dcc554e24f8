"""A SuperLink of our own with SuperNodes, hostile nodes and a hostile server."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from flwr.app import ConfigRecord

from hetero_fl.core.payload import FORM as PAYLOAD
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.certificates import (
    load_node_key,
    make_node_key,
    make_server_files,
    public_bytes,
)
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.flower import superlink as superlink_module, supernode as supernode_module
from hetero_fl.deployment.flower.app import PACKAGE, write_bridge_app
from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.deployments import SITES, small
from tests.support.echo_node import EchoNode
from tests.support.flower_federation import FlowerFederation
from tests.support.hostile_messages import (
    ANSWERS,
    HEADS,
    Answer,
    bodies,
    bomb,
    examples,
    hostile,
    sealed,
)
from tests.support.nodes import LONG, until

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
    end = time.monotonic() + LONG
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
            sent = transport.push(number, Envelope(head, body), LONG)
            assert answer(transport, sent) == Envelope(head, body[::-1])
        failed = transport.push(number, Envelope({"fail": True}), LONG)
        assert answer(transport, failed) is None
        assert node.failure is None

    assert transport.pull(["of another run"], 0.0) == {"of another run": None}
    lost = transport.push(number + 1, Envelope(), LONG)
    assert transport.pull([lost], 0.0) == {lost: None}


def test_killed_superlink_is_replaced(
    transport: FlowerTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink_module, "MIN_LIFETIME", 0.0)
    resume = threading.Event()

    def wait(envelope: Envelope) -> Envelope:
        if envelope.head.get("wait"):
            resume.wait(LONG)
        return envelope

    with EchoNode(transport._superlink.address, wait):
        first = only_node(transport)
        waiting = transport.push(first, Envelope({"wait": True}), LONG)
        assert transport.pull([waiting], 3.0) == {}
        kill_superlink(transport)
        assert answer(transport, waiting) is None
        resume.set()
        second = only_node(transport)
        assert second != first
        sent = transport.push(second, Envelope({"a": 1}), LONG)
        assert answer(transport, sent) == Envelope({"a": 1})

    monkeypatch.setattr(superlink_module, "MIN_LIFETIME", 1e9)
    kill_superlink(transport)
    with pytest.raises(RunFailedError, match="Flower ended the server's app within"):
        until(transport.nodes)


def test_superlink_admits_only_known_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_server_files(tmp_path / "server", ["localhost", "127.0.0.1"])
    other = make_server_files(tmp_path / "other", ["127.0.0.1"])
    north, stranger = tmp_path / "north", tmp_path / "stranger"
    for path in (north, stranger):
        make_node_key(path)
    transport = FlowerTransport(SuperLink(files=files, nodes=[north.with_suffix(".pub")]))
    address = transport._superlink.address
    monkeypatch.setattr(supernode_module, "PATIENCE", 1.0)
    try:
        with EchoNode(address, lambda e: e, files.authority, north):
            number = only_node(transport)
            known = public_bytes(load_node_key(north).public_key())
            assert transport.nodes()[number].strip() == known.strip()
            sent = transport.push(number, Envelope({"a": 1}, b"b"), LONG)
            assert answer(transport, sent) == Envelope({"a": 1}, b"b")

            refusals = (
                (files.authority, stranger, "does not admit this node ("),
                (other.authority, north, "the server's certificate is not valid"),
            )
            for authority, key, line in refusals:
                with EchoNode(address, lambda e: e, authority, key) as refused_node:
                    until(lambda node=refused_node: node.failure is not None)
                assert isinstance(refused_node.failure, UserError)
                assert line in str(refused_node.failure)

            url = f"https://{address}"
            for path, status in (
                ("/v1/control/list-runs", {404}),
                ("/v1/runtime/acquire-task", {404}),
                ("/v1/fleet/pull-messages", {400, 401, 403, 412, 415, 422}),
            ):
                refused = httpx.post(f"{url}{path}", verify=False)
                assert refused.status_code in status, path
            assert list(transport.nodes()) == [number]
    finally:
        transport.close()


MAX_ANSWER_BYTES = 2**22  # bytes of an answer


def sendable(head: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a head that Flower carries: it refuses some values at the sender."""
    kept = {}
    for name, value in head.items():
        try:
            ConfigRecord({name: value}).deflate()
        except (TypeError, ValueError, OverflowError, UnicodeError):
            continue
        kept[name] = value
    return kept


def one_at_a_time(handle: Handle, working: threading.Lock) -> Handle:
    """Let nodes in one process take turns, as they share torch's generator."""

    def handles(envelope: Envelope) -> Envelope:
        with working:
            return handle(envelope)

    return handles


def test_run_completes_with_a_hostile_site(tmp_path: Path) -> None:
    answers: list[Answer] = [
        sealed(bomb(MAX_ANSWER_BYTES // 4)),
        ({"why": "x" * 10**6, "ask": "refused"}, None, False),
        sealed(bytes(MAX_ANSWER_BYTES + 1)),
        sealed(bytes(2 * MAX_ANSWER_BYTES)),
        *examples(ANSWERS, 4),
    ]
    answers = [(sendable(head), body, check) for head, body, check in answers]
    nodes = {site: Node(SiteConfig(client=site), tmp_path / site) for site in SITES}
    handles = {site: node.handle for site, node in nodes.items()}
    handles["site_3"] = hostile(handles["site_3"], answers)
    source = small(models="linear", rounds=len(answers), evaluation__every=len(answers))
    transport = FlowerTransport(SuperLink(), MAX_ANSWER_BYTES)
    working = threading.Lock()

    with ExitStack() as stack:
        for handle in handles.values():
            address = transport._superlink.address
            stack.enter_context(EchoNode(address, one_at_a_time(handle, working)))
        run = run_federation(
            source,
            transport,
            out=tmp_path / "run",
            wait=LONG,
            deadline=LONG,
            message_bytes=MAX_ANSWER_BYTES,
        )

    assert run.summary["rounds_completed"] == len(answers)
    failed = [record["failed"] for record in run.metrics]
    assert all(set(each) <= {"site_3"} for each in failed)
    assert "expected at most" in failed[0]["site_3"]
    assert "head: must have" in failed[1]["site_3"]
    assert "must have <= 4,194,304 bytes" in failed[2]["site_3"]
    assert "must have <= 4,194,304 bytes" in failed[3]["site_3"]
    assert all(
        reason.isprintable() and len(reason) < 500 for each in failed for reason in each.values()
    )
    for site in SITES:
        assert verify(tmp_path / site / "audit.jsonl")


def test_node_answers_a_hostile_server(tmp_path: Path) -> None:
    drawn = examples(st.tuples(HEADS, st.none() | bodies(PAYLOAD)), 20)
    requests = [Envelope({"ask": "terms", **sendable(head)}, body or b"") for head, body in drawn]
    node = Node(SiteConfig(client="site_1"), tmp_path / "site_1")
    transport = FlowerTransport(SuperLink())
    try:
        with EchoNode(transport._superlink.address, node.handle):
            until(transport.nodes)
            (number,) = transport.nodes()
            waiting = {transport.push(number, envelope, LONG) for envelope in requests}
            answers: dict[str, Envelope | None] = {}
            while waiting:
                answers |= transport.pull(waiting, 1.0)
                waiting -= answers.keys()
            hello = transport.push(number, Envelope({"ask": "hello"}), LONG)
            while hello not in answers:
                answers |= transport.pull([hello], 1.0)
    finally:
        transport.close()

    assert None not in answers.values()
    last = answers[hello]
    assert last is not None and last.head["ask"] == "here"
    assert len(verify(tmp_path / "site_1" / "audit.jsonl")) == len(requests) + 1


# One MiB of zeros, named so often that it stands for 8 GiB.
BOMB_CLIENT = """
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp
from hetero_fl.deployment.flower.grid import BODY, HEAD, from_message, to_content
from hetero_fl.deployment.transport import Envelope

app = ClientApp()


@app.query()
def handle_query(message, context):
    if from_message(message).head["ask"] != "bomb":
        return Message(to_content(Envelope({"ask": "here"})), reply_to=message)
    content = to_content(Envelope({"ask": "done"}, bytes(2**20)))
    array = content[BODY][BODY]
    chunks = array.slice_array()
    array.slice_array = lambda: chunks * 2**13
    return Message(content, reply_to=message)
"""


MEASURING_SERVER = """
import json, resource, time
from pathlib import Path
from flwr.serverapp import ServerApp
from hetero_fl.deployment.flower.bridge import limit_memory
from hetero_fl.deployment.flower.grid import GridTransport
from hetero_fl.deployment.transport import BoundedTransport, Envelope

app = ServerApp()


@app.main()
def main(grid, context):
    message_bytes = context.run_config["message-bytes"]
    limit_memory(message_bytes)
    transport = BoundedTransport(GridTransport(grid), message_bytes)
    while not (nodes := transport.nodes()):
        time.sleep(0.1)
    answers = []
    for ask in ("bomb", "hello"):
        number = transport.push(list(nodes)[0], Envelope({"ask": ask}), 120.0)
        while not (found := transport.pull([number], 1.0)):
            pass
        answer = found[number]
        answers.append(None if answer is None else dict(answer.head))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(context.run_config["socket"]).write_text(json.dumps([answers, peak]))
"""


def test_array_declaring_8_gib_fails_only_its_node(tmp_path: Path) -> None:
    write_bridge_app(tmp_path / "app", tmp_path / "report.json", 2**22)
    (tmp_path / "app" / PACKAGE / "client_app.py").write_text(BOMB_CLIENT)
    (tmp_path / "app" / PACKAGE / "server_app.py").write_text(MEASURING_SERVER)

    with FlowerFederation(tmp_path / "federation", {"site_1": {}}) as federation:
        ended = federation.run(tmp_path / "app")

        assert ended.startswith("finished:completed"), federation.log("superlink")[-3000:]
    (bomb, hello), peak = json.loads((tmp_path / "report.json").read_text())
    assert bomb is None or bomb["ask"] == "refused"
    assert hello == {"ask": "here"}
    assert peak < 2**31
