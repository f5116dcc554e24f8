"""Runs whose server receives only sums, and comparisons with runs of plain sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hetero_fl.communication.homomorphic.key import SharedKey
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.federations import MIXED, config


def secure(method: str, models: Any = MIXED, clients: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the configuration with secure aggregation."""
    return config(method, models, clients, **{"channel__secure_sum": {}, **changes})


def tensors_of(trainer: FederatedTrainer, key: SharedKey | None = None) -> list[Tensor]:
    """Return the tensors of the server, which may be encrypted, and of the clients."""
    server = trainer.server
    if trainer.protocol.hides_server:
        # TenSEAL is optional.
        from tests.support.homomorphic import unsealed_server

        server = unsealed_server(trainer, key)
    clients = [trainer.store.get(client) for client in trainer.federation.client_infos]
    trees = [server.models, server.state, [(p.models, p.state) for p in clients]]
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def largest_difference(first: FederatedTrainer, second: FederatedTrainer) -> float:
    """Return the largest difference of tensors, relative to their largest magnitude or 1."""
    differences = []
    for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
        if one.numel():
            assert torch.isfinite(one).all() and torch.isfinite(other).all()
            scale = max(1.0, float(one.abs().max()))
            differences.append(float((one.double() - other.double()).abs().max()) / scale)
    assert len(differences) > 3
    return max(differences)
