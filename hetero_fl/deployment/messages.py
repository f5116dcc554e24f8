"""The language of server and nodes: questions, answers and the trees in their bodies."""

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
LOG = "log"  # of an answer: the head of the site's audit log, with the line on this answer


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
