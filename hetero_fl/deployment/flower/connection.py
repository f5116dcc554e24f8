"""Calls to the SuperLink, paced, and envelopes as Flower messages."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import httpx
from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
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
from flwr.proto.message_pb2 import (
    Message as Proto,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
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

from hetero_fl.deployment.envelope import MESSAGE_BYTES, Envelope
from hetero_fl.deployment.flower.records import to_content
from hetero_fl.utils.errors import RunFailedError, UserError

# How often to ask whether something has come: often at first, seldom when nothing has come for
# long.

SHORTEST = 0.02
LONGEST = 0.5  # seconds
# a factor from one question to the next: the longest pause after 24, three seconds in all
SLOWER = 1.15


class PollBackoff:
    """Pauses that grow by a factor until something comes."""

    def __init__(self) -> None:
        self._pause = SHORTEST

    def next_delay(self) -> float:
        """Seconds until the next question."""
        pause = self._pause
        self._pause = min(self._pause * SLOWER, LONGEST)
        return pause

    def reset(self) -> None:
        """Something has come: more may follow soon."""
        self._pause = SHORTEST


# Calls to the SuperLink: what goes wrong, told apart by what is to be done about it.


class UnreachableError(Exception):
    """Nobody answers, for the moment perhaps."""


class UnknownCallerError(Exception):
    """The SuperLink does not know this caller, or no longer."""


class RunOverError(Exception):
    """The run that a message belongs to is no longer."""


@contextmanager
def translate_call_errors(address: str) -> Iterator[None]:
    """Raises UnreachableError, UnknownCallerError or RunOverError; UserError if the other end is not who it should be; RunFailedError for the rest."""
    try:
        yield
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate verify failed" in str(error):
            raise UserError(
                f"{address}: the server's certificate is refused ({_reason(error)})"
            ) from None
        if "WRONG_VERSION_NUMBER" in str(error) or "wrong version number" in str(error):
            raise UserError(
                f"{address}: the server does not speak TLS; it was started without certificates"
            ) from None
        raise UnreachableError(f"{address}: {error or type(error).__name__}") from None
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        told = _server_message(error.response)
        if status in (401, 412):
            raise UnknownCallerError(told) from None
        if status == 403:
            raise RunOverError(told) from None
        if status >= 500:
            raise UnreachableError(f"{address}: {told}") from None
        raise RunFailedError(f"{address}: Flower's SuperLink answered {status} ({told})") from None


def _server_message(response: httpx.Response) -> str:
    error = FlowerError.from_json(response.text)
    return " ".join((error.message if error else response.text or response.reason_phrase).split())


def _reason(error: Exception) -> str:
    """`self-signed certificate` out of OpenSSL's `[SSL: …] certificate verify failed: self-signed certificate (_ssl.c:1000)`."""
    return str(error).split("verify failed: ")[-1].rsplit(" (_ssl", 1)[0]


# An envelope as a message of Flower's, and back; whole messages through the clients of its Fleet
# and Runtime APIs.

SERVER = Node(node_id=SUPERLINK_NODE_ID)
KIND = "query"  # Flower wants one of its own
PARTS_TIMEOUT = 60.0  # seconds within which the parts of a message that is announced must have come
MOST_PARTS = 64  # of a message, beside one for every PART_BYTES of its body
PART_BYTES = 2**20  # of a part that is not a piece of a body, at most


class MessageTooLongError(ObjectPullError):
    """A message that is longer than what is read."""


class MessageClient(Protocol):
    """What the Fleet and the Runtime client have alike."""

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse: ...

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse: ...

    def ConfirmMessageReceived(
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse: ...


def message_to_node(envelope: Envelope, run: int, node: int, within: float) -> Message:
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
        content=to_content(envelope),
    )


def answer_message(message: Message, answer: Envelope | None, after: float) -> Message:
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
            else {"content": to_content(answer)}
        ),
    )


def announce(message: Message) -> tuple[Proto, ObjectTree]:
    """What is sent first: the message without its content, and the list of its parts. Gives the message its number."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        return message_to_proto(remove_content_from_message(message)), get_object_tree(message)


def send_parts(
    client: MessageClient, node: Node, message: Message, session: str, wanted: Collection[str]
) -> None:
    """Send those parts of an announced message that the SuperLink asked for."""
    with no_object_id_recompute():
        push_objects(
            get_all_nested_objects(message),
            make_push_object_fn_protobuf(client.PushObject, node, message.metadata.run_id, session),
            object_ids_to_push=set(wanted),
        )


def fetch(
    client: MessageClient, node: Node, run: int, tree: ObjectTree, most: int = MESSAGE_BYTES
) -> Message:
    """Fetch a whole message.

    Args:
        client: The client of the API that has it.
        node: Who fetches it.
        run: Flower's number of the run.
        tree: The list of its parts, as it was announced.
        most: Bytes of its body, at most.

    Raises:
        TooLong: It is longer, which is noticed before all of it is in memory.
        ObjectPullError: A part of it never comes, or the parts make no message.
    """
    confirm = make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run)
    try:
        parts = pull_objects(
            _part_numbers(tree, most),
            _limit_pull(make_pull_object_fn_protobuf(client.PullObject, node, run), most),
            max_time=PARTS_TIMEOUT,
            max_tries_per_object=None,
            # Flower's is a second: a message is announced a moment before its parts are there
            initial_backoff=0.02,
            backoff_cap=1.0,
        )
    except MessageTooLongError:
        confirm(tree.object_id)  # else it would be kept for as long as the run lasts
        raise
    confirm(tree.object_id)
    try:
        _check_parts(parts, most)
        message = inflate_object_from_contents(tree.object_id, parts)
    except MessageTooLongError:
        raise
    except Exception as error:  # whatever somebody has sent
        raise ObjectPullError(tree.object_id, f"it is no message: {error}") from None
    if not isinstance(message, Message):
        raise ObjectPullError(tree.object_id, "it is no message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _part_numbers(tree: ObjectTree, most: int) -> list[str]:
    """Numbers of a message's parts. Raises TooLong if there are more than a message of so many bytes has."""
    numbers = [part.object_id for part in iterate_object_tree(tree)]
    if len(numbers) > MOST_PARTS + most // PART_BYTES:
        raise MessageTooLongError(tree.object_id, f"it has {len(numbers)} parts")
    return numbers


def _limit_pull(pull: Callable[[str], bytes], most: int) -> Callable[[str], bytes]:
    """The same function, which raises TooLong once parts of more than so many bytes have come."""
    counting = threading.Lock()
    left = most + PART_BYTES

    def pull_bounded(number: str) -> bytes:
        nonlocal left
        content = pull(number)
        with counting:
            left -= len(content)
            if left < 0:
                raise MessageTooLongError(number, f"a message of more than {most:,} bytes")
        return content

    return pull_bounded


def _check_parts(parts: dict[str, bytes], most: int) -> None:
    """Raise TooLong if the message would be longer than `most` bytes once its arrays are assembled.

    A few bytes can become many: arrays may name the same chunk, each of them any number of times.
    """
    size = 0
    for number, content in parts.items():
        kind, pieces, _ = get_object_head_values_from_object_content(content)
        if kind == ArrayChunk.__qualname__:
            continue
        if len(content) > PART_BYTES:
            raise MessageTooLongError(
                number, f"a part of {len(content):,} bytes; at most {PART_BYTES:,} are read"
            )
        if kind == Array.__qualname__:
            order = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            size += sum(len(parts[pieces[place]]) for place in order)
            if size > most + PART_BYTES:
                raise MessageTooLongError(number, f"a message of more than {most:,} bytes")
