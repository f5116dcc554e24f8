"""The upload collector refuses unexpected uploads."""

from __future__ import annotations

import pytest
import torch

from hetero_fl.core.payload import Item, Payload, PayloadError
from tests.support.federations import config, rounds_of


def test_collector_refuses_unexpected_upload() -> None:
    rounds = rounds_of(config("fedavg", "mlp"), num_rounds=0)
    broadcast = rounds.broadcast(rounds.federation.client_infos["site_1"])
    agreed = rounds.expectations.expected_items(
        rounds.federation.client_infos["site_1"], Payload(), 0
    )["model"]
    model = dict(agreed.values)

    def received(tensors: dict[str, torch.Tensor]) -> Payload:
        upload = Payload({"model": Item(tensors, agreed.weight, "params")})
        return rounds.decode_upload(
            rounds.federation.client_infos["site_1"], upload.encode(), broadcast, 0
        )

    assert set(received(model)["model"]) == set(model)
    with pytest.raises(PayloadError, match="unexpected tensor names"):
        received({"head.bias": model["head.bias"]})
    with pytest.raises(PayloadError, match="shape"):
        received({**model, "head.bias": torch.zeros(1)})
