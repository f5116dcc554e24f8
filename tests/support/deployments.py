"""Small federations over the loopback transport, for tests of site policies and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hetero_fl.deployment.audit_log import Entry, verify
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.local import PipeTransport, run_local_federation
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import load_public_key
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.reporting.run import Run
from tests.support.federations import config
from tests.support.loopback import LoopbackTransport
from tests.support.nodes import LONG

__all__ = [
    "SITES",
    "Between",
    "Envelope",
    "Federation",
    "PipeTransport",
    "run_local_federation",
    "small",
    "twice",
]

SITES = ("site_1", "site_2", "site_3")
Between = Callable[[Handle], Handle]


def small(method: str = "fedavg", models: Any = "cnn_gn_small", **changes: Any) -> dict[str, Any]:
    """Return the configuration of a run of three clients and two rounds."""
    return config(method, models, **changes)


class Federation:
    """Nodes with site files (changes to the defaults), and a server."""

    def __init__(
        self, folder: Path, sites: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
    ) -> None:
        self.folder, self.transport = folder, LoopbackTransport()
        self.log_lines: list[str] = []
        self.nodes = {
            client_id: Node(
                SiteConfig.model_validate(
                    _told({"client": client_id, **(sites or {}).get(client_id, {})})
                ),
                folder / client_id,
                self.log_lines.append,
                **more,
            )
            for client_id in SITES
        }

    def serve(
        self,
        source: Any,
        between: Mapping[str, Between] | None = None,
        public: Mapping[str, bytes] | None = None,
        **more: Any,
    ) -> Run:
        """Run the federation.

        Args:
            source: The configuration.
            between: Functions that wrap the message handlers of nodes.
            public: Public keys of the nodes.
            more: Further arguments of `run_federation`.
        """
        try:
            for client_id, node in self.nodes.items():
                handle: Handle = node.handle
                key = (public or {}).get(client_id, b"")
                self.transport.join((between or {}).get(client_id, lambda h: h)(handle), key)
            return run_federation(
                source,
                **{"transport": self.transport, "out": self.folder / "run", "wait": LONG, **more},
            )
        finally:
            working = [thread for _, thread in self.transport._nodes.values()]
            self.transport.close()
            # It may still write to its folder.
            for thread in working:
                thread.join(LONG)


def _told(site: dict[str, Any]) -> dict[str, Any]:
    """Return a site file that sends the text of reasons, so that tests can read it."""
    return {**site, "tells": {"errors": True, **site.get("tells", {})}}


def twice(handle: Handle) -> Handle:
    """Deliver every message twice."""

    def handles(envelope: Envelope) -> Envelope:
        handle(envelope)
        return handle(envelope)

    return handles


def signed_entries(folder: Path) -> list[Entry]:
    """Return the entries of a site's audit log, which must be signed with the site's key."""
    (key,) = folder.glob("*.pub")
    return verify(folder / "audit.jsonl", load_public_key(key))
