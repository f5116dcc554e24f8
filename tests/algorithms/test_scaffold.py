"""SCAFFOLD: a round, limit cases, head learning rates, optimizers, and infrequent uploads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.core.participant import floating_tensors
from hetero_fl.experiment import prepare
from tests.references.local_training import (
    batches,
    clients,
    largest_difference,
    mean,
    module,
    train,
)
from tests.support.federations import MIXED, config, rounds_of, same_bits

UNIFORM = {"name": "scaffold", "weighting": "uniform", "server_lr": 0.8}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_round_matches_reference(weighting: str) -> None:
    algorithm = {**UNIFORM, "weighting": weighting}
    rounds = rounds_of(
        config("scaffold", MIXED[:2], 6, algorithm=algorithm, clients__per_round=4), num_rounds=3
    )
    before, server, cohort = clients(rounds), rounds.server, rounds.sample_cohort(3)
    models = {g: dict(m) for g, m in server.models.items()}
    controls = {g: dict(c) for g, c in server.state["control"].items()}
    weight = {
        client_id: 1 if weighting == "uniform" else c.num_rows for client_id, c in before.items()
    }
    assert len(cohort) < len(before) and any(
        t.abs().sum() > 0 for c in controls.values() for t in c.values()
    )
    rounds.run_round()
    sent: dict[str, list[tuple[float, dict[str, Tensor]]]] = {g: [] for g in models}
    change = {g: {n: torch.zeros_like(t) for n, t in c.items()} for g, c in controls.items()}
    for client_id in cohort:
        client, group = before[client_id], before[client_id].arch["model"].spec_id
        x, c = models[group], controls[group]
        own = client.state.get("control", {n: torch.zeros_like(t) for n, t in c.items()})
        model = module(client.arch["model"], {**client.models["model"], **x})

        @torch.no_grad()
        def correct(model=model, c=c, own=own) -> None:
            for n, p in model.named_parameters():
                p.sub_(0.05 * (c[n] - own[n]))

        parameters = list(model.parameters())
        steps = train(
            client, parameters, lambda x, y, m=model: F.cross_entropy(m(x).logits, y), after=correct
        )
        y = {n: t.detach() for n, t in model.state_dict().items()}
        new = {n: own[n] - c[n] + (x[n] - y[n]) / (steps * 0.05) for n in c}
        assert largest_difference(rounds.store.get(client_id).state["control"], new) < 1e-9
        sent[group].append((weight[client_id], floating_tensors(y)))
        same_group = [i for i, other in before.items() if other.arch["model"].spec_id == group]
        present = [i for i in same_group if i in cohort]
        share = len(present) / len(same_group) * weight[client_id] / sum(weight[i] for i in present)
        for n in c:
            change[group][n] += share * (new[n] - own[n])
    for group, members in sent.items():
        if members:
            average, names = mean(members), server.arch[group].parameter_names
            moved = {
                n: t if n not in names else models[group][n] + 0.8 * (t - models[group][n])
                for n, t in average.items()
            }
            assert largest_difference(server.models[group], moved) < 1e-9
        expected = {n: controls[group][n] + change[group][n] for n in change[group]}
        assert largest_difference(server.state["control"][group], expected) < 1e-9


def test_first_round_equals_fedavg() -> None:
    for rounds, equal in ((1, True), (2, False)):
        fedavg, scaffold = (
            rounds_of(config(m, MIXED[:2], 4, rounds=rounds)) for m in ("fedavg", "scaffold")
        )
        for group in fedavg.server.models:
            actual, expected = (
                floating_tensors(scaffold.server.models[group]),
                floating_tensors(fedavg.server.models[group]),
            )
            assert same_bits(actual, expected) is equal


@pytest.mark.usefixtures("float64")
def test_single_client_equals_fedavg() -> None:
    fedavg, scaffold = (rounds_of(config(m, clients=1, rounds=4)) for m in ("fedavg", "scaffold"))
    (group,) = fedavg.server.models
    assert (
        largest_difference(
            floating_tensors(scaffold.server.models[group]),
            floating_tensors(fedavg.server.models[group]),
        )
        < 1e-11
    )
    c, own = scaffold.server.state["control"][group], scaffold.store.get("site").state["control"]
    assert (
        largest_difference(c, own) < 1e-10 and max(float(t.abs().max()) for t in c.values()) > 1e-3
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "changes", [{}, {"clients__defaults__share_every": 2}, {"clients__per_round": 3}]
)
def test_server_control_is_the_mean_of_client_controls(changes: dict[str, Any]) -> None:
    """Check the invariant; clients that never participated count as zero."""
    rounds = rounds_of(config("scaffold", "mlp", 5, algorithm=UNIFORM, rounds=4, **changes))
    (control,) = rounds.server.state["control"].values()
    own = [
        rounds.store.get(client_id).state.get("control")
        for client_id in rounds.federation.client_infos
    ]
    assert any(own)
    for n, c in control.items():
        expected = sum(m[n] for m in own if m) / 5
        assert c.abs().sum() > 0 and torch.allclose(c, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_infrequent_upload_averages_gradients_since_the_last() -> None:
    source = config("scaffold", "mlp", 2, algorithm=UNIFORM, clients__defaults__share_every=2)
    rounds = rounds_of(source, num_rounds=0)
    start, path = {n: t.clone() for n, t in next(iter(rounds.server.models.values())).items()}, 0.0
    for index in range(2):
        client = clients(rounds)["site_1"]
        path += 0.05 * -(-client.num_rows // 16)
        assert "control" not in client.state
        rounds.run_round()
        assert ("since" in rounds.store.get("site_1").state) is (index == 0)
    kept = rounds.store.get("site_1")
    expected = {n: (start[n] - kept.models["model"][n]) / path for n in start}
    assert largest_difference(kept.state["control"], expected) < 1e-9


@pytest.mark.usefixtures("float64")
def test_head_learning_rate_scales_correction_and_control() -> None:
    optimizer = {"name": "sgd", "lr": 0.05, "head_lr": 0.2}
    rounds = rounds_of(
        config("scaffold", "mlp", 2, algorithm=UNIFORM, clients__defaults__optimizer=optimizer),
        num_rounds=1,
    )
    (model,), (control,) = rounds.server.models.values(), rounds.server.state["control"].values()
    client, x, c = clients(rounds)["site_1"], dict(model), dict(control)
    rounds.run_round()
    own, net = client.state["control"], module(client.arch["model"], x)
    steps, rates = 0, {n: 0.2 if n.startswith("head.") else 0.05 for n in c}
    for a, b in batches(client):
        net.zero_grad()
        F.cross_entropy(net(a).logits, b).backward()
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.sub_(rates[n] * (p.grad + c[n] - own[n]))
        steps += 1
    expected = {
        n: own[n] - c[n] + (x[n] - p.detach()) / (steps * rates[n])
        for n, p in net.named_parameters()
    }
    assert largest_difference(rounds.store.get("site_1").state["control"], expected) < 1e-9


def test_adam_is_replaced_by_sgd_with_a_note() -> None:
    adam = {"name": "adam", "lr": 0.002, "weight_decay": 0.01}
    source = config("scaffold", "mlp", 3, clients__defaults__optimizer=adam)
    source["clients"]["overrides"] = [{"match": "site_3", "optimizer": {"name": "sgd", "lr": 0.3}}]
    prepared = prepare(source)
    assert any(
        "scaffold trains site_1, site_2 with sgd (lr 0.01, momentum 0.9)" in note
        for note in prepared.notes
    )
    rounds = prepared.make_trainer()
    used = {client_id: rounds.algorithm.optimizer(c) for client_id, c in clients(rounds).items()}  # type: ignore[operator]
    assert {client_id: (o.name, o.lr, o.momentum) for client_id, o in used.items()} == {
        "site_1": ("sgd", 0.01, 0.9), "site_2": ("sgd", 0.01, 0.9), "site_3": ("sgd", 0.3, 0.0)
    }  # fmt: skip
    assert used["site_1"].weight_decay == 0.01
    assert not prepare(config("scaffold", "mlp")).notes


def test_only_shared_tensors_have_controls() -> None:
    rounds = rounds_of(
        config("scaffold", "mlp", 3, clients__defaults__shares=["backbone"]), num_rounds=1
    )
    state = rounds.store.get("site_1").state["control"]
    assert state and all(n.startswith("backbone.") for n in state)
    (control,) = rounds.server.state["control"].values()
    assert all((t.abs().sum() > 0) == n.startswith("backbone.") for n, t in control.items())
    client_info = rounds.federation.client_infos["site_1"]
    for reading, items in ((True, {"model"}), (False, {"model", "control"})):
        assert (
            rounds.algorithm.broadcast(
                rounds.server, replace(client_info, purpose="evaluate" if reading else "train")
            ).keys()
            == items
        )
