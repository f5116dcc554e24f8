"""FedAvg, FedProx, FedPer and LG-FedAvg: a round, and settings that make them equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.participant import floating_tensors
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.references.local_training import clients, largest_difference, mean, module, train
from tests.support.federations import MIXED, config, rounds_of, same_bits

BN, MLP, GN = MIXED
ALL, BODY, HEAD = "", "backbone.", "head."


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("method", "part", "settings"),
    [
        ("fedavg", ALL, {}),
        ("fedavg", ALL, {"weighting": "uniform", "server_lr": 0.7}),
        ("fedprox", ALL, {"mu": 0.4}),
        ("fedper", BODY, {}),
        ("fedper", BODY, {"server_lr": 0.7}),
        ("lg_fedavg", HEAD, {}),
        ("lg_fedavg", HEAD, {"weighting": "uniform"}),
    ],
)
def test_round_matches_reference(method: str, part: str, settings: dict[str, Any]) -> None:
    rounds = rounds_of(
        config(method, [BN, MLP], 5, algorithm={"name": method, **settings}), num_rounds=2
    )
    models = {group: dict(tensors) for group, tensors in rounds.server.models.items()}
    uniform, rate = settings.get("weighting") == "uniform", settings.get("server_lr", 1.0)
    sent: dict[str, list[tuple[float, dict[str, Tensor]]]] = {group: [] for group in models}
    kept = {}
    for client_id, client in clients(rounds).items():
        group = client.arch["model"].spec_id
        taken = {n: t for n, t in floating_tensors(models[group]).items() if n.startswith(part)}
        model = module(client.arch["model"], {**client.models["model"], **taken})
        start = {n: p.detach().clone() for n, p in model.named_parameters()}

        def loss(x, y, model=model, start=start):
            far = sum(((p - start[n]) ** 2).sum() for n, p in model.named_parameters())
            return F.cross_entropy(model(x).logits, y) + settings.get("mu", 0.0) / 2 * far

        train(client, list(model.parameters()), loss)
        state = floating_tensors(model.state_dict())
        sent[group].append(
            (
                1 if uniform else client.num_rows,
                {n: t for n, t in state.items() if n.startswith(part)},
            )
        )
        kept[client_id] = {n: t for n, t in state.items() if not n.startswith(part)}
    rounds.run_round()
    assert sorted(len(members) for members in sent.values()) == [2, 3]
    for group, members in sent.items():
        expected = {}
        for n, average in mean(members).items():
            old, moves = models[group][n], "running" not in n
            expected[n] = old + rate * (average - old) if moves else average
        assert largest_difference(rounds.server.models[group], expected) < 1e-9
        still = {n: t for n, t in models[group].items() if n not in expected}
        assert all(torch.equal(rounds.server.models[group][n], t) for n, t in still.items())
    for client_id, tensors in kept.items():
        own = floating_tensors(rounds.store.get(client_id).models.get("model", {}))
        assert own.keys() == tensors.keys() and (
            not tensors or largest_difference(own, tensors) < 1e-9
        )


# Limit cases


def read(rounds: SynchronousTrainer, part: str = ALL) -> dict[str, dict[str, Tensor]]:
    """Return that part of the server's models, by group."""
    return {
        g: {n: t for n, t in floating_tensors(m).items() if n.startswith(part)}
        for g, m in rounds.server.models.items()
    }


def still(part: str) -> dict[str, Any]:
    """Return client settings whose optimizer does not change that part."""
    fast, slow = 0.05, 1e-300
    lr, head_lr = (slow, fast) if part == BODY else (fast, slow)
    return {"clients__defaults__optimizer": {"name": "sgd", "lr": lr, "head_lr": head_lr}}


BACKBONES = {"clients__defaults__shares": ["backbone", "predictions", "statistics"]}
# No BatchNorm, whose statistics change without an optimizer.
GROUPS = [MLP, GN]
LIMITS: dict[str, tuple[str, str, tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    # The part of the server's models that is equal, and whether it is bit-identical.
    "fedper is fedavg of clients that share their backbone": (
        BODY,
        "bits",
        ("fedper", {}),
        ("fedavg", BACKBONES),
    ),
    "fedavg whose heads do not move is fedper": (
        BODY,
        "bits",
        ("fedavg", still(HEAD)),
        ("fedper", still(HEAD)),
    ),
    "fedrep whose heads do not move is fedper": (
        BODY,
        "1e-12",
        ("fedrep", still(HEAD)),
        ("fedper", still(HEAD)),
    ),
    "fedbabu is fedavg whose heads do not move": (
        BODY,
        "1e-12",
        ("fedbabu", {}),
        (
            "fedavg",
            {
                "clients__defaults__optimizer": {
                    "name": "sgd",
                    "lr": 0.05,
                    "momentum": 0.9,
                    "head_lr": 1e-300,
                }
            },
        ),
    ),
    "lg_fedavg whose backbones do not move is fedavg": (
        HEAD,
        "bits",
        ("lg_fedavg", still(BODY)),
        ("fedavg", still(BODY)),
    ),
    "fedprox without a pull is fedavg": (
        ALL,
        "bits",
        ("fedprox", {"algorithm__mu": 0.0}),
        ("fedavg", {}),
    ),
    "server_lr 1 is the mean": (
        ALL,
        "bits",
        ("fedavg", {"algorithm__server_lr": 1.0}),
        ("fedavg", {}),
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("limit", LIMITS)
def test_special_settings_reduce_to_other_methods(limit: str) -> None:
    part, how, *sides = LIMITS[limit]
    one, other = (
        read(rounds_of(config(m, GROUPS, 4, rounds=3, **changes)), part) for m, changes in sides
    )
    for group in one:
        assert one[group].keys() == other[group].keys() and one[group]
        equal = same_bits(one[group], other[group])
        assert equal if how == "bits" else largest_difference(one[group], other[group]) < float(how)
    changed = read(rounds_of(config(sides[0][0], GROUPS, 4, rounds=1, **sides[0][1])), part)
    # Training changed what is compared.
    assert not any(same_bits(one[group], changed[group]) for group in one)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedper", "lg_fedavg", "fedbn"])
def test_single_client_per_architecture_equals_local(method: str) -> None:
    models = [BN, MLP, MLP]
    algorithm = {"name": method, **({"mu": 0.0} if method == "fedprox" else {})}
    local = rounds_of(config("local", models, rounds=3))
    actual = rounds_of(config(method, models, algorithm=algorithm, rounds=3))
    for client_id, single in (("site_1", True), ("site_2", False)):
        sent = actual.server.models[actual.federation.client_infos[client_id].arch.spec_id]
        own = {**sent, **actual.store.get(client_id).models.get("model", {})}
        assert (
            same_bits(
                floating_tensors(local.store.get(client_id).models["model"]), floating_tensors(own)
            )
            is single
        )


@pytest.mark.usefixtures("float64")
def test_model_without_backbone_trains_its_head() -> None:
    start = rounds_of(config("local", ["linear", MLP], 4), num_rounds=0)
    (client_id, client_info), *_ = start.federation.client_infos.items()
    local = rounds_of(config("local", ["linear", MLP], 4, clients__defaults__batch_size=500))
    for method, expected in (
        ("fedrep", local.store.get(client_id).models["model"]),
        ("fedbabu", start.federation.initial_tensors(client_info.arch)),
    ):
        actual = rounds_of(config(method, ["linear", MLP], 4, clients__defaults__batch_size=500))
        assert largest_difference(clients(actual)[client_id].models["model"], expected) < 1e-12
        assert actual.evaluate().clients[client_id].scores["personal"]
