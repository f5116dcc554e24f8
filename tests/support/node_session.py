"""A node in the middle of a run, which a hostile server asks further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetero_fl.deployment.messages import message
from hetero_fl.deployment.transport import Envelope, Handle
from tests.support.deployments import Federation, small


class NodeSession:
    """The node of `site_1` after the last round, before it leaves the run.

    Args:
        folder: Folder of the sites and the run.
        site: Changes to the site file.
        **changes: Changes to the server's configuration.

    Attributes:
        run: The run.
        requests: The last honest request of each kind, in order.
    """

    def __init__(self, folder: Path, site: Mapping[str, Any] | None = None, **changes: Any) -> None:
        self.federation = Federation(folder, {"site_1": site or {}})
        self.node = self.federation.nodes["site_1"]
        self.requests: dict[str, Envelope] = {}
        self.run = self.federation.serve(small(**changes), {"site_1": self._keep})

    def _keep(self, handle: Handle) -> Handle:
        def handles(envelope: Envelope) -> Envelope:
            kind = str(envelope.head.get("what", envelope.head["ask"]))
            if kind == "leave":
                return message("left")
            self.requests[kind] = envelope
            return handle(envelope)

        return handles

    def repeat(self, kind: str, /, body: bytes | None = None, **head: Any) -> Envelope:
        """Repeat a request with these changes."""
        request = self.requests[kind]
        body = request.body if body is None else body
        return self.node.handle(Envelope({**request.head, **head}, body))

    def refusal_reason(self, kind: str, /, body: bytes | None = None, **head: Any) -> str:
        """Repeat a request with these changes, which the node must refuse."""
        answer = self.repeat(kind, body, **head)
        assert answer.head["ask"] == "refused" and answer.body == message("refused").body
        return str(answer.head["why"])
