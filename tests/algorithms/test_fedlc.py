"""The loss of FedLC compared with a reference in float64."""

from __future__ import annotations

import math

import pytest
import torch

from hetero_fl.algorithms.fedlc import CalibratedMargins, Denominator, label_margins
from hetero_fl.core.objectives import Batch
from tests.algorithms.test_references import nets_of, small_model
from tests.support.federations import config, rounds_of, same_bits


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("denominator", ["others", "all"])
def test_loss_matches_reference(denominator: Denominator) -> None:
    generator = torch.Generator().manual_seed(3)
    model = small_model()
    x, y = torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0, 2, 6])
    counts = [5, 0, 3, 1, 0, 0, 7, 2, 2, 1]
    margins = label_margins(torch.tensor(counts), tau=0.5)

    loss = CalibratedMargins(denominator=denominator).loss(
        nets_of(model), Batch(x=x, y=y), {"margins": margins}
    )

    z = model(x).logits
    for i, true in enumerate(y.tolist()):
        f = {c: z[i, c].item() - 0.5 * n**-0.25 for c, n in enumerate(counts) if n}
        total = sum(math.exp(v) for c, v in f.items() if denominator == "all" or c != true)
        assert math.isclose(loss[i].item(), math.log(total) - f[true], abs_tol=1e-10)


@pytest.mark.parametrize("denominator", ["others", "all"])
def test_gradient_is_finite_for_a_client_with_one_class(denominator: Denominator) -> None:
    model = small_model()
    margins = torch.full((10,), torch.inf, dtype=next(model.parameters()).dtype)
    margins[4] = 0.3
    batch = Batch(x=torch.randn(2, 1, 8, 8).to(margins.dtype), y=torch.tensor([4, 4]))

    nets = nets_of(model)
    loss = CalibratedMargins(denominator=denominator).loss(nets, batch, {"margins": margins})
    loss.sum().backward()

    assert torch.equal(loss, torch.zeros_like(loss))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_margin_of_a_class_without_examples_is_infinite_for_tau_zero() -> None:
    assert label_margins(torch.tensor([0, 3]), tau=0.0).tolist() == [math.inf, 0.0]


def test_fedlc_with_tau_zero_and_all_classes_equals_fedavg() -> None:
    equal_classes = {"kind": "iid"}
    options = {"name": "fedlc", "tau": 0.0, "denominator": "all"}
    fedlc = rounds_of(config("fedlc", algorithm=options, data__partition=equal_classes))
    fedavg = rounds_of(config("fedavg", data__partition=equal_classes))

    (group,) = fedavg.server.models
    assert same_bits(fedlc.server.models[group], fedavg.server.models[group])
