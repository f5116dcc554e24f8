"""Runs with homomorphic encryption, and the state of a server that only clients can read."""

from __future__ import annotations

from functools import cache
from typing import Any

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.communication.homomorphic.messages import unseal_state
from hetero_fl.core.participant import Participant
from hetero_fl.federation.summed_uploads.hidden_server import HiddenServer, SealedLink
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.federations import MIXED, config, runtime_of


@cache
def shared_key() -> SharedKey:
    """Return a key that the clients of all tests share."""
    return SharedKey.generate()


def encrypted(method: str, models: Any = MIXED, clients: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the configuration with homomorphic encryption."""
    return config(method, models, clients, **{"channel__homomorphic": {}, **changes})


def unsealed_server(trainer: FederatedTrainer, key: SharedKey | None = None) -> Participant:
    """Return the server in the state that clients decrypt."""
    if key is None:
        key = runtime_of(trainer).federation.shared_key
        assert key is not None
    assert isinstance(trainer.link, SealedLink)
    state = unseal_state(trainer.link.state, key)
    return HiddenServer(trainer.algorithm, trainer.federation)._server(state, trainer.completed)
