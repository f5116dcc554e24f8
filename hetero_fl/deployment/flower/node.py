"""A node's end: this process is a SuperNode that answers messages itself, one after the other."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from hetero_fl.deployment.certificates import public_bytes
from hetero_fl.deployment.envelope import MESSAGE_BYTES, Envelope, Handle
from hetero_fl.deployment.flower.connection import (
    MessageTooLongError,
    PollBackoff,
    RunOverError,
    UnknownCallerError,
    UnreachableError,
    announce,
    answer_message,
    fetch,
    send_parts,
    translate_call_errors,
)
from hetero_fl.deployment.flower.records import from_message
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import write_atomically

log = logging.getLogger(__name__)

BEAT = (
    # seconds between signs of life; a node counts as gone after twice the least interval that
    # Flower allows (10 s)
    4.0
)
RETRY_DELAYS = 0.5, 5.0  # seconds, first and longest, until a server that is away is tried again


def serve(
    handle: Handle,
    address: str,
    key: EllipticCurvePrivateKey,
    authority: Path | None = None,
    memory: Path | None = None,
    patience: float = 60.0,
    stop: threading.Event | None = None,
    most: int = MESSAGE_BYTES,
) -> None:
    """Answer every message that comes for the holder of `key`, until `stop` is set.

    A server that is away is waited for without end: it may be started later, or anew. One that does not know the key is asked
    again for `patience` seconds. What `handle` raises is logged, and told to the server as a failure of this node.

    Args:
        address: The server's, `host:port`.
        authority: A file with the certificate of who vouches for the server; without it nothing is encrypted.
        memory: A file for the number that Flower gave this node. With it a node that was killed comes back at once; without, only
            when the server has noticed that it was gone (20 s).
        most: Bytes of a message, at most; a longer one is not read.

    Raises:
        UserError: the server is not who it should be, or does not know the key.
    """
    stop = stop or threading.Event()
    with _FlowerNode(address, key, authority, memory, most) as member:
        refused = None
        rest = RETRY_DELAYS[0]
        said = ""
        while not stop.is_set():
            try:
                member.join()
                refused = None
                rest = RETRY_DELAYS[0]
                said = ""
                member.work(handle, stop)
            except UnknownCallerError as error:
                refused = refused or time.monotonic()
                if time.monotonic() - refused > patience:
                    raise UserError(
                        f"{address}: the server does not admit this node ({error}): "
                        "its key is not among those that the server was given, or the two clocks differ by more than 5 s"
                    ) from None
                stop.wait(RETRY_DELAYS[0])
            except (UnreachableError, RunOverError) as error:
                if str(error) != said:
                    log.warning("waiting for the server; %s", error)
                said = str(error)
                stop.wait(rest)
                rest = min(rest * 2, RETRY_DELAYS[1])


class _FlowerNode:
    """This node as Flower knows it."""

    def __init__(
        self,
        address: str,
        key: EllipticCurvePrivateKey,
        authority: Path | None,
        memory: Path | None,
        most: int,
    ) -> None:
        self._address = address
        self._memory = memory
        self._most = most
        self._public = public_bytes(key.public_key())
        context = ssl.create_default_context(cafile=authority) if authority else False
        self._client = FleetHttpClient(
            f"{'https' if authority else 'http'}://{address}",
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
            verify=context,
        )
        self._node: Node | None = None
        self._joining = threading.Lock()
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._send_heartbeats, daemon=True)

    def __enter__(self) -> _FlowerNode:
        self._beats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beats.join()
        if self._node is not None:
            with (
                suppress(
                    UnreachableError, UnknownCallerError, RunOverError, RunFailedError, UserError
                ),
                translate_call_errors(self._address),
            ):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def join(self) -> None:
        """Register at the server, or again if it has forgotten this node.

        Raises:
            RequestRefusedError: If the server does not know the key.
        """
        with self._joining, translate_call_errors(self._address):
            if self._node is not None:
                with suppress(UnknownCallerError), translate_call_errors(self._address):
                    self._alive(self._node)
                    return
                self._node = None
            elif (
                number := self._node_info()
            ) is not None:  # of a process that was killed: the server shall notice
                with suppress(UnknownCallerError), translate_call_errors(self._address):
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=number))
            got = self._client.ActivateNode(
                ActivateNodeRequest(
                    public_key=self._public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL
                )
            )
            self._node = Node(node_id=got.node_id)
        if self._memory is not None:
            write_atomically(self._memory, str(got.node_id).encode())
        log.info("joined %s as node %d", self._address, got.node_id)

    def work(self, handle: Handle, stop: threading.Event) -> None:
        """Answer messages until `stop` is set or something is wrong."""
        pace = PollBackoff()
        while not stop.is_set() and (node := self._node) is not None:
            with translate_call_errors(self._address):
                got = self._client.PullMessages(PullMessagesRequest(node=node))
            if not got.messages_list:
                stop.wait(pace.next_delay())
                continue
            pace.reset()
            began = time.monotonic()
            try:
                with translate_call_errors(self._address):
                    run = got.messages_list[0].metadata.run_id
                    tree = got.message_object_trees[0]
                    message = fetch(self._client, node, run, tree, self._most)
            except MessageTooLongError as error:
                log.warning("a message was not read (message_bytes): %s", error)
                continue
            except ObjectPullError:
                log.warning("a message was announced that never came whole")
                continue
            answer = _handle_safely(handle, from_message(message))
            took = time.monotonic() - began
            self._send(
                node,
                answer_message(message, answer, took),
                took,
                began + message.metadata.ttl,
                stop,
            )

    def _send(
        self, node: Node, answer: Message, took: float, until: float, stop: threading.Event
    ) -> None:
        """Keep at it while somebody may be waiting: an answer can be the work of hours."""
        proto, tree = announce(answer)
        request = PushMessagesRequest(
            node=node,
            messages_list=[proto],
            message_object_trees=[tree],
            clientapp_runtime_list=[took],
        )
        while True:
            try:
                with translate_call_errors(self._address):
                    got = self._client.PushMessages(request)
                    send_parts(self._client, node, answer, got.session_id, got.objects_to_push)
                return
            except UnreachableError:
                if time.monotonic() > until or stop.wait(RETRY_DELAYS[0]):
                    raise
            except (RunOverError, ObjectPushError):
                log.info("nobody waits for an answer any more")
                return

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(BEAT):
            # the first time is the main thread's, which tells what is wrong
            if self._node is not None:
                with suppress(
                    UnreachableError, UnknownCallerError, RunOverError, RunFailedError, UserError
                ):
                    self.join()

    def _alive(self, node: Node) -> None:
        self._client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        )

    def _node_info(self) -> int | None:
        try:
            return int(self._memory.read_text()) if self._memory else None
        except (OSError, ValueError):
            return None


def _handle_safely(handle: Handle, envelope: Envelope | None) -> Envelope | None:
    if envelope is None:
        log.warning("a message came that is none of hetero_fl's")
        return None
    try:
        return handle(envelope)
    except Exception:
        log.exception("a message could not be answered")
        return None
