"""Who said it: nobody speaks for another, and what is changed, repeated or late is refused, in one line at who refuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

from hetero_fl.deployment import messages
from hetero_fl.deployment.audit_log import AuditLog, verify
from hetero_fl.deployment.certificates import make_node_key
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.conversations import GREETING, Connections
from hetero_fl.deployment.envelope import Envelope, Handle
from hetero_fl.deployment.messages import LoopbackTransport, NodeKeys, ServerKeys, SignedTransport
from hetero_fl.deployment.monitoring import read_status
from hetero_fl.deployment.node import Node
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.helpers.deployments import SITES, Federation, small
from tests.helpers.nodes import LONG, Clock, until

SERVER, *OWN = (generate_private_key(SECP384R1()) for _ in range(4))
KEYS = dict(zip(SITES, OWN, strict=True))
PINNED = ServerKeys(SERVER, {id: key.public_key() for id, key in KEYS.items()})


def keys_of(id: str, **other: Any) -> NodeKeys:
    return replace(NodeKeys(KEYS[id], SERVER.public_key()), _seen_messages={}, **other)


class Heard(LoopbackTransport):
    """Counts the answers that the server has had."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = 0

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        found = super().pull(numbers, wait)
        self.heard += len(found)
        return found


class Meeting:
    """A server that meets a single node, which says it is site_1."""

    def __init__(
        self, tmp_path: Path, keys: NodeKeys | None = None, server: ServerKeys = PINNED, **site: Any
    ) -> None:
        self.said: list[str] = []  # by the server
        self.refused: list[str] = []  # by the node
        found = SiteConfig.model_validate({"client": "site_1", **site})
        self.node = Node(found, tmp_path / "site", self.refused.append, keys or keys_of("site_1"))
        self.transport, self.server = Heard(), server

    def met(self, between: Callable[[Handle], Handle] = lambda handle: handle) -> bool:
        """Whether the server takes the node for site_1."""
        transport = SignedTransport(self.transport, self.server, self.said.append)
        connections = Connections(transport, SITES, self.said.append)
        self.transport.join(between(self.node.handle))
        try:
            until(
                lambda: connections.wait_for_clients(0.1) and self.transport.heard
            )  # others never come
            return "site_1" in connections.node_of
        finally:
            self.transport.close()


def test_a_node_with_its_key_is_met(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    assert meeting.met() and meeting.said[0] == "site_1 is here" and not meeting.refused


def test_a_node_that_was_busy_and_whose_clock_is_ahead_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to the greeting just before the server sends another: to be refused then would end its process."""

    def ahead(handle: Handle) -> Handle:
        def handles(envelope: Envelope) -> Envelope:
            with monkeypatch.context() as patch:
                patch.setattr(
                    messages, "time", SimpleNamespace(time=lambda: time.time() + GREETING + 5.0)
                )
                return handle(envelope)

        return handles

    meeting = Meeting(tmp_path)
    assert meeting.met(ahead) and not meeting.refused


def test_an_unknown_node_is_refused(tmp_path: Path) -> None:
    server = ServerKeys(SERVER, {id: PINNED.clients[id] for id in SITES[1:]})
    meeting = Meeting(tmp_path, server=server)
    assert not meeting.met()
    assert (
        meeting.said[0]
        == "refused an answer in the name of 'site_1': unknown: no key is known of 'site_1'"
    )


def test_a_node_that_says_it_is_another_client_is_refused(tmp_path: Path) -> None:
    """It is known to the server, by a key of its own; that does not let it speak for site_1."""
    meeting = Meeting(tmp_path, keys_of("site_2"))
    assert not meeting.met()
    assert "in the name of 'site_1': a message that 'site_1' did not sign so" in meeting.said[0]


def test_a_server_with_another_key_is_refused_by_the_node(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path, server=replace(PINNED, own=generate_private_key(SECP384R1())))
    assert not meeting.met()
    assert (
        "a message that the server did not sign so: another key, or changed on its way"
        in meeting.refused[0]
    )
    assert verify(tmp_path / "site" / "audit.jsonl")[0]["outcome"] == meeting.refused[0]


def test_a_server_that_does_not_sign_is_refused_by_the_node(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    answer = meeting.node.handle(Envelope({"ask": "hello"}))
    assert answer.head["why"] == "a message of the server that is not signed"


CHANGES: dict[str, Callable[[Envelope], Envelope]] = {
    "the head": lambda e: Envelope({**e.head, "protocol": 7}, e.body),
    "a new key of the head": lambda e: Envelope({**e.head, "more": True}, e.body),
    "the payload": lambda e: Envelope(e.head, e.body[:-1] + bytes([e.body[-1] ^ 1])),
    "a payload that is cut": lambda e: Envelope(e.head, e.body[:-1]),
    "the signature": lambda e: Envelope({**e.head, "signature": b"0" * 103}, e.body),
    "no signature": lambda e: Envelope(
        {n: v for n, v in e.head.items() if n != "signature"}, e.body
    ),
    "a signature that is text": lambda e: Envelope({**e.head, "signature": "x"}, e.body),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_that_was_changed_is_refused(change: str, tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    assert not meeting.met(lambda handle: lambda asked: CHANGES[change](handle(asked)))
    assert (
        "refused an answer in the name of 'site_1'" in meeting.said[0] and "sign" in meeting.said[0]
    )


@pytest.mark.parametrize("change", ["a new key of the head", "the signature", "no signature"])
def test_a_message_that_was_changed_is_refused(change: str, tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    assert not meeting.met(lambda handle: lambda asked: handle(CHANGES[change](asked)))
    assert "sign" in meeting.refused[0]


def test_a_message_that_comes_once_more_is_refused(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)

    def replaying(handle: Handle) -> Handle:
        def handles(asked: Envelope) -> Envelope:
            answer = handle(asked)
            assert handle(asked).head["ask"] == "refused"
            return answer

        return handles

    assert meeting.met(replaying) and meeting.refused[0].endswith(
        "is replayed: this very message came before"
    )


def test_an_answer_to_another_message_is_refused(tmp_path: Path) -> None:
    """What a node has said once is no answer to what it is asked now, whoever says it again."""
    said: list[Envelope] = []
    assert Meeting(tmp_path).met(
        lambda handle: lambda asked: said.append(handle(asked)) or said[-1]
    )
    meeting = Meeting(tmp_path / "again")
    assert not meeting.met(lambda handle: lambda asked: said[0])
    assert meeting.said[0].endswith(
        "replayed: it answers another message than the one that is open"
    )


def test_an_expired_message_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting(tmp_path)
    now = time.time()

    def late(handle: Handle) -> Handle:
        def handles(asked: Envelope) -> Envelope:
            with monkeypatch.context() as clock:
                clock.setattr(time, "time", lambda: now + 1000)
                return handle(asked)

        return handles

    assert not meeting.met(late)
    assert "'hello' has expired" in meeting.refused[0]


def test_an_expired_answer_is_refused() -> None:
    """However slow the transport was: the server asks for no answer after its time."""
    said: list[str] = []
    loopback = LoopbackTransport()
    keys = keys_of("site_1")
    node = loopback.join(lambda asked: keys.sign(Envelope({"ask": "here"}), asked, "site_1"))
    signed = SignedTransport(loopback, PINNED, said.append)
    number = signed.push(node, Envelope({"ask": "hello"}), 0.2)
    time.sleep(0.4)
    answer = signed.pull([number], LONG)[number]
    loopback.close()
    assert answer is not None and answer.head["ask"] == "refused" and "expired" in said[0]


def test_an_answer_from_another_node_is_refused() -> None:
    """A node that met the server as site_2 gives site_1's answers from then on, signed by site_1."""
    said: list[str] = []
    loopback, keys = LoopbackTransport(), {id: keys_of(id) for id in SITES}
    as_who = ["site_2", "site_1"]
    node = loopback.join(
        lambda asked: keys[who := as_who.pop(0)].sign(Envelope({"ask": "here"}), asked, who)
    )
    signed = SignedTransport(loopback, PINNED, said.append)
    for expected in ("here", "refused"):
        number = signed.push(
            node, Envelope({"ask": "hello" if expected == "here" else "terms"}), LONG
        )
        answer = signed.pull([number], LONG)[number]
        assert answer is not None and answer.head["ask"] == expected
    loopback.close()
    assert said == ["refused an answer in the name of 'site_1': its node is known as 'site_2'"]


def test_a_message_for_another_client_is_refused(tmp_path: Path) -> None:
    keys = keys_of("site_1")
    sent: list[Envelope] = []
    loopback = LoopbackTransport()
    other = keys_of("site_2")

    def handle(asked: Envelope) -> Envelope:
        sent.append(asked)
        return other.sign(Envelope({"ask": "here"}), asked, "site_2")

    node = loopback.join(handle)
    signed = SignedTransport(loopback, PINNED, lambda line: None)
    for ask in ("hello", "terms"):
        signed.pull([signed.push(node, Envelope({"ask": ask}), LONG)], LONG)
    loopback.close()
    site = Node(SiteConfig(client="site_1"), tmp_path, keys=keys)
    assert site.handle(sent[1]).head["why"] == "'terms' is for 'site_2'"


def test_two_clients_with_one_key_are_a_mistake() -> None:
    with pytest.raises(UserError, match="'site_1' and 'site_2' have one key"):
        ServerKeys(SERVER, {"site_1": OWN[0].public_key(), "site_2": OWN[0].public_key()})


def test_keys_are_read_from_their_files(tmp_path: Path) -> None:
    make_node_key(tmp_path / "server"), make_node_key(tmp_path / "site_1")
    node = NodeKeys.load(tmp_path / "site_1", tmp_path / "server.pub")
    server = ServerKeys.load(tmp_path / "server", {"site_1": tmp_path / "site_1.pub"})
    assert Meeting(tmp_path, node, server).met()
    with pytest.raises(UserError, match="the private one"):
        NodeKeys.load(tmp_path / "site_1", tmp_path / "server")


def test_a_signed_run_is_the_run_and_says_nothing_of_missing_keys(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "signed")
    for id, node in federation.nodes.items():
        node.keys = keys_of(id)
    with_keys = federation.serve(small(), keys=PINNED)
    without = Federation(tmp_path / "plain").serve(small())
    for key in ("personal", "global", "clients", "communication"):
        assert with_keys.summary[key] == without.summary[key]
    note = "no keys were given: messages are not signed"
    assert (
        note in (without.path / "log.txt").read_text()
        and note not in (with_keys.path / "log.txt").read_text()
    )


def test_an_upload_that_is_changed_on_its_way_costs_the_client_its_round_and_nobody_else(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path)
    for id, node in federation.nodes.items():
        node.keys = keys_of(id)

    def changing(handle: Handle) -> Handle:
        def handles(asked: Envelope) -> Envelope:
            answer = handle(asked)
            return CHANGES["the payload"](answer) if asked.head.get("what") == "train" else answer

        return handles

    run = federation.serve(small(), {"site_2": changing}, keys=PINNED)
    assert all(list(line["failed"]) == ["site_2"] for line in run.metrics)
    assert "did not sign so" in run.metrics[0]["failed"]["site_2"]


def test_without_its_node_a_run_does_not_begin(tmp_path: Path, clock: Clock) -> None:
    federation = Federation(tmp_path)
    for id, node in federation.nodes.items():
        node.keys = keys_of("site_1" if id == "site_3" else id)  # registered, but as somebody else
    with pytest.raises(RunFailedError, match="not there after 300 s: site_3"):
        federation.serve(small(), keys=PINNED, say=clock.after(4, []))


def test_server_keeps_the_heads_of_audit_logs(tmp_path: Path) -> None:
    """With it a site's log that went back to an earlier end is found."""
    federation = Federation(tmp_path)
    for id, node in federation.nodes.items():
        node.keys = keys_of(id)
        node.log = AuditLog(node.log.path, KEYS[id])

    federation.serve(small(rounds=1), keys=PINNED)

    told = read_status(tmp_path / "run")["nodes"]
    for id in SITES:
        assert len(verify(tmp_path / id / "audit.jsonl", PINNED.clients[id], told[id]["log"])) > 3


def head_of(count: int, digit: str) -> str:
    """The head of an audit log of so many lines."""
    return f"{count}:{digit * 64}"


WENT_BACK = f"the audit log of 'site_1' has 3 lines; it had 5 (kept: {head_of(5, 'a')})"


@pytest.mark.parametrize(
    ("heads", "kept", "told"),
    [
        ([head_of(5, "a"), "junk", head_of(5, "a"), head_of(6, "b")], head_of(6, "b"), []),
        ([head_of(5, "a"), head_of(3, "b"), head_of(4, "c")], head_of(5, "a"), [WENT_BACK]),
        (
            [head_of(5, "a"), head_of(5, "b")],
            head_of(5, "a"),
            [
                f"line 5 of the audit log of 'site_1' was replaced: found {head_of(5, 'b')} (kept: {head_of(5, 'a')})"
            ],
        ),
        (
            [head_of(5, "a"), head_of(3, "b"), head_of(5, "c"), head_of(6, "d")],
            head_of(6, "d"),
            [
                WENT_BACK,
                f"line 5 of the audit log of 'site_1' was replaced: found {head_of(5, 'c')} (kept: {head_of(5, 'a')})",
            ],
        ),
    ],
)
def test_server_keeps_the_longest_audit_log_and_reports_another(
    heads: list[str], kept: str, told: list[str]
) -> None:
    said: list[str] = []
    signed = SignedTransport(LoopbackTransport(), PINNED, said.append)

    for head in heads:
        signed._note_log("site_1", head)

    assert signed.logs == {"site_1": kept}
    assert said == told


def test_an_audit_log_that_went_back_is_an_event_of_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(tmp_path)
    for id, node in federation.nodes.items():
        node.keys = keys_of(id)
    heads = iter([head_of(5, "a"), head_of(3, "b")])
    note = SignedTransport._note_log

    def forged(self: SignedTransport, client: str, head: str) -> None:
        note(self, client, next(heads, "") if client == "site_1" else head)

    monkeypatch.setattr(SignedTransport, "_note_log", forged)

    federation.serve(small(rounds=1), keys=PINNED)

    status = read_status(tmp_path / "run")
    assert status["nodes"]["site_1"]["log"] == head_of(5, "a")
    assert WENT_BACK in [event["message"] for event in status["events"]]
