"""Messages between the server and the nodes: one answer to each request.

The requests are `hello`, `terms` (configuration and public sets), `join` (data reports of all
clients and the initial state), `do` (one task) and `leave`. The successful answers are `here`,
`told` (data report), `ready`, `done` and `left`. The unsuccessful answers are `failed` (training
diverged), `error` (an exception, whose traceback is in the log of the site) and `refused` (by the
policy, the data or the format of the message).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, StringConstraints, ValidationError
from torch import Tensor

from hetero_fl.config.describe import describe_error
from hetero_fl.deployment.transport import Envelope
from hetero_fl.utils.errors import one_line
from hetero_fl.utils.serialization import CodecError, decode, encode
from hetero_fl.utils.version import __version__

# Codes of unsuccessful answers: the site's data (all causes alike), a malformed message, an error
# or divergence, a run that the site is not part of, and the policy of the site. A code may name a
# key of the server's configuration (`policy: rounds`). A node that answers `left` is greeted again.
# The text of a reason stays in the log of the site unless `tells.errors` is set, because it may
# quote rows.
CODES = ("data", "malformed", "failed", "left", "policy")

# Version of the protocol, which must be the same at the server and at all nodes.
PROTOCOL = 4
# Format of message bodies: encoded trees of plain values and tensors, never pickle.
FORM = f"deployment {PROTOCOL}"
# Entry in the head of an answer with the head of the site's audit log. The log already includes the
# line about this answer.
LOG = "log"
MAX_THREADS = 1024

# Names that are safe as file names.
FileName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9]{1,64}$")]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
# Name of a private state, or an empty string.
StateName = Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")]


class RequestRefusedError(Exception):
    """Raised when a message is malformed or requests something that is not allowed.

    Args:
        message: Reason for the refusal, which is shortened to one printable line.
        code: The part of the reason that the other side may know, see `CODES`.
    """

    def __init__(self, message: object, code: str = "malformed") -> None:
        super().__init__(one_line(message))
        self.code = one_line(code, 80)


class Fields(BaseModel):
    """Base class of the heads of messages. Types are strict, and unknown fields are ignored."""

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class Body(Fields):
    """Base class of the bodies of messages, which must not have unknown fields."""

    model_config = ConfigDict(extra="forbid")


class HelloHead(Fields):
    """Head of `hello` and `leave`.

    Attributes:
        run: ID of the server's run, which the node may not be part of.
    """

    run: FileName = ""


class RunHead(Fields):
    """Head of a message about a run.

    Attributes:
        run: ID of the run.
        session: ID of the server's process.
    """

    run: FileName
    session: str = ""


class Terms(Body):
    """Body of `terms`: the configuration and the public sets.

    Attributes:
        config: Configuration as plain values.
        public: Hash of the public sets.
        pack: Encoded public sets, for sites with their own data.
    """

    config: Any
    public: str
    pack: InstanceOf[Tensor] | None = None


class Join(Body):
    """Body of `join`.

    Attributes:
        reports: Data reports of all clients, see `validation.DataReport`.
        fingerprint: Fingerprint of the federation at the server.
        threads: Number of threads.
        state: Encoded initial private state of the client, if it has one.
    """

    reports: dict[str, Any]
    fingerprint: str
    threads: int = Field(ge=1, le=MAX_THREADS)
    state: InstanceOf[Tensor] | None = None


class TaskHead(RunHead):
    """Head of `do`.

    Attributes:
        task: Name of the task. A repeated task has the same name.
        kind: "answer" for an exchange of the protocol, "read" for an evaluation.
        what: Kind of the request.
        round: Index of the round, from 0.
        again: Number of earlier attempts at the round.
        base: Name of the private state from which the task starts, or an empty string.
        expires: Time at which the task expires, in seconds since the epoch.
        spare: Names of states that must not be deleted, separated by commas.
        details: Whether an evaluation computes all results that a report shows.
    """

    task: FileName
    kind: Literal["answer", "read"]
    what: str
    round: int
    again: int
    base: StateName
    expires: float
    spare: str = Field("", pattern="^[0-9a-f,]*$")
    details: bool = False


class HereHead(Fields):
    """Head of `here`.

    Attributes:
        client: Client of the node.
        session: The session that the node has joined, or an empty string.
        has_data: Whether the site has its own data.
    """

    client: str
    session: str = ""
    has_data: bool


class ReadyHead(Fields):
    """Head of `ready`.

    Attributes:
        state: Name of the initial private state, or an empty string.
    """

    state: StateName


class EvaluatedHead(Fields):
    """Head of `done` for an evaluation.

    Attributes:
        reset: Whether the node has lost the private state and started without it.
    """

    reset: bool = False


class DoneHead(EvaluatedHead):
    """Head of `done` for an exchange of the protocol.

    Attributes:
        what: Kind of the reply.
        state: Name of the client's new private state, or an empty string if it did not change.
        check: SHA-256 digest of the body.
    """

    what: str
    state: StateName
    check: Digest


T = TypeVar("T", bound=BaseModel)


def read(model: type[T], values: Any, place: str) -> T:
    """Validate received values.

    Args:
        model: Type of the values.
        values: The head or the decoded body of a message.
        place: Name of the values, for error messages.

    Raises:
        RequestRefusedError: If a value is missing or invalid.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestRefusedError(f"{place}: {describe_error(error, values, model)}") from None


def message(kind: str, body: Any = None, **head: Any) -> Envelope:
    """Create a message with an encoded body.

    Args:
        kind: Kind of the message, such as "hello".
        body: Nested dictionaries and lists of plain values and tensors. If None, the body is empty.
        **head: Additional entries of the head.
    """
    return Envelope({"ask": kind, **head}, b"" if body is None else encode(body, FORM))


def decode_body(envelope: Envelope) -> Any:
    """Decode the body of a message to nested dictionaries and lists of plain values and tensors.

    Raises:
        RequestRefusedError: If the body cannot be decoded.
    """
    try:
        return decode(envelope.body, FORM)
    except CodecError as error:
        raise RequestRefusedError(f"{envelope.head.get('ask')!r:.60}: {error}") from None


def read_head(model: type[T], envelope: Envelope) -> T:
    """Validate the head of a message, see `read`."""
    return read(model, envelope.head, f"{envelope.head.get('ask')!r:.60}")


def read_body(model: type[T], envelope: Envelope) -> T:
    """Decode and validate the body of a message, see `read`."""
    return read(model, decode_body(envelope), f"{envelope.head.get('ask')!r:.60}")


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


def version_mismatch(head: Mapping[str, object]) -> str:
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
