"""Given modules: their backbone and head, copies, and names that differ with the behavior."""

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

from model_zoo import ModelError, SplitModel, create_model
from model_zoo.given_models import GivenModel, redraw_weights
from model_zoo.heads import split_module
from model_zoo.shapes import Shape
from tests.support.models import Convolution

GRAY = Shape(1, (8, 8))


def test_timm_classifier_is_found() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("resnet10t", num_classes=4, in_chans=1)

    split = split_module(module, Shape(1, (32, 32)))

    assert split.head.out_features == 4 and split.feature_dim == 512


def test_feature_width_is_that_of_the_head() -> None:
    head = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    assert SplitModel(nn.Flatten(), head).feature_dim == 64
    assert split_module(Convolution(), GRAY, head="out").feature_dim == 10


def test_given_module_is_copied() -> None:
    module = Convolution()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = GivenModel(module)

    started = create_model(given.name, 3, 1, 8, pretrained=True)
    redrawn = create_model(given.name, 3, 1, 8)

    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(started(x).logits, module(x))
    assert not torch.allclose(redrawn(x).logits, module(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_equal_architectures_have_equal_names() -> None:
    first, second, wider = (GivenModel(Convolution(width=width)) for width in (4, 4, 5))
    frozen = Convolution()
    frozen.conv.weight.requires_grad_(False)

    assert first.name == second.name
    assert len({first.name, wider.name, GivenModel(frozen).name}) == 3
    assert GivenModel(Convolution).name != first.name


def test_class_receives_the_arguments_that_it_accepts() -> None:
    given = GivenModel(Convolution)

    wide = create_model(given.name, 7, 1, 8, width=6)

    assert wide.head.out_features == 7
    assert wide.state_dict()["backbone.conv.weight"].shape[0] == 6


def test_module_in_double_precision_is_converted() -> None:
    given = GivenModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double())
    model = create_model(given.name, num_classes=3, input_size=8)
    assert model.head.weight.dtype == torch.float32


def test_redrawn_weights_name_the_parameters_that_stay() -> None:
    class Scaled(Convolution):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    assert redraw_weights(Scaled()) == ["scale"]


def test_model_that_returns_a_dictionary_is_refused() -> None:
    class Named(nn.Sequential):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x)}

    given = GivenModel(Named(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(ModelError, match="expected a model that returns logits, got dict"):
        create_model(given.name, num_classes=3, input_size=8)


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
