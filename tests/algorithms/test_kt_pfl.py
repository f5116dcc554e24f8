"""KT-pFL: the simplex projection, and limit cases of the learned coefficients."""

from __future__ import annotations

import pytest
import torch

from hetero_fl.algorithms.proxy_distillation import normalize_rows, project_to_simplex


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
