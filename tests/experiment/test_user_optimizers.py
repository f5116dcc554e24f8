"""Optimizers of the user: what local training assumes about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetero_fl as hfl
from hetero_fl.engine.training import restore_optimizer, snapshot_optimizer
from hetero_fl.utils.errors import UserError
from tests.support.python_federations import QUIET, images


class PlainSGD(torch.optim.Optimizer):
    """An optimizer without state, whose `step` has no closure."""

    def __init__(self, parameters: Any, lr: float = 0.2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class SharpnessAware(PlainSGD):
    """An optimizer that needs the closure that its `step` declares as optional."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        assert closure is not None, "evaluate the loss twice"


def make_lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


def make_sgd_of_matrices(parameters: Any) -> torch.optim.Optimizer:
    """Return an optimizer of weights, which leaves biases as they are."""
    return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.2)


def federation(**client: Any) -> hfl.Federation:
    clients = [hfl.Client(f"site_{i}", "linear", images(30, i), **client) for i in (1, 2)]
    return hfl.Federation(clients, test=images(12, 9))


def test_optimizer_without_closure_equals_sgd() -> None:
    runs = [
        federation(optimizer=each).train(hfl.FedAvg(), rounds=1, overrides=QUIET)
        for each in (PlainSGD, hfl.SGD(lr=0.2))
    ]

    first, second = (run.models["site_1"].tensors["head.weight"] for run in runs)
    assert torch.allclose(first, second, atol=1e-6)


def test_optimizer_of_some_parameters_is_accepted() -> None:
    run = federation(optimizer=make_sgd_of_matrices).train(hfl.FedAvg(), rounds=1, overrides=QUIET)

    start = federation(optimizer=hfl.SGD(lr=1e-12)).train(hfl.FedAvg(), rounds=1, overrides=QUIET)
    first, second = (each.models["site_1"].tensors for each in (run, start))
    assert torch.allclose(first["head.bias"], second["head.bias"])
    assert not torch.allclose(first["head.weight"], second["head.weight"])


def test_optimizer_that_local_training_cannot_use_is_refused() -> None:
    words = r"optimizer: SharpnessAware.step\(\) fails without .*: evaluate the loss twice"

    with pytest.raises(UserError, match=rf"^Client\('a'\): {words}"):
        hfl.Client("a", "linear", optimizer=SharpnessAware)


@pytest.mark.parametrize(
    "create",
    [
        torch.optim.SGD,
        torch.optim.ASGD,
        torch.optim.Adafactor,
        torch.optim.Rprop,
        torch.optim.NAdam,
        lambda p: torch.optim.AdamW(p, fused=True),
    ],
)
def test_kept_optimizer_continues(create: Any) -> None:
    def fit(steps: int, pause: int | None = None) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        named = dict(layer.named_parameters())
        optimizer = create(layer.parameters())
        for step in range(steps):
            if step == pause:
                saved = snapshot_optimizer(optimizer, named, torch.device("cpu"))
                optimizer = create(layer.parameters())
                restore_optimizer(optimizer, named, saved)
            optimizer.zero_grad()
            layer(torch.eye(4)).square().sum().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(fit(4, pause=2), fit(4))
