"""Running means: values, unchanged inputs and constant memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hetero_fl.aggregation.means import RunningMean


class Calls(TorchDispatchMode):
    """Count operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def terms(n: int) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=draws) for _ in range(n)]


def test_running_mean_does_not_change_its_terms() -> None:
    values, weights = terms(6), [0.0, 2.0, 0.0, 1.0, 4.0, 3.0]
    kept = [v.clone() for v in values]
    mean = RunningMean()
    for value, weight in zip(values, weights, strict=True):
        mean.add(value, weight)
    exact = sum(w * v.double() for v, w in zip(kept, weights, strict=True)) / sum(weights)
    assert mean.value is not None
    assert torch.allclose(mean.value.double(), exact, atol=1e-6)
    assert all(torch.equal(v, k) for v, k in zip(values, kept, strict=True))


def test_returned_mean_does_not_change_later() -> None:
    mean, values = RunningMean(), terms(5)
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    for value in values:
        mean.add(value, 1.0)
        now = mean.value
        assert now is not None
        read.append((now, now.clone()))
    assert all(torch.equal(now, then) for now, then in read)


def test_intermediate_reads_do_not_change_the_mean() -> None:
    often, once = RunningMean(), RunningMean()
    for value in terms(7):
        often.add(value, 3.0)
        assert often.value is not None
        once.add(value, 3.0)
    assert often.value is not None and once.value is not None
    assert torch.equal(often.value, once.value)


def test_running_mean_allocates_one_tensor() -> None:
    mean, values = RunningMean(), terms(10)
    with Calls() as calls:
        for value in values:
            mean.add(value, 1.0)
    assert calls.names == ["lerp", *["lerp_"] * 8]
