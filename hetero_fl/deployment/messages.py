"""Messages between server and nodes, and their signatures."""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA384

from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.deployment.certificates import (
    PublicKey,
    load_node_key,
    load_public_key,
    public_bytes,
)
from hetero_fl.deployment.envelope import Envelope, Handle, Head, find_fault
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.utils.errors import UserError, one_line
from hetero_fl.utils.serialization import CodecError, as_tensor, decode, encode
from hetero_fl.utils.version import __version__

# What carries messages between the server and its nodes, and one that carries them within this
# process.


class UnreadableAnswer(Envelope):
    """Placeholder for an answer that was refused."""

    @classmethod
    def with_reason(cls, why: str) -> UnreadableAnswer:
        return cls({"ask": "refused", "why": why})


class Transport(Protocol):
    """The server's end. A node answers each message with one."""

    def nodes(self) -> Collection[int]:
        """The nodes that are connected now. One that comes back may have another number."""

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Hand over a message, which is of no use after so many seconds: an answer that nobody has had by then may be thrown
        away. Returns its number."""

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Answers that have come, waiting up to so many seconds for the first; None where none will ever come (it expired, the
        node is gone or has failed). Raises RunFailedError if the transport itself has broken down."""

    def close(self) -> None:
        """Give everything back."""


class BoundedTransport:
    """A transport whose answers are within bounds; `UnreadableAnswer` takes the place of others.

    Args:
        transport: The transport that carries the messages.
        most: Bytes of an answer's body, at most.
    """

    def __init__(self, transport: Transport, most: int) -> None:
        self.transport = transport
        self.most = most
        self.nodes = transport.nodes
        self.push = transport.push
        self.close = transport.close

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """As any transport."""
        return {
            n: None if a is None else self._check_answer(a)
            for n, a in self.transport.pull(numbers, wait).items()
        }

    def _check_answer(self, answer: Envelope) -> Envelope:
        why = find_fault(answer, self.most)
        return UnreadableAnswer.with_reason(why) if why else answer


class LoopbackTransport:
    """Nodes in this process, a thread each: for tests, and for whoever wants to try a node without a network."""

    def __init__(self) -> None:
        self._nodes: dict[
            int, tuple[queue.Queue[tuple[str, Envelope] | None], threading.Thread]
        ] = {}
        self._numbers = itertools.count(1)
        self._messages = itertools.count(1)
        self._waiting: dict[str, int] = {}  # message -> node
        self._answers: dict[str, Envelope | None] = {}
        self._ends: dict[str, float] = {}  # when an answer is of no use any more
        self._changed = threading.Condition()
        self._working = threading.Lock()  # one at a time: torch's generator is the process's

    def join(self, handle: Handle) -> int:
        """A node comes. Returns its number."""
        number = next(self._numbers)
        inbox = queue.Queue[tuple[str, Envelope] | None]()
        thread = threading.Thread(target=self._work, args=(inbox, handle), daemon=True)
        with self._changed:
            self._nodes[number] = inbox, thread
        thread.start()
        return number

    def leave(self, node: int) -> None:
        """A node goes, in the midst of whatever it does: its answers are lost."""
        with self._changed:
            inbox, _ = self._nodes.pop(node)
            inbox.put(None)
            for message in [m for m, n in self._waiting.items() if n == node]:
                del self._waiting[message]
                self._answers[message] = None
            self._changed.notify_all()

    def nodes(self) -> Collection[int]:
        with self._changed:
            return list(self._nodes)

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        message = str(next(self._messages))
        now = time.monotonic()
        with self._changed:
            for old in [m for m, end in self._ends.items() if end < now]:
                del self._ends[old]
                self._answers.pop(old, None)
            self._ends[message] = now + within
            if node not in self._nodes:
                self._answers[message] = None
            else:
                self._waiting[message] = node
                self._nodes[node][0].put((message, envelope))
        return message

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        end = time.monotonic() + wait
        with self._changed:
            while not (
                found := {n: self._answers.pop(n) for n in list(numbers) if n in self._answers}
            ):
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            for number in found:
                self._ends.pop(number, None)
        return found

    def close(self) -> None:
        for node in list(self._nodes):
            self.leave(node)

    def _work(self, inbox: queue.Queue[tuple[str, Envelope] | None], handle: Handle) -> None:
        while (given := inbox.get()) is not None:
            message, envelope = given
            try:
                with self._working:
                    answer: Envelope | None = handle(envelope)
            except Exception:  # as a node whose process has died
                answer = None
            with self._changed:
                if self._waiting.pop(message, None) is not None:
                    self._answers[message] = answer
                    self._changed.notify_all()


# What server and nodes say to each other: plain trees as bytes, never pickle, and what is read is
# checked.
#
# A node is asked, in this order, `hello` (who are you?), `terms` (this is the configuration: what
# do you tell of your rows?), `roster` (this is who takes part: are you ready?); `keep` (begin with
# this model of another run); then, for each task, `do`; at the end, `leave`. It answers `here`,
# `told`, `ready`, `kept`, `done`; or `lacks` (the public sets), `unready` (it was started anew
# since), `lost` (the private state that the task starts from), `failed` (its training diverged),
# `refused` (it will not, and why).

PROTOCOL = 1  # of these messages: another number, another language
FORM = f"deployment {PROTOCOL}"


# Exceptions raised while parsing a malformed message.
JUNK = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class RequestRefusedError(Exception):
    """A message that is not as it should be, or that asks for what is not granted; one short printable line."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


def message(kind: str, body: Any = None, **head: Any) -> Envelope:
    """A message with a tree as its body."""
    return Envelope({"ask": kind, **head}, b"" if body is None else encode(body, FORM))


def body_of(envelope: Envelope) -> Any:
    """The tree in a message's body. Raises RequestRefusedError if it is none."""
    try:
        return decode(envelope.body, FORM)
    except CodecError as error:
        raise RequestRefusedError(f"{envelope.head.get('ask')!r:.60}: {error}") from None


def head_value(head: Head, name: str, kind: type) -> Any:
    """A value of a message's head. Raises RequestRefusedError if it is missing or of another type."""
    value = head.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestRefusedError(
            f"{head.get('ask')!r:.60}: {name}: found {value!r:.60}; expected {kind.__name__}"
        )
    return value


def reason(answer: Envelope) -> str:
    """Return why an answer is not the one that was hoped for: one short printable line, whatever it says."""
    return one_line(answer.head.get("why", answer.head.get("ask")))


def versions() -> dict[str, Any]:
    """What both sides have to have alike."""
    return {"protocol": PROTOCOL, "package": __version__, "torch": torch.__version__}


def version_mismatch(head: Head) -> str:
    """A line on the first version that another participant has otherwise; empty if all are the same."""
    for name, own in versions().items():
        if head.get(name) != own:
            return f"{name} {head.get(name)!r:.60}, but {own!r} here"
    return ""


# Trees ---------------------------------------------------------------------------------------------------------------
def data_info_tree(info: RemoteDataInfo) -> dict[str, Any]:
    """What a client told, as plain values."""
    view = None if info.view is None else asdict(info.view)
    return {"rows": dict(info.rows), "hash": info.content_hash, "view": view, "labels": info.labels}


def evaluation_tree(evaluation: ClientEvaluation) -> dict[str, Any]:
    """What a node tells of its model, as plain values."""
    tree = {field.name: getattr(evaluation, field.name) for field in fields(evaluation)}
    return {**tree, "model": as_tensor(evaluation.model) if evaluation.model else None}


# Who said it: the server signs each of its messages, each node its answers, over head and body;
# public keys are known before.
#
# Whatever carries messages, TLS or not, can then neither change, nor repeat, nor invent one. An
# answer is signed together with the number of the message that it answers, so that it is of no use
# as the answer to another; a message says to whom it is, and until when it holds. Keys are those of
# the nodes' authentication (ECDSA on P-384, SHA-384).

SIGNATURE = "signature"
NUMBER = "number"
TO = "to"
UNTIL = "until"  # of a message of the server's
FROM = "client"
ANSWERS = "answers"  # of an answer
LOG = "log"  # of an answer: the head of the site's audit log, with the line on this very answer
HEAD = re.compile(r"(\d{1,12}):[0-9a-f]{64}")


# Signatures ----------------------------------------------------------------------------------------------------------
def sign_envelope(envelope: Envelope, key: EllipticCurvePrivateKey, role: str) -> Envelope:
    """With a signature in its head. `role`: who signs, so that no message passes for an answer."""
    return Envelope(
        {**envelope.head, SIGNATURE: key.sign(_signed_content(envelope, role), ECDSA(SHA384()))},
        envelope.body,
    )


def check_signature(envelope: Envelope, key: PublicKey, role: str, whose: str) -> None:
    """Raises RequestRefusedError for a message that was not signed with this key as it is now."""
    signature = envelope.head.get(SIGNATURE)
    if not isinstance(signature, bytes):
        raise RequestRefusedError(f"a message of {whose} that is not signed")
    try:
        key.verify(signature, _signed_content(envelope, role), ECDSA(SHA384()))
    except InvalidSignature:
        raise RequestRefusedError(
            f"a message that {whose} did not sign so: another key, or changed on its way"
        ) from None


def _signed_content(envelope: Envelope, role: str) -> bytes:
    plain = {
        n: {"bytes": v.hex()} if isinstance(v, bytes) else v
        for n, v in envelope.head.items()
        if n != SIGNATURE
    }
    try:
        head = json.dumps(plain, sort_keys=True)
    except TypeError:
        raise RequestRefusedError(
            "the head of a message holds something else than plain values"
        ) from None
    return f"hetero_fl {role}\n{head}\n{hashlib.sha256(envelope.body).hexdigest()}".encode()


# At a node -----------------------------------------------------------------------------------------------------------
@dataclass
class NodeKeys:
    """A node's own key, and the server's public one."""

    own: EllipticCurvePrivateKey
    server: PublicKey
    # messages' numbers, until when they hold
    _seen_messages: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, own: Path, server: Path) -> NodeKeys:
        """From their files. Raises UserError."""
        return cls(load_node_key(own), load_public_key(server))

    def check(self, envelope: Envelope, client: str) -> None:
        """Raises RequestRefusedError for what the server did not say to this client, now, for the first time."""
        check_signature(envelope, self.server, "server", "the server")
        head = envelope.head
        now = time.time()
        ask, number, to, until = (
            head_value(head, *n) for n in (("ask", str), (NUMBER, str), (TO, str), (UNTIL, float))
        )
        if to != client and not (to == "" and ask in ("hello", "leave")):
            raise RequestRefusedError(f"'{ask}' is for '{to}'")
        if until < now:
            raise RequestRefusedError(
                f"'{ask}' has expired, {now - until:.0f} s ago by this machine's clock"
            )
        self._seen_messages = {
            known: end for known, end in self._seen_messages.items() if end >= now
        }
        if number in self._seen_messages:
            raise RequestRefusedError(f"'{ask}' is replayed: this very message came before")
        self._seen_messages[number] = until

    def sign(self, answer: Envelope, request: Envelope, client: str) -> Envelope:
        """An answer that holds for this message alone."""
        number = request.head.get(NUMBER, "")
        head: Head = {
            **answer.head,
            FROM: client,
            ANSWERS: number if isinstance(number, str) else "",
        }
        return sign_envelope(Envelope(head, answer.body), self.own, "node")


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
        return cls(
            load_node_key(own), {client: load_public_key(path) for client, path in clients.items()}
        )


@dataclass(frozen=True)
class PendingMessage:
    """A message that is to be answered."""

    node: int
    request: str
    number: str
    until: float


class SignedTransport:
    """A transport whose messages are signed, and whose answers are handed on only if they are what they should be.

    Another answer becomes a refusal that says why; `say` is told, too.
    """

    def __init__(self, transport: Transport, keys: ServerKeys, say: Callable[[str], None]) -> None:
        self.transport = transport
        self.keys = keys
        self.say = say
        self.logs: dict[str, str] = {}  # client -> the head of its audit log with the most lines
        self._last_logs: dict[str, str] = {}  # client -> the head that its last answer had
        self._who: dict[int, str] = {}  # node -> the client whose key it holds
        self._sent: dict[str, PendingMessage] = {}

    def nodes(self) -> Collection[int]:
        there = self.transport.nodes()
        self._who = {node: client for node, client in self._who.items() if node in there}
        return there

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        number = secrets.token_hex(16)
        until = time.time() + within
        head: Head = {**envelope.head, NUMBER: number, TO: self._who.get(node, ""), UNTIL: until}
        sent = self.transport.push(
            node, sign_envelope(Envelope(head, envelope.body), self.keys.own, "server"), within
        )
        self._sent[sent] = PendingMessage(node, str(envelope.head.get("ask")), number, until)
        return sent

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """As any transport; an answer to what was not asked, or not any more, never comes out."""
        came = self.transport.pull(numbers, wait)
        self._drop_expired()
        return {
            number: None if answer is None else self._receive_answer(number, answer)
            for number, answer in came.items()
        }

    def close(self) -> None:
        self.transport.close()

    def _receive_answer(self, number: str, answer: Envelope) -> Envelope:
        if isinstance(answer, UnreadableAnswer):
            return answer
        try:
            return self._check_answer(self._sent.pop(number, None), answer)
        except RequestRefusedError as error:
            client = one_line(answer.head.get(FROM, ""), 80)
            self.say(f"refused an answer in the name of '{client}': {error}")
            return Envelope({"ask": "refused", "client": client, "why": str(error)})

    def _check_answer(self, sent: PendingMessage | None, answer: Envelope) -> Envelope:
        client = head_value(answer.head, FROM, str)
        if client not in self.keys.clients:
            raise RequestRefusedError(f"unknown: no key is known of '{client[:80]}'")
        check_signature(answer, self.keys.clients[client], "node", f"'{client}'")
        if sent is None or answer.head.get(ANSWERS) != sent.number:
            raise RequestRefusedError(
                "replayed: it answers another message than the one that is open"
            )
        if time.time() > sent.until:
            raise RequestRefusedError(f"expired {time.time() - sent.until:.0f} s before it came")
        known = self._who.get(sent.node)
        if known is None and sent.request == "hello":
            self._who[sent.node] = known = client
        if known != client:
            raise RequestRefusedError(f"its node is known as '{known or 'nobody'}'")
        self._note_log(client, str(answer.head.get(LOG, "")))
        return Envelope(
            {n: v for n, v in answer.head.items() if n not in (SIGNATURE, ANSWERS, LOG)},
            answer.body,
        )

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
            self.say(
                f"the audit log of '{client}' has {_lines(head)} lines; it had {_lines(last)} (kept: {kept})"
            )
        elif any(_lines(head) == _lines(before) and head != before for before in (last, kept)):
            self.say(
                f"line {_lines(head)} of the audit log of '{client}' was replaced: found {head} (kept: {kept})"
            )
        if _lines(head) > _lines(kept):
            self.logs[client] = head

    def _drop_expired(self) -> None:
        """Messages to which no answer would be taken any more."""
        if len(self._sent) > 4 * max(16, len(self._who)):
            now = time.time()
            self._sent = {n: sent for n, sent in self._sent.items() if sent.until >= now}


def _lines(head: str) -> int:
    """Return the number of lines of an audit log, from its head."""
    return int(head.partition(":")[0])
