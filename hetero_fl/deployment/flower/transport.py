"""The server's end of the transport."""

from __future__ import annotations

import io
import itertools
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from hetero_fl.deployment.certificates import PublicKey, public_bytes
from hetero_fl.deployment.envelope import MESSAGE_BYTES, Envelope
from hetero_fl.deployment.flower.connection import (
    SERVER,
    MessageTooLongError,
    PollBackoff,
    RunOverError,
    UnknownCallerError,
    UnreachableError,
    announce,
    fetch,
    message_to_node,
    send_parts,
    translate_call_errors,
)
from hetero_fl.deployment.flower.records import from_message
from hetero_fl.deployment.flower.superlink import SuperLink
from hetero_fl.deployment.messages import UnreadableAnswer
from hetero_fl.utils.errors import RunFailedError, UserError

# A run of Flower's that this process is the app of: nodes admitted, the run begun, its right to
# send messages held.

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
BEAT = 10.0  # seconds between signs of life; Flower ends a run that gives none for a minute

# Flower wants an app to a run. Nobody ever installs or starts this one.
APP = """\
[project]
name = "hetero-fl"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "hetero-fl"

[tool.flwr.app.components]
serverapp = "none:app"
clientapp = "none:app"
"""


class FlowerRun:
    """From its making on until `close`, messages can be sent through `client` in the name of `number`."""

    def __init__(self, superlink: SuperLink, keys: Iterable[tuple[str, bytes]]) -> None:
        url = f"{'http' if superlink.files is None else 'https'}://{superlink.address}"
        verify = superlink.verification()
        with (
            translate_call_errors(superlink.address),
            ControlHttpClient(url, verify=verify) as control,
        ):
            for name, key in keys:
                _register_node(control, name, key)
            fab = Fab(content=_pack_app())
            self.number: int = control.StartRun(StartRunRequest(fab=fab)).run_id
        guard = SuperExecAuthHttpInterceptor(
            master_secret=superlink.secret, protected_methods=[ACQUIRE]
        )
        with (
            translate_call_errors(superlink.address),
            RuntimeHttpClient(url, verify=verify, interceptors=[guard]) as executor,
        ):
            got = executor.AcquireTask(
                AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            )
        if not got.token or got.task.run_id != self.number:
            raise RunFailedError("Flower's SuperLink has not given out the run that was begun")
        self.client = RuntimeHttpClient(
            url, verify=verify, interceptors=[RuntimeTokenHttpInterceptor(got.token)]
        )
        with translate_call_errors(superlink.address):
            self.client.PullTaskInput(PullTaskInputRequest())  # which says that it has begun
        self._ended = threading.Event()
        self._beats = threading.Thread(
            target=self._send_heartbeats, args=(superlink.address,), daemon=True
        )
        self._beats.start()

    def close(self) -> None:
        """Say that it is over, if anybody still listens."""
        self._ended.set()
        self._beats.join()
        with suppress(httpx.HTTPError):
            self.client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
        self.client.close()

    def _send_heartbeats(self, address: str) -> None:
        while not self._ended.wait(BEAT):
            with (
                suppress(UnreachableError, UnknownCallerError, RunOverError, RunFailedError),
                translate_call_errors(address),
            ):
                self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def _register_node(control: ControlHttpClient, name: str, key: bytes) -> None:
    try:
        control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 409:  # it is admitted already
            raise


def _pack_app() -> bytes:
    """The app as Flower packs one: a zip of files and a list of their hashes; the list is not asked for here."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("pyproject.toml", APP)
    return packed.getvalue()


# The server's end: messages through a SuperLink of our own, to nodes that are known by their keys.

POLL_SECONDS = 1.0  # seconds between looks at who is there, while answers are waited for
LINGER = 3.0  # seconds at the end in which nodes may take and answer the last messages
TRIES = 5
REST = 0.5  # of a call that nobody answers; seconds between them

T = TypeVar("T")


@dataclass(frozen=True)
class _PendingMessage:
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

    def __init__(
        self, superlink: SuperLink, keys: Mapping[str, PublicKey], most: int = MESSAGE_BYTES
    ) -> None:
        self._superlink = superlink
        self._most = most
        self._names = {public_bytes(key): name for name, key in keys.items()}
        self._connected_nodes: dict[int, tuple[str, str]] = {}  # number -> name, since when
        self._sent: dict[str, _PendingMessage] = {}
        # messages of which it has been said that no answer will come
        self._forgotten: set[str] = set()
        self._backoff = PollBackoff()
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
        self._connected_nodes = {
            node.node_id: (self._names[node.public_key], node.last_activated_at)
            for node in found
            if node.public_key in self._names
        }
        return {number: name for number, (name, _) in self._connected_nodes.items()}

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Hand over a message, which is of no use after so many seconds. Returns its number."""
        if node not in self._connected_nodes:
            self.names()
        if node not in self._connected_nodes or self._closed:
            return f"never-{next(self._never)}"

        def send(run: FlowerRun) -> str:
            message = message_to_node(envelope, run.number, node, within)
            proto, tree = announce(message)
            got = run.client.PushMessages(
                PushAppMessagesRequest(messages_list=[proto], message_object_trees=[tree])
            )
            if not got.message_ids or not got.message_ids[0]:
                return f"never-{next(self._never)}"  # it has gone in this moment
            send_parts(run.client, SERVER, message, got.session_id, got.objects_to_push)
            return str(got.message_ids[0])

        try:
            number = self._call(send)
        except ObjectPushError:
            return f"never-{next(self._never)}"
        if not number.startswith("never-"):
            since = self._connected_nodes[node][1] if node in self._connected_nodes else ""
            self._sent[number] = _PendingMessage(node, since, time.monotonic() + within)
            self._backoff.reset()
        return number

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Answers that have come, waiting up to so many seconds for the first; None where none will ever come."""
        end = time.monotonic() + wait
        look = time.monotonic() + POLL_SECONDS
        while True:
            answers: dict[str, Envelope | None] = {n: None for n in numbers if n not in self._sent}
            if asked := [n for n in numbers if n in self._sent]:
                answers |= self._answers(asked)
            if not answers and time.monotonic() >= look:
                answers = self._lost_messages(asked)
                look = time.monotonic() + POLL_SECONDS
            for number in answers:
                self._sent.pop(number, None)
            if answers:
                self._backoff.reset()
            left = end - time.monotonic()
            if answers or left <= 0 or not numbers:
                return answers
            time.sleep(min(self._backoff.next_delay(), left))

    def close(self) -> None:
        """End the run and the SuperLink, when the last messages have been taken. Nodes go on looking for a server."""
        if self._closed:
            return
        try:
            end = time.monotonic() + LINGER
            while self._sent and time.monotonic() < end:
                self.pull(list(self._sent), end - time.monotonic())
            self._run.close()
        except (RunFailedError, UserError):
            pass  # it is over in any case
        finally:
            self._closed = True
            self._connected_nodes.clear()
            self._sent.clear()
            self._superlink.close()

    def _answers(self, requested: list[str]) -> dict[str, Envelope | None]:
        """Of those that are asked for. Others that nobody asks for any more are had and thrown away: the SuperLink keeps them."""
        now = time.monotonic()
        late = {n for n, sent in self._sent.items() if n not in requested and sent.until < now}
        every = [*requested, *late, *self._forgotten]
        got = self._call(
            lambda run: run.client.PullMessages(PullAppMessagesRequest(message_ids=every))
        )
        answers: dict[str, Envelope | None] = {}
        for proto, tree in zip(got.messages_list, got.message_object_trees, strict=True):
            number = proto.metadata.reply_to_message_id
            if number in requested and not proto.HasField("error"):
                answers[number] = self._fetch_answer(tree)
                continue
            self._discard(proto.metadata.message_id)
            self._discard(number)  # what it was an answer to, if nobody ever came for that
            if number in requested:
                answers[number] = None
            else:
                self._forgotten.discard(number)
                self._sent.pop(number, None)
        return answers

    def _fetch_answer(self, tree: ObjectTree) -> Envelope | None:
        try:
            return self._call(
                lambda run: from_message(fetch(run.client, SERVER, run.number, tree, self._most))
            )
        except MessageTooLongError as error:
            return UnreadableAnswer.with_reason(str(error))
        except ObjectPullError:  # the node went away while it was sending
            return None

    def _discard(self, number: str) -> None:
        """Parts of a message that the SuperLink would keep for as long as the run lasts."""

        def confirm(run: FlowerRun) -> None:
            run.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=SERVER, run_id=run.number, message_object_id=number
                )
            )

        with suppress(RunFailedError):
            self._call(confirm)

    def _lost_messages(self, requested: list[str]) -> dict[str, Envelope | None]:
        """Messages to nodes that went away since, come back or not: what they had been given died with them."""
        self.names()
        answers: dict[str, Envelope | None] = {}
        for number in requested:
            sent = self._sent.get(number)
            if (
                sent is None
                or sent.node not in self._connected_nodes
                or self._connected_nodes[sent.node][1] != sent.since
            ):
                answers[number] = None
                self._forgotten.add(number)
        return answers

    def _call(self, what: Callable[[FlowerRun], T]) -> T:
        """Do it; if the SuperLink has forgotten us or died, begin anew and do it once more."""
        for attempt in range(TRIES):
            try:
                with translate_call_errors(self._superlink.address):
                    return what(self._run)
            except (UnknownCallerError, RunOverError):
                self._reconnect()
            except UnreachableError as error:
                if self._superlink.restart_if_dead():
                    self._reconnect()
                elif attempt + 1 == TRIES:
                    raise RunFailedError(f"Flower's SuperLink does not answer ({error})") from None
                else:
                    time.sleep(REST)
        raise RunFailedError("Flower's SuperLink refuses the run again and again")

    def _reconnect(self) -> None:
        self._run.close()
        for kept in (self._sent, self._connected_nodes, self._forgotten):
            kept.clear()
        self._run = self._begin()

    def _begin(self) -> FlowerRun:
        return FlowerRun(self._superlink, ((name, key) for key, name in self._names.items()))
