"""A transport that records what a hostile server sees: all that it sends and receives.

It knows only the interface `Transport`, so it works over any transport, to any nodes.
"""

from __future__ import annotations

import base64
from collections.abc import Collection

from hetero_fl.deployment.transport import Envelope, Transport

# Seconds that a node may take for an answer; the machine may be busy.
WAIT = 300.0


class RecordingTransport:
    """Transport that forwards messages to another transport and keeps a copy of each.

    Args:
        transport: Transport to the nodes.

    Attributes:
        sent: Messages to the nodes, in order.
        received: Answers of the nodes, in order of arrival.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.sent: list[Envelope] = []
        self.received: list[Envelope] = []
        self.nodes = transport.nodes
        self.close = transport.close

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        self.sent.append(envelope)
        return self.transport.push(node, envelope, within)

    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        answers = self.transport.pull(numbers, wait)
        self.received += [answer for answer in answers.values() if answer is not None]
        return answers

    def ask(self, node: int, envelope: Envelope) -> Envelope | None:
        """Send one message and return the answer, or None if the node ended without one."""
        number = self.push(node, envelope, WAIT)
        return self.pull([number], WAIT)[number]

    def reasons(self) -> list[str]:
        """Return the reasons in unsuccessful answers."""
        return [str(answer.head["why"]) for answer in self.received if "why" in answer.head]

    def find(self, secret: str | bytes) -> list[str]:
        """Return where a secret of a site was seen: as such, in other cases, as hex or Base64."""
        raw = secret.encode() if isinstance(secret, str) else secret
        # Base64 of the text without what depends on its neighbors, at each offset.
        shifted = [base64.b64encode(b"\0" * i + raw)[4 * (i > 0) : -4] for i in range(3)]
        forms = [raw.lower(), raw.hex().encode(), *(form.lower() for form in shifted)]
        return [
            f"{which} {index}: {form!r}"
            for which, envelopes in (("sent", self.sent), ("received", self.received))
            for index, envelope in enumerate(envelopes)
            for form in forms
            if form in repr(envelope.head).lower().encode() or form in envelope.body.lower()
        ]
