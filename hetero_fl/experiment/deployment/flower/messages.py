"""An envelope as a message of Flower's, and back; whole messages through the clients of its Fleet and Runtime APIs."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as Proto
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)

from hetero_fl.experiment.deployment.transport import Envelope, Head

SERVER = Node(node_id=SUPERLINK_NODE_ID)
KIND = "query"  # Flower wants one of its own
HEAD, BODY = "head", "body"
COMING = 60.0  # seconds within which the parts of a message that is announced must have come


class Client(Protocol):
    """What the Fleet and the Runtime client have alike."""

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse: ...

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse: ...

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> ConfirmMessageReceivedResponse: ...


def to_node(envelope: Envelope, run: int, node: int, within: float) -> Message:
    """A message to a node, of no use after so many seconds."""
    return make_message(
        metadata=Metadata(
            run_id=run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=within,
            message_type=KIND,
        ),
        content=_content(envelope),
    )


def answer_to(message: Message, answer: Envelope | None, after: float) -> Message:
    """A node's answer so many seconds after the message came; None says that the node failed.

    It is dated by the server's clock and the seconds that passed, so that the two clocks need not agree.
    """
    asked = message.metadata
    return make_message(
        metadata=Metadata(
            run_id=asked.run_id,
            message_id="",
            src_node_id=asked.dst_node_id,
            dst_node_id=asked.src_node_id,
            reply_to_message_id=asked.message_id,
            group_id=asked.group_id,
            created_at=asked.created_at + after,
            ttl=max(asked.ttl - after, 0.001),
            message_type=asked.message_type,
        ),
        **(
            {"error": Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the node failed")}
            if answer is None
            else {"content": _content(answer)}
        ),
    )


def _content(envelope: Envelope) -> RecordDict:
    body = envelope.body
    array = Array(dtype="uint8", shape=(len(body),), stype="bytes", data=body)
    return RecordDict({HEAD: ConfigRecord(dict(envelope.head)), BODY: ArrayRecord({BODY: array} if body else {})})


def envelope_of(message: Message) -> Envelope | None:
    """What a message holds; None if it says that something failed, or was not made by `to_node` or `answer_to`."""
    if not message.has_content():
        return None
    head, body = message.content.config_records.get(HEAD), message.content.array_records.get(BODY)
    if head is None or body is None:
        return None
    plain: Head = {name: value for name, value in head.items() if not isinstance(value, list)}
    return Envelope(plain, body[BODY].data if BODY in body else b"") if len(plain) == len(head) else None


def announced(message: Message) -> tuple[Proto, ObjectTree]:
    """What is sent first: the message without its content, and the list of its parts. Gives the message its number."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        return message_to_proto(remove_content_from_message(message)), get_object_tree(message)


def send_parts(client: Client, node: Node, message: Message, session: str, wanted: Collection[str]) -> None:
    """Send those parts of an announced message that the SuperLink asked for."""
    with no_object_id_recompute():
        push_objects(
            get_all_nested_objects(message),
            make_push_object_fn_protobuf(client.PushObject, node, message.metadata.run_id, session),
            object_ids_to_push=set(wanted),
        )


def fetch(client: Client, node: Node, run: int, tree: ObjectTree) -> Message:
    """A whole message. Raises ObjectPullError if a part of it never comes, or they make no message."""
    parts = pull_objects(
        [part.object_id for part in iterate_object_tree(tree)],
        make_pull_object_fn_protobuf(client.PullObject, node, run),
        max_time=COMING,
        max_tries_per_object=None,
        initial_backoff=0.02,  # Flower's is a second: a message is announced a moment before its parts are there
        backoff_cap=1.0,
    )
    make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run)(tree.object_id)
    try:
        message = inflate_object_from_contents(tree.object_id, parts)
    except Exception as error:  # whatever somebody has sent
        raise ObjectPullError(tree.object_id, f"it is no message: {error}") from None
    if not isinstance(message, Message):
        raise ObjectPullError(tree.object_id, "it is no message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message
