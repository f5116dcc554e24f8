"""FedGen: clients that share less, and the generated features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.utils.seeding import keyed_generator
from tests.references.local_training import module
from tests.support.federations import MIXED, config, rounds_of, same_bits

SETTINGS = {
    "generator_steps": 4,
    "generator_lr": 0.01,
    "generator_hidden": 20,
    "generator_batch_size": 6,
    "noise_dim": 3,
}


def fedgen(models: Any = MIXED, **settings: Any) -> dict[str, Any]:
    return config("fedgen", models, algorithm={"name": "fedgen", **SETTINGS, **settings})


def drawn(labels: Tensor, *where: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes and noise drawn with that key, and the generator's input."""
    g = keyed_generator(*where)
    y = torch.multinomial(labels, 6, True, generator=g)
    noise = torch.randn(6, 3, generator=g)
    return y, noise, torch.cat([F.one_hot(y, 10).to(noise.dtype), noise], 1)


def test_fedgen_without_shared_heads_equals_fedavg_of_backbones() -> None:
    kept = {"shares": ["backbone", "statistics"], "optimizer": {"name": "sgd", "lr": 0.05}}
    fedavg = rounds_of(config("fedavg", clients__defaults=kept))
    actual = rounds_of(
        {**fedgen("cnn_bn_small"), "clients": config(clients__defaults=kept)["clients"]}
    )
    (group,) = fedavg.server.models
    assert (
        same_bits(fedavg.server.models[group], actual.server.models[group])
        and "labels" not in actual.server.state
    )


def test_clients_without_counts_are_assumed_uniform() -> None:
    source = fedgen()
    source["clients"]["overrides"] = [{"match": "site_2", "shares": ["parameters"]}]
    rounds = rounds_of(source, num_rounds=1)
    client_infos, counts = rounds.federation.client_infos, rounds.federation.label_counts
    expected = counts("site_1") + counts("site_3") + client_infos["site_2"].num_rows / 10
    assert torch.allclose(rounds.server.state["labels"], expected)


def test_generator_is_sent_for_training_only() -> None:
    rounds = rounds_of(fedgen(), num_rounds=1)
    client_info = rounds.federation.client_infos["site_1"]
    for purpose, items in (("train", {"model", "generator", "labels"}), ("evaluate", {"model"})):
        recipient = replace(client_info, purpose=purpose)
        assert set(rounds.algorithm.broadcast(rounds.server, recipient)) == items
    # The server sends it again each round.
    assert "generator" not in rounds.store.get("site_1").models


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_generated_features_are_diverse_and_classified_correctly() -> None:
    settings = {"generator_steps": 300, "generator_batch_size": 32, "diversity": 1.0}
    rounds = rounds_of(fedgen("cnn_bn_small", **settings), num_rounds=2)
    (group,) = [s for s in rounds.server.models if s != "generator"]
    generator = module(rounds.server.arch["generator"], rounds.server.models["generator"]).eval()
    labels = rounds.server.state["labels"]
    y, _, x = drawn(labels, "test")
    with torch.no_grad():
        z = generator(x).logits
    predictions = (
        z @ rounds.server.models[group]["head.weight"].T + rounds.server.models[group]["head.bias"]
    )
    assert (predictions.argmax(1) == y).double().mean() > 0.6
    same = generator(
        torch.cat([x[:1, :10].repeat(40, 1), torch.randn(40, 3, generator=keyed_generator("n"))], 1)
    ).logits
    assert float(same.detach().std(0).mean()) > 1e-2
