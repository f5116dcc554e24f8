"""The method `clipped_fedavg`."""

from __future__ import annotations

import torch
from pydantic import Field

from hetero_fl.algorithms import Algorithm, local_fit, upload_model
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload


class ClippedFedAvg(Algorithm):
    """Average parameters of clients that move each tensor by a limited distance.

    Args:
        max_change: Maximum L2 norm of the change of a tensor in a round.
    """

    title = "Clipped FedAvg"

    max_change: float = Field(1.0, gt=0, description="maximum L2 norm of the change of a tensor")

    def train(self, client: Participant, received: Payload):
        """Train for one round, and move back tensors that have changed too much."""
        yield from self.deploy(client, received)
        before = {name: tensor.clone() for name, tensor in client.models["model"].items()}
        yield local_fit(client)
        model = client.models["model"]
        client.load("model", {name: self._clip(model[name], before[name]) for name in model})
        return upload_model(self, client)

    def _clip(self, tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        change = tensor - before
        factor = (self.max_change / change.norm().clamp(min=1e-12)).clamp(max=1)
        return before + factor * change
