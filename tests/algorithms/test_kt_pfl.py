"""KT-pFL: the simplex projection, and limit cases of the learned coefficients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.algorithms.kt_pfl import normalize_rows, project_to_simplex
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.support.federations import MIXED, config, rounds_of

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
