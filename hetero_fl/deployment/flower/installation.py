"""Check that a suitable version of Flower is installed."""

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
    """Check Flower's version before it is imported, and make Flower quiet.

    Raises:
        UserError: If Flower is missing or has another version.
    """
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
