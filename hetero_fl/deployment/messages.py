"""Protocol between the server and the nodes: requests, answers and their bodies.

The requests are `hello`, `terms` (configuration), `roster` (data reports of all clients), `keep`
(initial private state), `do` (one task) and `leave`. The successful answers are `here`, `told`
(data report), `ready`, `kept`, `done` and `left`.
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

# The unsuccessful answers are `lacks` (public sets missing), `unready` (node restarted), `lost`
# (private state missing), `failed` (training diverged), `error` (an exception, whose traceback is
# in the log of the site) and `refused` (by the policy, the data or the format of the message).

# Codes of unsuccessful answers: the site's data (all causes alike), a malformed message, an error
# or divergence, a lost state, a run that the site is not part of, and the policy of the site. A
# code may name a key of the server's configuration (`policy: rounds`). The text of a reason stays
# in the log of the site unless `tells.errors` is set, because it may quote rows.
CODES = ("data", "malformed", "failed", "lost", "left", "policy")

# Version of the protocol, which must be the same at the server and at all nodes.
PROTOCOL = 3
# Format of message bodies: encoded trees of plain values and tensors, never pickle.
FORM = f"deployment {PROTOCOL}"
# Entry in the head of an answer with the head of the site's audit log. The log already includes the
# line about this answer.
LOG = "log"
# Exceptions raised while parsing a malformed message.
MALFORMED_ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


class RequestRefusedError(Exception):
    """Raised when a message is malformed or requests something that is not allowed.

    Args:
        message: Reason for the refusal, which is shortened to one printable line.
        code: The part of the reason that the other side may know, see `CODES`.
    """

    def __init__(self, message: object, code: str = "malformed") -> None:
        super().__init__(one_line(message))
        self.code = one_line(code, 80)


def message(kind: str, body: Any = None, **head: Any) -> Envelope:
    """Create a message with an encoded body.

    Args:
        kind: Kind of the message, such as "hello".
        body: Nested dictionaries and lists of plain values and tensors. If None, the body is empty.
        **head: Additional entries of the head.
    """
    return Envelope({"ask": kind, **head}, b"" if body is None else encode(body, FORM))


def decode_body(envelope: Envelope, *names: str) -> Any:
    """Decode the body of a message.

    Args:
        envelope: The message.
        *names: Required keys of the body.

    Returns:
        Nested dictionaries and lists of plain values and tensors.

    Raises:
        RequestRefusedError: If the body cannot be decoded or lacks a key.
    """
    ask = envelope.head.get("ask")
    try:
        tree = decode(envelope.body, FORM)
    except CodecError as error:
        raise RequestRefusedError(f"{ask!r:.60}: {error}") from None
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            raise RequestRefusedError(f"{ask!r:.60}: {name}: missing")
    return tree


def head_value(head: Head, name: str, kind: type) -> Any:
    """Return a value from the head of a message.

    Args:
        head: Head of the message.
        name: Name of the value.
        kind: Expected type of the value. A bool is not accepted as an int.

    Raises:
        RequestRefusedError: If the value is missing or has another type.
    """
    value = head.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestRefusedError(
            f"{head.get('ask')!r:.60}: {name}: expected {kind.__name__}, got {value!r:.60}"
        )
    return value


def check_file_name(name: str) -> str:
    """Return a received name if it is safe to use as a file name.

    Raises:
        RequestRefusedError: If the name is not safe.
    """
    if not (name.isalnum() and len(name) <= 64):
        raise RequestRefusedError(
            f"file name: expected at most 64 letters and digits, got {name[:80]!r}"
        )
    return name


def refusal_reason(answer: Envelope) -> str:
    """Return the reason in an unsuccessful answer as one short printable line.

    If the answer contains no reason, the kind of the answer is returned.
    """
    why = one_line(answer.head.get("why", answer.head.get("ask")))
    is_code = why in CODES or why.startswith("policy: ")
    return f"{why} (see the log of the site)" if is_code else why


def versions() -> dict[str, Any]:
    """Return the versions whose public parts must be equal at the server and at all nodes."""
    return {"protocol": PROTOCOL, "package": __version__, "torch": torch.__version__}


def version_mismatch(head: Head) -> str:
    """Describe the first version in a head that differs from the local version.

    The build tag after a plus sign, such as `cpu` in `2.4.0+cpu`, may differ.

    Returns:
        The description, or an empty string if all versions are equal.
    """
    for name, expected in versions().items():
        if _public_version(head.get(name)) != _public_version(expected):
            return f"{name}: expected version {expected!r}, got {head.get(name)!r:.60}"
    return ""


def _public_version(version: object) -> str:
    return str(version).partition("+")[0]


def data_info_tree(info: RemoteDataInfo) -> dict[str, Any]:
    """Return a client's data report as plain values."""
    view = None if info.view is None else asdict(info.view)
    return {"rows": dict(info.rows), "hash": info.content_hash, "view": view, "labels": info.labels}


def evaluation_tree(evaluation: ClientEvaluation) -> dict[str, Any]:
    """Return an evaluation as plain values.

    The model is a tensor of bytes, or None if the evaluation contains no model.
    """
    tree = {field.name: getattr(evaluation, field.name) for field in fields(evaluation)}
    return {**tree, "model": as_tensor(evaluation.model) if evaluation.model else None}
