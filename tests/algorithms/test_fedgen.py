"""FedGen: clients that share less, and the generated features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

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
