"""The server's end: messages through a SuperLink of our own, to nodes that are known by their keys."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError

from hetero_fl.errors import RunFailed, UserError
from hetero_fl.experiment.deployment.certificates import PublicKey, public_bytes
from hetero_fl.experiment.deployment.flower.calls import Over, Refused, Unreachable, calling
from hetero_fl.experiment.deployment.flower.messages import (
    SERVER,
    TooLong,
    announced,
    envelope_of,
    fetch,
    send_parts,
    to_node,
)  # fmt: skip
from hetero_fl.experiment.deployment.flower.pace import Pace
from hetero_fl.experiment.deployment.flower.run import Run
from hetero_fl.experiment.deployment.flower.superlink import Superlink
from hetero_fl.experiment.deployment.transport import MESSAGE_BYTES, Envelope, Unread

LOOK = 1.0  # seconds between looks at who is there, while answers are waited for
LINGER = 3.0  # seconds at the end in which nodes may take and answer the last messages
TRIES, REST = 5, 0.5  # of a call that nobody answers; seconds between them

T = TypeVar("T")


@dataclass(frozen=True)
class _Sent:
    """A message under way: to whom, and since when that node has been there."""

    node: int
    since: str
    until: float  # by the monotonic clock: of no use after


class FlowerTransport:
    """Takes a SuperLink over, and closes it. `keys`: the public key of every node that may take part, by its name; `most`: bytes
    of an answer, at most.

    A node is who holds the key, under whatever number Flower gives it; others that connect are not seen. If the SuperLink dies
    it is started anew: nodes come back by themselves, and of all messages under way it is said that no answer will come.
    """

    def __init__(self, superlink: Superlink, keys: Mapping[str, PublicKey], most: int = MESSAGE_BYTES) -> None:
        self._superlink, self._most = superlink, most
        self._names = {public_bytes(key): name for name, key in keys.items()}
        self._here: dict[int, tuple[str, str]] = {}  # number -> name, since when
        self._sent: dict[str, _Sent] = {}
        self._forgotten: set[str] = set()  # messages of which it has been said that no answer will come
        self._pace = Pace()
        self._closed = False
        self._never = itertools.count(1)
        try:
            self._run = self._begin()
        except BaseException:
            superlink.close()
            raise

    def nodes(self) -> Collection[int]:
        """The nodes that are connected now."""
        return list(self.names())

    def names(self) -> Mapping[int, str]:
        """The same, with the name whose key each holds."""
        if self._closed:
            return {}
        found = self._call(lambda run: run.client.GetNodes(GetNodesRequest())).nodes
        self._here = {
            node.node_id: (self._names[node.public_key], node.last_activated_at)
            for node in found
            if node.public_key in self._names
        }
        return {number: name for number, (name, _) in self._here.items()}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Hand over a message, which is of no use after so many seconds. Returns its number."""
        if node not in self._here:
            self.names()
        if node not in self._here or self._closed:
            return f"never-{next(self._never)}"

        def send(run: Run) -> str:
            message = to_node(envelope, run.number, node, within)
            proto, tree = announced(message)
            got = run.client.PushMessages(PushAppMessagesRequest(messages_list=[proto], message_object_trees=[tree]))
            if not got.message_ids or not got.message_ids[0]:
                return f"never-{next(self._never)}"  # it has gone in this moment
            send_parts(run.client, SERVER, message, got.session_id, got.objects_to_push)
            return str(got.message_ids[0])

        try:
            number = self._call(send)
        except ObjectPushError:
            return f"never-{next(self._never)}"
        if not number.startswith("never-"):
            since = self._here[node][1] if node in self._here else ""
            self._sent[number] = _Sent(node, since, time.monotonic() + within)
            self._pace.reset()
        return number

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Answers that have come, waiting up to so many seconds for the first; None where none will ever come."""
        end, look = time.monotonic() + wait, time.monotonic() + LOOK
        while True:
            answers: dict[str, Envelope | None] = {n: None for n in numbers if n not in self._sent}
            if asked := [n for n in numbers if n in self._sent]:
                answers |= self._answers(asked)
            if not answers and time.monotonic() >= look:
                answers, look = self._gone(asked), time.monotonic() + LOOK
            for number in answers:
                self._sent.pop(number, None)
            if answers:
                self._pace.reset()
            left = end - time.monotonic()
            if answers or left <= 0 or not numbers:
                return answers
            time.sleep(min(self._pace.next(), left))

    def close(self) -> None:
        """End the run and the SuperLink, when the last messages have been taken. Nodes go on looking for a server."""
        if self._closed:
            return
        try:
            end = time.monotonic() + LINGER
            while self._sent and time.monotonic() < end:
                self.pull(list(self._sent), end - time.monotonic())
            self._run.close()
        except (RunFailed, UserError):
            pass  # it is over in any case
        finally:
            self._closed = True
            self._here.clear()
            self._sent.clear()
            self._superlink.close()

    def _answers(self, asked: list[str]) -> dict[str, Envelope | None]:
        """Of those that are asked for. Others that nobody asks for any more are had and thrown away: the SuperLink keeps them."""
        now = time.monotonic()
        late = {n for n, sent in self._sent.items() if n not in asked and sent.until < now}
        every = [*asked, *late, *self._forgotten]
        got = self._call(lambda run: run.client.PullMessages(PullAppMessagesRequest(message_ids=every)))
        answers: dict[str, Envelope | None] = {}
        for proto, tree in zip(got.messages_list, got.message_object_trees, strict=True):
            number = proto.metadata.reply_to_message_id
            if number in asked and not proto.HasField("error"):
                answers[number] = self._fetched(tree)
                continue
            self._throw_away(proto.metadata.message_id)
            self._throw_away(number)  # what it was an answer to, if nobody ever came for that
            if number in asked:
                answers[number] = None
            else:
                self._forgotten.discard(number)
                self._sent.pop(number, None)
        return answers

    def _fetched(self, tree: ObjectTree) -> Envelope | None:
        try:
            return self._call(lambda run: envelope_of(fetch(run.client, SERVER, run.number, tree, self._most)))
        except TooLong as error:
            return Unread.because(str(error))
        except ObjectPullError:  # the node went away while it was sending
            return None

    def _throw_away(self, number: str) -> None:
        """Parts of a message that the SuperLink would keep for as long as the run lasts."""

        def confirm(run: Run) -> None:
            run.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=SERVER, run_id=run.number, message_object_id=number)
            )

        with suppress(RunFailed):
            self._call(confirm)

    def _gone(self, asked: list[str]) -> dict[str, Envelope | None]:
        """Messages to nodes that went away since, come back or not: what they had been given died with them."""
        self.names()
        answers: dict[str, Envelope | None] = {}
        for number in asked:
            sent = self._sent.get(number)
            if sent is None or sent.node not in self._here or self._here[sent.node][1] != sent.since:
                answers[number] = None
                self._forgotten.add(number)
        return answers

    def _call(self, what: Callable[[Run], T]) -> T:
        """Do it; if the SuperLink has forgotten us or died, begin anew and do it once more."""
        for attempt in range(TRIES):
            try:
                with calling(self._superlink.address):
                    return what(self._run)
            except (Refused, Over):
                self._anew()
            except Unreachable as error:
                if self._superlink.revive():
                    self._anew()
                elif attempt + 1 == TRIES:
                    raise RunFailed(f"Flower's SuperLink does not answer ({error})") from None
                else:
                    time.sleep(REST)
        raise RunFailed("Flower's SuperLink refuses the run again and again")

    def _anew(self) -> None:
        self._run.close()
        for kept in (self._sent, self._here, self._forgotten):
            kept.clear()
        self._run = self._begin()

    def _begin(self) -> Run:
        return Run(self._superlink, ((name, key) for key, name in self._names.items()))
