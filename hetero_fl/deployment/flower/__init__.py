"""Messages over Flower: its SuperLink between us, the server's process as the ServerApp and each node's as a SuperNode.

Flower's usual way starts a process of its own for every message at every node, out of code that the server sends along. Here
the long-lived processes speak Flower's own protocols, by its own clients: Flower's isolation mode `process` lets the server be
the app that a run belongs to, and the node takes its messages where a SuperNode takes them, with a SuperNode's key, heartbeat
and registration. So a message costs no process, a node's memory stays warm, no port is opened at a node, and nothing that a
server sends is ever executed there.

The clients are Flower's inner ones: the extra `flower` in pyproject.toml holds to the version that this was written for.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

from hetero_fl.utils.errors import UserError

WRITTEN_FOR = "1.41"
QUIET = {  # unless the environment says otherwise
    "FLWR_TELEMETRY_ENABLED": "0",  # Flower reports its use to its makers by default
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "WARNING",  # else a line for every message
}


def check_installed() -> None:
    """Raises UserError if Flower is missing or of another version. Nothing of it is imported."""
    advice = f"pip install 'hetero_fl[flower]' brings flwr {WRITTEN_FOR}"
    if sys.version_info < (3, 11):
        raise UserError(
            f"Flower {WRITTEN_FOR} needs Python 3.11; found {sys.version_info[0]}.{sys.version_info[1]}"
        )
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise UserError(f"Flower is not installed; {advice}") from None
    if found.split(".")[:2] != WRITTEN_FOR.split("."):
        raise UserError(f"flwr {found} is installed; {advice}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


check_installed()  # before anything of Flower is imported

from hetero_fl.deployment.flower.node import serve  # noqa: E402
from hetero_fl.deployment.flower.superlink import SuperLink  # noqa: E402
from hetero_fl.deployment.flower.transport import FlowerTransport  # noqa: E402

__all__ = ["FlowerTransport", "SuperLink", "serve"]
