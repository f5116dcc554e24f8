"""A hostile participant over TLS: it is authenticated, its messages are signed, and what they hold is drawn by Hypothesis."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

import hypothesis.strategies as st
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body, get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from hypothesis import HealthCheck, given, settings

from hetero_fl.core.payload import FORM as PAYLOAD
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.certificates import ServerFiles, make_node_key, make_server_files
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.envelope import Envelope, Handle
from hetero_fl.deployment.flower.connection import (
    SERVER,
    MessageTooLongError,
    _check_parts,
    announce,
    fetch,
    get_all_nested_objects,
    message_to_node,
)
from hetero_fl.deployment.flower.node import serve
from hetero_fl.deployment.flower.records import SMALL_BODY_BYTES, from_message
from hetero_fl.deployment.flower.superlink import SuperLink
from hetero_fl.deployment.flower.transport import FlowerTransport
from hetero_fl.deployment.messages import (
    NodeKeys,
    ServerKeys,
    SignedTransport,
    body_of,
    message,
    sign_envelope,
)
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation as serve_run
from tests.helpers.deployments import SITES, small
from tests.helpers.hostile_messages import (
    ANSWERS,
    HEADS,
    Answer,
    bodies,
    bomb,
    examples,
    hostile,
    sealed,
)
from tests.helpers.nodes import LONG

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MOST = 2**22  # bytes of an answer


class Net:
    """A SuperLink with TLS, keys of the server and of three sites, and the sites' nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: ServerFiles = make_server_files(folder / "server", ["localhost", "127.0.0.1"])
        self.own = make_node_key(folder / "sign")
        self.private = {site: make_node_key(folder / site / "key") for site in SITES}
        self.public = {site: key.public_key() for site, key in self.private.items()}
        self.keys = ServerKeys(self.own, self.public)
        self.superlink = SuperLink(files=self.files)
        self.transport = FlowerTransport(self.superlink, self.public, MOST)
        self.said: list[str] = []

    def keys_of(self, site: str) -> NodeKeys:
        return NodeKeys(self.private[site], self.own.public_key())

    def node(self, site: str) -> Node:
        return Node(
            SiteConfig(client=site),
            self.folder / site / "state",
            self.said.append,
            self.keys_of(site),
        )

    @contextmanager
    def joined(self, handles: dict[str, Handle]) -> Iterator[None]:
        """Sites that answer so, each in a thread."""
        stop = threading.Event()
        with ExitStack() as stack:
            for site, handle in handles.items():
                about = {"authority": self.files.authority, "stop": stop}
                args = (handle, self.superlink.address, self.private[site])
                thread = threading.Thread(target=serve, args=args, kwargs=about)
                thread.start()
                stack.callback(thread.join)
            stack.callback(stop.set)
            yield


@pytest.mark.slow
def test_run_over_tls_ends_well_with_a_hostile_site(tmp_path: Path) -> None:
    net = Net(tmp_path)
    long: list[Answer] = [
        sealed(bomb(MOST // 4)),
        ({"why": "x" * 10**6, "ask": "refused"}, None, False),
    ]
    answers = [*long, sealed(bytes(MOST + 1)), sealed(bytes(2 * MOST)), *examples(ANSWERS, 20)]
    answers = [(sendable(head), body, check) for head, body, check in answers]
    handles = {site: net.node(site).handle for site in SITES}
    handles["site_3"] = hostile(handles["site_3"], answers, net.keys_of("site_3"))
    made = small(models="linear", rounds=len(answers), evaluation__every=len(answers))

    with net.joined(in_turn(handles)):
        run = serve_run(
            made,
            net.transport,
            out=net.folder / "run",
            wait=LONG,
            deadline=LONG,
            keys=net.keys,
            message_bytes=MOST,
        )

    assert run.summary["rounds_completed"] == len(answers)
    failed = [record["failed"] for record in run.metrics]
    assert all(set(each) <= {"site_3"} for each in failed)
    assert "what was agreed takes at most" in failed[0]["site_3"]
    assert "a head of" in failed[1]["site_3"] or "a part of" in failed[1]["site_3"]
    assert (
        "at most 4,194,304" in failed[2]["site_3"]
        or "more than 4,194,304 bytes" in failed[2]["site_3"]
    )
    assert "a message of more than 4,194,304 bytes" in failed[3]["site_3"]
    assert all(why.isprintable() and len(why) < 500 for each in failed for why in each.values())
    for site in SITES:
        assert verify(net.folder / site / "state" / "audit.jsonl", net.public[site])


def in_turn(handles: dict[str, Handle]) -> dict[str, Handle]:
    """The sites one at a time: torch's generator is the process's."""
    working = threading.Lock()

    def alone(handle: Handle) -> Handle:
        def handles_one(envelope: Envelope) -> Envelope:
            with working:
                return handle(envelope)

        return handles_one

    return {site: alone(handle) for site, handle in handles.items()}


@pytest.mark.slow
def test_huge_score_over_tls_is_refused_by_name(tmp_path: Path) -> None:
    net = Net(tmp_path)
    handles = {site: net.node(site).handle for site in SITES}
    honest = handles["site_3"]

    def lies(asked: Envelope) -> Envelope:
        answer = honest(asked)
        if asked.head.get("kind") != "read":
            return answer
        told = body_of(answer)
        told["scores"]["personal"]["loss"] = 1e200
        kept = {name: value for name, value in answer.head.items() if name != "signature"}
        return sign_envelope(
            Envelope(kept, message("done", told).body), net.private["site_3"], "node"
        )

    handles["site_3"] = lies
    with net.joined(in_turn(handles)):
        made = small(models="linear", rounds=1)
        run = serve_run(
            made, net.transport, out=net.folder / "run", wait=LONG, deadline=LONG, keys=net.keys
        )

    assert run.metrics[0]["unread"] == {
        "site_3": "its reading is refused: found 1e+200; expected 0 to 1e+18"
    }


def sendable(head: dict[str, Any]) -> dict[str, Any]:
    """What of a head Flower carries: it refuses some values at the sender."""
    kept = {}
    for name, value in head.items():
        try:
            ConfigRecord({name: value}).deflate()
        except (TypeError, ValueError, OverflowError, UnicodeError):
            continue
        kept[name] = value
    return kept


@pytest.mark.slow
def test_node_over_tls_answers_a_hostile_server(tmp_path: Path) -> None:
    net = Net(tmp_path)
    drawn = examples(st.tuples(HEADS, st.none() | bodies(PAYLOAD)), 50)
    node = net.node("site_1")
    signed = SignedTransport(net.transport, net.keys, net.said.append)
    with net.joined({"site_1": node.handle}):
        while not (there := list(signed.nodes())):
            pass
        asked = [
            ({"ask": "hello"}, b""),
            *((sendable(head), body or b"") for head, body in drawn),
            ({"ask": "hello"}, b""),
        ]
        for head, body in asked:
            number = signed.push(there[0], Envelope({"ask": "terms", **head}, body), LONG)
            answer = signed.pull([number], LONG)[number]
            assert answer is not None
        assert answer.head["ask"] == "here"
        net.transport.close()
    assert len(
        verify(net.folder / "site_1" / "state" / "audit.jsonl", net.public["site_1"])
    ) == len(asked)
    assert signed.logs["site_1"].startswith(f"{len(asked)}:")


# Parts of a message --------------------------------------------------------------------------------------------------
class Parts:
    """What a SuperLink holds of a message."""

    def __init__(self, envelope: Envelope) -> None:
        message = message_to_node(envelope, 1, 2, 3.0)
        _, self.tree = announce(message)
        self.content = {
            number: part.deflate() for number, part in get_all_nested_objects(message).items()
        }
        self.confirmed: list[str] = []

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        content = self.content.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=True, object_content=content or b""
        )

    def ConfirmMessageReceived(
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        self.confirmed.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()

    def PushObject(self, request: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize("size", [0, 100, SMALL_BODY_BYTES + 1, 12_000_000])
def test_fetch_reads_what_was_sent(size: int) -> None:
    sent = Envelope({"a": 1}, bytes(size))
    parts = Parts(sent)
    assert from_message(fetch(parts, SERVER, 1, parts.tree, most=max(size, 1))) == sent


def test_fetch_stops_when_too_much_has_come() -> None:
    parts = Parts(Envelope({}, b"".join(bytes([i]) * 2**20 for i in range(100))))
    pulled: list[str] = []
    pull = parts.PullObject
    parts.PullObject = lambda request: pulled.append(request.object_id) or pull(request)  # type: ignore[method-assign]

    with pytest.raises(MessageTooLongError, match="more than 1,000 bytes"):
        fetch(parts, SERVER, 1, parts.tree, most=1000)

    assert len(pulled) < len(parts.content) and parts.confirmed


def test_array_that_names_a_piece_many_times_is_refused() -> None:
    parts = Parts(Envelope({}, bytes(2**23)))
    (number,) = [n for n, content in parts.content.items() if content.startswith(b"Array ")]
    head, _, body = parts.content[number].partition(b"\0")
    told = json.loads(body)
    told["arraychunk_ids"] *= 100
    body = json.dumps(told).encode()
    parts.content[number] = head.rsplit(b" ", 1)[0] + f" {len(body)}".encode() + b"\0" + body

    with pytest.raises(MessageTooLongError, match="a message of more than"):
        fetch(parts, SERVER, 1, parts.tree, most=2**24)


def test_arrays_that_share_a_chunk_are_refused_if_they_are_too_long_together() -> None:
    content = Parts(Envelope({}, bytes(2**20))).content
    (array,) = [part for part in content.values() if part.startswith(b"Array ")]
    _check_parts(content, most=2**20)

    with pytest.raises(MessageTooLongError, match="a message of more than 4,194,304 bytes"):
        _check_parts(content | {f"copy {i}": array for i in range(20)}, most=2**22)


def test_message_of_many_parts_is_refused_before_any_is_fetched() -> None:
    parts = Parts(Envelope())
    tree = ObjectTree(
        object_id=parts.tree.object_id, children=[ObjectTree(object_id=str(i)) for i in range(1000)]
    )
    with pytest.raises(MessageTooLongError, match="1001 parts"):
        fetch(parts, SERVER, 1, tree, most=2**20)


@given(
    at=st.integers(0, 5),
    place=st.floats(0, 0.99),
    change=st.binary(max_size=20),
    kind=st.sampled_from(["changed", "cut", "other", "junk"]),
    large=st.booleans(),
)
@FUZZ
def test_parts_of_any_bytes_make_a_message_or_are_refused(
    at: int, place: float, change: bytes, kind: str, large: bool
) -> None:
    parts = Parts(Envelope({"a": 1, "b": "x"}, bytes(2 * SMALL_BODY_BYTES if large else 10)))
    number = sorted(parts.content)[at % len(parts.content)]
    content, cut = parts.content[number], int(place * len(parts.content[number]))
    parts.content[number] = {
        "changed": content[:cut] + change + content[cut + len(change) :],
        "cut": content[:cut],
        "other": parts.content[sorted(parts.content)[0]],
        "junk": change,
    }[kind]
    with suppress(ObjectPullError):
        from_message(fetch(parts, SERVER, 1, parts.tree, most=2**20))


def test_content_of_other_records_is_no_message() -> None:
    ours = message_to_node(Envelope({"a": 1}, b"b"), 1, 2, 3.0)
    array = Array(dtype="uint8", shape=(1,), stype="bytes", data=b"x")
    for content in (
        RecordDict({"head": ArrayRecord({"body": array}), "body": ConfigRecord({"body": b""})}),
        RecordDict({"head": ConfigRecord({"a": 1}), "body": ArrayRecord({"other": array})}),
        RecordDict(),
    ):
        ours._content = content
        assert from_message(ours) is None
    assert get_object_id(add_header_to_object_body(b"", array))
