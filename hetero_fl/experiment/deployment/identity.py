"""Who said it: the server signs each of its messages, each node its answers, over head and body; public keys are known before.

Whatever carries messages, TLS or not, can then neither change, nor repeat, nor invent one. An answer is signed together with the
number of the message that it answers, so that it is of no use as the answer to another; a message says to whom it is, and until
when it holds. Keys are those of the nodes' authentication (ECDSA on P-384, SHA-384).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA384

from hetero_fl.errors import UserError, one_line
from hetero_fl.experiment.deployment.certificates import PublicKey, load_node_key, load_public_key, public_bytes
from hetero_fl.experiment.deployment.messages import Refused, told_apart
from hetero_fl.experiment.deployment.transport import Envelope, Head, Transport, Unread

SIGNATURE = "signature"
NUMBER, TO, UNTIL = "number", "to", "until"  # of a message of the server's
FROM, ANSWERS = "client", "answers"  # of an answer
LOG = "log"  # of an answer: the head of the site's audit log, with the line on this very answer
HEAD = re.compile(r"(\d{1,12}):[0-9a-f]{64}")


# Signatures ----------------------------------------------------------------------------------------------------------
def signed(envelope: Envelope, key: EllipticCurvePrivateKey, role: str) -> Envelope:
    """With a signature in its head. `role`: who signs, so that no message passes for an answer."""
    return Envelope({**envelope.head, SIGNATURE: key.sign(_about(envelope, role), ECDSA(SHA384()))}, envelope.body)


def check(envelope: Envelope, key: PublicKey, role: str, whose: str) -> None:
    """Raises Refused for a message that was not signed with this key as it is now."""
    signature = envelope.head.get(SIGNATURE)
    if not isinstance(signature, bytes):
        raise Refused(f"a message of {whose} that is not signed")
    try:
        key.verify(signature, _about(envelope, role), ECDSA(SHA384()))
    except InvalidSignature:
        raise Refused(f"a message that {whose} did not sign so: another key, or changed on its way") from None


def _about(envelope: Envelope, role: str) -> bytes:
    plain = {n: {"bytes": v.hex()} if isinstance(v, bytes) else v for n, v in envelope.head.items() if n != SIGNATURE}
    try:
        head = json.dumps(plain, sort_keys=True)
    except TypeError:
        raise Refused("the head of a message holds something else than plain values") from None
    return f"hetero_fl {role}\n{head}\n{hashlib.sha256(envelope.body).hexdigest()}".encode()


# At a node -----------------------------------------------------------------------------------------------------------
@dataclass
class NodeKeys:
    """A node's own key, and the server's public one."""

    own: EllipticCurvePrivateKey
    server: PublicKey
    _seen: dict[str, float] = field(default_factory=dict)  # messages' numbers, until when they hold

    @classmethod
    def load(cls, own: Path, server: Path) -> NodeKeys:
        """From their files. Raises UserError."""
        return cls(load_node_key(own), load_public_key(server))

    def check(self, envelope: Envelope, client: str) -> None:
        """Raises Refused for what the server did not say to this client, now, for the first time."""
        check(envelope, self.server, "server", "the server")
        head, now = envelope.head, time.time()
        ask, number, to, until = (
            told_apart(head, *n) for n in (("ask", str), (NUMBER, str), (TO, str), (UNTIL, float))
        )
        if to != client and not (to == "" and ask in ("hello", "leave")):
            raise Refused(f"'{ask}' is for '{to}'")
        if until < now:
            raise Refused(f"'{ask}' has expired, {now - until:.0f} s ago by this machine's clock")
        self._seen = {known: end for known, end in self._seen.items() if end >= now}
        if number in self._seen:
            raise Refused(f"'{ask}' is replayed: this very message came before")
        self._seen[number] = until

    def sign(self, answer: Envelope, asked: Envelope, client: str) -> Envelope:
        """An answer that holds for this message alone."""
        number = asked.head.get(NUMBER, "")
        head: Head = {**answer.head, FROM: client, ANSWERS: number if isinstance(number, str) else ""}
        return signed(Envelope(head, answer.body), self.own, "node")


# At the server -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ServerKeys:
    """The server's own key, and the public one of each client: nobody else can speak for it."""

    own: EllipticCurvePrivateKey
    clients: Mapping[str, PublicKey]

    def __post_init__(self) -> None:
        owner: dict[bytes, str] = {}
        for client, key in self.clients.items():
            if (other := owner.setdefault(public_bytes(key), client)) != client:
                raise UserError(f"keys: '{other}' and '{client}' have one key; each needs its own")

    @classmethod
    def load(cls, own: Path, clients: Mapping[str, Path]) -> ServerKeys:
        """From their files. Raises UserError."""
        return cls(load_node_key(own), {client: load_public_key(path) for client, path in clients.items()})


@dataclass(frozen=True)
class Sent:
    """A message that is to be answered."""

    node: int
    ask: str
    number: str
    until: float


class Signed:
    """A transport whose messages are signed, and whose answers are handed on only if they are what they should be.

    Another answer becomes a refusal that says why; `say` is told, too.
    """

    def __init__(self, transport: Transport, keys: ServerKeys, say: Callable[[str], None]) -> None:
        self.transport, self.keys, self.say = transport, keys, say
        self.logs: dict[str, str] = {}  # client -> the head of its audit log with the most lines
        self._last_logs: dict[str, str] = {}  # client -> the head that its last answer had
        self._who: dict[int, str] = {}  # node -> the client whose key it holds
        self._sent: dict[str, Sent] = {}

    def nodes(self) -> Collection[int]:
        there = self.transport.nodes()
        self._who = {node: client for node, client in self._who.items() if node in there}
        return there

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        number, until = secrets.token_hex(16), time.time() + within
        head: Head = {**envelope.head, NUMBER: number, TO: self._who.get(node, ""), UNTIL: until}
        sent = self.transport.push(node, signed(Envelope(head, envelope.body), self.keys.own, "server"), within)
        self._sent[sent] = Sent(node, str(envelope.head.get("ask")), number, until)
        return sent

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """As any transport; an answer to what was not asked, or not any more, never comes out."""
        came = self.transport.pull(numbers, wait)
        self._forget()
        return {number: None if answer is None else self._heard(number, answer) for number, answer in came.items()}

    def close(self) -> None:
        self.transport.close()

    def _heard(self, number: str, answer: Envelope) -> Envelope:
        if isinstance(answer, Unread):
            return answer
        try:
            return self._checked(self._sent.pop(number, None), answer)
        except Refused as error:
            client = one_line(answer.head.get(FROM, ""), 80)
            self.say(f"refused an answer in the name of '{client}': {error}")
            return Envelope({"ask": "refused", "client": client, "why": str(error)})

    def _checked(self, sent: Sent | None, answer: Envelope) -> Envelope:
        client = told_apart(answer.head, FROM, str)
        if client not in self.keys.clients:
            raise Refused(f"unknown: no key is known of '{client[:80]}'")
        check(answer, self.keys.clients[client], "node", f"'{client}'")
        if sent is None or answer.head.get(ANSWERS) != sent.number:
            raise Refused("replayed: it answers another message than the one that is open")
        if time.time() > sent.until:
            raise Refused(f"expired {time.time() - sent.until:.0f} s before it came")
        known = self._who.get(sent.node)
        if known is None and sent.ask == "hello":
            self._who[sent.node] = known = client
        if known != client:
            raise Refused(f"its node is known as '{known or 'nobody'}'")
        self._note_log(client, str(answer.head.get(LOG, "")))
        return Envelope({n: v for n, v in answer.head.items() if n not in (SIGNATURE, ANSWERS, LOG)}, answer.body)

    def _note_log(self, client: str, head: str) -> None:
        """Keep the head of a site's audit log that has the most lines, and report one that contradicts an earlier one.

        Nobody at the site can change it here: a log that was cut off, or written anew, does not verify against it.
        """
        if HEAD.fullmatch(head) is None:
            return
        kept = self.logs.setdefault(client, head)
        last = self._last_logs.get(client, head)
        self._last_logs[client] = head
        if _lines(head) < _lines(last):
            self.say(f"the audit log of '{client}' has {_lines(head)} lines; it had {_lines(last)} (kept: {kept})")
        elif any(_lines(head) == _lines(before) and head != before for before in (last, kept)):
            self.say(f"line {_lines(head)} of the audit log of '{client}' was replaced: found {head} (kept: {kept})")
        if _lines(head) > _lines(kept):
            self.logs[client] = head

    def _forget(self) -> None:
        """Messages to which no answer would be taken any more."""
        if len(self._sent) > 4 * max(16, len(self._who)):
            now = time.time()
            self._sent = {n: sent for n, sent in self._sent.items() if sent.until >= now}


def _lines(head: str) -> int:
    """Return the number of lines of an audit log, from its head."""
    return int(head.partition(":")[0])
