"""The protocol of server and nodes: requests, answers and the trees in their bodies.

The server sends a node `hello` (which client is it?), `terms` (the configuration), `roster` (the
reports of all clients), `keep` (a private state to start from), `do` for each task, and `leave`.
The node answers `here`, `told` (its data report), `ready`, `kept`, `done` and `left`; or `lacks`
(public sets are missing), `unready` (it was restarted), `lost` (a private state), `failed`
(training diverged) or `refused`. Bodies are plain trees in bytes, never pickle.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch

from hetero_fl.data.client_rows import RemoteDataInfo
from hetero_fl.deployment.transport import Envelope, Head
from hetero_fl.federation.client_runtime import ClientEvaluation
from hetero_fl.utils.errors import one_line
from hetero_fl.utils.serialization import CodecError, as_tensor, decode, encode
from hetero_fl.utils.version import __version__

# Version of the messages; server and nodes must have the same.
PROTOCOL = 1
FORM = f"deployment {PROTOCOL}"
# Entry of an answer's head: the head of the site's audit log, this answer's line included.
LOG = "log"


# Exceptions raised while parsing a malformed message.
JUNK = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class RequestRefusedError(Exception):
    """Raised for a message that is malformed or that asks for more than is allowed.

    Args:
        message: The reason, which is reduced to one short printable line.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


def message(kind: str, body: Any = None, **head: Any) -> Envelope:
    """Return a message with a tree as its body.

    Args:
        kind: Kind of the message, such as "hello".
        body: Tree of plain values and tensors. None: an empty body.
        **head: Further entries of the head.
    """
    return Envelope({"ask": kind, **head}, b"" if body is None else encode(body, FORM))


def body_of(envelope: Envelope) -> Any:
    """Return the tree in a message's body.

    Raises:
        RequestRefusedError: If the body cannot be decoded.
    """
    try:
        return decode(envelope.body, FORM)
    except CodecError as error:
        raise RequestRefusedError(f"{envelope.head.get('ask')!r:.60}: {error}") from None


def head_value(head: Head, name: str, kind: type) -> Any:
    """Return a value of a message's head.

    Args:
        head: The head.
        name: Name of the value.
        kind: Its expected type.

    Raises:
        RequestRefusedError: If the value is missing or has another type.
    """
    value = head.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestRefusedError(
            f"{head.get('ask')!r:.60}: {name}: expected {kind.__name__}, got {value!r:.60}"
        )
    return value


def reason(answer: Envelope) -> str:
    """Return why an answer is not the expected one, as one short printable line."""
    return one_line(answer.head.get("why", answer.head.get("ask")))


def versions() -> dict[str, Any]:
    """Return the versions that must be the same at the server and at all nodes."""
    return {"protocol": PROTOCOL, "package": __version__, "torch": torch.__version__}


def version_mismatch(head: Head) -> str:
    """Return the first version that differs from ours as one line, or an empty string."""
    for name, own in versions().items():
        if head.get(name) != own:
            return f"{name}: expected version {own!r}, got {head.get(name)!r:.60}"
    return ""


def data_info_tree(info: RemoteDataInfo) -> dict[str, Any]:
    """Return a client's data report as plain values."""
    view = None if info.view is None else asdict(info.view)
    return {"rows": dict(info.rows), "hash": info.content_hash, "view": view, "labels": info.labels}


def evaluation_tree(evaluation: ClientEvaluation) -> dict[str, Any]:
    """Return an evaluation as plain values, its model as a tensor of bytes."""
    tree = {field.name: getattr(evaluation, field.name) for field in fields(evaluation)}
    return {**tree, "model": as_tensor(evaluation.model) if evaluation.model else None}
