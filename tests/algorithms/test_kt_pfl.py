"""KT-pFL: a round, the simplex projection, and limit cases of the learned coefficients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_fl.algorithms.kt_pfl import normalize_rows, project_to_simplex
from hetero_fl.core.objectives import TeacherDistillation
from hetero_fl.core.plan import Fit
from hetero_fl.engine.batches import index_batches
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.references.local_training import clients, largest_difference, module, train
from tests.support.federations import MIXED, config, deployed, rounds_of

T = 3.0


def federation(models: Any = MIXED, clients: int = 3, **settings: Any) -> dict[str, Any]:
    return config(
        "kt_pfl", models, clients, algorithm={"name": "kt_pfl", "temperature": T, **settings}
    )


def nearest(row: list[float]) -> list[float]:
    """Project onto the simplex by bisection: max(v − t, 0) that sums to one."""
    low, high = min(row) - 1, max(row)
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if sum(max(v - t, 0) for v in row) > 1 else (low, t)
    return [max(v - low, 0) for v in row]


def follow(model: torch.nn.Module, x: Tensor, mixed: Tensor, where: tuple[Any, ...]) -> None:
    """Train one epoch of KL·T² from a mixture, in batches drawn with the client's key."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for rows in index_batches(60, Fit({}, TeacherDistillation(), batch_size=32), where):
        optimizer.zero_grad()
        log_q = (model(x[rows]).logits / T).log_softmax(1)
        (T**2 * (mixed[rows] * (mixed[rows].log() - log_q)).sum(1).mean()).backward()
        optimizer.step()


@pytest.mark.usefixtures("float64")
def test_round_matches_reference() -> None:
    """Expect distillation, private training, and predictions of the trained model."""
    settings = {"rho": 0.4, "coefficient_lr": 0.2, "coefficient_steps": 3}
    rounds = rounds_of(federation(**settings), num_rounds=1)
    before, state = clients(rounds), dict(rounds.server.state)
    rounds.run_round()
    predictions = []
    for k, (client_id, client) in enumerate(before.items()):
        model, public = (
            module(client.arch["model"], client.models["model"]),
            client.data("proxy", None)["x"],
        )
        mixed = sum(state["coefficients"][k, j] * state["predictions"][j] for j in range(3))
        follow(model, public, mixed, (0, 1, client_id, "digest", 0))
        train(
            client, list(model.parameters()), lambda x, y, m=model: F.cross_entropy(m(x).logits, y)
        )
        assert largest_difference(rounds.store.get(client_id).models["model"], model) < 1e-9
        with torch.no_grad():
            predictions.append((model.eval()(public).logits / T).softmax(1))
    c = state["coefficients"].clone()
    for _ in range(3):
        c.requires_grad_()
        loss = torch.zeros(())
        for k in range(3):
            mixed = sum(c[k, j] * predictions[j] for j in range(3))
            loss = (
                loss
                + T**2 * (mixed * (mixed / predictions[k]).log()).sum(1).mean()
                + 0.4 * ((c[k] - 1 / 3) ** 2).sum()
            )
        (grad,) = torch.autograd.grad(loss, c)
        c = torch.tensor([nearest(row) for row in (c - 0.2 * grad).tolist()])
    assert float((rounds.server.state["coefficients"] - c).abs().max()) < 1e-9
    assert float((c - state["coefficients"]).abs().max()) > 1e-4
    assert float((rounds.server.state["predictions"] - torch.stack(predictions)).abs().max()) < 1e-9


@pytest.mark.usefixtures("float64")
def test_evaluation_distills_newest_mixture() -> None:
    source = federation("mlp", coefficient_lr=0.2)
    source["clients"]["per_round"] = 2
    rounds = rounds_of(source, num_rounds=1)
    state = rounds.server.state
    # The third client did not participate and receives the plain mean.
    assert len(state["seen"]) == 2
    for client_id, client in clients(rounds).items():
        model, public = (
            module(client.arch["model"], client.models["model"]),
            client.data("proxy", None)["x"],
        )
        at = state["seen"].index(client_id) if client_id in state["seen"] else None
        c = (
            torch.full((2,), 0.5)
            if at is None
            else state["coefficients"][at] / state["coefficients"][at].sum()
        )
        follow(
            model,
            public,
            torch.einsum("k,kdc->dc", c, state["predictions"]),
            (0, 1, client_id, "digest", 0),
        )
        assert largest_difference(deployed(rounds, client_id).models["model"], model) < 1e-9


@pytest.mark.usefixtures("float64")
def test_simplex_projection_is_nearest_distribution() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    actual = project_to_simplex(rows)
    assert torch.allclose(actual, torch.tensor([nearest(r) for r in rows.tolist()]), atol=1e-12)
    assert torch.allclose(project_to_simplex(actual), actual, atol=1e-15)
    assert torch.equal(
        normalize_rows(torch.tensor([[0.0, 0.0], [1.0, 3.0]])),
        torch.tensor([[0.5, 0.5], [0.25, 0.75]]),
    )


def learned(rounds: SynchronousTrainer, p: Tensor, **settings: Any) -> Tensor:
    method = rounds.algorithm.model_copy(update=settings)
    mix = torch.full((len(p), len(p)), 1 / len(p))
    return run_plan(
        rounds.server, method.update_coefficients(rounds.server, mix, p), rounds.backend
    )[0]


@pytest.mark.usefixtures("float64")
def test_learned_coefficients_in_limit_cases() -> None:
    rounds = rounds_of(federation("mlp"), num_rounds=0)
    p = (3 * torch.randn(4, 50, 10, generator=torch.Generator().manual_seed(4))).softmax(-1)
    p[1] = p[0]
    uniform = torch.full((4, 4), 0.25)
    of_equals = learned(rounds, p[:1].expand(4, -1, -1), coefficient_lr=0.1)
    # Equal clients.
    assert torch.allclose(of_equals, uniform, atol=1e-12)
    steps = {"coefficient_lr": 0.02, "coefficient_steps": 200}
    free, regularized = learned(rounds, p, rho=0.0, **steps), learned(rounds, p, rho=20.0, **steps)
    # Without regularization each client learns a weight on itself,
    assert (free.argmax(1)[2:] == torch.tensor([2, 3])).all()
    # and an equal weight on equal clients.
    assert torch.allclose(free[0, 0], free[0, 1]) and free[0, 1] > 1.5 * free[0, 2]
    assert float((regularized - uniform).abs().max()) < 0.5 * float((free - uniform).abs().max())
    assert torch.allclose(learned(rounds, p[:1]), torch.ones(1, 1))
    assert "mix" not in rounds.server.models and "mix" not in rounds.server.arch


@pytest.mark.usefixtures("float64")
def test_zero_learning_rate_uses_the_mean_teacher() -> None:
    rounds = rounds_of(federation(coefficient_steps=0), num_rounds=1)
    teachers = [
        rounds.algorithm.broadcast(rounds.server, c)["teacher"]
        for c in rounds.federation.client_infos.values()
    ]
    mean = rounds.server.state["predictions"].mean(0)
    assert all(torch.allclose((t / T).softmax(1), mean, atol=1e-12) for t in teachers)
    # So do clients that give the present ones no weight.
    state = rounds.server.state
    state["coefficients"] = torch.zeros_like(state["coefficients"])
    teacher = rounds.algorithm.broadcast(rounds.server, rounds.federation.client_infos["site_1"])[
        "teacher"
    ]
    assert torch.allclose((teacher / T).softmax(1), mean, atol=1e-12)
    first = rounds_of(federation(), num_rounds=0)
    local = rounds_of(config("local", MIXED, 3), num_rounds=1)
    # No client has a teacher yet.
    first.run_round()
    for client_id in local.federation.client_infos:
        assert (
            largest_difference(
                first.store.get(client_id).models["model"],
                local.store.get(client_id).models["model"],
            )
            == 0
        )


def test_absent_clients_keep_their_coefficients() -> None:
    source = federation("mlp", 4, coefficient_lr=0.3)
    source["clients"]["per_round"] = 2
    rounds = rounds_of({**source, "rounds": 6}, num_rounds=0)
    ids, changed = list(rounds.federation.client_infos), 0

    def coefficients() -> Tensor:
        c, seen = (
            torch.full((4, 4), 0.25),
            [ids.index(client_id) for client_id in rounds.server.state.get("seen", [])],
        )
        if seen:
            c[torch.tensor(seen)[:, None], seen] = rounds.server.state["coefficients"]
        return c

    for index in range(6):
        before = coefficients()
        rounds.run_round()
        assert set(rounds.server.state["seen"]) == {
            client_id for i in range(index + 1) for client_id in rounds.sample_cohort(i)
        }
        c, present = (
            coefficients(),
            [ids.index(client_id) for client_id in rounds.sample_cohort(index)],
        )
        absent = [k for k in range(4) if k not in present]
        assert torch.equal(c[absent], before[absent]) and torch.equal(
            c[:, absent], before[:, absent]
        )
        assert torch.allclose(c.sum(1), torch.ones(4), atol=1e-5) and (c >= 0).all()
        changed += not torch.equal(c, before)
        teacher = rounds.algorithm.broadcast(
            rounds.server, rounds.federation.client_infos[ids[absent[0]]]
        )["teacher"]
        assert torch.allclose((teacher / T).softmax(1).sum(1), torch.ones(60), atol=1e-5)
    assert changed == 6
