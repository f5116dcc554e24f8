"""Private state of clients between rounds: staged while a round runs, committed with it and not before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hetero_fl.architecture import Tensors


@dataclass
class Private:
    """What one client keeps: tensors by slot, and its own state (trees of tensors and plain values)."""

    models: dict[str, Tensors] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class Store:
    """Private state by client id. A client without any costs nothing."""

    def __init__(self) -> None:
        self._kept: dict[str, Private] = {}
        self._staged: dict[str, Private] = {}

    def get(self, client: str) -> Private:
        """The state as committed; empty for a client that keeps nothing. Do not change it in place."""
        return self._kept.get(client) or Private()

    def stage(self, client: str, private: Private) -> None:
        """State written in a round that has not ended yet."""
        self._staged[client] = private

    def drop(self, client: str) -> None:
        """Forget what one client staged: the server did not take its upload."""
        self._staged.pop(client, None)

    def commit(self) -> None:
        """Make what was staged the state; the round has ended."""
        self._kept.update({c: p for c, p in self._staged.items() if p.models or p.state})
        for client in [c for c, p in self._staged.items() if not (p.models or p.state)]:
            self._kept.pop(client, None)
        self._staged.clear()

    def discard(self) -> None:
        """Forget what was staged; the round did not end."""
        self._staged.clear()

    def tree(self) -> dict[str, Any]:
        """Everything committed, for a checkpoint."""
        return {c: {"models": p.models, "state": p.state} for c, p in sorted(self._kept.items())}

    def restore(self, tree: dict[str, Any]) -> None:
        """The reverse of `tree`."""
        self._kept = {c: Private(p["models"], p["state"]) for c, p in tree.items()}
        self._staged.clear()
