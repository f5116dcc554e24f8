"""Federations of a few small clients over Loopback, for tests of what each side lets the other do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.reporting.run import Run
from tests.helpers.loopback import LoopbackTransport
from tests.helpers.nodes import LONG
from tests.helpers.small_federations import config

SITES = ("site_1", "site_2", "site_3")
Between = Callable[[Handle], Handle]


def small(method: str = "fedavg", models: Any = "cnn_gn_small", **changes: Any) -> dict[str, Any]:
    """A run of three clients, of two rounds."""
    return config(method, models, **changes)


class Federation:
    """Nodes, each with its site file's content over the defaults, and a server."""

    def __init__(
        self, folder: Path, sites: Mapping[str, Mapping[str, Any]] | None = None, **more: Any
    ) -> None:
        self.folder, self.transport = folder, LoopbackTransport()
        self.said: list[str] = []
        self.nodes = {
            id: Node(
                SiteConfig.model_validate({"client": id, **(sites or {}).get(id, {})}),
                folder / id,
                self.said.append,
                **more,
            )
            for id in SITES
        }

    def serve(
        self,
        source: Any,
        between: Mapping[str, Between] | None = None,
        public: Mapping[str, bytes] | None = None,
        **more: Any,
    ) -> Run:
        """The whole run. `between`: what stands between a node and the network; `public`: the nodes' keys."""
        try:
            for id, node in self.nodes.items():
                handle: Handle = node.handle
                key = (public or {}).get(id, b"")
                self.transport.join((between or {}).get(id, lambda h: h)(handle), key)
            return run_federation(
                source,
                **{"transport": self.transport, "out": self.folder / "run", "wait": LONG, **more},
            )
        finally:
            working = [thread for _, thread in self.transport._nodes.values()]
            self.transport.close()
            for thread in working:  # it may still write into its folder
                thread.join(LONG)


def twice(handle: Handle) -> Handle:
    """Everything comes twice."""

    def handles(envelope: Envelope) -> Envelope:
        handle(envelope)
        return handle(envelope)

    return handles
