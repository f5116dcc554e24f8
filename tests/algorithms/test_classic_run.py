"""Plain FedAvg runs compared with reference code and with a plain training loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.aggregation.means import add_updates
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Fit
from hetero_fl.data import augment
from hetero_fl.engine.batches import index_batches
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.templates import Templates
from hetero_fl.utils.seeding import keyed_generator
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, rounds_of, same_bits

SUM = {"name": "fedavg", "weighting": "sum", "server_lr": 0.1}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_server_step_matches_plain_fedavg(method: str) -> None:
    settings = {**SUM, "name": method} | ({"mu": 0.0} if method == "fedprox" else {})
    rounds = rounds_of(
        config(method, MIXED[0], 4, algorithm=settings, clients__per_round=3), num_rounds=1
    )
    (group,) = rounds.server.models
    model = {n: t.clone() for n, t in rounds.server.models[group].items()}
    total = {n: torch.zeros_like(t) for n, t in model.items()}
    cohort = rounds.sample_cohort(rounds.completed)
    for client_id, client in clients(rounds).items():
        if client_id in cohort:
            local = module(
                client.arch["model"], {**client.models["model"], **floating_tensors(model)}
            )
            train(
                client,
                list(local.parameters()),
                lambda x, y, local=local: F.cross_entropy(local(x).logits, y),
            )
            for n, t in local.state_dict().items():
                total[n] += t.detach() - model[n]
    rounds.run_round()
    expected = {n: t + 0.1 * total[n] for n, t in floating_tensors(model).items()}
    assert (
        any("running_var" in n for n in expected)
        and largest_difference(rounds.server.models[group], expected) < 1e-12
    )
    assert largest_difference(model, expected) > 1e-3
    counters = {n: t for n, t in rounds.server.models[group].items() if not t.is_floating_point()}
    assert counters and all(torch.equal(t, model[n]) for n, t in counters.items())


@pytest.mark.usefixtures("float64")
def test_summed_updates_equal_mean_with_scaled_server_rate() -> None:
    summed = rounds_of(config("fedavg", ["mlp", MIXED[2]], 6, algorithm=SUM))
    mean = rounds_of(
        config(
            "fedavg",
            ["mlp", MIXED[2]],
            6,
            algorithm={**SUM, "weighting": "uniform", "server_lr": 0.3},
        )
    )
    # Three of each architecture.
    for group, tensors in mean.server.models.items():
        assert largest_difference(summed.server.models[group], tensors) < 1e-12


def test_server_rate_extrapolates_parameters_but_not_statistics() -> None:
    now, mean = (
        {"w": torch.tensor([1.0]), "var": torch.tensor([1.0])},
        {"w": torch.tensor([0.2]), "var": torch.tensor([0.2])},
    )
    total_weights = {"w": 6.0, "var": 6.0}
    moved = add_updates({**now, "other": torch.tensor([5.0])}, mean, total_weights, 0.5, ["w"])
    assert torch.allclose(moved["w"], torch.tensor([1 - 3 * 0.8])) and torch.equal(
        moved["var"], mean["var"]
    )
    assert moved["other"] == 5
    assert torch.allclose(
        add_updates(now, mean, total_weights, 0.1, ["w"])["var"], torch.tensor([1 - 0.6 * 0.8])
    )


@pytest.mark.parametrize(
    "algorithm", [{"name": "fedavg"}, {**SUM, "server_lr": 1.0}, {"name": "centralized"}], ids=str
)
def test_single_client_equals_plain_training_loop(
    algorithm: dict[str, Any],
) -> None:
    settings = {"epochs": 2, "augment": {"crop": 1, "flip": True}, "batch_size": 16,
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}  # fmt: skip
    rounds = rounds_of(
        config(
            algorithm["name"],
            MIXED[0],
            1,
            algorithm=algorithm,
            rounds=3,
            clients__defaults=settings,
            clients__per_round=1,
        ),
        num_rounds=0,
    )
    (client,) = clients(rounds).values()
    template = Templates(DeviceMemory(torch.device("cpu")))(client.arch["model"]).load(
        client.models["model"]
    )
    model = client.arch["model"].build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(template.state_dict())
    model.train()
    data = client.data("train", None)
    for round_idx in range(3):
        stream = (0, round_idx, client.participant_id, "train", 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        cut = index_batches(client.num_rows, Fit({}, Supervised(), epochs=2, batch_size=16), stream)
        for i, rows in enumerate(cut):
            x = augment(
                data["x"][rows], client.settings.augment, keyed_generator(*stream, "augment", i)
            )
            optimizer.zero_grad()
            F.cross_entropy(model(x).logits, data["y"][rows]).backward()
            optimizer.step()
        rounds.run_round()
        (group,) = rounds.server.models
        plain: dict[str, Tensor] = {n: t.contiguous() for n, t in model.state_dict().items()}
        assert same_bits(floating_tensors(rounds.server.models[group]), floating_tensors(plain)), (
            round
        )


def test_centralized_training_equals_single_client_with_all_rows() -> None:
    in_order = {"kind": "in_order", "min_size": 2}
    full = {
        "data__partition": in_order,
        "data__split": {"validation": 0, "test": 0},
        "data__proxy__size": 0,
    }
    centralized = rounds_of(config("centralized", MIXED[0], 4, **full))
    # Batches are drawn with the key of the first client.
    groups = [{"name": "site_1", "model": MIXED[0]}]
    single = rounds_of(config("fedavg", clients__groups=groups, clients__per_round=1, **full))
    (group,) = single.server.models
    assert same_bits(
        floating_tensors(single.server.models[group]),
        floating_tensors(centralized.server.models[group]),
    )
