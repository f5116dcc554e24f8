"""Envelopes as the content of Flower messages."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from hetero_fl.deployment.transport import Envelope, Head

HEAD = "head"
BODY = "body"
# A body up to this size travels in a ConfigRecord, which saves six of fourteen calls each way.
SMALL_BODY_BYTES = 2**16


def to_content(envelope: Envelope) -> RecordDict:
    """Return an envelope as the content of a Flower message."""
    head = ConfigRecord(dict(envelope.head))
    body = envelope.body
    if len(body) <= SMALL_BODY_BYTES:
        return RecordDict({HEAD: head, BODY: ConfigRecord({BODY: body})})
    array = Array(dtype="uint8", shape=(len(body),), stype="bytes", data=body)
    return RecordDict({HEAD: head, BODY: ArrayRecord({BODY: array})})


def from_message(message: Message) -> Envelope | None:
    """Return the envelope in a Flower message.

    Returns:
        The envelope; None if the message reports an error or was not made by `to_content`.
    """
    if not message.has_content():
        return None
    small = message.content.config_records
    large = message.content.array_records
    try:
        head = small[HEAD]
        body = large[BODY][BODY].data if BODY in large else small[BODY][BODY]
    except (KeyError, AttributeError, TypeError):
        return None
    plain: Head = {name: value for name, value in head.items() if not isinstance(value, list)}
    return Envelope(plain, body) if len(plain) == len(head) and isinstance(body, bytes) else None
