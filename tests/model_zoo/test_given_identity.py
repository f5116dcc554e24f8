"""Names of given models: modules that behave differently never share a name."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.given_models import GivenModel, redraw_weights


class Net(nn.Module):
    def __init__(
        self, act: Callable[[Tensor], Tensor] = F.relu, scale: float = 1.0, options: Any = None
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 6)
        self.out = nn.Linear(6, 2)
        self.act = act
        self.options = options
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.hidden(x)) * self.scale)  # type: ignore[no-any-return]


def double(x: Tensor) -> Tensor:
    return 2 * x


def name(module: nn.Module) -> tuple[str, GivenModel]:
    given = GivenModel(module)
    return given.name, given


def make_double() -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * x


def test_modules_that_differ_have_different_names(subtests: pytest.Subtests) -> None:
    for first, second in (
        (Net(F.relu), Net(F.gelu)),
        (Net(double), Net(lambda x: 2 * x)),
        (Net(make_double()), Net(make_double())),
        (Net(functools.partial(F.leaky_relu, negative_slope=0.1)), Net(F.leaky_relu)),
        (Net(scale=1.0), Net(scale=3.0)),
        (Net(options=[0, 1]), Net(options=[2, 3])),
        (Net(options={"a": 1}), Net(options={"a": 2})),
        (Net(options=torch.zeros(2)), Net(options=torch.ones(2))),
        (Net(options=None), Net(options={1})),
    ):
        with subtests.test(first=first):
            one, kept = name(first)
            other, also_kept = name(second)

            assert one != other
            assert kept.is_instance and also_kept.is_instance


def test_equal_modules_have_one_name(subtests: pytest.Subtests) -> None:
    for make in (
        Net,
        lambda: Net(double, options={"widths": [1, 2], "kind": torch.float32}),
        lambda: Net(functools.partial(F.leaky_relu, negative_slope=0.1)),
        lambda: copy.deepcopy(Net(options={3, 1, 2})),
        lambda: Net(options=nn.LSTM(1, 4)),
        lambda: copy.deepcopy(Net(options=nn.GRU(1, 4, num_layers=2, bidirectional=True))),
        lambda: Net(options=weakref.ref(double)),
    ):
        with subtests.test(make=make):
            one, kept = name(make())
            other, also_kept = name(make())

            assert one == other
            assert kept is not also_kept


def test_a_shared_lambda_is_one_architecture() -> None:
    act = make_double()

    one, kept = name(Net(act))
    other, also_kept = name(copy.deepcopy(Net(act)))

    assert one == other
    assert kept is not also_kept


def test_redrawing_keeps_frozen_layers() -> None:
    net = Net()
    net.hidden.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())

    redraw_weights(net)

    assert torch.equal(net.hidden.weight, before["hidden.weight"])
    assert not torch.equal(net.out.weight, before["out.weight"])
