"""Messages over Flower: its SuperLink between us, the server's process as the ServerApp and each node's as a SuperNode.

Flower's usual way starts a process of its own for every message at every node, out of code that the server sends along. Here
the long-lived processes speak Flower's own protocols, by its own clients: Flower's isolation mode `process` lets the server be
the app that a run belongs to, and the node takes its messages where a SuperNode takes them, with a SuperNode's key, heartbeat
and registration. So a message costs no process, a node's memory stays warm, no port is opened at a node, and nothing that a
server sends is ever executed there.

The clients are Flower's inner ones: the extra `flower` in pyproject.toml holds to the version that this was written for.
"""

from hetero_fl.deployment.flower.installed import check_installed

check_installed()  # before anything of Flower is imported

from hetero_fl.deployment.flower.node import serve  # noqa: E402
from hetero_fl.deployment.flower.superlink import SuperLink  # noqa: E402
from hetero_fl.deployment.flower.transport import FlowerTransport  # noqa: E402

__all__ = ["FlowerTransport", "SuperLink", "serve"]
