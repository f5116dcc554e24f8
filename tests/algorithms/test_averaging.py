"""Methods that average parameters: local training, weights, steps, margins and server optimizers.

`tests/contracts/test_references.py` compares complete rounds with references.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.algorithms.averaging import (
    CalibratedMargins,
    Denominator,
    accumulated_steps,
    label_margins,
)
from hetero_fl.algorithms.round_parts import add_updates
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.objectives import Batch, Supervised
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Fit
from hetero_fl.data import augment
from hetero_fl.engine.training import index_batches
from hetero_fl.experiment import prepare
from hetero_fl.utils.seeding import keyed_generator
from tests.algorithms.test_references import nets_of, small_model
from tests.references.local_training import batches, clients, largest_difference, module
from tests.support.federations import MIXED, config, rounds_of, same_bits

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


def test_single_client_equals_plain_training_loop(subtests: pytest.Subtests) -> None:
    """Compare augmented training, bit for bit."""
    options = {"epochs": 2, "augment": {"crop": 1, "flip": True}, "optimizer": SGD}
    for name in ("fedavg", "centralized"):
        rounds = rounds_of(config(name, MIXED[0], 1, clients__defaults=options), num_rounds=0)
        (client,) = clients(rounds).values()
        model = client.arch["model"].build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(client.models["model"])
        model.train()
        data, settings = client.data("train", None), client.settings
        fit = Fit({}, Supervised(), epochs=2, batch_size=settings.batch_size)
        for index in range(2):
            stream = (0, index, client.participant_id, "train", 0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
            for step, rows in enumerate(index_batches(client.num_rows, fit, stream)):
                draws = keyed_generator(*stream, "augment", step)
                x = augment(data["x"][rows], settings.augment, draws)
                optimizer.zero_grad()
                F.cross_entropy(model(x), data["y"][rows]).backward()
                optimizer.step()
            rounds.run_round()

            (actual,) = rounds.server.models.values()
            expected = {n: t.contiguous() for n, t in model.state_dict().items()}
            with subtests.test(method=name, index=index):
                assert same_bits(floating_tensors(actual), floating_tensors(expected))


def test_server_rate_extrapolates_parameters_but_not_statistics() -> None:
    now = {"w": torch.tensor([1.0]), "var": torch.tensor([1.0]), "other": torch.tensor([5.0])}
    mean = {"w": torch.tensor([0.2]), "var": torch.tensor([0.2])}
    total_weights = {"w": 6.0, "var": 6.0}

    fast = add_updates(now, mean, total_weights, 0.5, ["w"])
    slow = add_updates(now, mean, total_weights, 0.1, ["w"])

    assert torch.allclose(fast["w"], torch.tensor([1 - 3 * 0.8]))
    assert torch.equal(fast["var"], mean["var"]) and fast["other"] == 5
    assert torch.allclose(slow["var"], torch.tensor([1 - 0.6 * 0.8]))


# FedLC


@pytest.mark.parametrize("denominator", ["others", "all"])
def test_margin_gradient_is_finite_for_a_client_with_one_class(denominator: Denominator) -> None:
    model = small_model()
    margins = torch.full((10,), torch.inf)
    margins[4] = 0.3
    batch = Batch(x=torch.randn(2, 1, 8, 8), y=torch.tensor([4, 4]))

    objective = CalibratedMargins(denominator=denominator)
    loss = objective.loss(nets_of(model), batch, {"margins": margins})
    loss.sum().backward()

    assert torch.equal(loss, torch.zeros_like(loss))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_margin_of_a_class_without_examples_is_infinite_for_tau_zero() -> None:
    assert label_margins(torch.tensor([0, 3]), tau=0.0).tolist() == [math.inf, 0.0]


# FedNova


def test_effective_steps_match_torch_on_unit_gradients() -> None:
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.5, False), (0.9, True)):
        for steps in (1, 2, 7):
            x = torch.zeros((), dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
            for _ in range(steps):
                x.grad = torch.ones_like(x)
                optimizer.step()

            settings = OptimizerConfig(name="sgd", momentum=momentum, nesterov=nesterov)
            assert accumulated_steps(steps, settings) == pytest.approx(-x.item(), rel=1e-12)
            assert accumulated_steps(steps, OptimizerConfig(name="adam")) == steps


@pytest.mark.usefixtures("float64")
def test_infrequent_uploads_divide_by_all_steps() -> None:
    rare = {"share_every": 2, "steps": 3, "optimizer": {"name": "sgd"}}
    nova, plain = (
        rounds_of(config(name, "mlp", clients__defaults=rare)) for name in ("fednova", "fedavg")
    )

    (group,) = nova.server.models
    assert largest_difference(nova.server.models[group], plain.server.models[group]) < 1e-12
    assert all("since" not in nova.store.get(name).state for name in nova.federation.client_infos)


def test_fednova_keeps_tensors_shared_by_architectures_equal() -> None:
    models = [
        {"name": "mlp", "hidden": [24], "feature_dim": 16},
        {"name": "cnn", "width": 4, "norm": "group", "feature_dim": 16},
    ]
    for cohort in (4, 1):
        rounds = rounds_of(
            config("fednova", models, 4, clients__common=["head."], clients__per_round=cohort)
        )

        one, other = rounds.server.models.values()
        assert torch.equal(one["head.weight"], other["head.weight"])


# Server optimizers


# SCAFFOLD


@pytest.mark.usefixtures("float64")
def test_infrequent_upload_averages_gradients_since_the_last() -> None:
    source = config("scaffold", "mlp", 2, clients__defaults__share_every=2)
    rounds = rounds_of(source, num_rounds=0)
    (model,) = rounds.server.models.values()
    start, path = {n: t.clone() for n, t in model.items()}, 0.0
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
    source = config("scaffold", "mlp", 2, clients__defaults__optimizer=optimizer)
    rounds = rounds_of(source, num_rounds=1)
    (model,), (control,) = rounds.server.models.values(), rounds.server.state["control"].values()
    client, x, c = clients(rounds)["site_1"], dict(model), dict(control)
    rounds.run_round()

    own, net = client.state["control"], module(client.arch["model"], x)
    steps, rates = 0, {n: 0.2 if n.startswith("head.") else 0.05 for n in c}
    for a, b in batches(client):
        net.zero_grad()
        F.cross_entropy(net(a), b).backward()
        with torch.no_grad():
            for n, p in net.named_parameters():
                p.sub_(rates[n] * (p.grad + c[n] - own[n]))
        steps += 1
    ends = dict(net.named_parameters())
    expected = {n: own[n] - c[n] + (x[n] - ends[n].detach()) / (steps * rates[n]) for n in ends}
    assert largest_difference(rounds.store.get("site_1").state["control"], expected) < 1e-9


def test_adam_is_replaced_by_sgd_with_a_note() -> None:
    adam = {"name": "adam", "lr": 0.002, "weight_decay": 0.01}
    source = config("scaffold", "mlp", 3, clients__defaults__optimizer=adam)
    source["clients"]["overrides"] = [{"match": "site_3", "optimizer": {"name": "sgd", "lr": 0.3}}]

    prepared = prepare(source)

    note = "scaffold trains site_1, site_2 with sgd (lr 0.01, momentum 0.9)"
    assert any(note in line for line in prepared.notes)
    rounds = prepared.make_trainer()
    used = {name: rounds.algorithm.optimizer(c) for name, c in clients(rounds).items()}  # type: ignore[operator]
    found = [(o.name, o.lr, o.momentum) for o in used.values()]
    assert found == [("sgd", 0.01, 0.9), ("sgd", 0.01, 0.9), ("sgd", 0.3, 0.0)]
    assert used["site_1"].weight_decay == 0.01
    assert not prepare(config("scaffold", "mlp")).notes


def test_only_shared_tensors_have_controls() -> None:
    source = config("scaffold", "mlp", 3, clients__defaults__shares=["backbone"])
    rounds = rounds_of(source, num_rounds=1)

    state = rounds.store.get("site_1").state["control"]
    assert state and all(n.startswith("backbone.") for n in state)
    (control,) = rounds.server.state["control"].values()
    assert all((t.abs().sum() > 0) == n.startswith("backbone.") for n, t in control.items())
    client_info = rounds.federation.client_infos["site_1"]
    for purpose, items in (("evaluate", {"model"}), ("train", {"model", "control"})):
        recipient = replace(client_info, purpose=purpose)
        assert rounds.algorithm.broadcast(rounds.server, recipient).keys() == items
