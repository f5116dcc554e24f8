"""ClientApp that forwards each message to the worker process of its site.

Flower starts a new process for every message. To start quickly, this process neither imports torch
nor loads data. The worker (see `worker.py`) is started at the first message and keeps models and
data in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hetero_fl.deployment.flower.grid import from_message, to_content
from hetero_fl.deployment.flower.worker_socket import ALLOW_CODE, SITE, WorkerError, forward
from hetero_fl.deployment.transport import Envelope

app = ClientApp()


@app.query()
def handle_query(message: Message, context: Context) -> Message:
    """Forward a message to the site's worker and return the worker's answer."""
    envelope = from_message(message)
    if envelope is None:
        answer = _refusal("not a message of hetero_fl")
    elif not isinstance(site := context.node_config.get(SITE), str):
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
