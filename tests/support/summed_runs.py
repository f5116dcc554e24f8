"""Runs whose server receives only sums, and comparisons with runs of plain sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hetero_fl.communication.homomorphic import SharedKey
from hetero_fl.communication.protocol import Message, encoded
from hetero_fl.core.payload import Payload
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.federation.trainer import FederatedTrainer
from tests.support.federations import MIXED, config, runtime_of


def secure(method: str, models: Any = MIXED, clients: int = 4, **changes: Any) -> dict[str, Any]:
    """Return the configuration with secure aggregation."""
    return config(method, models, clients, **{"channel__secure_sum": {}, **changes})


def received_broadcasts(
    trainer: FederatedTrainer, key: SharedKey | None = None
) -> dict[str, Payload]:
    """Return the next broadcast as each client reads it, which may decrypt a sum.

    Args:
        trainer: The run.
        key: Key of the clients. If None, the key of the clients in this process.
    """
    federation = trainer.federation
    if federation.channel.homomorphic is not None:
        key = key or runtime_of(trainer).federation.shared_key
    protocol = make_protocol(trainer.algorithm, replace(federation, shared_key=key))
    trainer.set_round(trainer.round_idx)
    broadcasts = {}
    for client, info in federation.client_infos.items():
        content = trainer.link.content(trainer.link.broadcast(info))
        if federation.channel.homomorphic is not None:
            content = protocol.broadcast_in(client, Message("train", content, trainer.round_idx))
        broadcasts[client] = Payload.decode(encoded(content))
    return broadcasts


def tensors_of(trainer: FederatedTrainer, key: SharedKey | None = None) -> list[Tensor]:
    """Return the tensors that clients receive next, and those of their private states."""
    received = received_broadcasts(trainer, key).values()
    clients = [trainer.store.get(client) for client in trainer.federation.client_infos]
    trees = [[dict(payload) for payload in received], [(p.models, p.state) for p in clients]]
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
