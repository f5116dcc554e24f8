"""FedNova: a round in float64, effective step counts, and equality with FedAvg."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hetero_fl.algorithms.fedavg import accumulated_steps
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.participant import floating_tensors
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, rounds_of

UNEVEN = {"kind": "dirichlet", "alpha": 0.1, "min_size": 8}


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.5}, {"momentum": 0.9, "nesterov": True}]
)
def test_effective_steps_match_torch_on_unit_gradients(
    settings: dict[str, Any], steps: int
) -> None:
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, **settings)
    for _ in range(steps):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert accumulated_steps(steps, OptimizerConfig(name="sgd", **settings)) == pytest.approx(
        -x.item(), rel=1e-12
    )
    assert accumulated_steps(steps, OptimizerConfig(name="adam")) == steps


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("weighting", "rate"), [("samples", 1.0), ("uniform", 0.7)])
def test_round_matches_reference(weighting: str, rate: float) -> None:
    algorithm = {"name": "fednova", "weighting": weighting, "server_lr": rate}
    rounds = rounds_of(
        config(
            "fednova",
            MIXED[:2],
            6,
            algorithm=algorithm,
            clients__per_round=5,
            data__partition=UNEVEN,
        ),
        num_rounds=2,
    )
    before, cohort = clients(rounds), rounds.sample_cohort(2)
    models = {g: dict(m) for g, m in rounds.server.models.items()}
    rounds.run_round()
    paths = set()
    for group, x in models.items():
        names, sent = rounds.server.arch[group].parameter_names, []
        for client_id in cohort:
            client = before[client_id]
            if client.arch["model"].spec_id == group:
                model = module(client.arch["model"], {**client.models["model"], **x})
                steps = train(
                    client,
                    list(model.parameters()),
                    lambda x, y, m=model: F.cross_entropy(m(x).logits, y),
                )
                # Factor of each gradient (eq. 5).
                a = sum((1 - 0.9 ** (steps - i)) / (1 - 0.9) for i in range(steps))
                weight = client.num_rows if weighting == "samples" else 1
                sent.append(
                    (
                        weight,
                        a,
                        {n: t.detach() for n, t in floating_tensors(model.state_dict()).items()},
                    )
                )
                paths.add(a)
        total = sum(w for w, *_ in sent)
        effective = sum(w * a for w, a, _ in sent) / total
        for n in floating_tensors(x):
            if n in names:
                expected = x[n] + rate * effective * sum(
                    w / total * (y[n] - x[n]) / a for w, a, y in sent
                )
            else:
                expected = sum(w / total * y[n] for w, _, y in sent)
            assert largest_difference({n: rounds.server.models[group][n]}, {n: expected}) < 1e-12
    # Otherwise the round would equal FedAvg.
    assert len(paths) > 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("models", ["cnn_bn_small", MIXED[:2]])
def test_equal_steps_equal_fedavg(models: Any) -> None:
    for steps, same in ((4, True), (None, False)):
        settings = {
            "steps": steps,
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "batch_size": 16,
        }
        one, other = (
            rounds_of(config(name, models, 4, clients__defaults=settings))
            for name in ("fednova", "fedavg")
        )
        distance = max(
            largest_difference(one.server.models[g], other.server.models[g])
            for g in one.server.models
        )
        assert (distance < 1e-12) is same


@pytest.mark.usefixtures("float64")
def test_infrequent_uploads_divide_by_all_steps() -> None:
    source = config(
        "fednova",
        "mlp",
        3,
        rounds=2,
        clients__defaults={"share_every": 2, "steps": 3, "optimizer": {"name": "sgd"}},
    )
    nova, plain = rounds_of(source), rounds_of({**source, "algorithm": {"name": "fedavg"}})
    for group in nova.server.models:
        assert largest_difference(nova.server.models[group], plain.server.models[group]) < 1e-12
    assert all(
        "since" not in nova.store.get(client_id).state for client_id in nova.federation.client_infos
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cohort", [4, 1])
def test_tensors_shared_by_architectures_stay_equal(cohort: int) -> None:
    models = [
        {"name": "mlp", "hidden": [24], "feature_dim": 16},
        {"name": "cnn", "width": 4, "norm": "group", "feature_dim": 16},
    ]
    rounds = rounds_of(
        config("fednova", models, 4, clients__common=["head."], clients__per_round=cohort)
    )
    one, other = rounds.server.models.values()
    assert torch.equal(one["head.weight"], other["head.weight"])
