"""Hostile nodes and a hostile server over Flower."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from flwr.app import ConfigRecord

from hetero_fl.core.payload import FORM as PAYLOAD
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.flower.app import PACKAGE, write_bridge_app
from hetero_fl.deployment.flower.superlink import FlowerTransport, SuperLink
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope, Handle
from tests.support.deployments import SITES, small
from tests.support.echo_node import EchoNode
from tests.support.flower_federation import FlowerFederation, until
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
from tests.support.nodes import LONG

pytestmark = pytest.mark.slow
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
