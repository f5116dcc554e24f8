"""Whether Flower is there, in the version that this package was written for; and what it must not do unasked."""

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
