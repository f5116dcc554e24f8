"""Runs with homomorphic encryption."""

from __future__ import annotations

from functools import cache
from typing import Any

from hetero_fl.communication.homomorphic import SharedKey
from tests.support.federations import MIXED, config


@cache
def shared_key() -> SharedKey:
    """Return a key that the clients of all tests share."""
    return SharedKey.generate()


def encrypted(method: str, models: Any = MIXED, clients: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the configuration with homomorphic encryption."""
    return config(method, models, clients, **{"channel__homomorphic": {}, **changes})
