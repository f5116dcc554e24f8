"""Which node speaks for which client, and the audit log heads that the server keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

from hetero_fl.deployment import sites
from hetero_fl.deployment.audit_log import AuditLog, verify
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.messages import LOG
from hetero_fl.deployment.monitoring import read_status
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import public_bytes
from hetero_fl.deployment.sites import LogHeads, Sites
from hetero_fl.deployment.transport import Envelope
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import RunFailedError
from tests.support.cases import each_case
from tests.support.deployments import SITES, Federation, small
from tests.support.loopback import LoopbackTransport
from tests.support.nodes import LONG, Clock, EventLines, until

PRIVATE = {client: generate_private_key(SECP384R1()) for client in SITES}
KEYS = {client: public_bytes(key.public_key()) for client, key in PRIVATE.items()}


class Server:
    """A server's connections, and nodes that claim to be some client."""

    def __init__(self, folder: Path, keys: Mapping[str, bytes] | None) -> None:
        self.folder = folder
        self.log_lines = EventLines()
        self.transport = LoopbackTransport()
        self.sites = Sites(self.transport, SITES, self.log_lines, keys=keys)

    def meet(self, claim: str, key: bytes) -> int:
        """Connect a node, and wait until the server has answered its claim."""
        folder = self.folder / str(len(self.log_lines))
        count = len(self.log_lines)
        number = self.transport.join(Node(SiteConfig(client=claim), folder).handle, key)
        until(lambda: self.sites.refresh() or len(self.log_lines) > count)
        return number


REFUSED = "refused a node for client 'site_1': "


@each_case(
    ("known", "key", "line"),
    [
        (KEYS, KEYS["site_1"], "site_1 connected"),
        (KEYS, KEYS["site_2"], f"{REFUSED}its key is not the key of client 'site_1'"),
        (KEYS, b"", f"{REFUSED}its key is not the key of client 'site_1'"),
        (KEYS, b"junk", f"{REFUSED}its key is not the key of client 'site_1'"),
        (
            {client: KEYS[client] for client in SITES[1:]},
            KEYS["site_1"],
            f"{REFUSED}no key is known for client 'site_1'",
        ),
    ],
)
def test_node_with_another_key_is_refused(
    known: Mapping[str, bytes], key: bytes, line: str, tmp_path: Path
) -> None:
    server = Server(tmp_path, known)

    number = server.meet("site_1", key)

    assert server.log_lines == [line]
    assert server.sites._nodes == ({"site_1": number} if "connected" in line else {})


def test_without_keys_a_client_belongs_to_its_connected_node(tmp_path: Path) -> None:
    server = Server(tmp_path, None)

    first = server.meet("site_1", KEYS["site_1"])
    server.meet("site_1", KEYS["site_2"])
    assert server.sites._nodes == {"site_1": first}
    assert "its key is not the key of client 'site_1'" in server.log_lines[-1]

    server.transport.leave(first)
    server.sites.refresh()
    again = server.meet("site_1", KEYS["site_3"])
    assert server.sites._nodes == {"site_1": again}
    assert server.log_lines[-1] == "site_1 reconnected"


def test_restarted_node_joins_after_an_earlier_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "GREETING_RETRY_SECONDS", 0.1)
    server = Server(tmp_path, None)
    first = server.meet("site_1", KEYS["site_1"])
    again = server.meet("site_1", KEYS["site_2"])
    assert "its key is not the key of client 'site_1'" in server.log_lines[-1]
    for client in SITES[1:]:
        server.meet(client, KEYS[client])

    server.transport.leave(first)
    server.sites.join(load_config(small()), wait=LONG)

    assert server.sites.connected() == list(SITES)
    assert server.sites.node_of("site_1") == again
    server.transport.close()


def test_node_with_failed_worker_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "GREETING_RETRY_SECONDS", 0.1)
    server = Server(tmp_path, None)
    node = Node(SiteConfig(client="site_1"), tmp_path / "site")
    refusals = ["the folder is locked", "the folder is locked"]

    def handle(envelope: Envelope) -> Envelope:
        if refusals:
            return Envelope({"ask": "refused", "why": refusals.pop()})
        return node.handle(envelope)

    number = server.transport.join(handle)
    until(lambda: server.sites.refresh() or server.sites._nodes)

    assert server.sites._nodes == {"site_1": number}
    refused = "refused a node for client '': the folder is locked"
    assert server.log_lines == [refused, "site_1 connected"]


def test_run_requires_all_nodes(tmp_path: Path, clock: Clock) -> None:
    federation = Federation(tmp_path)
    keys = {**KEYS, "site_3": b"of another node"}

    missing = (
        "no node connected within 300 s for site_3; "
        "refused a node for client 'site_3': its key is not"
    )
    with pytest.raises(RunFailedError, match=missing):
        federation.serve(small(), keys=keys, public=KEYS, log=clock.after(3, []))


def test_server_keeps_the_heads_of_audit_logs(tmp_path: Path) -> None:
    """They show when a site's log is reset to an earlier end."""
    federation = Federation(tmp_path)
    for client, node in federation.nodes.items():
        node.audit_log = AuditLog(node.audit_log.path, PRIVATE[client])

    federation.serve(small(rounds=1), keys=KEYS, public=KEYS)

    nodes = read_status(tmp_path / "run")["nodes"]
    for client in SITES:
        path = tmp_path / client / "audit.jsonl"
        assert len(verify(path, PRIVATE[client].public_key(), nodes[client]["log"])) > 3


def head_of(count: int, digit: str) -> str:
    """Return the head of an audit log of so many lines."""
    return f"{count}:{digit * 64}"


def contradiction(found: str, last: str) -> str:
    """Return the line about a head that contradicts `last`; the head `5:a...` is kept."""
    return (
        f"the audit log of 'site_1' was truncated or rewritten: found {found} after {last} "
        f"(kept: {head_of(5, 'a')})"
    )


WENT_BACK = contradiction(head_of(3, "b"), head_of(5, "a"))


@each_case(
    ("heads", "kept", "expected"),
    [
        ([head_of(5, "a"), "junk", head_of(5, "a"), head_of(6, "b")], head_of(6, "b"), []),
        ([head_of(5, "a"), head_of(3, "b"), head_of(4, "c")], head_of(5, "a"), [WENT_BACK]),
        (
            [head_of(5, "a"), head_of(5, "b")],
            head_of(5, "a"),
            [contradiction(head_of(5, "b"), head_of(5, "a"))],
        ),
        (
            [head_of(5, "a"), head_of(3, "b"), head_of(3, "c"), head_of(6, "d")],
            head_of(6, "d"),
            [WENT_BACK, contradiction(head_of(3, "c"), head_of(3, "b"))],
        ),
    ],
)
def test_longest_audit_log_is_kept_and_another_is_reported(
    heads: list[str], kept: str, expected: list[str]
) -> None:
    lines = EventLines()
    found = LogHeads(lines)

    for head in heads:
        found.update("site_1", Envelope({LOG: head}))

    assert found.longest == {"site_1": kept}
    assert lines == expected
    assert set(lines.clients) <= {"site_1"}


def test_truncated_audit_log_is_a_status_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = iter([head_of(5, "a"), head_of(3, "b")])
    update = LogHeads.update

    def forged(self: LogHeads, client: str, answer: Envelope) -> None:
        if client == "site_1":
            answer = Envelope({LOG: next(heads, "")})
        update(self, client, answer)

    monkeypatch.setattr(LogHeads, "update", forged)

    Federation(tmp_path).serve(small(rounds=1))

    status = read_status(tmp_path / "run")
    assert status["nodes"]["site_1"]["log"] == head_of(5, "a")
    assert WENT_BACK in [event["message"] for event in status["events"]]
