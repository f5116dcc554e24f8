"""ClientApp that forwards each message to the worker process of its site, and Flower's messages.

Flower starts a new process for every message. To start quickly, this process neither imports torch
nor loads data. The worker (see `worker.py`) is started at the first message and keeps models and
data in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hetero_fl.deployment.flower.worker import WorkerError, forward
from hetero_fl.deployment.transport import Envelope, Head

# Records of a Flower message.
HEAD = "head"
BODY = "body"
# Bodies up to this size are sent in a ConfigRecord, which takes 8 instead of 14 remote calls.
SMALL_BODY_BYTES = 2**16
# Keys of Flower's node configuration: path of the site file, and permission to run code.
SITE = "site"
ALLOW_CODE = "allow-code"

app = ClientApp()


@app.query()
def handle_query(message: Message, context: Context) -> Message:
    """Forward a message to the site's worker and return the worker's answer."""
    envelope = from_message(message)
    site = context.node_config.get(SITE)
    if envelope is None:
        answer = _refusal("not a message of hetero_fl")
    elif not isinstance(site, str):
        answer = _refusal(
            f"""--node-config has no {SITE}; expected '{SITE}="/path/to/site.yaml"'"""
        )
    else:
        allow_code = bool(context.node_config.get(ALLOW_CODE, False))
        try:
            answer = forward(envelope, Path(site), allow_code)
        except WorkerError as error:
            # The error may contain file names, so it is logged at the site only.
            print(error, file=sys.stderr, flush=True)
            answer = _refusal("its worker did not start; the log of its SuperNode says why")
    return Message(to_content(answer), reply_to=message)


def _refusal(reason: str) -> Envelope:
    print(f"refused: {reason}", file=sys.stderr, flush=True)
    return Envelope({"ask": "refused", "why": reason})


def to_content(envelope: Envelope) -> RecordDict:
    """Convert an envelope to the content of a Flower message."""
    head = ConfigRecord(dict(envelope.head))
    body = envelope.body
    if len(body) <= SMALL_BODY_BYTES:
        return RecordDict({HEAD: head, BODY: ConfigRecord({BODY: body})})
    array = Array(dtype="uint8", shape=(len(body),), stype="bytes", data=body)
    return RecordDict({HEAD: head, BODY: ArrayRecord({BODY: array})})


def from_message(message: Message) -> Envelope | None:
    """Extract the envelope from a Flower message.

    Returns:
        The envelope, or None if the message reports an error or was not created by `to_content`.
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
